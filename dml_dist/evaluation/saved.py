"""Embeddings of an evaluation in one file, for whoever draws or searches them later.

embeddings.npz, read by `numpy.load`, uncompressed, 4 D + 16 bytes an image:

    embeddings   (N, D) float32   as the network gave them, in index-row order
    rows         (N,) int64       rows of the index
    labels       (N,) int64       labels in the index
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dml_dist.errors import DataError
from dml_dist.files import open_atomic
from dml_dist.parallel.comm import Comm

LARGEST_BYTES = 1 << 30
"""Embeddings of more bytes than this are not kept: one rank has to hold them all."""


@dataclass(frozen=True, eq=False)
class SavedEmbeddings:
    """Embeddings of all ranks.

    Attributes:
        embeddings: (N, D) float32.
        rows: (N,) int64 index rows.
        labels: (N,) int64.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def collect_embeddings(
    embeddings: np.ndarray, rows: np.ndarray, labels: np.ndarray, comm: Comm
) -> SavedEmbeddings | None:
    """Return the embeddings of all ranks in rank order on rank 0; every rank calls this.

    Args:
        embeddings: This rank's part, (n, D) float32; n may be 0, D is then not looked at.
        rows: Its index rows, (n,) int64.
        labels: Its labels, (n,) int64.
        comm: The ranks.

    Returns:
        None on the other ranks, and on all ranks when they exceed `LARGEST_BYTES`.
    """
    shapes = comm.gather_objects(embeddings.shape, what="gather shapes of embeddings")
    width = max((shape[1] for shape in shapes if shape[0]), default=0)
    if sum(shape[0] for shape in shapes) * width * 4 > LARGEST_BYTES:
        return None
    kept: list[list[np.ndarray]] = [[], [], []]
    for source, (count, _) in enumerate(shapes):
        # One rank's part at a time: the others forget it at once.
        own = (embeddings.reshape(count, width), rows, labels) if source == comm.rank else None
        empty = (np.empty((count, width), np.float32), *np.empty((2, count), np.int64))
        for parts, values in zip(kept, own or empty, strict=True):
            tensor = torch.from_numpy(np.ascontiguousarray(values)).to(comm.device)
            got = comm.broadcast(tensor, source, what="collect embeddings")
            if comm.rank == 0:
                parts.append(got.cpu().numpy())
    if comm.rank != 0:
        return None
    return SavedEmbeddings(*(np.concatenate(parts) for parts in kept))


def write_embeddings(path: Path, saved: SavedEmbeddings) -> None:
    """Write embeddings.npz, at once or not at all."""
    with open_atomic(path) as file:
        np.savez(file, embeddings=saved.embeddings, rows=saved.rows, labels=saved.labels)


def read_embeddings(path: Path) -> SavedEmbeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        DataError: If the file is missing, damaged or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as values:
            return SavedEmbeddings(values["embeddings"], values["rows"], values["labels"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"required embeddings of an evaluation, got {path}, which cannot be read ({error}); "
            "evaluate the run again"
        ) from None
