"""Retrieval and clustering metrics of embeddings, exact and the same for any number of ranks.

Ranks hold contiguous parts of the rows, which are each rank's gallery shard and its queries. Rows
are validated and stored (`population`, `search.exact`), ranked (`rounds`) and, if requested,
clustered (`clustering`); the sums of all ranks give the means.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml_dist.errors import ConfigError, DmlDistError
from dml_dist.evaluation.clustering import CLUSTERING_METRICS, measure_clusters, measure_structure
from dml_dist.evaluation.population import (
    Array,
    Population,
    check_rows,
    check_super_classes,
    gather_population,
    gather_super_classes,
)
from dml_dist.evaluation.rounds import Outcome, Rounds
from dml_dist.evaluation.tally import Tally
from dml_dist.metrics import definitions as defined
from dml_dist.metrics import per_class
from dml_dist.metrics import ranking as metrics
from dml_dist.parallel.comm import Comm
from dml_dist.runs.artifacts import PerClass
from dml_dist.search.exact import Distance, store_rows
from dml_dist.search.propose import resolve_backend

EXTRA_METRICS = (*CLUSTERING_METRICS, "super_class_recall", "structure")
"""Metrics that are measured only if requested."""


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Result of an evaluation, the same on every rank except for the seconds.

    Attributes:
        recall_at_k: K -> Recall@K, in [0, 1].
        r_precision: In [0, 1].
        map_at_r: MAP@R, in [0, 1].
        num_queries: Number of counted queries.
        num_gallery: Number of gallery rows.
        num_lone_queries: Queries without another gallery row of their class, not counted.
        seconds: Stage -> seconds: "prepare", "list" and "count" for the metrics above,
            "super_class" and "cluster" (with structure) if requested, "total". "list",
            "count" and "super_class" are the slowest rank's, the others this rank's.
        per_class: Results of each class of the evaluated rows.
        super_class_recall_at_k: K -> fraction of the counted queries with a super-class that have a
            row of it among the first K; empty unless requested, or if no row has a super-class.
        clustering: Requested clustering metrics by name, with k-means' facts.
        structure: Measures of the embedding distribution (`metrics.structure`), if requested.
        definitions: Requested metrics as other projects define them, by name.
        query_rows: (Q,) int64, the counted queries in increasing order, if neighbors are requested.
        neighbors: (Q, k) int64 global gallery rows, nearest first; -1 where the gallery ends.
        neighbor_distances: (Q, k) float64, squared Euclidean; inf where the gallery ends.
    """

    recall_at_k: dict[int, float]
    r_precision: float
    map_at_r: float
    num_queries: int
    num_gallery: int
    num_lone_queries: int
    seconds: dict[str, float]
    per_class: PerClass
    super_class_recall_at_k: dict[int, float] = field(default_factory=dict)
    clustering: dict[str, float] = field(default_factory=dict)
    structure: dict[str, float] = field(default_factory=dict)
    definitions: dict[str, float] = field(default_factory=dict)
    query_rows: np.ndarray | None = None
    neighbors: np.ndarray | None = None
    neighbor_distances: np.ndarray | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the metrics by their names in records: recall_at_1, map_at_r, ..."""
        return {
            **{f"recall_at_{k}": value for k, value in self.recall_at_k.items()},
            "r_precision": self.r_precision,
            "map_at_r": self.map_at_r,
            **{f"super_class_recall_at_{k}": v for k, v in self.super_class_recall_at_k.items()},
            **self.clustering,
            **self.structure,
            **self.definitions,
            "num_queries": self.num_queries,
            "num_gallery": self.num_gallery,
            "num_lone_queries": self.num_lone_queries,
        }


def evaluate(
    embeddings: Array,
    labels: Array,
    *,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    distance: Distance = "cosine",
    roles: Sequence[str] | np.ndarray | None = None,
    backend: str = "auto",
    memory_mb: float = 512.0,
    comm: Comm | None = None,
    neighbors: int = 0,
    extra: Collection[str] = (),
    definitions: Sequence[str] = (),
    super_classes: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
) -> RetrievalResult:
    """Return Recall@K, R-precision, MAP@R and requested extra metrics of embeddings.

    A query never finds its own row; equal distances are ordered by gallery row. Every digit depends
    on rows, labels and roles alone: not on `comm`, `backend`, `memory_mb`, threads or device.

    Args:
        embeddings: (N, D) rows of a floating type, not necessarily normalized; with `comm` this
            rank's contiguous part in rank order, which may be empty.
        labels: (N,) integers of any value; floats that are whole numbers count as integers.
        recall_at: The K of Recall@K, each >= 1; K may exceed the gallery.
        distance: "cosine" (rows normalized in float64, then stored in float32) or "euclidean".
        roles: (N,) "query", "gallery" or "both"; None means both for all.
        backend: Search backend for candidates: "auto", "faiss" or "torch".
        memory_mb: Bound on this rank's working memory in MiB, besides its embeddings, two float32
            copies of them (a third one of the gallery's rows where some rows are queries only),
            and buffers of the libraries (about 30 MiB).
        comm: The ranks; None means this process alone. Every rank calls this.
        neighbors: Number of neighbors of every counted query in the result.
        extra: Names in `EXTRA_METRICS`: nmi, nmi_geometric, f1, ami (k-means with as many
            clusters as classes), super_class_recall and structure.
        definitions: Metrics as other projects define them (`metrics.definitions`), such as
            "nir.map_1000" or "oml.map_at_5".
        super_classes: (N,) names, "" for none; only super_class_recall needs them.
        seed: Seed of k-means, and of the sample whose structure is measured.

    Raises:
        DataError: If rows are not finite, shapes or roles are wrong, or nothing can be counted.
        ConfigError: If an option is out of range or the backend is not installed.
    """
    start = time.perf_counter()
    comm = comm or Comm.single(str(embeddings.device) if isinstance(embeddings, Tensor) else "cpu")
    error: DmlDistError | None = None
    try:
        _check_options(recall_at, distance, memory_mb, neighbors, extra)
        other = _definitions(definitions)
        chosen = resolve_backend(backend, comm.device)
        local = check_rows(embeddings, labels, roles, comm.device)
        names = check_super_classes(super_classes, len(local.labels_N))
    except DmlDistError as raised:
        error = raised
    # Collective: if one rank's rows are invalid, all ranks raise, instead of waiting below.
    comm.agree(error, what="check the rows to evaluate")
    population = gather_population(local, comm)
    by_super = "super_class_recall" in extra
    super_N = gather_super_classes(names, population, comm) if by_super else None
    vectors_ND = _stored(local.embeddings_ND, population, distance, comm)
    search: dict[str, Any] = {"backend": chosen, "memory_bytes": int(memory_mb * 2**20)}
    rounds = Rounds(
        population,
        vectors_ND,
        comm,
        recall_at=tuple(recall_at),
        definitions=other,
        super_N=super_N,
        neighbors=neighbors,
        **search,
    )
    prepared = time.perf_counter()
    outcome = rounds.run()
    del rounds  # Free its float32 copies before clustering.
    ranked = time.perf_counter()
    clustering = measure_clusters(population, vectors_ND, comm, wanted=extra, seed=seed, **search)
    structure = {}
    if "structure" in extra:
        structure = measure_structure(population, vectors_ND, comm, seed=seed)
    end = time.perf_counter()
    seconds = {"prepare": prepared - start, **outcome.seconds, "cluster": end - ranked}
    return _result(outcome, population, seconds | {"total": end - start}, clustering, structure)


def _result(
    outcome: Outcome,
    population: Population,
    seconds: dict[str, float],
    clustering: dict[str, float],
    structure: dict[str, float],
) -> RetrievalResult:
    """Compute means from sums."""
    tally, listed = outcome.tally, outcome.listed
    means = metrics.finish(tally.sums, tally.recall_at)
    super_sums = tally.super_sums
    by_super = metrics.finish(super_sums, tally.recall_at) if super_sums.num_queries else None
    return RetrievalResult(
        recall_at_k=means.recall_at_k,
        r_precision=means.r_precision,
        map_at_r=means.map_at_r,
        num_queries=tally.sums.num_queries,
        num_gallery=population.num_gallery,
        num_lone_queries=population.num_lone_queries,
        seconds=seconds,
        per_class=_per_class(tally, population),
        super_class_recall_at_k={} if by_super is None else by_super.recall_at_k,
        clustering=clustering,
        structure=structure,
        definitions={
            one.name: defined.finish(one, total, population.num_lone_queries)
            for one, total in zip(tally.definitions, tally.definition_sums, strict=True)
        },
        query_rows=None if listed is None else listed.query_rows,
        neighbors=None if listed is None else listed.neighbors,
        neighbor_distances=None if listed is None else listed.distances,
    )


def _per_class(tally: Tally, population: Population) -> PerClass:
    means = per_class.finish(tally.class_sums)
    return PerClass(
        label=population.label_C,
        num_images=np.bincount(population.class_N, minlength=len(population.label_C)),
        num_queries=means.num_queries_C,
        recall_at_1=means.recall_at_1_C,
        r_precision=means.r_precision_C,
        map_at_r=means.map_at_r_C,
    )


def _definitions(names: Sequence[str]) -> tuple[defined.Definition, ...]:
    try:
        return defined.definitions(names)
    except ValueError as error:
        raise ConfigError(f"definitions: {error}") from None


def _check_options(
    recall_at: Sequence[int],
    distance: str,
    memory_mb: float,
    neighbors: int,
    extra: Collection[str],
) -> None:
    if not recall_at or any(int(k) != k or k < 1 for k in recall_at):
        raise ConfigError(
            f"recall_at must hold integers >= 1, but is {list(recall_at)}; use (1, 10), say"
        )
    if distance not in ("cosine", "euclidean"):
        raise ConfigError(f"unknown distance {distance!r}; use cosine or euclidean")
    if not memory_mb > 0:
        raise ConfigError(f"memory_mb must be > 0, but is {memory_mb}; the default is 512")
    if neighbors < 0:
        raise ConfigError(f"neighbors must be >= 0, but is {neighbors}; 0 returns none")
    if unknown := [name for name in extra if name not in EXTRA_METRICS]:
        raise ConfigError(
            f"extra metrics are {', '.join(EXTRA_METRICS)}, but not {unknown[0]!r}; Recall@K, "
            "R-precision and MAP@R are always measured"
        )


def _stored(
    embeddings_ND: Tensor, population: Population, distance: Distance, comm: Comm
) -> Tensor:
    """Return this rank's stored rows; a rank without rows takes the others' width. Collective."""
    width = int(
        comm.all_reduce_max(
            torch.tensor([embeddings_ND.shape[1] if len(embeddings_ND) else 0], device=comm.device),
            what="embedding width",
        )
    )
    if not population.sizes[comm.rank]:
        return torch.zeros((0, width), dtype=torch.float32, device=comm.device)
    return store_rows(embeddings_ND, distance)
