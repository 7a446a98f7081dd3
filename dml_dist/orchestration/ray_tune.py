"""Trials of a search on a Ray cluster, by Ray Tune: placement, concurrency and restarts.

What to try, what to prune and what came out is the caller's, who keeps it. A trial is pruned by
asking it to stop: if Tune ended its process, the ranks of a distributed trial would keep their
resources, and no checkpoint would be written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import RunError, TopologyError
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.orchestration.ray_tasks import gpus_of
from dml_dist.runtime.signals import StopRequest, polling

# Read by Ray Tune when it is imported; values that the user has set are kept.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Runs keep their own records.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is not used.
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}
_SCRATCH = ".ray"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_AN_ANSWER = 20.0
# Ray Tune refuses a trial without resources. Its ranks reserve their own.
_CPUS_OF_A_DRIVER = 0.01

PRUNED = "pruned"
"""The reason of a trial that was pruned."""
TIME_LIMIT = "time limit"
"""The reason of trials that the deadline stops."""

Payload = Mapping[str, Any]
Outcome = dict[str, Any]
Report = Callable[[int, float], None]
"""Takes step and intermediate value."""
ExecuteTrial = Callable[[Payload, Report, StopRequest], Outcome]
"""Executes a trial in a process of the cluster; a module-level function."""


class TrialQueue(Protocol):
    """What the trials are; called in the driver, by one thread."""

    def next(self) -> tuple[int, Payload] | None:
        """Return number and task of the next trial, both JSON values; None if there is none."""

    def restarted(self, number: int, starts: int) -> None:
        """Hear that a trial's process died and was started again, for the `starts`-th time."""

    def report(self, number: int, step: int, value: float) -> bool:
        """Take an intermediate value and return whether to prune the trial."""

    def end(self, number: int, outcome: Outcome | None) -> None:
        """Take what `execute` returned; None if the trial's process died too often."""


def run_trials(
    queue: TrialQueue,
    execute: ExecuteTrial,
    launch: LaunchConfig,
    *,
    parallel: int | None,
    deadline: float,
    folder: Path,
    stop: StopRequest,
    on_start: Callable[[int], None],
) -> None:
    """Execute trials until the queue is empty, the time is over, or a stop is requested.

    Args:
        queue: The trials.
        execute: Executes one of them.
        launch: The cluster, and the resources of each trial.
        parallel: Number of trials at a time; None: as many as the cluster can hold.
        deadline: Time of `time.monotonic` after which trials stop with a checkpoint.
        folder: Folder of the study, whose lock is held; Tune's own files are in it for a time.
        stop: Request to stop all trials.
        on_start: Takes the number of trials at a time, once it is known.

    Raises:
        TopologyError: If the cluster cannot hold a trial, or `parallel` of them.
        RunError: If the cluster fails.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with cluster(_local_cluster(launch, parallel)):
        import ray
        from ray import tune

        # Its messages on processes that died are tracebacks; the queue hears of them.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        concurrent = _concurrency(launch, parallel)
        on_start(concurrent)
        board = ray.remote(num_cpus=0)(_StopBoard).remote()
        searcher = _searcher(queue, board, stop, deadline)
        scratch = folder / _SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # Of a command that was killed.
        name = f"tune-{uuid.uuid4().hex[:12]}"
        trainable = tune.with_parameters(
            _trial, execute=execute, board=board, command=sys.argv, working_dir=os.getcwd()
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, _resources(launch, concurrent)),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=launch.max_failures),
            ),
        )
        try:
            with _forwarding(stop, deadline, board):
                tuner.fit()
        except ray.exceptions.RayError as error:
            raise RunError(
                f"Ray Tune failed ({type(error).__name__}: {error}); check that the cluster is up, "
                "then repeat the command: the trials go on from their checkpoints"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


# ---------------------------------------------------------------- in the driver


def _searcher(queue: TrialQueue, board: Any, stop: StopRequest, deadline: float) -> Any:
    """Return a searcher of Ray Tune that asks and tells a queue."""
    from ray.tune.search import Searcher

    class QueueSearcher(Searcher):
        def __init__(self) -> None:
            super().__init__()
            self._numbers: dict[str, int] = {}
            self._starts: Counter[int] = Counter()

        def suggest(self, trial_id: str) -> Any:
            if stop.reason is not None or time.monotonic() > deadline:
                return Searcher.FINISHED
            task = queue.next()
            if task is None:
                return Searcher.FINISHED
            number, payload = task
            self._numbers[trial_id] = number
            return {"number": number, "payload": json.dumps(payload)}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            number = self._numbers[trial_id]
            if result.get("begun"):
                self._starts[number] += 1
                if self._starts[number] > 1:
                    queue.restarted(number, self._starts[number])
            if "step" not in result:
                return
            if queue.report(number, int(result["step"]), float(result["value"])):
                board.prune.remote(number)

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            text = None if error or result is None else result.get("outcome")
            queue.end(self._numbers[trial_id], None if text is None else json.loads(text))

        # Tune saves its state with the searcher's. Ours is the queue's, whose owner keeps it.
        def __reduce__(self) -> Any:
            return Searcher, ()

        def save(self, checkpoint_path: str) -> None:
            """Save nothing."""

    return QueueSearcher()


def _forwarding(stop: StopRequest, deadline: float, board: Any) -> AbstractContextManager[None]:
    """Ask all trials to stop when this process is asked to, or the time is over."""

    def look() -> bool:
        reason = stop.reason
        if reason is None and time.monotonic() > deadline:
            reason = TIME_LIMIT
        if reason is not None:
            board.stop_all.remote(reason)
        return reason is not None

    return polling(look, _SECONDS_BETWEEN_LOOKS)


def _cpus_of(launch: LaunchConfig) -> float:
    """Return the CPUs of a trial, its ranks together."""
    if launch.launcher == "ray":
        return launch.num_workers * launch.cpus_per_rank + _CPUS_OF_A_DRIVER
    return launch.cpus_per_rank


def _local_cluster(launch: LaunchConfig, parallel: int | None) -> LaunchConfig:
    """Return a launch configuration by which a cluster on this machine holds the trials."""
    if launch.address is not None:
        return launch
    cpus = _cpus_of(launch) * (parallel or 1)
    return launch.model_copy(update={"num_workers": math.ceil(cpus), "cpus_per_rank": 1.0})


def _concurrency(launch: LaunchConfig, parallel: int | None) -> int:
    """Return the number of trials at a time, so that none waits for the ranks of another."""
    import ray

    have = ray.cluster_resources()
    fitting = math.floor(have.get("CPU", 0.0) / _cpus_of(launch) + 1e-9)
    if launch.launcher == "ray" and (gpus := gpus_of(launch)):
        fitting = min(fitting, int(gpus) // launch.num_workers)
    elif parallel is None and (gpus := gpus_of(launch)):
        fitting = min(fitting, int(gpus))
    if fitting < (parallel or 1):
        one = f"{_cpus_of(launch):g} CPUs{' and a GPU for each rank' if gpus_of(launch) else ''}"
        what = f"{parallel} trials at a time of {one} each" if parallel else f"a trial of {one}"
        raise TopologyError(
            f"{what} cannot be placed in the cluster {launch.address or 'here'}: "
            f"{have.get('CPU', 0.0):g} CPUs and {have.get('GPU', 0.0):g} GPUs hold {fitting}; "
            "lower --parallel, launch.num_workers or launch.cpus_per_rank, or add nodes"
        )
    return parallel or fitting


def _resources(launch: LaunchConfig, concurrent: int) -> dict[str, float]:
    """Return what Tune reserves for a trial: its process, or the driver of its ranks."""
    if launch.launcher == "ray":
        return {"CPU": _CPUS_OF_A_DRIVER}
    gpus = gpus_of(launch)
    share = {"GPU": min(1.0, gpus / concurrent)} if gpus else {}
    return {"CPU": launch.cpus_per_rank, **share}


# ---------------------------------------------------------------- in the cluster


class _StopBoard:
    """An actor that holds which trials are asked to stop, and why."""

    def __init__(self) -> None:
        self._pruned: set[int] = set()
        self._reason: str | None = None

    def prune(self, number: int) -> None:
        """Ask a trial to stop because its values are too low."""
        self._pruned.add(number)

    def stop_all(self, reason: str) -> None:
        """Ask all trials to stop."""
        self._reason = reason

    def reason(self, number: int) -> str | None:
        """Return why a trial is to stop, or None."""
        return PRUNED if number in self._pruned else self._reason


def _trial(
    config: dict[str, Any],
    execute: ExecuteTrial,
    board: Any,
    command: list[str],
    working_dir: str,
) -> None:
    """Execute a trial in a process of Ray Tune; its last report holds the outcome."""
    from ray import tune

    os.chdir(working_dir)
    sys.argv = command  # Recorded as the runs' command.
    stop = StopRequest()

    def report(step: int, value: float) -> None:
        tune.report({"step": step, "value": value})

    tune.report({"begun": True})
    with _requests_from(board, int(config["number"]), stop):
        outcome = execute(json.loads(config["payload"]), report, stop)
    tune.report({"outcome": json.dumps(outcome)})


def _requests_from(board: Any, number: int, stop: StopRequest) -> AbstractContextManager[None]:
    """Take the requests to stop a trial from the board."""
    import ray

    def look() -> bool:
        # A late answer is a busy machine, a lost board a driver that ends this process soon.
        with suppress(ray.exceptions.RayError):
            reason = ray.get(board.reason.remote(number), timeout=_SECONDS_FOR_AN_ANSWER)
            if reason is not None:
                # A pruned trial that has trained to its end keeps its value.
                stop.only_training = reason == PRUNED
                stop.reason = reason
        return False  # Another reason may follow.

    return polling(look, _SECONDS_BETWEEN_LOOKS)
