"""Searches over the representatives of classes: greedy k-centre, and nearest classes.

Both give the same integers for any number of ranks: distances are the exact ones of
`search/exact.py`, ties go to the lower place or class.

Shape legend: C classes, b places of a class's pool, m representatives of a class, h neighbours,
D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.partition import part_sizes
from dml_dist.search.exact import pair_distances, store_rows
from dml_dist.search.gallery import GalleryShard, Queries
from dml_dist.search.propose import resolve_backend

_NEIGHBORS = "nearest classes"


def k_center(embeddings_CbD: Tensor, number: int) -> Tensor:
    """Pick from each class's pool by greedy k-centre (Gonzalez): each next one is the farthest.

    The first place is picked first; each further one has the largest distance to its nearest
    picked one.

    Args:
        embeddings_CbD: Embeddings of the pools; they are normalised here.
        number: m, 1 <= m <= b.

    Returns:
        (C, m) int64 places in 0 .. b - 1, all different but where a pool repeats an image.
    """
    num_classes, num_places, size = embeddings_CbD.shape
    stored_CbD = store_rows(embeddings_CbD.reshape(-1, size), "cosine").reshape(
        num_classes, num_places, size
    )
    picked_C = torch.zeros(num_classes, dtype=torch.int64, device=embeddings_CbD.device)
    all_picked = [picked_C]
    nearest_Cb = torch.full(
        (num_classes, num_places), torch.inf, dtype=torch.float64, device=embeddings_CbD.device
    )
    first_C = torch.arange(num_classes, device=embeddings_CbD.device) * num_places
    flat = stored_CbD.reshape(-1, size)
    everyone = torch.arange(len(flat), device=flat.device)
    for _ in range(number - 1):
        centre = (first_C + picked_C).repeat_interleave(num_places)
        distance_Cb = pair_distances(flat, everyone, flat, centre).reshape(num_classes, num_places)
        nearest_Cb = torch.minimum(nearest_Cb, distance_Cb)
        picked_C = nearest_Cb.argmax(dim=1)  # The first among equals on the CPU; see below.
        picked_C = (nearest_Cb == nearest_Cb.gather(1, picked_C[:, None])).int().argmax(dim=1)
        all_picked.append(picked_C)
    return torch.stack(all_picked, dim=1)
