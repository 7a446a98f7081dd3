"""Copying of a training plan's remote tar shards, and the check of the cache's size."""

from __future__ import annotations

import threading

import numpy as np

from dml_dist.config.schema import RunConfig
from dml_dist.data.index import Index, RemoteTarShards
from dml_dist.data.loader import plan_tar_shards
from dml_dist.data.plans import BatchPlan, ShuffledPlan
from dml_dist.parallel.comm import Comm
from dml_dist.runtime.progress import Emit, phase

_POLL_SECONDS = 2.0


def require_cache_room(index: Index, plan: BatchPlan, config: RunConfig) -> None:
    """Refuse a cache that is too small for the tar shards of a plan; nothing is copied.

    A shuffled plan needs the windows that batches in flight are made of, the largest tar shards
    taken together; any other plan needs all its tar shards at once.

    Raises:
        DataError: If it is too small, with the sizes.
    """
    if index.remote is None:
        return
    tar_shards = plan_tar_shards(index, plan)
    if not isinstance(plan, ShuffledPlan):
        index.remote.require_room(tar_shards, f"data.batches {config.data.batches.name}")
        return
    in_flight = max(1, config.data.loader_workers * config.data.prefetch)
    rows_per_shard = len(plan.rows) / len(tar_shards)
    seams = -(-in_flight * plan.global_batch_size // (plan.window * rows_per_shard))
    largest = tar_shards[np.argsort(index.remote.needed[tar_shards], kind="stable")[::-1]]
    index.remote.require_room(
        largest[: plan.window * (1 + int(seams))],
        f"data.batches.window {plan.window} with {in_flight} batches in flight",
    )


def fetch_before_training(index: Index, plan: BatchPlan, comm: Comm, emit: Emit) -> None:
    """Copy all tar shards of a plan that reaches any class at any time; every rank calls it.

    Ranks of one machine share the work. None waits in a collective for longer than some seconds,
    however long another one copies. For shuffled plans tar shards are copied during training.

    Raises:
        DmlDistError: If a tar shard cannot be copied, on all ranks.
    """
    if index.remote is None or isinstance(plan, ShuffledPlan):
        return
    tar_shards = plan_tar_shards(index, plan)
    # Each rank begins elsewhere, so that ranks of one machine rarely wait for the same file.
    own_first = np.roll(tar_shards, -(comm.rank * len(tar_shards) // comm.world_size))
    copying = _Copying(index.remote, own_first)
    copying.start()
    while True:
        copying.join(_POLL_SECONDS)
        is_alive = copying.is_alive()
        error, num_ready = (
            copying.error,
            copying.num_ready,
        )  # Read after is_alive: final if it ended.
        states = comm.gather_objects((is_alive, error is not None), what="copies of tar shards")
        emit(phase("fetch tar shards", num_ready, len(tar_shards)))
        if any(failed for _, failed in states) or not any(alive for alive, _ in states):
            comm.agree(error, what="copies of tar shards")
            return


class _Copying(threading.Thread):
    """Copies tar shards into the cache, without keeping them there."""

    def __init__(self, remote: RemoteTarShards, tar_shards: np.ndarray) -> None:
        super().__init__(daemon=True)
        self.remote = remote
        self.tar_shards: list[int] = tar_shards.tolist()
        self.num_ready = 0
        self.error: Exception | None = None

    def run(self) -> None:
        def ready(tar_shard: int) -> None:
            self.num_ready += 1

        try:
            self.remote.lease_all(self.tar_shards, ready)
            for tar_shard in self.tar_shards:
                self.remote.release(tar_shard)
        except Exception as error:
            self.error = error
