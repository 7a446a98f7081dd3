"""Carrying out the runs of a comparison: here one after another, or side by side as Ray tasks.

A run that is finished in its folder is taken as it is, one that is not goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from dml_dist.config.load import load_config
from dml_dist.config.schema import LaunchConfig, RunConfig
from dml_dist.errors import ConfigError, DmlDistError, RunError
from dml_dist.files import read_json
from dml_dist.orchestration.train import run_training
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from dml_dist.runs.study import compare_section, digest, refused_differences
from dml_dist.runtime.tasks import fatal_event, rebuild_error

Metrics = dict[str, Any]
Execute = Callable[[RunConfig, Path], Metrics]
"""Takes the configuration of a run and its folder; gives the content of metrics.json."""

Value = TypeVar("Value")


def finished_metrics(config: RunConfig, folder: Path) -> Metrics | None:
    """Return the metrics of a run that is finished in a folder; None if there is more to do.

    Raises:
        ConfigError: If the folder holds a run of another configuration.
    """
    run = RunFolder(folder)
    if not run.info_path.is_file():
        return None
    saved = load_config(run.config_path)
    if digest(saved) != digest(config):
        differences = "; ".join(map(str, refused_differences(saved, config)))
        raise ConfigError(
            f"required the run {config.name} in {folder}, got one of another configuration "
            f"(there -> now): {differences}; remove that folder, or give another --run-dir"
        )
    return dict(read_json(run.metrics_path)) if run.info().finished else None


def is_diverged(folder: Path) -> bool:
    """Whether a run ended with a loss that is not finite."""
    records = read_records(RunFolder(folder).records("steps"))
    return bool(records) and not math.isfinite(records[-1].get("loss", math.nan))


def execute_run(config: RunConfig, folder: Path) -> Metrics:
    """Make a run, or go on with it; what it says goes to FOLDER.log."""
    _remove_partial_run(folder)
    started = RunFolder(folder).info_path.is_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8") as file:
        console = Console(file=file, width=100)
        return run_training(config, console, run_dir=folder, resume=started, report=False)


class Jobs:
    """Runs tasks side by side, as many at a time as the configuration says."""

    def __init__(self, config: RunConfig) -> None:
        """Take the number of runs at a time, and where they run, from a comparison."""
        self._launch = config.launch
        self._parallel = compare_section(config).parallel
        self._held = ExitStack()
        self._remote: Any = None

    def __enter__(self) -> Jobs:
        if self._parallel > 1 or self._launch.launcher == "ray":
            # One cluster for all runs: to start one takes seconds.
            from dml_dist.orchestration.ray_launch import cluster

            workers = self._launch.num_workers if self._parallel == 1 else self._parallel
            settings = self._launch.model_copy(update={"num_workers": workers})
            self._held.enter_context(cluster(settings))
        if self._parallel > 1:
            import ray

            self._remote = ray.remote(max_retries=0, **self._resources())(_task)
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def execute(self, config: RunConfig, folder: Path) -> Metrics:
        """Carry out a run, unless it is finished, and return its metrics; threads may call this."""
        done = finished_metrics(config, folder)
        if done is not None:
            return done
        launch = config.launch.model_copy(update={"threads_per_rank": self._threads()})
        config = config.model_copy(update={"launch": launch})
        if self._remote is None:
            return execute_run(config, folder)
        return self._in_ray(config, folder)

    def each(self, tasks: Sequence[Callable[[], Value]]) -> Iterator[tuple[int, Future[Value]]]:
        """Carry out tasks and give the number and outcome of each as it ends."""
        if self._parallel == 1:
            for number, task in enumerate(tasks):
                yield number, _outcome(task)
            return
        pool = ThreadPoolExecutor(self._parallel)
        try:
            futures = {pool.submit(task): number for number, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future
        finally:
            # After Ctrl-C nothing new begins; the cluster ends with what was at work.
            pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> int | None:
        if self._launch.threads_per_rank is not None or self._parallel == 1:
            return self._launch.threads_per_rank
        return max(1, len(os.sched_getaffinity(0)) // self._parallel)

    def _resources(self) -> dict[str, float]:
        resources = {"num_cpus": self._launch.cpus_per_rank}
        gpus = _gpus(self._launch)
        return {**resources, "num_gpus": min(1.0, gpus / self._parallel)} if gpus else resources

    def _in_ray(self, config: RunConfig, folder: Path) -> Metrics:
        import ray

        text = config.model_dump_json()
        try:
            outcome = ray.get(self._remote.remote(text, str(folder), sys.argv, os.getcwd()))
        except ray.exceptions.RayError as error:
            raise RunError(
                f"the process of the run {config.name} ended ({type(error).__name__}); see whether "
                "there is enough memory for as many runs at a time, then continue with --resume"
            ) from error
        if outcome.get("kind") == "fatal":
            raise rebuild_error(outcome)
        return dict(outcome)


def _task(text: str, folder: str, command: list[str], place: str) -> dict[str, Any]:
    """Carry out a run in a process of Ray's."""
    os.chdir(place)
    sys.argv = command  # What the run's record names as its command.
    try:
        return execute_run(RunConfig.model_validate_json(text), Path(folder))
    except DmlDistError as error:
        return fatal_event(error, 0)


def _outcome(task: Callable[[], Value]) -> Future[Value]:
    future: Future[Value] = Future()
    try:
        future.set_result(task())
    except Exception as error:  # Looked at by whoever asks for the result.
        future.set_exception(error)
    return future


def _gpus(launch: LaunchConfig) -> float:
    """Return the GPUs that runs may share."""
    if launch.use_gpu == "no":
        return 0.0
    if launch.address is None:
        return float(torch.cuda.device_count())
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def _remove_partial_run(folder: Path) -> None:
    """Remove what a command left that was killed while it made the folder: no run as yet."""
    if RunFolder(folder).info_path.is_file() or not folder.is_dir():
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    ours = {"config.yaml"}
    if all(path.name in ours or path.name.startswith(".") for path in files):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
