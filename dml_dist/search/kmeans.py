"""Lloyd's k-means over the rows of all ranks, exact and the same for any number of ranks.

1. Centres are distinct rows, drawn by global row from a seed.
2. A row belongs to its nearest centre in the exact distance of `search.exact`, ties to the lower
   centre.
3. A centre becomes the mean of its rows, rounded to float32. Coordinates are added as integers in
   units of 2^-s, s the largest whole number with N (largest |x| + 1 unit) 2^s < 2^62: no sum of N
   of them overflows int64, and integers add to the same sum in any order. A coordinate is rounded
   by half a unit, 2^-47 of the largest one for N = 60,000, far less than a centre is.
4. Empty clusters, in rising order, take as centres the rows that are farthest from their own
   centre (ties to the lower row), out of clusters of two rows or more; a row at distance 0 is
   taken by none, and a cluster that finds no row keeps its centre. So k may exceed the number of
   distinct rows: the clusters that are too many stay empty.

Steps 2 to 4 are repeated until no row changes its centre. Only centres that moved can take a row
away from a centre that did not move or came closer: other rows alone are compared with all
centres.

Every rank holds all centres, as float32 in two copies, and one more while they change.

Legend: N rows of this rank, K centres, M of them, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.search.exact import pair_distances
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.propose import Backend
from dml_dist.search.sharded import norm_bound, queries_per_block

# Keeps the stream of drawn centres apart from other streams of the same seed.
_STREAM = 0x4B4D454E
_SUM_BITS = 62


@dataclass(frozen=True, eq=False)
class Clusters:
    """Where k-means left the rows.

    Attributes:
        cluster_N: Cluster of each row of this rank, 0..k-1, (N,) int64.
        num_iterations: Updates of the centres that were carried out, the same on every rank.
        has_converged: Whether the last update changed no row's centre.
        num_empty: Clusters without a row at the end.
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
        sizes: Rows of each rank.
        num_clusters: k, 1 .. number of all rows.
        comm: The ranks.
        seed: Seed of the first centres.
        backend: What proposes centres; the clusters do not depend on it.
        memory_bytes: Bound on working memory beside rows and centres.
        max_iterations: Largest number of updates.

    Raises:
        ValueError: If `num_clusters` is out of range.
    """
    if not 1 <= num_clusters <= sum(sizes):
        raise ValueError(f"required 1 <= num_clusters <= {sum(sizes)} rows, got {num_clusters}")
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
    """Centres, and this rank's rows with their clusters and exact distances."""

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
        """Choose the first centres and give every row to one."""
        name = np.random.SeedSequence(seed, spawn_key=(_STREAM,))
        generator = np.random.Generator(np.random.Philox(name))
        row_K = torch.from_numpy(
            generator.choice(self._num_rows, self._num_clusters, replace=False)
        ).to(self.cluster_N.device)
        self._centers_KD = self._rows_of_all(row_K)
        index_N = torch.arange(len(self.cluster_N), device=row_K.device)
        self._take_nearest(index_N, torch.arange(self._num_clusters, device=row_K.device))

    def counts(self) -> Tensor:
        """Return the rows of each cluster over all ranks, (K,) int64."""
        local_K = torch.bincount(self.cluster_N, minlength=self._num_clusters)
        return self._comm.all_reduce_sum(local_K, what="k-means counts")

    def update(self) -> None:
        """Make each centre the mean of its rows; every rank gets the same bits."""
        count_K = self.counts()
        before_KD = self._centers_KD
        self._centers_KD = before_KD.clone()
        order_N = self.cluster_N.argsort(stable=True)
        sorted_N = self.cluster_N[order_N]
        # Sums of a range of centres at a time: int64, of this rank and of all.
        step = max(1, self._memory_bytes // 4 // (24 * max(1, before_KD.shape[1])))
        for low in range(0, self._num_clusters, step):
            high = min(low + step, self._num_clusters)
            first, last = torch.searchsorted(
                sorted_N, torch.tensor([low, high], device=sorted_N.device)
            ).tolist()
            sums_MD = self._sums(order_N[first:last], low, high)
            sums_MD = self._comm.all_reduce_sum(sums_MD, what="k-means sums")
            full_M = (count_K[low:high] > 0).nonzero()[:, 0]
            means_MD = sums_MD[full_M].to(torch.float64) / count_K[low:high][full_M, None]
            means_MD *= 2.0**-self._scale_bits
            self._centers_KD[low + full_M] = means_MD.to(torch.float32)
        self._refill(count_K)
        self._has_moved_K = (self._centers_KD != before_KD).any(dim=1)

    def assign(self) -> bool:
        """Give every row to its nearest centre; return whether any row of any rank changed."""
        before_N = self.cluster_N.clone()
        moved_M = self._has_moved_K.nonzero()[:, 0]
        still_M = (~self._has_moved_K).nonzero()[:, 0]
        own_N = self._has_moved_K[before_N].nonzero()[:, 0]
        distance_N = self._distance_N
        self._distance_N = distance_N.clone()
        self._distance_N[own_N] = pair_distances(
            self._vectors_ND, own_N, self._centers_KD, self.cluster_N[own_N]
        )
        every_N = torch.arange(len(before_N), device=before_N.device)
        farther_N = (self._distance_N > distance_N).nonzero()[:, 0]
        self._take_nearest(every_N, moved_M)
        self._take_nearest(farther_N, still_M)
        changed = (self.cluster_N != before_N).any().reshape(1).to(torch.int64)
        return bool(self._comm.all_reduce_max(changed, what="k-means changes"))

    def _take_nearest(self, index_N: Tensor, center_M: Tensor) -> None:
        """Give rows to the nearest of some centres (rising) where it precedes their own."""
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
            # No centre is a query's own row.
            nobody = torch.full_like(index, -1)
            found = shard.nearest(Queries(self._vectors_ND[index], nobody, nobody), 1, spare=1)
            distance, center = found.distance_QK[:, 0], found.row_QK[:, 0]
            own, own_distance = self.cluster_N[index], self._distance_N[index]
            nearer = (distance < own_distance) | ((distance == own_distance) & (center < own))
            self.cluster_N[index] = torch.where(nearer, center, own)
            self._distance_N[index] = torch.where(nearer, distance, own_distance)

    def _sums(self, index_P: Tensor, low: int, high: int) -> Tensor:
        """Return the fixed-point sums of rows of centres low..high-1, (high - low, D) int64."""
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
        # x < 2^e and N <= 2^n: N (x + 1 unit) <= 2^(n + e + 1) units of 1 for units below 2^e.
        exponent = math.frexp(float(largest))[1]
        return _SUM_BITS - 1 - exponent - self._num_rows.bit_length()

    def _refill(self, count_K: Tensor) -> None:
        """Give empty clusters rows that are far from their centre."""
        empty_M = (count_K == 0).nonzero()[:, 0]
        if not len(empty_M):
            return
        usable_N = (count_K[self.cluster_N] > 1) & (self._distance_N > 0)
        index_N = usable_N.nonzero()[:, 0]
        # By rising row within equal distances, as the indices rise.
        order = self._distance_N[index_N].argsort(descending=True, stable=True)
        index_P = index_N[order[: len(empty_M)]].cpu().numpy()
        found = self._comm.gather_objects(
            (self._distance_N[index_P].cpu().numpy(), index_P + self._low),
            what="k-means far rows",
        )
        distance_P = np.concatenate([part for part, _ in found])
        row_P = np.concatenate([part for _, part in found])
        row_M = row_P[np.lexsort((row_P, -distance_P))[: len(empty_M)]]
        rows = torch.from_numpy(row_M).to(empty_M.device)
        self._centers_KD[empty_M[: len(rows)]] = self._rows_of_all(rows)

    def _rows_of_all(self, row_M: Tensor) -> Tensor:
        """Return stored rows by their global numbers, (M, D), on every rank."""
        local_M = row_M - self._low
        here_M = ((local_M >= 0) & (local_M < len(self._vectors_ND))).nonzero()[:, 0]
        rows_MD = self._vectors_ND.new_zeros((len(row_M), self._vectors_ND.shape[1]))
        rows_MD[here_M] = self._vectors_ND[local_M[here_M]]
        # A row is on one rank: adding zeros keeps its value.
        return self._comm.all_reduce_sum(rows_MD, what="k-means rows")
