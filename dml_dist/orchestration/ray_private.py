"""All that dml_dist uses of Ray's private API. Without a part of it, the rest still works.

Ray may change these names in any version. What is missing is said once, and its use left out.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


def trainer_class() -> Any:
    """Return Ray's trainer without its handler of SIGINT; ours ends a run in an orderly way.

    The trainer keeps the handle of the actor that `fit` waits for, so that the wait can be ended.
    Without the private method `controller` stays None, and no wait can be ended.
    """
    from ray.train.torch import TorchTrainer

    with _private("a wait for ranks that never start is not ended"):
        _ = TorchTrainer._register_sigint_handler

    class Trainer(TorchTrainer):
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

    return Trainer


def job_config() -> Any:
    """Return a job's configuration with which workers do not import from the current folder first.

    Ray puts the driver's current folder in front of all others on every worker, and has no option
    for it. Without the private name it still does.
    """
    from ray.job_config import JobConfig

    with _private("files of the current folder can hide libraries on workers"):
        _ = JobConfig()._py_driver_sys_path

        class Config(JobConfig):
            @property
            def _py_driver_sys_path(self) -> list[str]:
                return []  # A new list each time, so that what is appended has no effect.

            @_py_driver_sys_path.setter
            def _py_driver_sys_path(self, folders: list[str]) -> None:
                pass

        return Config()
    return JobConfig()


def torch_config_class() -> Any:
    """Return Ray's TorchConfig, whose ranks meet at the nodes' Ray addresses, and at no others.

    Gloo binds to the address of the host's name, which is 127.0.0.1 in many /etc/hosts, NCCL to
    the first interface, and torch's store to all. Without the hook they still do.
    """
    from ray.train.torch import TorchConfig

    from dml_dist.parallel.process_group import bind_store

    with _private("ranks on several nodes may not reach each other"):
        base: Any = TorchConfig().backend_cls
        _ = base.on_start

        class Backend(base):
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                worker_group.execute(bind_to_node)
                worker_group.execute(bind_store)
                super().on_start(worker_group, backend_config)

        class Config(TorchConfig):
            @property
            def backend_cls(self) -> Any:
                return Backend

        return Config
    return TorchConfig


def bind_to_node() -> None:
    """Make gloo and NCCL use the interface of this node's Ray address, unless they are told."""
    import psutil  # Ray brings it.
    import ray

    own = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if own in (address.address for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            # The exact name: NCCL takes names for prefixes.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def forget_token() -> None:
    """Let Ray read the token again that its next cluster needs."""
    with _private("this process cannot use a second cluster with another token"):
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def dead_daemons() -> str:
    """Return the names of Ray's own processes that have died and that a cluster cannot run without.

    Only those that this process started. Some time later Ray ends this process, often silently.
    """
    with _private("the death of Ray's own processes is not reported"):
        import ray._private.worker

        node = ray._private.worker._global_node
        dead = {kind for kind, _ in node.dead_processes()} if node is not None else set()
        return " and ".join(sorted(dead & {"raylet", "gcs_server"}))
    return ""


def silence_reports() -> None:
    """Silence what Ray Train logs at INFO on every rank, whatever its logging configuration."""
    with _private("Ray Train may log more than asked for"):
        import ray.train.v2._internal.execution.context as context

        logging.getLogger(context.__file__).setLevel(logging.WARNING)


@contextmanager
def _private(effect: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, ImportError, TypeError) as error:
        _warn(effect, str(error))


@functools.cache
def _warn(effect: str, missing: str) -> None:
    import ray

    logger.warning(
        "Ray %s lacks a private name that dml_dist uses (%s): %s. Everything else works; the "
        "versions of Ray that were tested are in pyproject.toml",
        ray.__version__,
        missing,
        effect,
    )
