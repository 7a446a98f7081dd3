"""Data loaders for training and evaluation with a pool of loader workers.

Loader workers are forked: they start in a tenth of a second (forkserver and spawn take 3.5 to 6 s,
because each imports torch again), share the index's memory, and do not import the main module.
Forking a process that has threads (Ray's, OpenMP's) is safe only if the child takes no lock that
such a thread may hold. Ours reads files, decodes and resizes on one torch thread, which never
enters an OpenMP region, and touches neither CUDA nor Ray. Where a custom transform breaks this rule
and blocks, the time limit below ends the run with a message.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dml_dist.data.batches import Batch, BatchRequest, PlanSampler, ShardDataset
from dml_dist.data.decoded_cache import DecodedCache
from dml_dist.data.index import Index
from dml_dist.data.plans import BalancedPlan, BatchPlan, ShuffledPlan, evaluation_batches
from dml_dist.data.staging import StagedRequests
from dml_dist.data.systematic import StatefulPlan
from dml_dist.data.transforms import Transform
from dml_dist.errors import DmlDistError, LoaderLostError, RunError
from dml_dist.partition import part_bounds
from dml_dist.random_streams import Stream, seed_of
from dml_dist.topology import Topology

POLL_SECONDS = 1.0
"""How often a waiting rank checks that its loader workers are alive."""

LIMIT_SECONDS = 600.0
"""How long a rank waits for one batch; as long as ranks wait for each other by default."""

EVALUATION_AHEAD = 2
"""Remote tar shards that an evaluation, which reads one after the other, copies ahead."""


class BatchLoader:
    """Batches of one rank, in order; every iteration starts a pool of loader workers and ends it.

    Args:
        dataset: Turns requests into batches.
        requests: What to load; its length is the number of batches.
        workers: Loader workers; 0 loads in this process.
        prefetch: Batches that each loader worker prepares ahead.
        pin_memory: Whether batches are put into page-locked memory, for a CUDA rank.
        ahead: Remote tar shards that are copied in the background before they are needed.
        keep: Remote tar shards that are in the cache all the time.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        requests: Sampler[BatchRequest] | Sequence[BatchRequest],
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
        ahead: int = EVALUATION_AHEAD,
        keep: np.ndarray | None = None,
    ) -> None:
        self.dataset = dataset
        self.requests = requests
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory
        self.ahead = ahead
        self.keep = keep

    def __len__(self) -> int:
        return len(self.requests)  # type: ignore[arg-type]  # a Sampler of ours has a length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: If a sample is missing or damaged; it names the sample.
            RunError: If a loader worker died, no batch came within the time limit, or a remote tar
                shard did not come.
        """
        if not len(self):
            return
        staged = None
        if self.dataset.index.remote is not None:
            staged = StagedRequests(
                self.dataset.index, self.requests, ahead=self.ahead, keep=self.keep
            )
        iterator = None
        try:
            iterator = self._start(staged or self.requests)
            for _ in range(len(self)):
                item = self._next(iterator)
                if isinstance(item, StopIteration) and staged is not None and staged.error:
                    raise staged.error
                if isinstance(item, Exception):
                    raise item
                if staged is not None:
                    staged.received()
                yield item
        finally:
            # The last reference ends the pool now, even if an error keeps this frame for a while.
            del iterator
            if staged is not None:
                staged.close()

    def _start(self, requests: Iterable[BatchRequest]) -> Iterator[Batch | DmlDistError]:
        with warnings.catch_warnings(), _signal_handler_kept():
            # Python 3.12 warns of every fork in a process with threads; see the top of this file.
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
            # More loader workers than cores: the number is the user's, and torch knows of one rank.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            return iter(
                DataLoader[Batch | DmlDistError](
                    self.dataset,
                    batch_size=None,
                    sampler=requests,
                    num_workers=self.workers,
                    prefetch_factor=self.prefetch if self.workers else None,
                    timeout=POLL_SECONDS if self.workers else 0,
                    multiprocessing_context=_start_method() if self.workers else None,
                    pin_memory=self.pin_memory,
                    # The seed that a DataLoader draws for its workers must not come out of torch's
                    # global generator: the number of loaders opened would change a model's draws.
                    generator=torch.Generator().manual_seed(seed_of(Stream.LOADER_WORKERS, 0)),
                    worker_init_fn=_leave_process_group,
                )
            )

    def _next(self, iterator: Iterator[Batch | DmlDistError]) -> Batch | Exception:
        """Wait for the next item; a fault of the pool is returned as an error like any other."""
        limit = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < limit:
            try:
                return next(iterator)
            except Exception as error:
                # The DataLoader looks after its workers at the end of its short time limit.
                if str(error).startswith("DataLoader timed out"):
                    continue
                if not self.workers:
                    return error
                # The message holds the loader worker's traceback. This process's would keep the
                # pool alive until a garbage collection, which then takes 5 s to end it.
                error.__traceback__ = None
                return worker_death(error) or error
        return RunError(
            f"The {self.workers} loader workers returned no batch within {LIMIT_SECONDS:.0f} s; "
            "check that the storage of the tar shards responds, or set data.loader_workers to 0 "
            "to see where reading blocks"
        )


def worker_death(error: Exception) -> LoaderLostError | None:
    """Return what to tell the user if an error of a DataLoader means a dead loader worker.

    A batch that a dead worker still had to hand over ends in an error of its connection. Where
    another DataLoader was opened in the main thread before ours, its signal handler reports the
    death by a RuntimeError at any line, so that a training loop may meet it outside of the loader.
    """
    text = str(error).strip()
    from_pool = isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")
    # What a loader worker itself raises begins with "Caught".
    lost = isinstance(error, OSError | EOFError) and not text.startswith("Caught")
    if not from_pool and not lost:
        return None
    return LoaderLostError(
        f"all loader workers are required until the end, but one died ({text or 'end of file'}); "
        "most often the machine ran out of memory: lower data.loader_workers or data.prefetch"
    )


def train_loader(
    index: Index,
    plan: BatchPlan | StatefulPlan,
    transform: Transform,
    *,
    seed: int,
    topology: Topology,
    start_step: int,
    end_step: int,
    workers: int,
    prefetch: int,
    decoded_cache_mb: int = 0,
) -> BatchLoader:
    """Return this rank's parts of the global batches `start_step` .. `end_step - 1`.

    One pool of loader workers serves all epochs. The batches do not depend on `workers`.

    Args:
        index: Where images are.
        plan: The global batches, or a plan with the states that it follows.
        transform: Image transform.
        seed: Seed of the random views.
        topology: This rank.
        start_step: First global step, > 0 when a run is resumed.
        end_step: Global step after the last.
        workers: Loader workers of this rank; 0 loads in this process.
        prefetch: Batches that each loader worker prepares ahead.
        decoded_cache_mb: Limit in MB of the decoded images that this rank keeps; 0 keeps none.
    """
    requests = PlanSampler(plan, topology, start_step=start_step, end_step=end_step)
    decoded = None
    if decoded_cache_mb:
        decoded = DecodedCache(index, _plan_rows(plan), decoded_cache_mb * 10**6)
    return BatchLoader(
        ShardDataset(index, transform, seed, decoded),
        requests,
        workers=workers,
        prefetch=prefetch,
        pin_memory=topology.device_type == "cuda",
        ahead=plan.window if isinstance(plan, ShuffledPlan) else 0,
        keep=None if isinstance(plan, ShuffledPlan) else plan_tar_shards(index, plan),
    )


def plan_tar_shards(index: Index, plan: BatchPlan | StatefulPlan) -> np.ndarray:
    """Return the tar shards that batches of a plan are read from, rising."""
    return np.unique(index.tar_shard[_plan_rows(plan)])


def _plan_rows(plan: BatchPlan | StatefulPlan) -> np.ndarray:
    """Return the rows that any batch of a plan may hold."""
    if isinstance(plan, ShuffledPlan | BalancedPlan | StatefulPlan):
        return plan.rows
    return np.unique(np.concatenate(plan.epoch(0)))


def evaluation_loader(
    index: Index,
    rows: np.ndarray,
    transform: Transform,
    *,
    batch_size: int,
    topology: Topology,
    workers: int,
    prefetch: int,
) -> BatchLoader:
    """Return this rank's whole batches of `rows`, in order; none for a rank beyond their number.

    Args:
        index: Where images are.
        rows: (n,) int64 index rows, all ranks' together.
        transform: Image transform.
        batch_size: Images of one batch. Batches are fixed by it alone: ranks take contiguous runs
            of whole batches, because an embedding's last bits depend on its batch.
        topology: This rank.
        workers: Loader workers of this rank; 0 loads in this process.
        prefetch: Batches that each loader worker prepares ahead.
    """
    batches = evaluation_batches(len(rows), batch_size)
    first, end = part_bounds(len(batches), topology.world_size, topology.rank)
    requests = [
        BatchRequest(number, 0, rows[slice(*batches[number])]) for number in range(first, end)
    ]
    return BatchLoader(
        ShardDataset(index, transform),
        requests,
        workers=min(workers, len(requests)),
        prefetch=prefetch,
        pin_memory=topology.device_type == "cuda",
    )


@contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """Undo what a DataLoader does to the main thread: a handler that raises at any line.

    The handler reports dead workers at once; our own look after them, in every thread (Ray's
    training is not in the main one), reports them at one place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if handler is not None:  # None: installed from outside of Python
        signal.signal(signal.SIGCHLD, handler)


def _leave_process_group(worker: int) -> None:
    """Keep a loader worker out of the reach of signals to its rank's process group.

    Ctrl-C and torchrun signal the whole group; the rank needs its workers until it has stopped.
    """
    os.setpgrp()


def _start_method() -> str | None:
    """Return "fork" where the system has it (Linux), else the system's own way."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None
