"""Launching: the same rank function in this process, under torchrun, or under Ray Train."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init, shutdown, topology_from_environment
from dml_dist.runtime.progress import Emit
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment

Value = TypeVar("Value")


def world_size_of(launch: LaunchConfig) -> int:
    """Return the number of ranks that a launcher will start, or has started."""
    match launch.launcher:
        case "ray":
            return launch.num_workers
        case "torchrun":
            return topology_from_environment().world_size
        case "inprocess":
            return 1


def available_gpus() -> int:
    """Return the number of GPUs of this machine."""
    return torch.cuda.device_count()


def uses_gpu(launch: LaunchConfig, num_ranks: int, cluster_gpus: int | None = None) -> bool:
    """Tell whether ranks compute on GPUs.

    Args:
        launch: How ranks are started.
        num_ranks: Number of ranks on this machine, or in the cluster.
        cluster_gpus: GPUs of the cluster `launch.address`; None counts those of this machine.

    Raises:
        TopologyError: If GPUs are asked for and there are too few, as far as is known.
    """
    available = available_gpus() if cluster_gpus is None else cluster_gpus
    is_known = launch.address is None or cluster_gpus is not None
    if launch.use_gpu == "yes" and is_known and available < num_ranks:
        where = f"in the cluster {launch.address}" if launch.address else "on this machine"
        raise TopologyError(
            f"launch.use_gpu: yes needs {num_ranks} GPUs {where}, it has {available}; "
            "lower launch.num_workers or set launch.use_gpu to auto or no"
        )
    return launch.use_gpu == "yes" or (launch.use_gpu == "auto" and available >= num_ranks > 0)


@contextmanager
def joined(launch: LaunchConfig) -> Iterator[Comm]:
    """The processes that run this command: torchrun's ranks, or this one alone."""
    if launch.launcher != "torchrun":
        yield Comm.single("cuda:0" if _alone_on_gpu(launch) else "cpu")
        return
    if "RANK" not in os.environ:
        raise ConfigError(
            "launch.launcher: torchrun needs a process that torchrun started, but its environment "
            "variables are not set; run `torchrun --nproc-per-node N -m dml_dist train CONFIG`"
        )
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device_type = "cuda" if uses_gpu(launch, ranks_here) else "cpu"
    comm = init(topology_from_environment(device_type), timeout_seconds=launch.timeout_seconds)
    try:
        yield comm
    finally:
        shutdown()


def on_main(comm: Comm, action: Callable[[], Value]) -> Value:
    """Call a function on rank 0 and give its result, or its error, to every rank."""
    error: Exception | None = None
    value: Any = None
    if comm.rank == 0:
        try:
            value = action()
        except Exception as caught:  # Raised again on every rank.
            error = caught
    comm.agree(error)
    return comm.broadcast_object(value)


def launch(assignment: Assignment, comm: Comm, emit: Emit, stop: StopRequest) -> dict[str, Any]:
    """Execute an assignment on all ranks and return what `run_rank` gives."""
    settings = assignment.config.launch
    if settings.launcher == "ray":
        from dml_dist.orchestration.ray_launch import announce, cluster, cluster_gpus
        from dml_dist.orchestration.ray_train import run_under_ray

        # Too few GPUs on this machine: before Ray starts.
        uses_gpu(settings, settings.fewest_workers)
        announce(settings, emit)
        with cluster(settings):
            use_gpu = uses_gpu(settings, settings.fewest_workers, cluster_gpus(settings))
            return run_under_ray(assignment, settings, use_gpu=use_gpu, emit=emit, stop=stop)
    # Imported here: a driver under Ray needs neither data nor models.
    from dml_dist.runtime.rank import run_rank

    return run_rank(assignment, comm.topology, comm, emit, stop)


def _alone_on_gpu(launch: LaunchConfig) -> bool:
    return launch.launcher == "inprocess" and uses_gpu(launch, 1)
