"""Ray clusters: joining the one of `launch.address`, or starting one on this machine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import RunError, TopologyError
from dml_dist.files import write_text_atomic
from dml_dist.import_path import search_path
from dml_dist.orchestration.ray_private import forget_token, job_config
from dml_dist.runtime.progress import Emit, note

# Read by Ray when it is imported or started. Values that the user has set are kept.
_ENVIRONMENT = {
    # Seconds between health checks of the ranks; the default of 2 s delays the end of every run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
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
    # All of Ray's processes listen on 127.0.0.1 alone, whatever the system, despite the name.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_OBJECT_STORE_BYTES = 128 * 2**20
_SECONDS_FOR_AN_ANSWER = 5.0


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
    with contextlib.nullcontext() if launch.address else _own_folder() as folder:
        handler = signal.getsignal(signal.SIGTERM)
        _connect(launch, folder)
        # Ray's handler ends the interpreter, which aborts a process that waits for Ray.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
        try:
            _require_resources(launch)
            yield
        finally:
            ray.shutdown()


def _connect(launch: LaunchConfig, folder: Path | None) -> None:
    """Join the named cluster, or start one that keeps its files in a folder."""
    import ray

    forget_token()  # Of an earlier cluster of this process.
    folders = search_path()
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_config": ray.LoggingConfig(encoding="TEXT", log_level="ERROR"),
        "job_config": job_config(),
    }
    try:
        if folder is None:
            _guard_token_file()
            _require_answer(str(launch.address))
            hook = {"worker_process_setup_hook": _also_search(folders)}
            ray.init(address=launch.address, runtime_env=hook, **options)
        else:
            needed = math.ceil(launch.num_workers * launch.cpus_per_rank)
            ray.init(
                address="local",
                num_cpus=max(needed, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(folders)}},
                **options,
            )
    except SystemExit:  # Of Ray's own handler of SIGTERM.
        ray.shutdown()
        raise KeyboardInterrupt from None
    except Exception as error:  # Ray raises bare ones where its processes do not come up.
        if launch.address is None:
            raise RunError(
                f"Ray could not start a cluster on this machine: {last_line(error)} Free some "
                "ports, memory and room in /tmp, or wait until this machine is less busy; "
                "launch.launcher torchrun and inprocess need no Ray"
            ) from error
        raise RunError(
            f"no Ray cluster answers: launch.address {launch.address} ({last_line(error)}); start "
            "one with `ray start --head`, correct launch.address, or leave it out to start one here"
        ) from error


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Yield a folder for Ray's files, with a token in a file; removed at the end.

    Ray's default is /tmp/ray, open to all users and kept, with the token of all clusters in a file
    that others can read.
    """
    # The shortest place: Ray's sockets are in it, and their paths have at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    own_token = not any(name in os.environ for name in _TOKENS)
    if own_token:
        file = folder / "token"
        write_text_atomic(file, secrets.token_hex(32), private=True)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)
    try:
        yield folder / "r"  # Ray opens this one to all; they cannot reach it.
    finally:
        if own_token:
            del os.environ["RAY_AUTH_TOKEN_PATH"]
        shutil.rmtree(folder, ignore_errors=True)


def _guard_token_file() -> None:
    """Take from others the right to read the token: `ray get-auth-token` gives it to all."""
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    with contextlib.suppress(OSError):  # There is none, or it is somebody else's.
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)


def _also_search(folders: list[str]) -> Callable[[], None]:
    """Return a function that lets a worker of another machine import from folders, at the end.

    Ray sends a nested function whole: the worker calls it before it can import this package.
    """

    def append() -> None:
        import sys

        sys.path += [folder for folder in folders if folder not in sys.path]

    return append


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
    fewest, field = (
        launch.fewest_workers,
        "num_workers" if launch.min_workers is None else "min_workers",
    )
    # A rank cannot use the rests of two nodes. Ray would wait for a larger node without end.
    if sum(math.floor(cpus / launch.cpus_per_rank + 1e-9) for cpus in have) < fewest:
        nodes = f" on {len(have)} nodes ({', '.join(f'{cpus:g}' for cpus in have)})"
        raise TopologyError(
            f"launch.{field} {fewest} x cpus_per_rank {launch.cpus_per_rank} = "
            f"{fewest * launch.cpus_per_rank:g} CPUs are needed, but the cluster "
            f"{launch.address or 'here'} has {sum(have):g}{nodes if len(have) > 1 else ''}; lower "
            f"launch.{field} or launch.cpus_per_rank, or add nodes"
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
    fewest, most = launch.fewest_workers, launch.num_workers
    ranks = f"{most}" if fewest == most else f"{fewest} to {most}"
    emit(note(f"starting {ranks} ranks with Ray Train on {where} ..."))


def last_line(error: object) -> str:
    """Return the last line of an error's text, or its class without one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
