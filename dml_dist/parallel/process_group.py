"""Joining the ranks of a run: gloo on CPU, NCCL and gloo on GPU, a timeout always."""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dml_dist.errors import RunError, TopologyError
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology

# Longer than torch's own timeout, whose messages say more.
_SECONDS_FOR_TORCH = 2.0


def topology_from_environment(
    device_type: str = "cpu", environment: Mapping[str, str] = os.environ
) -> Topology:
    """Return the place that torchrun's environment variables give this process.

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
            f"The environment variables {', '.join(names)} must all be integers, but they are "
            f"{given}. Start every rank with torchrun."
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
        RunError: If not all ranks join in time.
        TopologyError: If there is a process group with another number or order of ranks.
    """
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be positive, but is {timeout_seconds}.")
    if topology.device_type == "cuda":
        torch.cuda.set_device(topology.device)
    if dist.is_initialized():
        joined = (dist.get_rank(), dist.get_world_size())
        if joined != (topology.rank, topology.world_size):
            raise TopologyError(
                f"This process should be rank {topology.rank} of {topology.world_size}, but in "
                f"the process group it is rank {joined[0]} of {joined[1]}. Configure as many "
                "ranks as the launcher started."
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
            f"rank {topology.rank} of {topology.world_size}: not all ranks met at {init_method} "
            f"within {timeout_seconds:g} s: {error}. Start every rank with the same address and "
            "number of ranks, and check the output of the others."
        ) from error
    return Comm(dist.group.WORLD, topology, timeout_seconds=timeout_seconds)


def bind_store() -> None:
    """Let rank 0's store listen at the address that the other ranks know, and at no other.

    torch listens on all interfaces, and whoever reaches a store can read and change what ranks
    tell each other there. A host's name stays with torch, since it may mean 127.0.0.1 here and
    another address elsewhere; so does torchrun's store, which torchrun itself opens.
    """
    # Not `import ... as`, which finds the function of the same name.
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    create = getattr(module, "_create_c10d_store", None)
    if create is None or getattr(create, "binds", False):
        return  # Another version of torch, which listens as it likes; or done before.

    def bound(
        hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, *more: Any
    ) -> dist.Store:
        listener = (
            _listener(hostname, port) if rank == 0 and not _is_agents(hostname, port) else None
        )
        if listener is None:
            return create(hostname, port, rank, world_size, timeout, *more)
        return dist.TCPStore(
            hostname,
            port,
            world_size,
            True,
            timeout,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )

    bound.binds = True  # type: ignore[attr-defined]
    module._create_c10d_store = bound


def _is_agents(hostname: str, port: int) -> bool:
    """Tell whether torchrun serves the store at this place."""
    place = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return uses_agent and place == (hostname, str(port))


def _listener(hostname: str, port: int) -> socket.socket | None:
    """Return a socket that listens at an address, None where torch must find out by itself."""
    try:
        is_v6 = hostname != "localhost" and ipaddress.ip_address(hostname).version == 6
        return socket.create_server(
            (hostname, port), family=socket.AF_INET6 if is_v6 else socket.AF_INET
        )
    except (OSError, ValueError):  # Another machine's, in use by an earlier store, or a name.
        return None


def _meet(init_method: str, topology: Topology, timeout_seconds: float) -> dist.Store:
    """Return the store through which ranks find each other.

    torch ignores its timeout where another program holds rank 0's port, accepts connections and
    never answers. So torch waits in a thread.

    Raises:
        RuntimeError: If nothing answers in time, or as torch does.
    """
    limit = timedelta(seconds=timeout_seconds)
    found: list[dist.Store | Exception] = []

    def work() -> None:
        try:
            bind_store()
            place = rendezvous(init_method, topology.rank, topology.world_size, timeout=limit)
            found.append(next(place)[0])
        except Exception as error:  # Raised again below.
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_seconds + _SECONDS_FOR_TORCH)
    if not found:
        raise RuntimeError("rank 0 does not answer; another program may hold its port")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def shutdown() -> None:
    """Leave the process group, if there is one; the launcher that made one does so itself."""
    if dist.is_initialized():
        dist.destroy_process_group()
