"""Exact Lloyd's k-means over the rows of all ranks; results do not depend on the number of ranks.

1. Centers are distinct rows, drawn by global row from a seed.
2. A row belongs to its nearest center in the exact distance of `search.exact`, ties to the lower
   center.
3. A center becomes the mean of its rows, rounded to float32. Coordinates are added as integers in
   units of 2^-s, s the largest integer with N (largest |x| + 1 unit) 2^s < 2^62: a sum of N of
   them cannot overflow int64, and integer sums do not depend on the order. A coordinate is off by
   at most half a unit, 2^-47 of the largest one for N = 60,000, far below a center's rounding.
4. Empty clusters, in increasing order, move to the rows farthest from their own center (ties to
   the lower row), among clusters of two rows or more. Rows at distance 0 are not used, and a
   cluster that finds no row keeps its center. So k may exceed the number of distinct rows: the
   surplus clusters stay empty.

Steps 2 to 4 are repeated until no row changes its cluster. If a row's center did not move, or came
closer, only centers that moved can become nearer to it. Other rows are compared with all centers.

Every rank holds all centers, as float32 in two copies, three during an update.

Legend: N rows of this rank, K centers, M of them, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.random_streams import Stream, generator_of
from dml_dist.search.exact import pair_distances
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.propose import Backend
from dml_dist.search.sharded import norm_bound, queries_per_block

_SUM_BITS = 62


@dataclass(frozen=True, eq=False)
class Clusters:
    """Result of k-means.

    Attributes:
        cluster_N: Cluster of each row of this rank, 0..k-1, (N,) int64.
        num_iterations: Number of center updates, the same on every rank.
        has_converged: Whether the last update changed no row's cluster.
        num_empty: Number of clusters without a row.
    """

    cluster_N: Tensor
    num_iterations: int
    has_converged: bool
    num_empty: int


def kmeans(
    vectors_ND: Tensor,
    sizes: tuple[int, ...],
    num_clusters: int,
    comm: Comm,
    *,
    seed: int,
    backend: Backend,
    memory_bytes: int,
    max_iterations: int = 20,
) -> Clusters:
    """Return the clusters of this rank's rows; every rank calls this.

    Args:
        vectors_ND: Stored float32 rows of this rank, (N, D).
        sizes: Number of rows of each rank.
        num_clusters: k, 1 .. number of all rows.
        comm: The ranks.
        seed: Seed of the initial centers.
        backend: Search backend; the clusters do not depend on it.
        memory_bytes: Bound on working memory in addition to rows and centers.
        max_iterations: Largest number of updates.

    Raises:
        ValueError: If `num_clusters` is out of range.
    """
    if not 1 <= num_clusters <= sum(sizes):
        raise ValueError(
            f"num_clusters must be 1 .. {sum(sizes)}, the number of rows, but is {num_clusters}"
        )
    run = _KMeans(vectors_ND, sizes, num_clusters, comm, backend, memory_bytes)
    run.draw(seed)
    num_iterations, has_converged = 0, False
    while num_iterations < max_iterations and not has_converged:
        run.update()
        has_converged = not run.assign()
        num_iterations += 1
    num_empty = int((run.counts() == 0).sum())
    return Clusters(run.cluster_N, num_iterations, has_converged, num_empty)


class _KMeans:
    """Centers, and this rank's rows with their clusters and exact distances."""

    def __init__(
        self,
        vectors_ND: Tensor,
        sizes: tuple[int, ...],
        num_clusters: int,
        comm: Comm,
        backend: Backend,
        memory_bytes: int,
    ) -> None:
        self._vectors_ND = vectors_ND
        self._comm = comm
        self._backend: Backend = backend
        self._memory_bytes = memory_bytes
        self._low = sum(sizes[: comm.rank])
        self._num_rows = sum(sizes)
        self._num_clusters = num_clusters
        self._radius = norm_bound(vectors_ND, comm)
        self._scale_bits = self._fixed_point()
        device = vectors_ND.device
        num_local = len(vectors_ND)
        self.cluster_N = torch.zeros(num_local, dtype=torch.int64, device=device)
        self._distance_N = torch.full((num_local,), torch.inf, dtype=torch.float64, device=device)
        self._centers_KD = torch.empty(0, device=device)
        self._has_moved_K = torch.ones(num_clusters, dtype=torch.bool, device=device)

    def draw(self, seed: int) -> None:
        """Draw the initial centers and assign every row to one; every rank calls this."""
        generator = generator_of(Stream.KMEANS_CENTERS, seed)
        row_K = torch.from_numpy(
            generator.choice(self._num_rows, self._num_clusters, replace=False)
        ).to(self.cluster_N.device)
        self._centers_KD = self._gather_rows(row_K)
        index_N = torch.arange(len(self.cluster_N), device=row_K.device)
        self._assign_nearest(index_N, torch.arange(self._num_clusters, device=row_K.device))

    def counts(self) -> Tensor:
        """Return the rows of each cluster over all ranks, (K,) int64."""
        local_K = torch.bincount(self.cluster_N, minlength=self._num_clusters)
        return self._comm.all_reduce_sum(local_K, what="k-means counts")

    def update(self) -> None:
        """Move each center to the mean of its rows; the same bits on every rank."""
        count_K = self.counts()
        before_KD = self._centers_KD
        self._centers_KD = before_KD.clone()
        order_N = self.cluster_N.argsort(stable=True)
        sorted_N = self.cluster_N[order_N]
        # A range of centers at a time, to bound the memory of the int64 sums.
        step = max(1, self._memory_bytes // 4 // (24 * max(1, before_KD.shape[1])))
        for low in range(0, self._num_clusters, step):
            high = min(low + step, self._num_clusters)
            first, last = torch.searchsorted(
                sorted_N, torch.tensor([low, high], device=sorted_N.device)
            ).tolist()
            sums_MD = self._sums(order_N[first:last], low, high)
            # Collective; all ranks loop over the same ranges. Integer sums are exact in any order.
            sums_MD = self._comm.all_reduce_sum(sums_MD, what="k-means sums")
            full_M = (count_K[low:high] > 0).nonzero()[:, 0]
            means_MD = sums_MD[full_M].to(torch.float64) / count_K[low:high][full_M, None]
            means_MD *= 2.0**-self._scale_bits
            self._centers_KD[low + full_M] = means_MD.to(torch.float32)
        self._refill(count_K)
        self._has_moved_K = (self._centers_KD != before_KD).any(dim=1)

    def assign(self) -> bool:
        """Assign every row to its nearest center; return whether any row of any rank changed."""
        before_N = self.cluster_N.clone()
        moved_M = self._has_moved_K.nonzero()[:, 0]
        unmoved_M = (~self._has_moved_K).nonzero()[:, 0]
        own_N = self._has_moved_K[before_N].nonzero()[:, 0]
        distance_N = self._distance_N
        self._distance_N = distance_N.clone()
        self._distance_N[own_N] = pair_distances(
            self._vectors_ND, own_N, self._centers_KD, self.cluster_N[own_N]
        )
        # See the module docstring: other centers can only win where the own one moved away.
        every_N = torch.arange(len(before_N), device=before_N.device)
        farther_N = (self._distance_N > distance_N).nonzero()[:, 0]
        self._assign_nearest(every_N, moved_M)
        self._assign_nearest(farther_N, unmoved_M)
        changed = (self.cluster_N != before_N).any().reshape(1).to(torch.int64)
        return bool(self._comm.all_reduce_max(changed, what="k-means changes"))

    def _assign_nearest(self, index_N: Tensor, center_M: Tensor) -> None:
        """Assign rows to the nearest of some centers (increasing) if it beats their own."""
        if not len(index_N) or not len(center_M):
            return
        shard = GalleryShard(
            self._centers_KD[center_M],
            center_M,
            torch.zeros_like(center_M),
            radius=self._radius,
            backend=self._backend,
            memory_bytes=self._memory_bytes,
        )
        step = queries_per_block(self._memory_bytes, 1, self._vectors_ND.shape[1], 1)
        for index in index_N.split(step):
            # Row -1: no center is excluded as the query itself.
            no_row = torch.full_like(index, -1)
            found = shard.nearest(Queries(self._vectors_ND[index], no_row, no_row), 1, num_extra=1)
            distance, center = found.distance_QK[:, 0], found.row_QK[:, 0]
            own, own_distance = self.cluster_N[index], self._distance_N[index]
            nearer = (distance < own_distance) | ((distance == own_distance) & (center < own))
            self.cluster_N[index] = torch.where(nearer, center, own)
            self._distance_N[index] = torch.where(nearer, distance, own_distance)

    def _sums(self, index_P: Tensor, low: int, high: int) -> Tensor:
        """Return the fixed-point sums of rows of centers low..high-1, (high - low, D) int64."""
        width = self._vectors_ND.shape[1]
        sums_MD = torch.zeros((high - low, width), dtype=torch.int64, device=index_P.device)
        for part in index_P.split(max(1, self._memory_bytes // 4 // (24 * max(1, width)))):
            scaled = self._vectors_ND[part].to(torch.float64) * 2.0**self._scale_bits
            sums_MD.index_add_(0, self.cluster_N[part] - low, scaled.round_().to(torch.int64))
        return sums_MD

    def _fixed_point(self) -> int:
        """Return s, the same on every rank."""
        vectors_ND = self._vectors_ND
        largest = vectors_ND.abs().amax() if vectors_ND.numel() else vectors_ND.new_zeros(())
        largest = self._comm.all_reduce_max(
            largest.to(torch.float64).reshape(1), what="k-means largest coordinate"
        )
        # |x| < 2^e and N < 2^n, so N (|x| + 1 unit) < 2^(n + e + 1) as long as a unit is below 2^e.
        exponent = math.frexp(float(largest))[1]
        return _SUM_BITS - 1 - exponent - self._num_rows.bit_length()

    def _refill(self, count_K: Tensor) -> None:
        """Move empty clusters to rows that are far from their center; every rank calls this."""
        empty_M = (count_K == 0).nonzero()[:, 0]
        if not len(empty_M):
            return
        usable_N = (count_K[self.cluster_N] > 1) & (self._distance_N > 0)
        index_N = usable_N.nonzero()[:, 0]
        # Stable, and indices increase: ties go to the lower row.
        order = self._distance_N[index_N].argsort(descending=True, stable=True)
        index_P = index_N[order[: len(empty_M)]].cpu().numpy()
        # Collective: all ranks see the same counts, so all return above or all get here.
        found = self._comm.gather_objects(
            (self._distance_N[index_P].cpu().numpy(), index_P + self._low),
            what="k-means far rows",
        )
        distance_P = np.concatenate([part for part, _ in found])
        row_P = np.concatenate([part for _, part in found])
        row_M = row_P[np.lexsort((row_P, -distance_P))[: len(empty_M)]]
        rows = torch.from_numpy(row_M).to(empty_M.device)
        self._centers_KD[empty_M[: len(rows)]] = self._gather_rows(rows)

    def _gather_rows(self, row_M: Tensor) -> Tensor:
        """Return stored rows by their global numbers, (M, D), on every rank. Collective."""
        local_M = row_M - self._low
        here_M = ((local_M >= 0) & (local_M < len(self._vectors_ND))).nonzero()[:, 0]
        rows_MD = self._vectors_ND.new_zeros((len(row_M), self._vectors_ND.shape[1]))
        rows_MD[here_M] = self._vectors_ND[local_M[here_M]]
        # Each row is on one rank, the others add zeros: the sum is exact.
        return self._comm.all_reduce_sum(rows_MD, what="k-means rows")
