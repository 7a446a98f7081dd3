"""Ranks under Ray Train: placement, process group and restarts are Ray's, everything else is ours.

Checkpoints, records and progress do not go through Ray: a restarted group of ranks finds the
newest checkpoint in the run folder, and events travel through one small actor. So the same rank
function runs under every launcher, and a run folder outlives the Ray version that wrote it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dml_dist.config.schema import LaunchConfig
from dml_dist.errors import RunError, TopologyError
from dml_dist.orchestration.ray_mailbox import Drain, Mailbox, fatal_of
from dml_dist.orchestration.ray_worker import ray_rank
from dml_dist.runtime.progress import Emit, note
from dml_dist.runtime.tasks import Assignment, rebuild_error

# Read by Ray when it is imported or started. Values that the user has set are kept.
_ENVIRONMENT = {
    # Ranks are asked every 0.2 s whether they still live; the default of 2 s delays every end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Only for a cluster that this process starts on its own machine.
_LOCAL_ENVIRONMENT = {
    # Idle worker processes, one a core, would compete with the ranks while they start.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_SCRATCH = ".ray"
_OBJECT_STORE_BYTES = 128 * 2**20
_CONTROLLER_FAILURES = 3
_SECONDS_FOR_AN_ANSWER = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2
# Ten times as many processes as cores make Ray's start take 3 to 5 minutes.
_SECONDS_BEFORE_A_WORD = 60.0
_SECONDS_OF_SILENCE = 900.0


def run_under_ray(
    assignment: Assignment, launch: LaunchConfig, *, use_gpu: bool, emit: Emit
) -> dict[str, Any]:
    """Run one assignment on `launch.num_workers` ranks of Ray Train and return rank 0's result.

    Raises:
        TopologyError: If the cluster cannot hold the ranks.
        RunError: If no cluster answers, or a rank failed more often than `max_failures`.
        DmlDistError: The error of the rank that gave up, whatever its class.
    """
    with cluster(launch):
        return _fit(assignment, launch, use_gpu=use_gpu, emit=emit)


def _fit(
    assignment: Assignment, launch: LaunchConfig, *, use_gpu: bool, emit: Emit
) -> dict[str, Any]:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig

    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    recovery_hint = _recovery_hint(assignment)
    # A fresh name each time: Ray's own state of an earlier attempt, whole or torn, must not come
    # back.
    name = f"{assignment.kind}-{uuid.uuid4().hex[:12]}"
    scratch = Path(assignment.run_dir) / _SCRATCH
    trainer = _trainer_class()(
        ray_rank,
        train_loop_config={"assignment": assignment.to_json(), "mailbox": mailbox},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo",
            timeout_s=math.ceil(launch.timeout_seconds),
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=launch.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": launch.cpus_per_rank, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(
                max_failures=launch.max_failures, controller_failure_limit=_CONTROLLER_FAILURES
            ),
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        with Drain(mailbox, emit) as drain:
            result = _result_of(trainer, drain, emit, recovery_hint)
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        if (fatal := fatal_of(mailbox)) is not None:
            raise rebuild_error(fatal) from error
        raise RunError(_describe(error, launch, recovery_hint)) from error
    finally:
        shutil.rmtree(scratch / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # Another command of this run may use it.
            scratch.rmdir()
    if (fatal := fatal_of(mailbox)) is not None:
        raise rebuild_error(fatal)
    return dict(result.return_value)


def delete_scratch(run_dir: Path) -> None:
    """Delete what killed trainings left of Ray's own state; for the holder of the run's lock."""
    scratch = run_dir / _SCRATCH
    for stale in scratch.glob("train-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with contextlib.suppress(OSError):  # There is none, or an evaluation uses it.
        scratch.rmdir()


def _trainer_class() -> Any:
    """Return Ray's trainer, without its handler of Ctrl-C: `fit` then ends as other calls do.

    It also keeps the handle of the actor that it waits for, by which a wait can be ended.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    return Trainer


def _recovery_hint(assignment: Assignment) -> str:
    """Return what a user does after a fault: a training continues, an evaluation begins anew."""
    return "continue with --resume" if assignment.kind == "train" else "run the command again"


def _result_of(trainer: Any, drain: Drain, emit: Emit, recovery_hint: str) -> Any:
    """Return what `fit` returns, or end it after a silence.

    Ray Train waits without a limit for its processes to start: on a machine with other work they
    take minutes, and where one never comes, for ever. `fit` stays in the caller's thread: whatever
    waits for Ray while it is shut down crashes the process. In another thread than the main one Ray
    gives no handle to end the wait by: there a silence is told and not ended.
    """
    import ray

    done, silent = threading.Event(), threading.Event()

    def busy() -> str:
        return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"

    def watch() -> None:
        told, dead = False, ""
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if not dead and (dead := _dead_daemons()):
                words = f"Ray's {dead} has died, and Ray will end without it"
                emit(note(f"{words}; the last checkpoint is kept: {recovery_hint}"))
            silence = drain.silence_seconds
            if silence > _SECONDS_OF_SILENCE and trainer.controller is not None:
                silent.set()
                ray.kill(trainer.controller)
                return
            if silence > _SECONDS_BEFORE_A_WORD and not told:
                words = f"no rank has answered for {silence:.0f} s: Ray starts slowly ({busy()})"
                emit(note(f"{words} ..."))
            told = silence > _SECONDS_BEFORE_A_WORD

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        return trainer.fit()
    except ray.exceptions.RayError as error:
        if not silent.is_set():
            raise
        raise RunError(
            f"required a sign of life of a rank within {_SECONDS_OF_SILENCE:g} s, got none: "
            f"Ray did not start the ranks, or they stand still ({busy()}); see whether the "
            f"cluster lives and has room, then {recovery_hint}"
        ) from error
    finally:
        done.set()
        thread.join()


def _dead_daemons() -> str:
    """Return which of Ray's own processes have ended that this process started and cannot miss.

    Some time later Ray ends this process, often without a word.
    """
    import ray._private.worker

    node = ray._private.worker._global_node
    dead = {kind for kind, _ in node.dead_processes()} if node is not None else set()
    return " and ".join(sorted(dead & {"raylet", "gcs_server"}))


def _describe(error: Exception, launch: LaunchConfig, recovery_hint: str) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items())]
    if not causes:
        return (
            f"Ray Train could not run {launch.num_workers} ranks: {_last_line(error)}; see whether "
            f"the cluster lives and has the CPUs (and GPUs) they need, then {recovery_hint}"
        )
    return (
        f"the ranks failed {launch.max_failures + 1} times (launch.max_failures: "
        f"{launch.max_failures} restarts): {'; '.join(causes)}; the last checkpoint is kept: "
        f"mend the cause and {recovery_hint}"
    )


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---------------------------------------------------------------- the cluster


@contextlib.contextmanager
def cluster(launch: LaunchConfig) -> Iterator[None]:
    """A connection to the named cluster, or a cluster of this machine for as long as it is used."""
    for name, value in (_ENVIRONMENT | ({} if launch.address else _LOCAL_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():  # A cluster that the calling program has started, such as a test's.
        _require_resources(launch)
        yield
        return
    import_path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_config": ray.LoggingConfig(encoding="TEXT", log_level="ERROR"),
        "runtime_env": None if launch.address else {"env_vars": {"PYTHONPATH": import_path}},
    }
    try:
        if launch.address:
            _require_answer(launch.address)
            ray.init(address=launch.address, **options)
        else:
            needed = math.ceil(launch.num_workers * launch.cpus_per_rank)
            ray.init(
                address="local",
                num_cpus=max(needed, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **options,
            )
    except Exception as error:  # Ray raises bare ones where its processes do not come up.
        if launch.address is None:
            raise RunError(
                f"Ray could not start a cluster on this machine: {_last_line(error)} Free some "
                "ports, memory and room in /tmp, or wait until less other work is done here; "
                "launch.launcher torchrun and inprocess need no Ray"
            ) from error
        raise RunError(
            f"no Ray cluster answers: launch.address {launch.address} ({_last_line(error)}); start "
            "one with `ray start --head`, correct launch.address, or leave it out to start one here"
        ) from error
    try:
        _require_resources(launch)
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConnectionError when nothing speaks Ray's protocol at HOST:PORT.

    Ray itself would try for minutes, and for ever where something else listens.
    """
    import grpc

    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # Such as `auto`, which Ray resolves by itself and refuses at once.
    channel = grpc.insecure_channel(f"{host}:{port}")
    try:
        grpc.channel_ready_future(channel).result(timeout=_SECONDS_FOR_AN_ANSWER)
    except grpc.FutureTimeoutError:
        raise ConnectionError(
            f"nothing that speaks gRPC at {host}:{port} within {_SECONDS_FOR_AN_ANSWER:g} s"
        ) from None
    finally:
        channel.close()


def _require_resources(launch: LaunchConfig) -> None:
    import ray

    have = ray.cluster_resources().get("CPU", 0.0)
    needed = launch.num_workers * launch.cpus_per_rank
    if have < needed:
        raise TopologyError(
            f"launch.num_workers {launch.num_workers} x cpus_per_rank {launch.cpus_per_rank} = "
            f"{needed:g} CPUs are required, the cluster {launch.address or 'here'} has {have:g}; "
            "lower launch.num_workers or launch.cpus_per_rank, or add nodes"
        )


def announce(launch: LaunchConfig, emit: Emit) -> None:
    """Say what is waited for: the start of Ray's processes takes seconds and shows nothing."""
    where = launch.address or "this machine"
    emit(note(f"starting {launch.num_workers} ranks with Ray Train on {where} ..."))
