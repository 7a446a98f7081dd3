"""How well k-means finds the classes: NMI, AMI and pairwise F1, the same for any number of ranks.

k is the number of classes of the evaluated rows, queries and gallery together; k-means runs once,
on the rows that distances are taken of (normalised for "cosine"; centres are plain means).
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
        wanted: Names; those out of `CLUSTERING_METRICS` are measured, and nothing without one. f1
            comes with pair_precision and pair_recall.
        seed: Seed of the first centres; it is part of what is returned.
        backend: What proposes centres.
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


# ---------------- structure

LARGEST_SAMPLE = 4096
"""Rows that are looked at; every pair of them is."""

_STREAM = 0x53545255


def measure_structure(
    population: Population, vectors_ND: Tensor, comm: Comm, *, seed: int
) -> dict[str, float]:
    """Return the measures of `metrics.structure` that there are, by name; every rank calls this.

    All rows where they are at most `LARGEST_SAMPLE`, else those of whole classes in an order drawn
    from the seed. The rows do not depend on the number of ranks; sums are in float64.

    Args:
        population: The rows of all ranks.
        vectors_ND: This rank's rows as distances are taken of them.
        comm: The ranks.
        seed: Seed of the draw.
    """
    chosen_N = _chosen(population.class_N, seed)
    low, high = population.part(comm.rank)
    own = torch.from_numpy(chosen_N[low:high]).to(vectors_ND.device)
    bounds = [population.part(rank) for rank in range(comm.world_size)]
    sizes = [int(chosen_N[first:end].sum()) for first, end in bounds]
    rows = comm.all_gather_rows(vectors_ND[own], sizes, what="rows whose structure is measured")
    found = embedding_structure(rows.cpu().numpy(), population.class_N[chosen_N]).as_dict()
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _chosen(class_N: np.ndarray, seed: int) -> np.ndarray:
    """Return which rows are looked at, (N,) bool."""
    sizes_C = np.bincount(class_N)
    order = np.random.default_rng([seed, _STREAM]).permutation(len(sizes_C))
    # At least two classes, however large they are, so that there is a distance between classes.
    fits = np.cumsum(sizes_C[order]) <= LARGEST_SAMPLE
    fits[:2] = True
    chosen_C = np.zeros(len(sizes_C), dtype=bool)
    chosen_C[order[fits]] = True
    return chosen_C[class_N]
