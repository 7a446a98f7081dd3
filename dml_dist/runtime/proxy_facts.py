"""Computes the proxy statistics of a report at the end of a run, from checkpoint and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dml_dist.losses.build_loss import build_loss
from dml_dist.random_streams import Stream, generator_of
from dml_dist.report.proxy_diagnostics import ProxyFacts, write_proxy_facts
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.context import RunContext
from dml_dist.train.checkpoint_files import PartFile, read_manifest, read_part

TABLE = "proxies"
MOST_IMAGES = 2_000
"""Largest number of training images that are compared with the proxies."""
MOST_CLASSES = 5_000
"""Largest number of classes whose nearest other class is searched."""

_MOST_PRODUCTS = 4e11  # multiplications of that search: some seconds of a CPU
_BLOCK_FLOATS = 1 << 24  # of a block of similarities: 64 MiB
_CHUNK_ROWS = 1 << 16  # rows of the table that are in memory at once


def keep_proxy_facts(
    context: RunContext, model: nn.Module, checkpoint: Path, folder: RunFolder
) -> None:
    """Write the statistics of a checkpoint's proxies; every rank calls this.

    Nothing is written for a loss without proxies, or whose proxies are shared by classes, or for a
    table of a scaling study, with proxies of classes that have no image.

    Args:
        context: Data and ranks.
        model: The checkpoint's network, on this rank's device.
        checkpoint: The checkpoint's folder.
        folder: The run.
    """
    files = [file for file in read_manifest(checkpoint).files if file.table == TABLE]
    classes = context.split.train_classes
    if not files or not len(classes) or context.config.proxies.num_classes is not None:
        return
    sizes = context.train_class_sizes
    loss = build_loss(context.config.loss, len(sizes), class_sizes=sizes)
    if getattr(loss, "num_free_rows", None) is not None:  # rows that belong to no class
        return
    table = _Table(checkpoint, sorted(files, key=lambda file: file.low), len(classes))
    generator = generator_of(Stream.PROXY_FACTS_IMAGES, context.config.seed)
    rows = np.sort(generator.permutation(context.split.train_rows)[:MOST_IMAGES])
    embeddings, labels, _ = context.embed(model, rows, "embed training images")
    own = context.split.class_ids(labels) if len(labels) else labels
    nearest = own
    if len(own):
        _, nearest = table.nearest(torch.from_numpy(embeddings), np.full(len(own), -1))
    parts = context.comm.gather_objects((own, nearest), what="nearest proxies")
    if context.topology.is_main:
        norms, width = table.norms()
        most = int(min(MOST_CLASSES, max(1, _MOST_PRODUCTS / (norms.size * width))))
        generator = generator_of(Stream.PROXY_FACTS_CLASSES, context.config.seed)
        drawn = np.sort(generator.permutation(len(classes))[:most])
        similarity, other = _nearest_classes(table, drawn)
        facts = ProxyFacts(
            names=np.array([context.index.class_names[label] for label in classes], dtype=str),
            norms=norms,
            drawn=drawn,
            nearest=other,
            similarity=similarity,
            image_class=np.concatenate([part[0] for part in parts]),
            image_nearest=np.concatenate([part[1] for part in parts]),
        )
        write_proxy_facts(folder.path, facts)


def _nearest_classes(table: _Table, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarity to the nearest other class, and that class, for some classes."""
    if table.num_classes < 2:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    per_class = table.per_class
    rows = (drawn[:, None] * per_class + np.arange(per_class)).ravel()
    similarity, other = table.nearest(table.rows(rows), np.repeat(drawn, per_class))
    best = similarity.reshape(-1, per_class).argmax(axis=1)
    at = np.arange(len(drawn)), best
    return similarity.reshape(-1, per_class)[at], other.reshape(-1, per_class)[at]


class _Table:
    """The proxies of a checkpoint, read in pieces; class c has the rows cK .. cK + K - 1."""

    def __init__(self, folder: Path, files: list[PartFile], num_classes: int) -> None:
        self._folder = folder
        self._files = files
        self.num_classes = num_classes
        self.per_class = max(file.high for file in files) // num_classes

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield first row and rows, (n, D) float32, of whole classes at a time."""
        step = max(1, _CHUNK_ROWS // self.per_class) * self.per_class
        for file in self._files:
            values = read_part(self._folder, file.name, mmap=True)["values"]
            for low in range(0, len(values), step):
                yield file.low + low, values[low : low + step].float()

    def norms(self) -> tuple[np.ndarray, int]:
        """Return the (C, K) lengths and the width D."""
        lengths, width = [], 0
        for _, values in self.pieces():
            lengths.append(values.norm(dim=1).numpy())
            width = values.shape[1]
        return np.concatenate(lengths).reshape(-1, self.per_class), width

    def rows(self, rows: np.ndarray) -> Tensor:
        """Return some rows in rising order, (n, D)."""
        found = []
        for low, values in self.pieces():
            mine = rows[(rows >= low) & (rows < low + len(values))] - low
            found.append(values[torch.from_numpy(mine)])
        return torch.cat(found)

    def nearest(self, queries_QD: Tensor, without: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine similarity and class of the proxy nearest to each query.

        Args:
            queries_QD: Vectors of any length.
            without: (Q,) class to exclude for each query; -1 excludes none.
        """
        queries = normalize(queries_QD.float(), dim=1)
        best = np.full(len(queries), -np.inf, dtype=np.float32)
        classes = np.zeros(len(queries), dtype=np.int64)
        for low, values in self.pieces():
            first = low // self.per_class
            proxies = normalize(values, dim=1)
            for start in range(0, len(queries), max(1, _BLOCK_FLOATS // len(proxies))):
                cut = slice(start, start + max(1, _BLOCK_FLOATS // len(proxies)))
                similarity = queries[cut] @ proxies.T
                by_class = similarity.view(len(similarity), -1, self.per_class).amax(dim=2)
                skipped = without[cut] - first
                inside = np.flatnonzero((skipped >= 0) & (skipped < by_class.shape[1]))
                by_class[torch.from_numpy(inside), torch.from_numpy(skipped[inside])] = -torch.inf
                top, place = (found.numpy() for found in by_class.max(dim=1))
                better = top > best[cut]
                best[cut] = np.where(better, top, best[cut])
                classes[cut] = np.where(better, place + first, classes[cut])
        return best, classes
