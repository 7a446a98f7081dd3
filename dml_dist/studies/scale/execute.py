"""Executes the run of one point: alone in a process of its own, or on ranks under Ray."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dml_dist.config.schema import RunConfig
from dml_dist.data.pool import end_with_parent
from dml_dist.errors import DmlDistError, RunError
from dml_dist.runs.scaling import scale_section
from dml_dist.studies.pool import execute_run
from dml_dist.studies.scale.grid import point_config, shards_folder
from dml_dist.studies.scale.plan import PlannedPoint
from dml_dist.studies.scale.serve import served

Metrics = dict[str, Any]


@contextmanager
def config_of(config: RunConfig, planned: PlannedPoint) -> Iterator[RunConfig]:
    """Give the configuration of a point's run, whose data can be read until the block ends.

    Args:
        config: The study's configuration, paths absolute.
        planned: The point.
    """
    name, sizes = planned.point.name, planned.sizes
    folder = shards_folder(config, sizes)
    if not sizes.remote:
        yield point_config(config, name, sizes, {"path": str(folder)})
        return
    with (
        served(folder, scale_section(config).remote_latency_ms) as url,
        tempfile.TemporaryDirectory(prefix="dml-dist-scale-") as cache,
    ):
        of_cache = {**config.data.cache.model_dump(mode="json"), "folder": cache}
        data = {"path": url, "dataset": None, "cache": of_cache}
        yield point_config(config, name, sizes, data)


def execute_alone(config: RunConfig, folder: Path) -> Metrics:
    """Execute a run on one rank in a new process, and return its metrics.

    What earlier points left in this process would hide what the run allocates, and a run that is
    killed for memory must not end the study.

    Raises:
        DmlDistError: As in the process; a RunError if it was killed.
    """
    # Forked from a server without threads; see data/pool.py.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, sys.argv, config, folder))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"the process of {config.name} was killed (exit code {process.exitcode}), probably "
            "because memory was short"
        ) from None
    finally:
        process.terminate()  # It has ended, unless this process was interrupted.
        process.join()
    if isinstance(outcome, DmlDistError):
        raise outcome
    return dict(outcome)


def _run(sender: Connection, command: list[str], config: RunConfig, folder: Path) -> None:
    end_with_parent()
    sys.argv = command  # Recorded as the run's command.
    try:
        outcome: Metrics | DmlDistError = execute_run(config, folder)
    except DmlDistError as error:
        outcome = error
    sender.send(outcome)


def delete_checkpoints(folder: Path) -> None:
    """Delete the weights of a measured run: a table of a million classes is large."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
