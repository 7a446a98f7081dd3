"""Several runs at a time, each in its own process: tasks on a Ray cluster.

A signal to the driver becomes the same signal in the process of every task.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from dml_dist.config.launch import LaunchConfig
from dml_dist.config.schema import RunConfig
from dml_dist.errors import DmlDistError, RunError, RunStopped
from dml_dist.orchestration.launch import available_gpus
from dml_dist.orchestration.ray_launch import cluster, cluster_gpus
from dml_dist.orchestration.ray_mailbox import Mailbox
from dml_dist.runtime.signals import StopRequest, polling, stop_on_signals
from dml_dist.runtime.tasks import fatal_event, rebuild_error

Metrics = dict[str, Any]
Execute = Callable[[RunConfig, Path], Metrics]
"""Executes a run, from its configuration and folder, and returns the content of metrics.json."""

_SECONDS_BETWEEN_POLLS = 1.0
_SECONDS_TO_STOP = 60.0


@contextmanager
def ray_tasks(execute: Execute, launch: LaunchConfig, parallel: int) -> Iterator[Execute]:
    """Yield a function that calls `execute` in a worker process of Ray; threads may call it.

    Args:
        execute: A module-level function; it handles signals.
        launch: The cluster, and the CPUs of each task.
        parallel: Number of tasks at a time; they share the GPUs.
    """
    with cluster(launch.model_copy(update={"num_workers": parallel})), stop_on_signals() as stop:
        import ray

        resources = {"num_cpus": launch.cpus_per_rank}
        if gpus := gpus_of(launch):
            resources["num_gpus"] = min(1.0, gpus / parallel)
        remote = ray.remote(max_retries=0, **resources)(_task)
        mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
        running: set[Any] = set()

        def call(config: RunConfig, folder: Path) -> Metrics:
            if stop.reason is not None:
                raise RunStopped(f"{config.name} was not started ({stop.reason})")
            text = config.model_dump_json()
            task = remote.remote(execute, mailbox, text, str(folder), sys.argv, os.getcwd())
            running.add(task)
            try:
                outcome = ray.get(task)
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"the process of the run {config.name} died ({type(error).__name__}); check "
                    f"that there is enough memory for {parallel} runs at a time, then continue "
                    "with --resume"
                ) from error
            finally:
                running.discard(task)
            if outcome.get("kind") == "fatal":
                raise rebuild_error(outcome)
            return dict(outcome)

        stop.is_training = True  # The first signal is for the tasks.
        with _forwarding(stop, mailbox):
            try:
                yield call
            finally:
                # The first task that stopped ends the study; others still write checkpoints.
                if running and stop.reason is not None and stop.is_training:
                    ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_STOP)


def _forwarding(stop: StopRequest, mailbox: Any) -> AbstractContextManager[None]:
    """Pass a request to stop on to the mailbox."""

    def look() -> bool:
        if stop.reason is not None:
            mailbox.request_stop.remote(stop.reason)
        return stop.reason is not None

    return polling(look, _SECONDS_BETWEEN_POLLS)


def _signals_from(mailbox: Any) -> AbstractContextManager[None]:
    """Send this process the signal that the driver received."""
    import ray

    def look() -> bool:
        with suppress(ray.exceptions.RayError):
            if (reason := ray.get(mailbox.stop_reason.remote())) is not None:
                os.kill(os.getpid(), signal.Signals[reason])
                return True
        return False

    return polling(look, _SECONDS_BETWEEN_POLLS)


def _task(
    execute: Execute,
    mailbox: Any,
    text: str,
    folder: str,
    command: list[str],
    working_dir: str,
) -> dict[str, Any]:
    os.chdir(working_dir)
    sys.argv = command  # Recorded as the run's command.
    try:
        with _signals_from(mailbox):
            return execute(RunConfig.model_validate_json(text), Path(folder))
    except DmlDistError as error:
        return fatal_event(error, 0)


def gpus_of(launch: LaunchConfig) -> float:
    """Return the number of GPUs that tasks share; the cluster must be up."""
    if launch.use_gpu == "no":
        return 0.0
    found = cluster_gpus(launch)
    return float(available_gpus() if found is None else found)
