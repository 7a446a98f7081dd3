"""How well k-means finds the classes: NMI, AMI and pairwise F1, the same for any number of ranks.

k is the number of classes of the evaluated rows, queries and gallery together; k-means runs once,
on the rows that distances are taken of (normalised for "cosine"; centres are plain means).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

from torch import Tensor

from dml_dist.evaluation.population import Population
from dml_dist.metrics import cluster_agreement as metrics
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
