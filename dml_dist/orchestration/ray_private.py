"""All that dml_dist uses of Ray's private API. Without a part of it, the rest still works.

Ray may change these names in any version. What is missing is said once, and its use left out.
"""

from __future__ import annotations

import functools
import logging
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
