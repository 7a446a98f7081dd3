"""Reference distance: float64, one pair at a time, in one fixed order.

Rows are stored as float32. The distance of two stored rows is the sum of their squared differences
in float64, added as a binary tree over the coordinates, padded with zeros to a power of two. Only
elementwise operations are used, so the bits depend on the two rows alone: not on block shapes, the
number of threads or ranks, or the device. A matrix product guarantees none of this.

Legend: N gallery rows, Q queries, P pairs, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["cosine", "euclidean"]

# Float64 elements per chunk: two such arrays fit a core's cache; a GPU needs larger ones.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def store_rows(embeddings_ND: Tensor, distance: Distance) -> Tensor:
    """Return the float32 rows whose distances are computed, (N, D).

    For "cosine" a row is divided by its norm in float64 and then rounded, so that squared
    Euclidean distance is 2 - 2 cos up to that rounding; a row of zeros stays zero. For
    "euclidean" rows are only rounded to float32.

    Args:
        embeddings_ND: Finite rows of any floating type, (N, D).
        distance: "cosine" or "euclidean".
    """
    if distance == "euclidean":
        return embeddings_ND.to(torch.float32)
    stored_ND = torch.empty(embeddings_ND.shape, dtype=torch.float32, device=embeddings_ND.device)
    for low, high in chunks(len(embeddings_ND), embeddings_ND.shape[1], embeddings_ND.device):
        rows = embeddings_ND[low:high].to(torch.float64)
        norms = tree_sum(rows * rows).sqrt()
        # A row of zeros has no direction and stays zero.
        stored_ND[low:high] = rows / torch.where(norms > 0, norms, 1.0)[:, None]
    return stored_ND


def tree_sum(values_PD: Tensor) -> Tensor:
    """Return the row sums of float64 values, (P,), added as a binary tree.

    `values_PD` is overwritten. Coordinate j + h is added to j for h = the powers of two below D,
    largest first: the tree over D padded with zeros to a power of two. The fixed order makes the
    sum reproducible; `sum()` may reorder.
    """
    width = values_PD.shape[1]
    if width == 0:
        return values_PD.new_zeros(values_PD.shape[0])
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        # Only the coordinates beyond `half` have a partner; the others would add a zero.
        values_PD[:, : width - half] += values_PD[:, half:width]
        width = half
    return values_PD[:, 0].clone()


def pair_distances(
    queries_QD: Tensor, query_P: Tensor, gallery_ND: Tensor, gallery_P: Tensor
) -> Tensor:
    """Return the exact distances of pairs of stored rows, (P,) float64.

    Args:
        queries_QD: Stored float32 rows, (Q, D).
        query_P: Row of `queries_QD` of each pair, (P,) int64.
        gallery_ND: Stored float32 rows, (N, D).
        gallery_P: Row of `gallery_ND` of each pair, (P,) int64.
    """
    num_pairs = query_P.shape[0]
    distance_P = torch.empty(num_pairs, dtype=torch.float64, device=query_P.device)
    for low, high in chunks(num_pairs, gallery_ND.shape[1], query_P.device):
        difference = queries_QD.index_select(0, query_P[low:high]).to(torch.float64)
        difference -= gallery_ND.index_select(0, gallery_P[low:high])
        distance_P[low:high] = tree_sum(difference.mul_(difference))
    return distance_P


def chunks(num_rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield the bounds of row chunks whose float64 copies fit the cache."""
    size = max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 18) // max(1, width))
    for low in range(0, num_rows, size):
        yield low, min(low + size, num_rows)
