"""How the evaluated embeddings lie in space, from whole classes drawn by a seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dml_dist.evaluation.population import Population
from dml_dist.metrics.structure import embedding_structure
from dml_dist.parallel.comm import Comm

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
