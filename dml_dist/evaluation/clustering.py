"""Clustering metrics of k-means: NMI, AMI and pairwise F1, the same for any number of ranks.

k is the number of classes of the evaluated rows, queries and gallery together. k-means runs once,
on the stored rows (normalized for "cosine"; centers are plain means).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from dml_dist.evaluation.population import Population
from dml_dist.metrics import cluster_agreement as metrics
from dml_dist.metrics.structure import embedding_structure
from dml_dist.parallel.comm import Comm
from dml_dist.random_streams import Stream, generator_of
from dml_dist.search.kmeans import kmeans
from dml_dist.search.propose import Backend

CLUSTERING_METRICS = ("nmi", "nmi_geometric", "f1", "ami")


def measure_clusters(
    population: Population,
    vectors_ND: Tensor,
    comm: Comm,
    *,
    wanted: Collection[str],
    seed: int,
    backend: Backend,
    memory_bytes: int,
) -> dict[str, float]:
    """Return clustering metrics by their names in records; every rank calls this.

    Args:
        population: The rows of all ranks.
        vectors_ND: This rank's stored rows.
        comm: The ranks.
        wanted: Metric names; those in `CLUSTERING_METRICS` are measured, k-means does not run
            without one. f1 comes with pair_precision and pair_recall.
        seed: Seed of the initial centers; also part of the result.
        backend: Search backend for candidates.
        memory_bytes: Bound on this rank's working memory.
    """
    if not set(wanted) & set(CLUSTERING_METRICS):
        return {}
    low, high = population.part(comm.rank)
    clusters = kmeans(
        vectors_ND,
        population.sizes,
        len(population.label_C),
        comm,
        seed=seed,
        backend=backend,
        memory_bytes=memory_bytes,
    )
    part = metrics.partial(population.class_N[low:high], clusters.cluster_N.cpu().numpy())
    parts = comm.gather_objects(part, what="gather contingency tables")
    table = reduce(metrics.merge, parts)
    found: dict[str, float] = {}
    if "nmi" in wanted:
        found["nmi"] = metrics.normalized_mutual_information(table)
    if "nmi_geometric" in wanted:
        found["nmi_geometric"] = metrics.geometric_nmi(table)
    if "f1" in wanted:
        pairs = metrics.pair_scores(table)
        found |= {"f1": pairs.f1, "pair_precision": pairs.precision, "pair_recall": pairs.recall}
    if "ami" in wanted:
        found["ami"] = metrics.adjusted_mutual_information(table)
    return found | {
        "num_clusters": len(population.label_C),
        "num_empty_clusters": clusters.num_empty,
        "kmeans_iterations": clusters.num_iterations,
        "kmeans_seed": seed,
    }


MAX_SAMPLE_ROWS = 4096
"""Maximum rows of the sample; all its pairs are measured."""


def measure_structure(
    population: Population, vectors_ND: Tensor, comm: Comm, *, seed: int
) -> dict[str, float]:
    """Return the measures of `metrics.structure` without NaN, by name; every rank calls this.

    Uses all rows up to `MAX_SAMPLE_ROWS`, else whole classes in a random order. The sample does not
    depend on the number of ranks; sums are in float64.

    Args:
        population: The rows of all ranks.
        vectors_ND: This rank's stored rows.
        comm: The ranks.
        seed: Seed of the sample.
    """
    is_sampled_N = _sample_rows(population.class_N, seed)
    low, high = population.part(comm.rank)
    own = torch.from_numpy(is_sampled_N[low:high]).to(vectors_ND.device)
    bounds = [population.part(rank) for rank in range(comm.world_size)]
    sizes = [int(is_sampled_N[first:end].sum()) for first, end in bounds]
    rows = comm.all_gather_rows(vectors_ND[own], sizes, what="rows whose structure is measured")
    found = embedding_structure(rows.cpu().numpy(), population.class_N[is_sampled_N]).as_dict()
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _sample_rows(class_N: np.ndarray, seed: int) -> np.ndarray:
    """Return which rows are sampled, (N,) bool."""
    sizes_C = np.bincount(class_N)
    order = generator_of(Stream.STRUCTURE_CLASSES, seed).permutation(len(sizes_C))
    # At least two classes, whatever their size: the inter-class distance needs them.
    fits = np.cumsum(sizes_C[order]) <= MAX_SAMPLE_ROWS
    fits[:2] = True
    is_sampled_C = np.zeros(len(sizes_C), dtype=bool)
    is_sampled_C[order[fits]] = True
    return is_sampled_C[class_N]
