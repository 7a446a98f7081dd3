"""Candidates for the k nearest rows of a gallery shard, by Faiss or by blocked products.

Both return the rows with the smallest float32 approximate distances, and the largest distance among
them, which no omitted row is below. The candidates may differ between backends, thread counts and
block shapes; the final results do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from dml_dist.errors import ConfigError
from dml_dist.search.approximate import Approximation, Thresholds

Backend = Literal["faiss", "torch"]

_GALLERY_TILE = {"cpu": 2048, "cuda": 32768}
# A float32 product and its copy in topk.
_BYTES_PER_PRODUCT = 8


@dataclass(frozen=True, eq=False)
class Proposals:
    """Candidates of each query.

    Attributes:
        position_QK: Rows of the gallery shard, int64, in no particular order.
        farthest_Q: Lower bound on the scaled approximate distance of omitted rows, float64; inf if
            no row is omitted.
    """

    position_QK: Tensor
    farthest_Q: Tensor


def resolve_backend(name: str, device: torch.device) -> Backend:
    """Return the backend for `name` ("auto", "faiss" or "torch") on a device.

    Raises:
        ConfigError: If the name is unknown, or names Faiss and it is not installed.
    """
    if name not in ("auto", "faiss", "torch"):
        raise ConfigError(
            f"evaluation.backend {name!r} is unknown; choose one of auto, faiss, torch"
        )
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        if name == "auto":
            return "torch"
        raise ConfigError(
            f"evaluation.backend faiss: the package faiss cannot be imported ({error}); "
            "install faiss-gpu or faiss-cpu, or choose backend torch"
        ) from error
    return "faiss"


def propose(
    gallery: Approximation,
    queries: Thresholds,
    num_candidates: int,
    backend: Backend,
    memory_bytes: int,
) -> Proposals:
    """Return `num_candidates` rows near each query, or every row when there are no more.

    Args:
        gallery: The shard's float32 rows, N of them.
        queries: The queries' float32 rows, Q of them.
        num_candidates: K, >= 1.
        backend: "faiss" or "torch".
        memory_bytes: Bound on this rank's working memory, half of it for products; Faiss chooses
            its own block sizes.
    """
    num_rows, num_queries = gallery.rows_ND.shape[0], queries.rows_QD.shape[0]
    if num_candidates >= num_rows:
        every = torch.arange(num_rows, device=gallery.rows_ND.device)
        return Proposals(
            every.expand(num_queries, num_rows), torch.full_like(queries.norm_Q, torch.inf)
        )
    match backend:
        case "faiss":
            return _propose_faiss(gallery, queries, num_candidates)
        case "torch":
            device = gallery.rows_ND.device.type
            tile = gallery_tile(device, num_queries, memory_bytes)
            return _propose_torch(gallery, queries, num_candidates, tile)
        case _:
            assert_never(backend)


def gallery_tile(device_type: str, num_queries: int, memory_bytes: int) -> int:
    """Return how many gallery rows are multiplied with `num_queries` queries at once, >= 1."""
    room = memory_bytes // 2 // (_BYTES_PER_PRODUCT * max(1, num_queries))
    return max(1, min(_GALLERY_TILE.get(device_type, 2048), room))


def _propose_faiss(gallery: Approximation, queries: Thresholds, num_candidates: int) -> Proposals:
    import faiss

    # Faiss links its own OpenMP, which torch.set_num_threads does not control.
    faiss.omp_set_num_threads(torch.get_num_threads())
    device = gallery.rows_ND.device
    distance_QK, position_QK = faiss.knn(
        queries.rows_QD.cpu().numpy(),
        gallery.rows_ND.cpu().numpy(),
        num_candidates,
        metric=faiss.METRIC_L2,
    )
    farthest_Q = torch.from_numpy(distance_QK[:, -1].astype("float64"))
    return Proposals(torch.from_numpy(position_QK).to(device), farthest_Q.to(device))


def _propose_torch(
    gallery: Approximation, queries: Thresholds, num_candidates: int, tile: int
) -> Proposals:
    num_rows = gallery.rows_ND.shape[0]
    best: tuple[Tensor, Tensor] | None = None
    for low in range(0, num_rows, tile):
        high = min(low + tile, num_rows)
        block = gallery.partial_distances(queries.rows_QD, low, high)
        values, positions = block.topk(
            min(num_candidates, high - low), dim=1, largest=False, sorted=False
        )
        positions += low
        if best is not None:
            values = torch.cat([best[0], values], dim=1)
            positions = torch.cat([best[1], positions], dim=1)
            values, kept = values.topk(
                min(num_candidates, values.shape[1]), dim=1, largest=False, sorted=False
            )
            positions = positions.gather(1, kept)
        best = values, positions
    assert best is not None, "an empty shard has no candidates"
    return Proposals(best[1], best[0].amax(dim=1).to(torch.float64) + queries.square_Q)
