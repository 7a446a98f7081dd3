"""Mergeable lists of nearest neighbors: partial per gallery shard, merged over shards.

Neighbors are ordered by (distance, global gallery row). Merging is associative and commutative,
because this order is total and does not depend on the shard.

Legend: Q queries, K entries of a list, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_ROW = torch.iinfo(torch.int64).max
"""The row of an empty entry; its distance is inf, so that it sorts last."""


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The nearest gallery rows of each query, nearest first.

    Attributes:
        distance_QK: Exact distances, float64; inf where there is no neighbor.
        row_QK: Global gallery rows, int64; NO_ROW where there is no neighbor.
    """

    distance_QK: Tensor
    row_QK: Tensor


def empty_neighbors(num_queries: int, num_neighbors: int, device: torch.device) -> Neighbors:
    """Return lists without any neighbor."""
    return Neighbors(
        torch.full((num_queries, num_neighbors), torch.inf, dtype=torch.float64, device=device),
        torch.full((num_queries, num_neighbors), NO_ROW, dtype=torch.int64, device=device),
    )


def sort_neighbors(distance_QM: Tensor, row_QM: Tensor, num_neighbors: int) -> Neighbors:
    """Return the first `num_neighbors` of each query by (distance, row); M may be any number."""
    # Sort by row first, then stably by distance: ties keep the lower row first.
    by_row = row_QM.argsort(dim=1)
    by_distance = distance_QM.gather(1, by_row).argsort(dim=1, stable=True)
    order = by_row.gather(1, by_distance)[:, :num_neighbors]
    found = Neighbors(distance_QM.gather(1, order), row_QM.gather(1, order))
    missing = num_neighbors - order.shape[1]
    if missing <= 0:
        return found
    free = empty_neighbors(order.shape[0], missing, order.device)
    return Neighbors(
        torch.cat([found.distance_QK, free.distance_QK], dim=1),
        torch.cat([found.row_QK, free.row_QK], dim=1),
    )


def merge_neighbors(parts: Sequence[Neighbors], num_neighbors: int) -> Neighbors:
    """Return the first `num_neighbors` of each query over disjoint parts of the gallery."""
    return sort_neighbors(
        torch.cat([part.distance_QK for part in parts], dim=1),
        torch.cat([part.row_QK for part in parts], dim=1),
        num_neighbors,
    )


def neighbors_of_pairs(
    query_P: Tensor, distance_P: Tensor, row_P: Tensor, num_queries: int, num_neighbors: int
) -> Neighbors:
    """Return lists from unordered (query, distance, row) triples."""
    # Sort by (query, distance, row): the least significant key first, then stable sorts.
    order = row_P.argsort()
    order = order[distance_P[order].argsort(stable=True)]
    order = order[query_P[order].argsort(stable=True)]
    query_P, distance_P, row_P = query_P[order], distance_P[order], row_P[order]
    count_Q = torch.bincount(query_P, minlength=num_queries)
    first_Q = count_Q.cumsum(0) - count_Q
    place_P = torch.arange(query_P.shape[0], device=query_P.device) - first_Q[query_P]
    kept = place_P < num_neighbors
    found = empty_neighbors(num_queries, num_neighbors, query_P.device)
    found.distance_QK[query_P[kept], place_P[kept]] = distance_P[kept]
    found.row_QK[query_P[kept], place_P[kept]] = row_P[kept]
    return found
