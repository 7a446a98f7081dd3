"""Joining the ranks of a run: gloo on CPU, NCCL beside gloo on GPU, a timeout always."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dml_dist.errors import RunError, TopologyError
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology

# torch is asked first: its own messages tell more.
_SECONDS_FOR_TORCH = 2.0


def topology_from_environment(
    device_type: str = "cpu", environment: Mapping[str, str] = os.environ
) -> Topology:
    """Return the place that torchrun, or whoever set its variables, gave this process.

    Args:
        device_type: "cpu", or "cuda" for the GPU of this rank's number on its machine.
        environment: RANK, WORLD_SIZE and LOCAL_RANK; without any of them: one process.

    Raises:
        TopologyError: If some of the variables are missing or are no integers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environment[name] for name in names if name in environment}
    if not given:
        return Topology(device=device_type if device_type == "cpu" else f"{device_type}:0")
    try:
        rank, world_size, local_rank = (int(given[name]) for name in names)
    except (KeyError, ValueError):
        raise TopologyError(
            f"required integers in the environment variables {', '.join(names)}, got {given}; "
            "start every rank through torchrun"
        ) from None
    device = device_type if device_type == "cpu" else f"{device_type}:{local_rank}"
    return Topology(rank, world_size, local_rank, device)


def init(
    topology: Topology,
    *,
    init_method: str = "env://",
    timeout_seconds: float = 600.0,
) -> Comm:
    """Join the ranks of a run and return their Comm.

    Ranks that a launcher has joined already (Ray Train does) keep their process group. One rank
    needs none.

    Args:
        topology: This rank's place.
        init_method: Where ranks meet: "env://" (torchrun's variables), "tcp://host:port" or
            "file:///path".
        timeout_seconds: How long joining, and each collective, waits for the others; > 0.

    Raises:
        RunError: If not all ranks came in time.
        TopologyError: If ranks were joined already in another number or order.
    """
    if timeout_seconds <= 0:
        raise ValueError(f"required timeout_seconds > 0, got {timeout_seconds}")
    if topology.device_type == "cuda":
        torch.cuda.set_device(topology.device)
    if dist.is_initialized():
        joined = (dist.get_rank(), dist.get_world_size())
        if joined != (topology.rank, topology.world_size):
            raise TopologyError(
                f"required rank {topology.rank} of {topology.world_size}, got a process group in "
                f"which this is rank {joined[0]} of {joined[1]}; give the launcher's number of "
                "ranks"
            )
        return Comm(dist.group.WORLD, topology, timeout_seconds=timeout_seconds)
    if topology.world_size == 1:
        return Comm(None, topology, timeout_seconds=timeout_seconds)
    try:
        dist.init_process_group(
            # Collectives on CPU tensors (objects, flags) go through gloo on GPU runs, too.
            "cpu:gloo,cuda:nccl" if topology.device_type == "cuda" else "gloo",
            store=_meet(init_method, topology, timeout_seconds),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {topology.rank} of {topology.world_size}: required all ranks at {init_method} "
            f"within {timeout_seconds:g} s, got: {error}; start every rank with the same address "
            "and number of ranks, and look at the output of the others"
        ) from error
    return Comm(dist.group.WORLD, topology, timeout_seconds=timeout_seconds)


def _meet(init_method: str, topology: Topology, timeout_seconds: float) -> dist.Store:
    """Return the store through which ranks find each other.

    torch waits for ever, whatever the time limit, where something else took rank 0's port, takes
    connections and never says a word. So it waits in a thread.

    Raises:
        RuntimeError: If nothing answers in time, or as torch does.
    """
    limit = timedelta(seconds=timeout_seconds)
    found: list[dist.Store | Exception] = []

    def work() -> None:
        try:
            place = rendezvous(init_method, topology.rank, topology.world_size, timeout=limit)
            found.append(next(place)[0])
        except Exception as error:  # Raised again below.
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_seconds + _SECONDS_FOR_TORCH)
    if not found:
        raise RuntimeError("no word from rank 0, whose port another program may have taken")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def shutdown() -> None:
    """Leave the process group, if there is one; the launcher that made one does so itself."""
    if dist.is_initialized():
        dist.destroy_process_group()
