"""Executes the runs of a study: one after another here or on a cluster, or several at a time.

A run that is finished in its folder is not repeated, one that is not finished is continued.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

from dml_dist.config.launch import LaunchConfig
from dml_dist.config.load import load_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.orchestration.ray_tasks import Execute, Metrics, ray_tasks
from dml_dist.orchestration.train import run_training
from dml_dist.runs.artifacts import read_metrics
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.study import StudyFolder, StudyKind, digest, fixed_differences
from dml_dist.runtime.signals import StopRequest
from dml_dist.terminal import open_console

Value = TypeVar("Value")


def finished_metrics(config: RunConfig, folder: Path, kind: StudyKind) -> Metrics | None:
    """Return the metrics of a run that is finished in a folder; None if there is work to do.

    Args:
        config: The configuration of the run.
        folder: The run's folder.
        kind: The kind of study, which says what makes it another run.

    Raises:
        ConfigError: If the folder holds a run of another configuration.
    """
    run = RunFolder(folder)
    if not run.info_path.is_file():
        return None
    saved = load_config(run.config_path)
    if digest(saved, kind) != digest(config, kind):
        differences = "; ".join(map(str, fixed_differences(saved, config, kind)))
        raise ConfigError(
            f"{folder} holds a run with another configuration than {config.name} has now "
            f"(there -> now): {differences}; remove the folder, or give another --run-dir"
        )
    return read_metrics(run.metrics_path) if run.info().finished else None


def execute_run(
    config: RunConfig,
    folder: Path,
    untrained_dir: Path | None = None,
    stop: StopRequest | None = None,
) -> Metrics:
    """Execute a run, or continue it; its output goes to FOLDER.log.

    Args:
        config: The run's configuration.
        folder: The run's folder.
        untrained_dir: Where the runs of the study keep what untrained networks reach.
        stop: Request of the caller to stop; None: signals make one.
    """
    _remove_partial_run(folder)
    started = RunFolder(folder).info_path.is_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.log"), "a", encoding="utf-8") as file:
        console = open_console(file=file, width=100)
        return run_training(
            config,
            console,
            run_dir=folder,
            resume=started,
            report=False,
            untrained_dir=untrained_dir,
            stop=stop,
        )


class Pool:
    """Executes runs: one after another, each of them distributed or not, or several at a time."""

    def __init__(self, folder: StudyFolder, launch: LaunchConfig, parallel: int) -> None:
        """Prepare to execute runs; they begin inside `with`.

        Args:
            folder: The study.
            launch: Where runs are executed.
            parallel: How many at a time, as Ray tasks if more than one.
        """
        self._kind = folder.kind
        self._launch = launch
        self._parallel = parallel
        self._held = ExitStack()
        self._execute: Execute = partial(execute_run, untrained_dir=folder.untrained_dir)

    def __enter__(self) -> Pool:
        if self._parallel > 1:
            self._execute = self._held.enter_context(
                ray_tasks(self._execute, self._launch, self._parallel)
            )
        elif self._launch.launcher == "ray":
            # One cluster for all runs: starting one takes seconds.
            self._held.enter_context(cluster(self._launch))
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def execute(self, config: RunConfig, folder: Path) -> Metrics:
        """Execute a run, unless it is finished, and return its metrics; threads may call this."""
        done = finished_metrics(config, folder, self._kind)
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
            # After Ctrl-C no task starts any more; the cluster ends those that are running.
            pool.shutdown(wait=False, cancel_futures=True)

    def _threads(self) -> int | None:
        if self._launch.threads_per_rank is not None or self._parallel == 1:
            return self._launch.threads_per_rank
        return max(1, len(os.sched_getaffinity(0)) // self._parallel)


def _outcome(task: Callable[[], Value]) -> Future[Value]:
    future: Future[Value] = Future()
    try:
        future.set_result(task())
    except Exception as error:  # Raised where the result is asked for.
        future.set_exception(error)
    return future


def _remove_partial_run(folder: Path) -> None:
    """Remove a folder that a command was creating when it was killed: it is not a run yet."""
    if RunFolder(folder).info_path.is_file() or not folder.is_dir():
        return
    files = [path for path in folder.rglob("*") if path.is_file()]
    ours = {"config.yaml"}
    if all(path.name in ours or path.name.startswith(".") for path in files):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
