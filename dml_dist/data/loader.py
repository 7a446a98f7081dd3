"""Batches for training and evaluation: plans in, tensors out, by a pool of loader workers.

Loader workers are forked: they start in a tenth of a second (forkserver and spawn take 3.5 to 6 s,
because each imports torch anew), share the index's memory, and ask nothing of the main module.
Forking a process that has threads (Ray's, OpenMP's) is safe only if the child takes no lock that
such a thread may hold. Ours reads files, decodes and resizes on one torch thread, which never
enters an OpenMP region, and touches neither CUDA nor Ray. Where a custom transform breaks this rule
and blocks, the time limit below ends the run with a message.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dml_dist.data.batches import Batch, BatchRequest, PlanSampler, ShardDataset
from dml_dist.data.index import Index
from dml_dist.data.plans import BatchPlan, evaluation_batches
from dml_dist.data.transforms import Transform
from dml_dist.errors import DmlDistError, RunError
from dml_dist.partition import part_bounds
from dml_dist.topology import Topology

POLL_SECONDS = 5.0
"""How often a waiting rank looks whether its loader workers are alive."""

LIMIT_SECONDS = 600.0
"""How long a rank waits for one batch; as long as ranks wait for each other by default."""


class BatchLoader:
    """Batches of one rank, in order; every iteration starts a pool of loader workers and ends it.

    Args:
        dataset: Turns requests into batches.
        requests: What to load; its length is the number of batches.
        workers: Loader workers; 0 loads in this process.
        prefetch: Batches that each loader worker prepares ahead.
        pin_memory: Whether batches are put into page-locked memory, for a CUDA rank.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        requests: Sampler[BatchRequest] | Sequence[BatchRequest],
        *,
        workers: int,
        prefetch: int,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.requests = requests
        self.workers = workers
        self.prefetch = prefetch
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.requests)  # type: ignore[arg-type]  # a Sampler of ours has a length

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: If a sample is missing or damaged; it names the sample.
            RunError: If a loader worker died, or no batch came within the time limit.
        """
        if not len(self):
            return
        iterator = self._start()
        for _ in range(len(self)):
            item = self._next(iterator)
            if isinstance(item, DmlDistError):
                raise item
            yield item

    def _start(self) -> Iterator[Batch | DmlDistError]:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork in a process with threads; see the top of this file.
            warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
            # More loader workers than cores: the number is the user's, and torch knows of one rank.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            return iter(
                DataLoader[Batch | DmlDistError](
                    self.dataset,
                    batch_size=None,
                    sampler=self.requests,
                    num_workers=self.workers,
                    prefetch_factor=self.prefetch if self.workers else None,
                    timeout=POLL_SECONDS if self.workers else 0,
                    multiprocessing_context=_start_method() if self.workers else None,
                    pin_memory=self.pin_memory,
                    # The seed that a DataLoader draws for its workers must not come out of torch's
                    # global generator: the number of loaders opened would change a model's draws.
                    generator=torch.Generator(),
                )
            )

    def _next(self, iterator: Iterator[Batch | DmlDistError]) -> Batch | DmlDistError:
        limit = time.monotonic() + LIMIT_SECONDS
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                # A short time limit makes the DataLoader look after its workers; without one it
                # notices a death only in the main thread, and Ray's training is not there.
                if not str(error).startswith("DataLoader timed out"):
                    death = worker_death(error)
                    if death is None:
                        raise
                    raise death from error
                if time.monotonic() > limit:
                    raise RunError(
                        f"a batch is required within {LIMIT_SECONDS:.0f} s, got none from "
                        f"{self.workers} loader workers; see whether the storage of "
                        "the tar shards answers, or set data.loader_workers to 0 to see where it "
                        "stays"
                    ) from error


def worker_death(error: RuntimeError) -> RunError | None:
    """Return what to tell the user if an error of a DataLoader means a dead loader worker.

    In the main thread a DataLoader reports the death of a worker by an exception at any line, so
    that a training loop may meet it outside of the loader.
    """
    text = str(error)
    if not text.startswith("DataLoader worker (pid"):
        return None
    return RunError(
        f"all loader workers are required until the end, but one died: {text.strip()}; most often "
        "the machine ran out of memory: lower data.loader_workers or data.prefetch"
    )


def train_loader(
    index: Index,
    plan: BatchPlan,
    transform: Transform,
    *,
    seed: int,
    topology: Topology,
    start_step: int,
    end_step: int,
    workers: int,
    prefetch: int,
) -> BatchLoader:
    """Return this rank's parts of the global batches `start_step` .. `end_step - 1`.

    One pool of loader workers serves all epochs. The batches do not depend on `workers`.

    Args:
        index: Where images are.
        plan: The global batches.
        transform: How images become tensors.
        seed: Seed of the random views.
        topology: This rank.
        start_step: First global step, > 0 when a run is resumed.
        end_step: Global step after the last.
        workers: Loader workers of this rank; 0 loads in this process.
        prefetch: Batches that each loader worker prepares ahead.
    """
    requests = PlanSampler(plan, topology, start_step=start_step, end_step=end_step)
    return BatchLoader(
        ShardDataset(index, transform, seed),
        requests,
        workers=workers,
        prefetch=prefetch,
        pin_memory=topology.device_type == "cuda",
    )


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
        transform: How images become tensors.
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


def _start_method() -> str | None:
    """Return "fork" where the system has it (Linux), else the system's own way."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None
