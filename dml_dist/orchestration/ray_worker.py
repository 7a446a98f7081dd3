"""The function that Ray Train calls on every rank."""

from __future__ import annotations

import logging
import time
from typing import Any

from dml_dist.errors import DmlDistError, PeerLostError
from dml_dist.orchestration.progress import Event
from dml_dist.orchestration.tasks import Assignment, fatal_event

# A rank that lost its peers waits this long for one of them to say that it gave up on purpose.
_SECONDS_FOR_A_REASON = 5.0


def ray_rank(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Run this rank's share of an assignment.

    An error that a restart cannot mend (bad data, a non-finite loss) is told to the driver and the
    function returns: a raised one would make Ray restart all ranks. A rank that merely lost its
    peers asks first whether one of them gave up in that way.
    """
    import ray
    from ray import train

    from dml_dist.orchestration.rank import run_rank
    from dml_dist.parallel.process_group import init, shutdown
    from dml_dist.topology import Topology

    _quiet()
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
    )

    def emit(event: Event) -> None:
        mailbox.push.remote(event)

    try:
        assignment = Assignment.from_json(settings["assignment"])
        timeout = assignment.config.launch.timeout_seconds
        comm = init(topology, timeout_seconds=timeout)
        return run_rank(assignment, topology, comm, emit)
    except PeerLostError:
        deadline = time.monotonic() + _SECONDS_FOR_A_REASON
        while time.monotonic() < deadline:
            if ray.get(mailbox.fatal.remote()) is not None:
                return None
            time.sleep(0.1)
        raise
    except DmlDistError as error:
        ray.get(mailbox.push.remote(fatal_event(error, topology.rank)))
        shutdown()  # The other ranks' collectives end now instead of at their timeout.
        return None


def _quiet() -> None:
    """Silence what Ray Train logs on every report at INFO, past its own logging configuration."""
    import ray.train.v2._internal.execution.context as ray_context

    logging.getLogger(ray_context.__file__).setLevel(logging.WARNING)
