"""Data, classes and topology of a run, opened once on each rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dml_dist.config.schema import RunConfig
from dml_dist.data.classes import ClassSplit, split_classes
from dml_dist.data.index import Index
from dml_dist.data.loader import evaluation_loader
from dml_dist.data.plans import BatchPlan, build_plan
from dml_dist.data.remote_shards import open_index
from dml_dist.data.transforms import Transform, build_transform
from dml_dist.errors import ConfigError, DataError
from dml_dist.evaluation.embed import embed
from dml_dist.evaluation.retrieval import RetrievalResult, evaluate
from dml_dist.models.timm_backbone import network_transform
from dml_dist.parallel.comm import Comm
from dml_dist.runs.artifacts import SavedEmbeddings, write_embeddings
from dml_dist.runtime.fetch import require_cache_room
from dml_dist.runtime.progress import Emit, discard, note, phase
from dml_dist.topology import Topology
from dml_dist.train.run_plan import RunPlan, resolve
from dml_dist.train.state import resolve_precision

LARGEST_BYTES = 1 << 30
"""Larger embeddings are not kept, because rank 0 has to hold all of them."""


@dataclass(frozen=True, eq=False)
class RunContext:
    """Objects shared by training and evaluation on one rank.

    Attributes:
        config: The run's configuration, paths absolute.
        index: Index of all images.
        split: Training and validation classes.
        transform: Converts images to tensors.
        topology: Rank, world size and device.
        comm: The collectives of all ranks.
        emit: Receives progress events.
    """

    config: RunConfig
    index: Index
    split: ClassSplit
    transform: Transform
    topology: Topology
    comm: Comm
    emit: Emit

    @property
    def train_class_sizes(self) -> list[int]:
        """Images of each training class, by class id."""
        return _class_sizes(self.index, self.split.train_rows)

    def resolve(self) -> RunPlan:
        """Return the plan of the run."""
        return resolve(
            self.config,
            train_class_sizes=self.train_class_sizes,
            validation_class_sizes=_class_sizes(self.index, self.split.validation_rows),
            world_size=self.topology.world_size,
        )

    def batch_plan(self) -> BatchPlan:
        """Return the global batches of training."""
        rows = self.split.train_rows
        return build_plan(
            self.config.data.batches,
            rows=rows,
            labels=self.index.label[rows],
            tar_shard=self.index.tar_shard[rows],
            seed=self.config.seed,
            global_batch_size=self.config.train.global_batch_size,
            world_size=self.topology.world_size,
        )

    def check_evaluable(self) -> None:
        """Check before training that the validation and test classes can be evaluated.

        Raises:
            ConfigError: If training or validation classes would be called test classes.
            DataError: If there is no test split, or no query has another image of its class.
        """
        check_test_split(self.config)
        _check_evaluable(self.index, self.rows_of(self.config.data.test_split), "data.test_split")
        if len(self.split.validation_rows):
            _check_evaluable(self.index, self.split.validation_rows, "validation")

    def check_cache(self) -> None:
        """Check that the cache is large enough for the remote tar shards of the training plan.

        Raises:
            DataError: If it is too small; the message holds the sizes.
        """
        require_cache_room(self.index, self.batch_plan(), self.config)

    def name_of_row(self, row: int) -> str:
        """Return the name of an index row's sample in messages."""
        return f"{self.index.keys[row]} of class {self.index.class_names[self.index.label[row]]}"

    def rows_of(self, split: str) -> np.ndarray:
        """Return the index rows of `validation` (classes held out of training) or of a split.

        Raises:
            ConfigError: If the split is `validation` and no class is held out.
            DataError: If no image belongs to the split.
        """
        if split != "validation":
            return self.index.rows(split)
        if not len(self.split.validation_rows):
            raise ConfigError(
                "the split validation has no images: the run's configuration holds out no classes "
                "(validation.name: none); use --split test or --split train"
            )
        return self.split.validation_rows

    def measure(
        self,
        model: nn.Module,
        rows: np.ndarray,
        title: str,
        neighbors: int = 0,
        *,
        final: bool = False,
        keep: Path | None = None,
    ) -> RetrievalResult:
        """Embed index rows on all ranks and rank them; every rank calls it.

        Args:
            model: The network, on this rank's device.
            rows: (N,) int64 index rows, the same on every rank.
            title: Name of the phase for the progress display.
            neighbors: Number of neighbors of every query to list in the result.
            final: Whether to include the metrics of the final evaluation.
            keep: File to save the embeddings to, if any.
        """
        config = self.config.evaluation
        embeddings, labels, own_rows = self.embed(model, rows, title)
        if keep is not None:
            self._keep(keep, embeddings, own_rows, labels)
        return evaluate(
            embeddings,
            labels,
            recall_at=config.recall_at,
            distance=config.distance,
            roles=self.index.role[own_rows],
            backend=config.backend,
            memory_mb=config.memory_mb,
            comm=self.comm,
            neighbors=neighbors,
            extra=config.metrics if final else self._watched(),
            definitions=config.definitions if final else (),
            super_classes=self.index.super_class[own_rows],
            seed=self.config.seed,
        )

    def _watched(self) -> tuple[str, ...]:
        """Return the extra metrics of each validation: those that a regularizer acts on."""
        return () if self.config.nir is None else ("structure",)

    def embed(
        self, model: nn.Module, rows: np.ndarray, title: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return this rank's embeddings, labels and index rows of some rows; every rank calls it.

        Args:
            model: The network, on this rank's device.
            rows: (N,) int64 index rows, the same on every rank.
            title: Name of the phase for the progress display.
        """
        batches = evaluation_loader(
            self.index,
            rows,
            self.transform,
            batch_size=self.config.evaluation.batch_size,
            topology=self.topology,
            workers=self.config.data.loader_workers,
            prefetch=self.config.data.prefetch,
        )
        precision = resolve_precision(self.config.train.precision, self.topology.device_type)
        num_ranks = self.topology.world_size

        def show(done: int) -> None:
            # Estimated from this rank: the numbers of batches of two ranks differ by at most one.
            self.emit(phase(title, min(done * num_ranks, len(rows)), len(rows)))

        found = embed(
            model,
            batches,
            device=self.topology.device,
            precision=precision.autocast,
            progress=show,
        )
        if not len(found[2]):
            self.emit(phase(title, len(rows), len(rows)))  # Fewer batches than ranks.
        return found

    def _keep(
        self, path: Path, embeddings: np.ndarray, rows: np.ndarray, labels: np.ndarray
    ) -> None:
        """Save the embeddings of all ranks to a file, if they are not too large."""
        saved = collect_embeddings(embeddings, rows, labels, self.comm)
        if saved is not None:
            write_embeddings(path, saved)
        elif self.topology.is_main:
            self.emit(note(f"embeddings are not kept: they exceed {LARGEST_BYTES / 2**30:g} GiB"))


def open_context(config: RunConfig, topology: Topology, comm: Comm, emit: Emit) -> RunContext:
    """Read the index and split its classes; `emit` is called on rank 0 only."""
    index = replace(open_index(config.data.path, config.data.cache), exif=config.data.exif)
    return RunContext(
        config=config,
        index=index,
        split=split_classes(index, config.data, config.validation, config.seed),
        transform=build_transform(network_transform(config.data.transform, config.model.backbone)),
        topology=topology,
        comm=comm,
        emit=emit if topology.is_main else discard,
    )


def collect_embeddings(
    embeddings: np.ndarray, rows: np.ndarray, labels: np.ndarray, comm: Comm
) -> SavedEmbeddings | None:
    """Return the embeddings of all ranks in rank order on rank 0; every rank calls this.

    Args:
        embeddings: This rank's part, (n, D) float32; if n is 0, D is ignored.
        rows: Its index rows, (n,) int64.
        labels: Its labels, (n,) int64.
        comm: Collectives of all ranks.

    Returns:
        None on the other ranks, and on all ranks if the embeddings exceed `LARGEST_BYTES`.
    """
    shapes = comm.gather_objects(embeddings.shape, what="gather shapes of embeddings")
    width = max((shape[1] for shape in shapes if shape[0]), default=0)
    if sum(shape[0] for shape in shapes) * width * 4 > LARGEST_BYTES:
        return None
    kept: list[list[np.ndarray]] = [[], [], []]
    for source, (count, _) in enumerate(shapes):
        # One rank's part at a time, so that only rank 0 holds more than one.
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


def check_test_split(config: RunConfig) -> None:
    """Refuse test classes that are trained on, or that select the checkpoint.

    Raises:
        ConfigError: If they are; the message names the splits.
    """
    test, train, final = config.data.test_split, config.data.train_split, config.evaluation
    if test == train:
        raise ConfigError(
            f"data.test_split and data.train_split are both {test!r}, so training classes would be "
            "reported as test classes. Name another split; `dml-dist evaluate "
            "--split` measures any split after training."
        )
    # The trials of searches, which evaluate nothing at their end, have this split.
    if test == "validation" and (final.final != "none" or final.evaluate_test_every is not None):
        raise ConfigError(
            "data.test_split is validation, but validation classes select the checkpoint and are "
            "no test classes. Name a split of the index, or set evaluation.final: none."
        )


def _check_evaluable(index: Index, rows: np.ndarray, what: str) -> None:
    labels, roles = index.label[rows], index.role[rows]
    is_query, in_gallery = roles != "gallery", roles != "query"
    relevant = np.bincount(labels[in_gallery], minlength=len(index.class_names))[labels]
    relevant = relevant - (is_query & in_gallery)  # A query is not its own result.
    if not (relevant[is_query] > 0).any():
        raise DataError(
            f"{what}: retrieval needs a query with another gallery image of its class, but there "
            f"is none among {len(rows)} images of {len(np.unique(labels))} classes in "
            f"{index.root}; use classes with at least two images"
        )


def _class_sizes(index: Index, rows: np.ndarray) -> list[int]:
    """Return the number of images of each class of some rows, in ascending order of labels."""
    _, counts = np.unique(index.label[rows], return_counts=True)
    return [int(count) for count in counts]
