"""Runs side by side, each in a process of its own: tasks on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dml_dist.config.schema import LaunchConfig, RunConfig
from dml_dist.errors import DmlDistError, RunError
from dml_dist.orchestration.launch import available_gpus
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.runtime.tasks import fatal_event, rebuild_error

Metrics = dict[str, Any]
Execute = Callable[[RunConfig, Path], Metrics]
"""Takes the configuration of a run and its folder; gives the content of metrics.json."""


@contextmanager
def ray_tasks(execute: Execute, launch: LaunchConfig, parallel: int) -> Iterator[Execute]:
    """Give a function that calls `execute` in a process of Ray's; threads may call it.

    Args:
        execute: A function of a module, which Ray's processes import.
        launch: The cluster, and the CPUs of each task.
        parallel: Number of tasks at a time, which share the GPUs.
    """
    with cluster(launch.model_copy(update={"num_workers": parallel})):
        import ray

        resources = {"num_cpus": launch.cpus_per_rank}
        if gpus := _gpus(launch):
            resources["num_gpus"] = min(1.0, gpus / parallel)
        remote = ray.remote(max_retries=0, **resources)(_task)

        def call(config: RunConfig, folder: Path) -> Metrics:
            text = config.model_dump_json()
            try:
                outcome = ray.get(remote.remote(execute, text, str(folder), sys.argv, os.getcwd()))
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"the process of the run {config.name} ended ({type(error).__name__}); check "
                    "whether there is enough memory for as many runs at a time, then continue "
                    "with --resume"
                ) from error
            if outcome.get("kind") == "fatal":
                raise rebuild_error(outcome)
            return dict(outcome)

        yield call


def _task(
    execute: Execute, text: str, folder: str, command: list[str], working_dir: str
) -> dict[str, Any]:
    os.chdir(working_dir)
    sys.argv = command  # What the run's record names as its command.
    try:
        return execute(RunConfig.model_validate_json(text), Path(folder))
    except DmlDistError as error:
        return fatal_event(error, 0)


def _gpus(launch: LaunchConfig) -> float:
    """Return the GPUs that tasks may share."""
    if launch.use_gpu == "no":
        return 0.0
    if launch.address is None:
        return float(available_gpus())
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))
