"""`dml-dist train`: check everything, make the run folder, launch the ranks, write the report."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dml_dist.config.data import DataConfig
from dml_dist.config.load import differing_paths, dump_config, load_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.index import INDEX_NAME
from dml_dist.errors import CheckpointError
from dml_dist.files import write_text_atomic
from dml_dist.orchestration.bench import open_bench
from dml_dist.orchestration.datasets import ensure_imported
from dml_dist.orchestration.estimate import estimate_plan
from dml_dist.orchestration.launch import joined, launch, on_main, world_size_of
from dml_dist.orchestration.progress import Display, discard
from dml_dist.orchestration.tables import print_results
from dml_dist.orchestration.tasks import Assignment
from dml_dist.parallel.comm import Comm
from dml_dist.report import write_report
from dml_dist.runs import RunFolder
from dml_dist.topology import Topology
from dml_dist.train.plan import RunPlan


def run_training(
    config: RunConfig, console: Console, *, run_dir: Path | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train a run, evaluate it on the test classes, and write its report.

    Args:
        config: The run's configuration.
        console: Where progress and the table of results go.
        run_dir: The run's folder; None is runs/NAME.
        resume: Go on with the run in the folder, instead of refusing one that exists.

    Raises:
        DmlDistError: Whatever is wrong with configuration, data or ranks.
    """
    start = time.monotonic()
    config = with_absolute_paths(config)
    folder = RunFolder(run_dir or Path("runs") / config.name)
    with joined(config.launch) as comm:
        assignment = on_main(comm, lambda: _prepare(config, folder, resume, console))
        with Display(console) if comm.rank == 0 else contextlib.nullcontext(discard) as emit:
            metrics = launch(assignment, comm, emit)
        metrics["seconds"]["total"] = time.monotonic() - start
        page = on_main(comm, lambda: _conclude(folder, metrics))
        if comm.rank == 0:
            print_results(folder, console)
            console.print(f"report:  {page}", highlight=False, soft_wrap=True)
            console.print(f"results: {folder.path}", highlight=False, soft_wrap=True)
    return metrics


def dry_run_table(config: RunConfig, console: Console) -> None:
    """Print the resolved plan of a run; nothing is written or started."""
    config = with_absolute_paths(config)
    world_size = world_size_of(config.launch)
    if (Path(config.data.path) / INDEX_NAME).exists():
        plan, source = _plan(config, world_size), f"counted in {config.data.path}"
    else:
        plan, source = estimate_plan(config, world_size)
    table = Table("plan", config.name, title_justify="left")
    for label, value in [("data", source), *plan.describe()]:
        table.add_row(label, value)
    console.print(table)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with paths that hold in every process, whatever its folder."""
    changes: dict[str, Any] = {"path": _absolute(config.data.path)}
    if (source := getattr(config.data.dataset, "source", None)) is not None:
        assert config.data.dataset is not None
        changes["dataset"] = config.data.dataset.model_copy(update={"source": _absolute(source)})
    data: DataConfig = config.data.model_copy(update=changes)
    return config.model_copy(update={"data": data})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


# ---------------------------------------------------------------- before


def _prepare(config: RunConfig, folder: RunFolder, resume: bool, console: Console) -> Assignment:
    """Check data, plan and folder, in this order, and write only when all are right."""
    changes: tuple[str, ...] = ()
    if resume:
        folder = RunFolder.open(folder.path)
        changes = _changes(folder, config)
    else:
        folder.require_new()
    ensure_imported(config.data, console)
    plan = _plan(config, world_size_of(config.launch))
    if resume:
        write_text_atomic(folder.config_path, dump_config(config))
    else:
        RunFolder.create(folder.path, dump_config(config), name=config.name, seed=config.seed)
    _announce(plan, config, console)
    return Assignment(
        kind="train",
        config=config,
        run_dir=str(folder.path),
        command=shlex.join(sys.argv),
        changes=changes,
    )


def _plan(config: RunConfig, world_size: int) -> RunPlan:
    # One rank's view is every rank's: the plan depends on their number alone.
    topology = Topology(world_size=world_size)
    return open_bench(config, topology, Comm.single(), discard).resolve()


def _changes(folder: RunFolder, config: RunConfig) -> tuple[str, ...]:
    """Return what differs from the run's configuration, or refuse what may not.

    Raises:
        CheckpointError: If a difference is not resumable; lists all that are not.
    """
    differences = differing_paths(load_config(folder.config_path), config)
    refused = [str(difference) for difference in differences if not difference.resumable]
    if refused:
        raise CheckpointError(
            f"--resume goes on with the configuration of {folder.path}, got another one "
            f"(run -> given): {'; '.join(refused)}; take these back, or start a new run with "
            "another --run-dir or name"
        )
    return tuple(str(difference) for difference in differences)


def _announce(plan: RunPlan, config: RunConfig, console: Console) -> None:
    console.print(
        f"{config.name}: {plan.num_images:,} images of {plan.num_classes:,} classes, "
        f"{plan.total_steps:,} steps of {plan.global_batch_size} on {plan.world_size} "
        f"{'rank' if plan.world_size == 1 else 'ranks'} ({config.launch.launcher})",
        highlight=False,
    )


# ---------------------------------------------------------------- after


def _conclude(folder: RunFolder, metrics: Mapping[str, Any]) -> Path:
    folder.finish(metrics)
    return write_report(folder.path)
