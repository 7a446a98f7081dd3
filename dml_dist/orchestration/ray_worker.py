"""The function that Ray Train calls on every rank."""

from __future__ import annotations

import errno
import socket
import threading
import time
from typing import Any

from dml_dist.errors import DmlDistError, LoaderLostError, PeerLostError, RunError
from dml_dist.orchestration.ray_mailbox import heartbeat
from dml_dist.orchestration.ray_private import silence_reports
from dml_dist.runtime.progress import Event, note
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment, fatal_event
from dml_dist.topology import Topology

# How long a rank that lost its peers waits for the error that one of them ended with.
_SECONDS_FOR_A_REASON = 5.0
_SECONDS_BETWEEN_QUESTIONS = 1.0
# What a restart cannot fix: the disk is full, or may not be written to.
_FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def ray_rank(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Run this rank's share of an assignment.

    An error that a restart cannot fix (bad data, a non-finite loss, a full disk) is sent to the
    driver and the function returns: a raised one makes Ray restart all ranks. A rank that only
    lost its peers first asks whether one of them sent such an error.
    """
    import ray
    from ray import train

    from dml_dist.parallel.process_group import init, shutdown
    from dml_dist.runtime.rank import run_rank

    silence_reports()
    context = train.get_context()
    mailbox = settings["mailbox"]
    if ray.get(mailbox.fatal.remote()) is not None:
        return None
    device = train.torch.get_device()
    topology = Topology(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        device=str(device),
        node=f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
    )

    def emit(event: Event) -> None:
        mailbox.push.remote(event)

    try:
        assignment = Assignment.from_json(settings["assignment"])
        timeout = assignment.config.launch.timeout_seconds
        comm = init(topology, timeout_seconds=timeout)
        stop = StopRequest()
        if assignment.config.launch.address is not None:
            _stop_when_preempted(topology, stop)
        node = ray.get_runtime_context().get_node_id()
        with heartbeat(mailbox, topology.rank, node, stop):
            return run_rank(assignment, topology, comm, emit, stop)
    except PeerLostError as error:
        if ray.get(mailbox.fatal.remote()) is None:
            emit(note(f"lost a rank: {error}"))
        deadline = time.monotonic() + _SECONDS_FOR_A_REASON
        while time.monotonic() < deadline:
            if ray.get(mailbox.fatal.remote()) is not None:
                return None
            time.sleep(0.1)
        raise
    except LoaderLostError as error:
        emit(note(f"rank {topology.rank} of {topology.world_size}: {error}"))
        raise
    except (DmlDistError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in _FINAL:
                raise
            error = _disk_error(error)
        ray.get(mailbox.push.remote(fatal_event(error, topology.rank)))
        shutdown()  # The other ranks' collectives end now instead of at their timeout.
        return None


def _stop_when_preempted(topology: Topology, stop: StopRequest) -> None:
    """Ask to stop, from a thread, when Ray is told that this rank's node ends soon.

    Each question waits for all ranks, so every rank asks equally often. Those that still wait when
    others have ended end with their process.
    """
    from ray import train

    def work() -> None:
        while (info := train.get_preemption_info()) is None:
            time.sleep(_SECONDS_BETWEEN_QUESTIONS)
        if topology.rank in info.preempted_ranks:
            stop.reason = f"the node {topology.node} is preempted"

    threading.Thread(target=work, daemon=True).start()


def _disk_error(error: OSError) -> RunError:
    return RunError(
        f"the run's folder could not be written: {error}; check disk space and permissions, then "
        "continue with --resume"
    )
