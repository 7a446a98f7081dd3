"""The sbatch script of a job."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from dml_dist.errors import TopologyError
from dml_dist.jobs.slurm_config import SlurmTargetConfig
from dml_dist.jobs.target import JobRequest


@dataclass(frozen=True)
class Shape:
    """What a job asks for.

    Attributes:
        nodes: Number of nodes.
        cpus: CPUs of each node.
        gpus: GPUs of each node.
    """

    nodes: int
    cpus: int
    gpus: int


def shape_of(config: SlurmTargetConfig, request: JobRequest) -> Shape:
    """Return the nodes that a request needs.

    Raises:
        TopologyError: If its ranks do not fit the nodes of the settings.
    """
    ranks = request.max_workers
    per_node = config.ranks_per_node or math.ceil(ranks / (config.nodes or 1))
    nodes = config.nodes or math.ceil(ranks / per_node)
    if nodes * per_node < ranks:
        raise TopologyError(
            f"{ranks} ranks do not fit {nodes} nodes with {per_node} ranks each (nodes and "
            "ranks_per_node of the SLURM target); raise one of them or lower launch.num_workers"
        )
    needed = math.ceil(request.cpus_per_rank * per_node)
    cpus = needed if config.cpus_per_node is None else config.cpus_per_node
    if cpus < needed:
        raise TopologyError(
            f"{per_node} ranks of {request.cpus_per_rank:g} CPUs do not fit cpus_per_node: {cpus} "
            f"of the SLURM target; raise it to {needed} or lower launch.cpus_per_rank"
        )
    return Shape(nodes, cpus, per_node if request.uses_gpu else 0)


def script(config: SlurmTargetConfig, request: JobRequest, cwd: Path) -> str:
    """Return the sbatch script of a request whose relative paths begin at `cwd`."""
    shape = shape_of(config, request)
    gpu = f"{config.gpu_type}:" if config.gpu_type else ""
    # sbatch replaces %j by the job's number.
    output = f"{config.log_dir}/{request.id}-".replace("%", "%%") + "%j.log"
    options: dict[str, object | None] = {
        "job-name": request.id,
        "nodes": shape.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": shape.cpus,
        "gpus-per-node": f"{gpu}{shape.gpus}" if shape.gpus else None,
        "mem": config.memory,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "time": config.time,
        "output": f'"{output}"',
        "open-mode": "append",
        "signal": f"TERM@{config.seconds_before_end}",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines += ["--exclusive"] if config.exclusive else []
    lines += ["--requeue" if config.requeue else "--no-requeue", *config.extra]
    node = {
        "log-dir": config.log_dir,
        "run-dir": request.run_dir,
        "gpus": shape.gpus,
        "start-seconds": config.start_seconds,
        "seconds-before-end": config.seconds_before_end,
        "max-starts-without-progress": config.max_starts_without_progress,
    }
    words = [shlex.quote(f"--{name}={value}") for name, value in node.items()]
    words += ["--requeue"] if config.requeue else []
    words.append(f"-- {shlex.join(request.arguments)}")
    header = "\n".join(f"#SBATCH {line}" for line in lines)
    setup = "".join(f"{line}\n" for line in config.setup)
    arguments = " \\\n    ".join(words)
    return f"""#!/bin/bash
# To submit this file by hand: mkdir -p {shlex.quote(config.log_dir)} && sbatch FILE
{header}

cd {shlex.quote(str(cwd))} || exit
{setup}
# SLURM signals this shell, too, when it ends the job; the processes on the nodes decide what to do.
trap : TERM
# One process on each node starts Ray there; the one on the first node runs the command.
srun --cpus-per-task={shape.cpus} --kill-on-bad-exit=1 --wait=0 \\
    {shlex.quote(config.python)} -m dml_dist.jobs.slurm_node \\
    {arguments}
"""
