"""Ranks under Ray Train: placement, process group and restarts are Ray's, everything else is ours.

Checkpoints, records and progress do not go through Ray: a restarted group of ranks finds the
newest checkpoint in the run folder, and events travel through one small actor. So the same rank
function runs under every launcher, and a run folder outlives the Ray version that wrote it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dml_dist.config.schema import LaunchConfig
from dml_dist.errors import RunError, TopologyError
from dml_dist.orchestration.ray_mailbox import Drain, Mailbox, fatal_of
from dml_dist.orchestration.ray_private import dead_daemons, torch_config_class, trainer_class
from dml_dist.orchestration.ray_worker import ray_rank
from dml_dist.runtime.progress import Emit, note
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment, rebuild_error

# Read by Ray when it is imported or started. Values that the user has set are kept.
_ENVIRONMENT = {
    # Seconds between health checks of the ranks; the default of 2 s delays the end of every run.
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
_SECONDS_BEFORE_A_NOTE = 60.0
_SECONDS_OF_SILENCE = 900.0


def run_under_ray(
    assignment: Assignment, launch: LaunchConfig, *, use_gpu: bool, emit: Emit, stop: StopRequest
) -> dict[str, Any]:
    """Run one assignment on `launch.num_workers` ranks of Ray Train and return rank 0's result.

    The cluster must be up.

    Raises:
        RunError: If a rank failed more often than `max_failures`.
        DmlDistError: The error of the rank that gave up, whatever its class.
    """
    import ray
    import ray.train
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: the loss of another node must not take the mailbox with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    recovery_hint = _recovery_hint(assignment)
    # A new name each time: Ray must not find its own state of an earlier attempt.
    name = f"{assignment.kind}-{uuid.uuid4().hex[:12]}"
    scratch = Path(assignment.run_dir) / _SCRATCH
    trainer = trainer_class()(
        ray_rank,
        train_loop_config={"assignment": assignment.to_json(), "mailbox": mailbox},
        torch_config=torch_config_class()(
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
        with Drain(mailbox, emit, stop) as drain:
            result = _result_of(trainer, mailbox, drain, emit, stop, recovery_hint)
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
    """Delete Ray's own state of killed trainings; only the holder of the run's lock may call it."""
    scratch = run_dir / _SCRATCH
    for stale in scratch.glob("train-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with contextlib.suppress(OSError):  # There is none, or an evaluation uses it.
        scratch.rmdir()


def _recovery_hint(assignment: Assignment) -> str:
    """Return what a user does after a fault: a training resumes, an evaluation starts again."""
    return "continue with --resume" if assignment.kind == "train" else "run the command again"


def _result_of(
    trainer: Any, mailbox: Any, drain: Drain, emit: Emit, stop: StopRequest, recovery_hint: str
) -> Any:
    """Return what `fit` returns; end it when no rank answers, or at a stop outside of training.

    Ray Train waits without a limit for its processes to start: on a busy machine they take
    minutes, and one that never comes is waited for forever. `fit` stays in the caller's thread:
    a thread that waits for Ray while it is shut down crashes the process. In another thread than
    the main one Ray gives no handle to end the wait by: there the silence is only reported.
    """
    import ray

    done, silent = threading.Event(), threading.Event()

    def watch() -> None:
        slow, sent, dead = False, False, ""
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            if not dead and (dead := dead_daemons()):
                text = f"Ray's {dead} has died, and Ray will end without it"
                emit(note(f"{text}; the last checkpoint is kept: {recovery_hint}"))
            if stop.reason is not None and not sent:
                mailbox.request_stop.remote(stop.reason)
                sent = True
            silence = drain.silence_seconds
            # A request that came too late for training: the ranks evaluate, or start again.
            late = stop.reason is not None and not stop.is_training and not stop.only_training
            if (late or silence > _SECONDS_OF_SILENCE) and trainer.controller is not None:
                if not late:
                    silent.set()
                ray.kill(trainer.controller)
                return
            if silence > _SECONDS_BEFORE_A_NOTE and not slow:
                text = f"no rank has answered for {silence:.0f} s: Ray starts slowly ({_load()})"
                emit(note(f"{text} ..."))
            slow = silence > _SECONDS_BEFORE_A_NOTE

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        return trainer.fit()
    except ray.exceptions.RayError as error:
        if silent.is_set():
            raise RunError(
                f"no heartbeat from any rank for {_SECONDS_OF_SILENCE:g} s: Ray did not start the "
                f"ranks, or they hang ({_load()}); check that the cluster is up and has free "
                f"resources, then {recovery_hint}"
            ) from error
        if stop.reason is not None:
            raise KeyboardInterrupt from error
        raise
    finally:
        done.set()
        thread.join()


def _load() -> str:
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def _describe(error: Exception, launch: LaunchConfig, recovery_hint: str) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [f"rank {rank}: {_last_line(failure)}" for rank, failure in sorted(failures.items())]
    if not causes:
        return (
            f"Ray Train could not run {launch.num_workers} ranks: {_last_line(error)}; check "
            "that the cluster is up and has the CPUs (and GPUs) they need, then "
            f"{recovery_hint}"
        )
    return (
        f"the ranks failed {launch.max_failures + 1} times (launch.max_failures: "
        f"{launch.max_failures} restarts): {'; '.join(causes)}; the last checkpoint is kept: "
        f"fix the cause and {recovery_hint}"
    )


def _last_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ---------------------------------------------------------------- the cluster


@contextlib.contextmanager
def cluster(launch: LaunchConfig) -> Iterator[None]:
    """Connect to the named cluster, or start one on this machine for as long as it is used.

    Raises:
        RunError: If no cluster answers.
        TopologyError: If the cluster cannot hold the ranks.
        KeyboardInterrupt: At SIGTERM while Ray starts, as at SIGINT.
    """
    for name, value in (_ENVIRONMENT | ({} if launch.address else _LOCAL_ENVIRONMENT)).items():
        os.environ.setdefault(name, value)
    import ray

    # Ray raises the level of the root logger; the package's own warnings must still be shown.
    logging.getLogger("dml_dist").setLevel(logging.WARNING)
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
    handler = signal.getsignal(signal.SIGTERM)
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
    except SystemExit:  # Of Ray's own handler of SIGTERM.
        ray.shutdown()
        raise KeyboardInterrupt from None
    except Exception as error:  # Ray raises bare ones where its processes do not come up.
        if launch.address is None:
            raise RunError(
                f"Ray could not start a cluster on this machine: {_last_line(error)} Free some "
                "ports, memory and room in /tmp, or wait until this machine is less busy; "
                "launch.launcher torchrun and inprocess need no Ray"
            ) from error
        raise RunError(
            f"no Ray cluster answers: launch.address {launch.address} ({_last_line(error)}); start "
            "one with `ray start --head`, correct launch.address, or leave it out to start one here"
        ) from error
    # Ray's handler ends the interpreter, which aborts a process that waits for Ray.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
    try:
        _require_resources(launch)
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConnectionError when nothing answers gRPC, Ray's protocol, at HOST:PORT.

    Ray itself would try for minutes, and forever where something else listens.
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
            f"no gRPC server answers at {host}:{port} within {_SECONDS_FOR_AN_ANSWER:g} s"
        ) from None
    finally:
        channel.close()


def _require_resources(launch: LaunchConfig) -> None:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [resources["CPU"] for resources in alive if "CPU" in resources]
    needed = launch.num_workers * launch.cpus_per_rank
    # A rank cannot use the rests of two nodes. Ray would wait for a larger node without end.
    if sum(math.floor(cpus / launch.cpus_per_rank + 1e-9) for cpus in have) < launch.num_workers:
        nodes = f" on {len(have)} nodes ({', '.join(f'{cpus:g}' for cpus in have)})"
        raise TopologyError(
            f"launch.num_workers {launch.num_workers} x cpus_per_rank {launch.cpus_per_rank} = "
            f"{needed:g} CPUs are needed, but the cluster {launch.address or 'here'} has "
            f"{sum(have):g}{nodes if len(have) > 1 else ''}; lower launch.num_workers or "
            "launch.cpus_per_rank, or add nodes"
        )


def cluster_gpus(launch: LaunchConfig) -> int | None:
    """Return the number of GPUs of the cluster `launch.address`; None for one on this machine."""
    if launch.address is None:
        return None
    import ray

    return int(ray.cluster_resources().get("GPU", 0.0))


def announce(launch: LaunchConfig, emit: Emit) -> None:
    """Say what the command waits for: the start of Ray's processes takes seconds."""
    where = launch.address or "this machine"
    emit(note(f"starting {launch.num_workers} ranks with Ray Train on {where} ..."))
