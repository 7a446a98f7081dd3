"""The start of the training processes: its entry in run.json, and room for fewer ranks."""

from __future__ import annotations

import math
import os

import torch

from dml_dist.config.schema import RunConfig
from dml_dist.errors import TopologyError
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.context import RunContext
from dml_dist.runtime.progress import note
from dml_dist.runtime.tasks import Assignment
from dml_dist.topology import Topology
from dml_dist.train.run_plan import RunPlan
from dml_dist.train.state import resolve_precision


def begin_attempt(
    assignment: Assignment, folder: RunFolder, plan: RunPlan, context: RunContext
) -> int:
    """Record the attempt on rank 0; return its number on every rank.

    Raises:
        TopologyError: If proxies would not fit into memory on the fewest ranks that an elastic run
            may go on with.
    """
    topology, comm = context.topology, context.comm
    nodes = comm.gather_objects(topology.node, what="names of the nodes")
    _check_fewest(plan, context)
    attempt = 0
    if topology.is_main:
        attempt = folder.begin_attempt(
            world_size=topology.world_size,
            launcher=context.config.launch.launcher,
            device=f"{topology.world_size} x {_device_name(topology)}",
            command=assignment.command,
            changes=assignment.changes,
            nodes=tuple(nodes),
            reason=assignment.reason,
        )
        coverage = context.batch_plan().coverage(0)
        facts = [*plan.describe(), ("images seen in an epoch", f"{coverage:.2%}")]
        folder.add_facts(dict(facts))
        if attempt > 1:
            why = f" ({assignment.reason})" if assignment.reason else ""
            context.emit(note(f"attempt {attempt} of this run{why}"))
    return int(comm.broadcast_object(attempt, what="number of the attempt"))


def _device_name(topology: Topology) -> str:
    if topology.device_type == "cuda":
        return torch.cuda.get_device_name(topology.device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _check_fewest(plan: RunPlan, context: RunContext) -> None:
    """Check the memory of proxies on `launch.fewest_workers`; every rank calls it."""
    config, topology = context.config, context.topology
    launch = config.launch
    if launch.launcher != "ray" or launch.fewest_workers >= topology.world_size:
        return
    needed = bytes_of_proxies(plan, config, launch.fewest_workers)
    limit = _memory_of_a_rank(topology)
    error = None
    if needed > limit:
        enough = math.ceil(launch.fewest_workers * needed / limit)
        error = TopologyError(
            f"launch.min_workers is {launch.fewest_workers}: on so few ranks the proxies of a rank "
            f"take {needed / 2**30:,.1f} GiB with gradients and optimiser state, but a rank on the "
            f"node {topology.node} has {limit / 2**30:,.1f} GiB. Set launch.min_workers to at "
            f"least {enough:,}"
        )
    context.comm.agree(error, what="memory of the fewest ranks")


def bytes_of_proxies(plan: RunPlan, config: RunConfig, world_size: int) -> int:
    """Return the bytes of a rank's proxies with gradients and optimiser state.

    Without the state of a custom optimiser, which is unknown.
    """
    rows = sum(plan.proxy_rows)
    dtype = resolve_precision(config.train.precision, "cpu").dtype
    gradients = rows * config.model.embedding_size * dtype.itemsize
    values = gradients if plan.proxy_bytes is None else sum(plan.proxy_bytes)
    return math.ceil((values + gradients) / world_size)


def _memory_of_a_rank(topology: Topology) -> int:
    """Return the bytes of a rank's GPU, or its share of the memory of its machine."""
    if topology.device_type == "cuda":
        return int(torch.cuda.mem_get_info(topology.device)[1])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here
