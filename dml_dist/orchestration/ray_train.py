"""Ranks under Ray Train: placement and process groups are Ray's, everything else is ours.

Checkpoints, records and progress do not go through Ray: a restarted group of ranks finds the
newest checkpoint in the run folder, and events travel through one small actor. So the same rank
function runs under every launcher, and a run folder outlives the Ray version that wrote it.

When ranks fail and when nodes are lost, preempted or added, another group of ranks starts from the
newest checkpoint, on as many ranks as there is room for. Ray Train's own restarts wait for the old
number of ranks, and its elastic groups grow without a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import RunError
from dml_dist.orchestration.ray_launch import last_line
from dml_dist.orchestration.ray_mailbox import Drain, Mailbox, fatal_of
from dml_dist.orchestration.ray_places import Places, lost_nodes
from dml_dist.orchestration.ray_private import dead_daemons, torch_config_class, trainer_class
from dml_dist.orchestration.ray_worker import ray_rank
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.progress import Emit, note
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment, rebuild_error

_SCRATCH = ".ray"
_CONTROLLER_FAILURES = 3
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LOOKS_FOR_ROOM = 1.0
# Heartbeats come every second.
_SECONDS_OF_A_HEARTBEAT = 5.0
# Nodes often come together.
_SECONDS_BEFORE_GROWING = 3.0
# Ten times as many processes as cores make Ray's start take 3 to 5 minutes.
_SECONDS_BEFORE_A_NOTE = 60.0
_SECONDS_OF_SILENCE = 900.0


@dataclass(frozen=True)
class _Ended:
    """The end of a group of ranks for which another one takes over.

    Attributes:
        reason: Why it ended.
        failure: The failure of a rank; None if the ranks could not help it.
    """

    reason: str
    failure: Exception | None = None


def run_under_ray(
    assignment: Assignment, launch: LaunchConfig, *, use_gpu: bool, emit: Emit, stop: StopRequest
) -> dict[str, Any]:
    """Run one assignment on ranks of Ray Train and return rank 0's result.

    The cluster must be up.

    Raises:
        RunError: If a rank failed more often than `max_failures`.
        DmlDistError: The error of the rank that gave up, whatever its class.
    """
    resources = {"CPU": launch.cpus_per_rank, **({"GPU": 1} if use_gpu else {})}
    places = Places(resources, launch.fewest_workers, launch.num_workers)
    hint = _recovery_hint(assignment)
    failures = 0
    try:
        while True:
            num_ranks = places.take(emit, stop, hint)
            group = _Group(assignment, launch, resources, num_ranks, places, emit, stop)
            outcome = group.run()
            if not isinstance(outcome, _Ended):
                return outcome
            if outcome.failure is not None:
                failures += 1
                if failures > launch.max_failures:
                    raise RunError(
                        f"the ranks failed {failures} times (launch.max_failures: "
                        f"{launch.max_failures} restarts): {outcome.reason}; "
                        f"{_kept(assignment)}: fix the cause and {hint}"
                    ) from outcome.failure
            emit(note(f"{outcome.reason}; starting the ranks again ..."))
            assignment = replace(assignment, reason=outcome.reason)
    finally:
        places.give_back()


def delete_scratch(run_dir: Path) -> None:
    """Delete Ray's own state of killed trainings; only the holder of the run's lock may call it."""
    scratch = run_dir / _SCRATCH
    for stale in scratch.glob("train-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with contextlib.suppress(OSError):  # There is none, or an evaluation uses it.
        scratch.rmdir()


class _Group:
    """One group of ranks: a call of Ray Train's `fit`, and the thread that looks after it."""

    def __init__(
        self,
        assignment: Assignment,
        launch: LaunchConfig,
        resources: dict[str, float],
        num_ranks: int,
        places: Places,
        emit: Emit,
        stop: StopRequest,
    ) -> None:
        self._assignment = assignment
        self._launch = launch
        self._resources = resources
        self._num_ranks = num_ranks
        self._places = places
        self._emit = emit
        self._stop = stop
        self._hint = _recovery_hint(assignment)
        self._room_since: float | None = None
        self._looked = 0.0

    def run(self) -> dict[str, Any] | _Ended:
        """Run the ranks to their end, or until another group has to take over."""
        import ray
        import ray.train
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the driver's node: the loss of another node must not take the mailbox with it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
        self._stop.is_training = False
        # A new name each time: Ray must not find its own state of an earlier attempt.
        name = f"{self._assignment.kind}-{uuid.uuid4().hex[:12]}"
        scratch = Path(self._assignment.run_dir) / _SCRATCH
        self._trainer = self._make_trainer(name, scratch)
        try:
            with Drain(self._mailbox, self._emit, self._stop) as self._drain:
                result = self._fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            if (fatal := fatal_of(self._mailbox)) is not None:
                raise rebuild_error(fatal) from error
            if lost := lost_nodes(self._drain.nodes):
                return _Ended(f"lost the node{'s' * (len(lost) > 1)} {', '.join(lost)}")
            if failed := _failed_ranks(error):
                return _Ended(failed, failure=error)
            raise RunError(
                f"Ray Train could not run {self._num_ranks} ranks: {last_line(error)}; check that "
                f"the cluster is up and has the CPUs (and GPUs) they need, then {self._hint}"
            ) from error
        finally:
            shutil.rmtree(scratch / name, ignore_errors=True)
            with contextlib.suppress(OSError):  # Another command of this run may use it.
                scratch.rmdir()
        if (fatal := fatal_of(self._mailbox)) is not None:
            raise rebuild_error(fatal)
        found = dict(result.return_value)
        if "stopped" in found and self._stop.reason is None:  # A node is preempted, or one came.
            return _Ended(found["stopped"]["reason"])
        return found

    def _make_trainer(self, name: str, scratch: Path) -> Any:
        import ray.train

        use_gpu = "GPU" in self._resources
        return trainer_class()(
            ray_rank,
            train_loop_config={
                "assignment": self._assignment.to_json(),
                "mailbox": self._mailbox,
            },
            torch_config=torch_config_class()(
                backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo",
                timeout_s=math.ceil(self._launch.timeout_seconds),
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self._num_ranks,
                use_gpu=use_gpu,
                resources_per_worker=self._resources,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(scratch),
                failure_config=ray.train.FailureConfig(
                    max_failures=0,
                    controller_failure_limit=_CONTROLLER_FAILURES,
                ),
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )

    def _fit(self) -> Any:
        """Return what `fit` returns; end it when it cannot go on, or must not.

        Ray Train waits without a limit for its processes to start: on a busy machine they take
        minutes, and one that never comes is waited for forever. `fit` stays in the caller's thread:
        a thread that waits for Ray while it is shut down crashes the process. In another thread
        than the main one Ray gives no handle to end the wait by: there the silence is only
        reported.
        """
        import ray

        self._done, self._silent = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            return self._trainer.fit()
        except ray.exceptions.RayError as error:
            if self._silent.is_set():
                raise RunError(
                    f"no heartbeat from any rank for {_SECONDS_OF_SILENCE:g} s: Ray did not start "
                    f"the ranks, or they hang ({_load()}); check that the cluster is up and has "
                    f"free resources, then {self._hint}"
                ) from error
            if self._stop.reason is not None:
                raise KeyboardInterrupt from error
            raise
        finally:
            self._done.set()
            thread.join()

    # ------------------------------------------------------------ in the thread

    def _watch(self) -> None:
        import ray

        stop, drain = self._stop, self._drain
        slow, sent, dead = False, False, ""
        while not self._done.wait(_SECONDS_BETWEEN_LOOKS):
            if not dead and (dead := dead_daemons()):
                text = f"Ray's {dead} has died, and Ray will end without it"
                self._emit(note(f"{text}; then {self._hint}"))
            if stop.reason is not None and not sent:
                self._mailbox.request_stop.remote(stop.reason)
                sent = True
            silence = drain.silence_seconds
            # A request that came too late for training: the ranks evaluate, or start again.
            late = stop.reason is not None and not stop.is_training and not stop.only_training
            is_silent = silence > _SECONDS_OF_SILENCE
            if stop.reason is None and not dead:
                self._look_for_room()
            if (late or is_silent) and self._trainer.controller is not None:
                if not late:
                    self._silent.set()
                ray.kill(self._trainer.controller)
                return
            if silence > _SECONDS_BEFORE_A_NOTE and not slow:
                text = f"no rank has answered for {silence:.0f} s: Ray starts slowly ({_load()})"
                self._emit(note(f"{text} ..."))
            slow = silence > _SECONDS_BEFORE_A_NOTE

    def _look_for_room(self) -> None:
        """Ask the ranks to stop with a checkpoint when there is room for more of them."""
        import ray

        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS_FOR_ROOM:
            return
        self._looked = now
        # While ranks start, held places could be those that Ray Train waits for.
        trains = self._stop.is_training and self._drain.silence_seconds < _SECONDS_OF_A_HEARTBEAT
        more = 0
        try:
            if trains:
                more = self._places.num_more(self._num_ranks)
            else:
                self._places.give_back()
        except ray.exceptions.RayError:
            return  # The cluster is gone; `fit` reports why.
        if more:
            self._room_since = self._room_since or now
            if now - self._room_since >= _SECONDS_BEFORE_GROWING:
                ranks = f"{self._num_ranks} to {self._num_ranks + more} ranks"
                self._mailbox.request_stop.remote(f"room for more: from {ranks}")


def _recovery_hint(assignment: Assignment) -> str:
    """Return what a user does after a fault: a training resumes, an evaluation starts again."""
    return "continue with --resume" if assignment.kind == "train" else "run the command again"


def _kept(assignment: Assignment) -> str:
    step = RunFolder(Path(assignment.run_dir)).last_checkpoint_step()
    return "there is no checkpoint" if step is None else f"the checkpoint of step {step:,} is kept"


def _load() -> str:
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def _failed_ranks(error: Exception) -> str:
    """Return which ranks failed and how, empty if Ray Train failed otherwise."""
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"rank {rank}: {last_line(one)}" for rank, one in sorted(failures.items()))
