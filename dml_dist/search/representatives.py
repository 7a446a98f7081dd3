"""Searches over the representatives of classes: greedy k-center, and nearest classes.

Both return the same integers for any number of ranks: distances are those of `search/exact.py`,
ties go to the lower index or class.

Shape legend: C classes, b rows of a class's pool, m representatives of a class, h neighbors,
D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.partition import part_sizes
from dml_dist.search.exact import pair_distances, store_rows
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.propose import resolve_backend

_NEIGHBORS = "nearest classes"


def k_center(embeddings_CbD: Tensor, number: int, is_image_Cb: Tensor | None = None) -> Tensor:
    """Select from each class's pool by greedy k-center (Gonzalez, 1985).

    The first row is selected first; each further one has the largest distance to its nearest
    selected row.

    Args:
        embeddings_CbD: Embeddings of the pools; they are normalized here.
        number: m, 1 <= m <= b.
        is_image_Cb: Which places of a pool hold an image, the first in any case; None if all do.

    Returns:
        (C, m) int64 different indices in 0 .. b - 1; -1 where a pool has no further image.
    """
    num_classes, pool_size, size = embeddings_CbD.shape
    stored_CbD = store_rows(embeddings_CbD.reshape(-1, size), "cosine").reshape(
        num_classes, pool_size, size
    )
    selected_C = torch.zeros(num_classes, dtype=torch.int64, device=embeddings_CbD.device)
    all_selected = [selected_C]
    nearest_Cb = torch.full(
        (num_classes, pool_size), torch.inf, dtype=torch.float64, device=embeddings_CbD.device
    )
    if is_image_Cb is not None:
        nearest_Cb.masked_fill_(~is_image_Cb, -1)
    first_C = torch.arange(num_classes, device=embeddings_CbD.device) * pool_size
    flat = stored_CbD.reshape(-1, size)
    every_row = torch.arange(len(flat), device=flat.device)
    for _ in range(number - 1):
        center = (first_C + selected_C.clamp(min=0)).repeat_interleave(pool_size)
        distance_Cb = pair_distances(flat, every_row, flat, center).reshape(num_classes, pool_size)
        nearest_Cb = torch.minimum(nearest_Cb, distance_Cb)
        # Never again, also where all further images are duplicates.
        nearest_Cb.scatter_(1, selected_C.clamp(min=0)[:, None], -1)
        farthest_C, selected_C = nearest_Cb.max(dim=1)  # The first among equals.
        selected_C = selected_C.masked_fill(farthest_C < 0, -1)
        all_selected.append(selected_C)
    return torch.stack(all_selected, dim=1)


def nearest_classes(
    embeddings_CmD: Tensor,
    number: int,
    comm: Comm,
    *,
    backend: str = "auto",
    memory_mb: float = 512.0,
) -> Tensor:
    """Return the nearest other classes of each class, nearest first, ties to the lower class.

    The distance of two classes is that of their nearest representatives. Each rank searches for
    the neighbors of its part of the classes.

    Args:
        embeddings_CmD: Embeddings of the representatives, the same on every rank; they are
            normalized here.
        number: h >= 1.
        comm: The ranks; every rank calls this.
        backend: Search backend for candidates: "auto", "faiss" or "torch".
        memory_mb: Bound on this rank's working memory in MiB, in addition to the embeddings.

    Returns:
        (C, h) int64 classes; -1 where there are fewer than h others.
    """
    num_classes, num_rows, size = embeddings_CmD.shape
    stored_ND = store_rows(embeddings_CmD.reshape(-1, size), "cosine")
    row_N = torch.arange(len(stored_ND), device=stored_ND.device)
    class_N = row_N // num_rows
    shard = GalleryShard(
        stored_ND,
        row_N,
        class_N,
        radius=2.0,  # Stored rows have norm 1.
        backend=resolve_backend(backend, comm.device),
        memory_bytes=int(memory_mb * 2**20),
    )
    sizes = part_sizes(num_classes, comm.world_size)
    low = sum(sizes[: comm.rank])
    own = slice(low * num_rows, (low + sizes[comm.rank]) * num_rows)
    # The own class and h others, even if each of them contributes all its m rows.
    found = shard.nearest(
        Queries(stored_ND[own], row_N[own], class_N[own]), min((number + 1) * num_rows, len(row_N))
    )
    distance_cM = found.distance_QK.reshape(sizes[comm.rank], -1)
    class_cM = (found.row_QK // num_rows).reshape(distance_cM.shape)
    # Empty entries are at infinity; put the own class there as well.
    own_c1 = torch.arange(low, low + sizes[comm.rank], device=class_cM.device)[:, None]
    distance_cM = distance_cM.masked_fill(class_cM == own_c1, torch.inf)
    # Collective: every rank contributes its part of the classes.
    return comm.all_gather_rows(
        _first_classes(distance_cM, class_cM, number), sizes, what=_NEIGHBORS
    )


def _first_classes(distance_cM: Tensor, class_cM: Tensor, number: int) -> Tensor:
    """Return the first `number` different classes of each row by (distance, class), else -1."""
    order = class_cM.argsort(dim=1, stable=True)
    order = order.gather(1, distance_cM.gather(1, order).argsort(dim=1, stable=True))
    distance_cM, class_cM = distance_cM.gather(1, order), class_cM.gather(1, order)
    # Keep a class's first (nearest) entry: sorted by class, entries that follow an equal one are
    # repeats.
    by_class = class_cM.argsort(dim=1, stable=True)
    sorted_classes = class_cM.gather(1, by_class)
    repeats = torch.zeros_like(sorted_classes, dtype=torch.bool)
    repeats[:, 1:] = sorted_classes[:, 1:] == sorted_classes[:, :-1]
    repeated = torch.zeros_like(repeats).scatter_(1, by_class, repeats)
    usable = ~repeated & distance_cM.isfinite()
    first = usable.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :number]
    chosen = torch.where(usable.gather(1, first), class_cM.gather(1, first), -1)
    missing = number - chosen.shape[1]
    return chosen if missing <= 0 else torch.nn.functional.pad(chosen, (0, missing), value=-1)
