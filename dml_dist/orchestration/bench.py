"""Data, classes and ranks of a run, opened once on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from dml_dist.config.schema import RunConfig
from dml_dist.data.classes import ClassSplit, split_classes
from dml_dist.data.index import Index, read_index
from dml_dist.data.loader import evaluation_loader
from dml_dist.data.transforms import Transform, build_transform
from dml_dist.errors import ConfigError
from dml_dist.evaluation.embed import embed
from dml_dist.evaluation.retrieval import RetrievalResult, evaluate
from dml_dist.orchestration.progress import Emit, discard, phase
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology
from dml_dist.train.plan import RunPlan, resolve
from dml_dist.train.state import resolve_precision


@dataclass(frozen=True, eq=False)
class Bench:
    """What training and evaluation need on one rank.

    Attributes:
        config: The run's configuration, paths absolute.
        index: All images.
        split: Training and validation classes.
        transform: From images to tensors.
        topology: This rank's place.
        comm: The collectives of all ranks.
        emit: Takes progress events.
    """

    config: RunConfig
    index: Index
    split: ClassSplit
    transform: Transform
    topology: Topology
    comm: Comm
    emit: Emit

    def resolve(self) -> RunPlan:
        """Return the plan of the run."""
        return resolve(
            self.config,
            train_class_sizes=_class_sizes(self.index, self.split.train_rows),
            validation_class_sizes=_class_sizes(self.index, self.split.validation_rows),
            world_size=self.topology.world_size,
        )

    def rows_of(self, split: str) -> np.ndarray:
        """Return the index rows of `validation` (classes held out of training) or of a split.

        Raises:
            ConfigError: If validation is asked for and no class is held out.
            DataError: If no image belongs to the split.
        """
        if split != "validation":
            return self.index.rows(split)
        if not len(self.split.validation_rows):
            raise ConfigError(
                "split validation: the run's configuration holds no class out "
                "(validation.name: none); give --split test or train"
            )
        return self.split.validation_rows

    def measure(
        self, model: nn.Module, rows: np.ndarray, title: str, neighbors: int = 0
    ) -> RetrievalResult:
        """Embed index rows on all ranks and rank them; every rank calls it.

        Args:
            model: The network, on this rank's device.
            rows: (N,) int64 index rows, the same on every rank.
            title: Name of the phase for the progress display.
            neighbors: How many neighbours of every query are listed in the result.
        """
        config = self.config.evaluation
        batches = evaluation_loader(
            self.index,
            rows,
            self.transform,
            batch_size=config.batch_size,
            topology=self.topology,
            workers=self.config.data.loader_workers,
            prefetch=self.config.data.prefetch,
        )
        precision = resolve_precision(self.config.train.precision, self.topology.device_type)
        num_ranks = self.topology.world_size

        def show(done: int) -> None:
            # This rank's share stands for all: ranks embed the same number of batches but for one.
            self.emit(phase(title, min(done * num_ranks, len(rows)), len(rows)))

        embeddings, labels, own_rows = embed(
            model,
            batches,
            device=self.topology.device,
            precision=precision.autocast,
            progress=show,
        )
        self.emit(phase(title, len(rows), len(rows)))
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
        )


def open_bench(config: RunConfig, topology: Topology, comm: Comm, emit: Emit) -> Bench:
    """Read the index and divide its classes; `emit` is called on rank 0 only."""
    index = read_index(Path(config.data.path))
    return Bench(
        config=config,
        index=index,
        split=split_classes(index, config.data, config.validation, config.seed),
        transform=build_transform(config.data.transform),
        topology=topology,
        comm=comm,
        emit=emit if topology.is_main else discard,
    )


def _class_sizes(index: Index, rows: np.ndarray) -> list[int]:
    """Return the number of images of each class of some rows, by rising label."""
    _, counts = np.unique(index.label[rows], return_counts=True)
    return [int(count) for count in counts]
