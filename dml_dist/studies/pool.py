"""Executing the runs of a study: here one after another, on a cluster, or side by side.

A run that is finished in its folder is taken as it is, one that is not goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from dml_dist.config.load import load_config
from dml_dist.config.schema import LaunchConfig, RunConfig
from dml_dist.errors import ConfigError
from dml_dist.files import read_json
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.orchestration.ray_tasks import Execute, Metrics, ray_tasks
from dml_dist.orchestration.train import run_training
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from dml_dist.runs.study import digest, refused_differences

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


class Pool:
    """Executes runs: here one after another, each on all ranks of a cluster, or side by side."""

    def __init__(self, launch: LaunchConfig, parallel: int) -> None:
        """Take where runs are executed, and how many at a time."""
        self._launch = launch
        self._parallel = parallel
        self._held = ExitStack()
        self._execute: Execute = execute_run

    def __enter__(self) -> Pool:
        if self._parallel > 1:
            self._execute = self._held.enter_context(
                ray_tasks(execute_run, self._launch, self._parallel)
            )
        elif self._launch.launcher == "ray":
            # One cluster for all runs: to start one takes seconds.
            self._held.enter_context(cluster(self._launch))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def execute(self, config: RunConfig, folder: Path) -> Metrics:
        """Execute a run, unless it is finished, and return its metrics; threads may call this."""
        done = finished_metrics(config, folder)
        if done is not None:
            return done
        launch = config.launch.model_copy(update={"threads_per_rank": self._threads()})
        return self._execute(config.model_copy(update={"launch": launch}), folder)

    def each(self, tasks: Sequence[Callable[[], Value]]) -> Iterator[tuple[int, Future[Value]]]:
        """Execute tasks and give the number and outcome of each as it ends."""
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
            # After Ctrl-C nothing new begins; the cluster ends with the tasks in progress.
            pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> int | None:
        if self._launch.threads_per_rank is not None or self._parallel == 1:
            return self._launch.threads_per_rank
        return max(1, len(os.sched_getaffinity(0)) // self._parallel)


def _outcome(task: Callable[[], Value]) -> Future[Value]:
    future: Future[Value] = Future()
    try:
        future.set_result(task())
    except Exception as error:  # Looked at by whoever asks for the result.
        future.set_exception(error)
    return future


def _remove_partial_run(folder: Path) -> None:
    """Remove what a command left that was killed while it made the folder: no run as yet."""
    if RunFolder(folder).info_path.is_file() or not folder.is_dir():
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    ours = {"config.yaml"}
    if all(path.name in ours or path.name.startswith(".") for path in files):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
