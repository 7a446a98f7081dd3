"""`dml-dist train`: check everything, make the run folder, launch the ranks, write the report."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dml_dist.config.launch import LaunchConfig
from dml_dist.config.load import dump_config, load_config, with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.data.index import INDEX_NAME
from dml_dist.errors import DmlDistError, PeerLostError, RunStopped
from dml_dist.models.backbones import check_weights, describe_weights, require_weights
from dml_dist.orchestration.launch import joined, launch, on_main, uses_gpu, world_size_of
from dml_dist.orchestration.ray_train import delete_scratch
from dml_dist.orchestration.tables import print_results
from dml_dist.parallel.comm import Comm
from dml_dist.report import try_to_write, write_report
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.context import open_context
from dml_dist.runtime.datasets import (
    ensure_imported,
    require_index,
    require_same_dataset,
    warn_of_secrets,
)
from dml_dist.runtime.estimate import check_before_import, estimate_plan
from dml_dist.runtime.loggers import check_loggers
from dml_dist.runtime.progress import Display, discard, warnings_as_notes
from dml_dist.runtime.signals import StopRequest, stop_on_signals
from dml_dist.runtime.tasks import Assignment
from dml_dist.topology import Topology
from dml_dist.train.checkpoint_files import newest_checkpoint
from dml_dist.train.resume import check_plan, resumable_differences
from dml_dist.train.run_plan import RunPlan
from dml_dist.urls import local_path, shown_url


def run_training(
    config: RunConfig,
    console: Console,
    *,
    run_dir: Path | None = None,
    resume: bool = False,
    report: bool = True,
    untrained_dir: Path | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Any]:
    """Train a run, evaluate it on the test classes, and write its report.

    Args:
        config: The run's configuration.
        console: Where progress and the table of results go.
        run_dir: The run's folder; None is runs/NAME.
        resume: Continue the run in the folder; without it an existing run is refused.
        report: Whether to write the report page.
        untrained_dir: Where the runs of a study share the untrained network's results.
        stop: Request of the caller to stop; None: signals make one.

    Raises:
        RunStopped: After SIGTERM, SIGINT or the caller's request; the last line of its message
            says how to continue.
        DmlDistError: If anything is wrong with configuration, data or ranks.
    """
    config = with_absolute_paths(config)
    folder = RunFolder(run_dir or Path("runs") / config.name)
    with stop_on_signals() if stop is None else contextlib.nullcontext(stop) as stop:
        try:
            return _run(config, folder, console, stop, untrained_dir, resume=resume, report=report)
        except (KeyboardInterrupt, PeerLostError) as error:
            if stop.reason is None:
                raise
            step = folder.last_checkpoint_step()
            kept = "no checkpoint yet" if step is None else f"last checkpoint at step {step:,}"
            message = f"{config.name} was interrupted by {stop.reason} ({kept})"
            raise RunStopped(f"{message}\n{_resume_hint(folder, config.launch)}") from error


def _run(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    stop: StopRequest,
    untrained_dir: Path | None,
    *,
    resume: bool,
    report: bool,
) -> dict[str, Any]:
    start = time.monotonic()
    with joined(config.launch) as comm, contextlib.ExitStack() as held:

        def prepare() -> Assignment:
            assignment = replace(
                _prepare(config, folder, resume, console),
                untrained_dir=None if untrained_dir is None else str(untrained_dir.absolute()),
            )
            text = dump_config(config)
            if not resume:
                RunFolder.create(folder.path, text, name=config.name, seed=config.seed)
            held.enter_context(folder.lock())
            delete_scratch(folder.path)
            folder.write_config(text)
            return assignment

        assignment = on_main(comm, prepare)
        is_main = comm.rank == 0
        with (
            Display(console) if is_main else contextlib.nullcontext(discard) as emit,
            _status_of(folder, stop) if is_main else contextlib.nullcontext(),
        ):
            metrics = launch(assignment, comm, emit, stop)
        if (stopped := metrics.get("stopped")) is not None:
            on_main(comm, lambda: folder.end("stopped", **stopped))
            raise RunStopped(
                f"{config.name} stopped at step {stopped['step']:,}, with a checkpoint "
                f"({stopped['reason']})\n{_resume_hint(folder, config.launch)}"
            )
        metrics["seconds"]["total"] = time.monotonic() - start
        page = on_main(comm, lambda: _conclude(folder, metrics, report))
        if comm.rank == 0:
            print_results(folder, console)
            if page is not None:
                console.print(f"report:  {page}", highlight=False, soft_wrap=True)
            console.print(f"results: {folder.path}", highlight=False, soft_wrap=True)
    return metrics


def dry_run_table(config: RunConfig, console: Console) -> None:
    """Print the resolved plan of a run; nothing is written or started."""
    config = with_absolute_paths(config)
    check_loggers(config.loggers)
    warn_of_secrets(config, console)
    plan, source = plan_without_data(config)
    table = Table("plan", config.name, title_justify="left")
    weights = describe_weights(config.model.backbone)
    for label, value in [("data", source), *plan.describe(), *weights]:
        table.add_row(label, value)
    console.print(table)


def plan_without_data(config: RunConfig) -> tuple[RunPlan, str]:
    """Return a run's plan and where its numbers come from; nothing is written or started.

    Args:
        config: The run's configuration; paths in it are absolute.

    Raises:
        DmlDistError: If configuration and data do not fit.
    """
    check_weights(config.model.backbone)
    world_size = world_size_of(config.launch)
    folder = local_path(config.data.path)
    if folder is None or (folder / INDEX_NAME).exists():
        require_same_dataset(config.data)
        return _plan(config, world_size), f"counted in {shown_url(config.data.path)}"
    return estimate_plan(config, world_size)


# ---------------------------------------------------------------- before


def _prepare(config: RunConfig, folder: RunFolder, resume: bool, console: Console) -> Assignment:
    """Check configuration, folder, data and plan; writes nothing but missing tar shards."""
    launch_config = config.launch
    changes: tuple[str, ...] = ()
    if resume:
        saved = load_config(RunFolder.open(folder.path).config_path)
        differences = resumable_differences(saved, config, folder.path)
        changes = tuple(str(difference) for difference in differences)
    else:
        folder.require_new()
    if launch_config.address is None:
        require_weights(config.model.backbone)  # Nodes of a cluster have their own copies.
    else:
        check_weights(config.model.backbone)
    check_loggers(config.loggers)
    if launch_config.launcher == "ray" and launch_config.address is None:
        uses_gpu(launch_config, launch_config.fewest_workers)
    world_size = world_size_of(launch_config)
    is_local = local_path(config.data.path) is not None
    if is_local and launch_config.launcher == "torchrun" and world_size > 1:
        require_index(config.data)  # During an import the other ranks would time out.
    if is_local:
        check_before_import(config, world_size)
        ensure_imported(config.data, console)
    plan = _plan(config, world_size)
    if resume:
        with warnings_as_notes(discard):  # The ranks report damaged checkpoints.
            found = newest_checkpoint(folder.checkpoints)
        if found is not None:
            check_plan(*found, config, plan)
    warn_of_secrets(config, console)
    _announce(plan, config, console)
    return Assignment(
        kind="train",
        config=config,
        run_dir=str(folder.path),
        command=shlex.join(shown_url(sys.argv)),
        changes=changes,
        reason="continued by --resume" if resume else "",
    )


def _plan(config: RunConfig, world_size: int) -> RunPlan:
    # The plan is the same on every rank: it depends on the number of ranks only.
    context = open_context(config, Topology(world_size=world_size), Comm.single(), discard)
    context.check_evaluable()
    plan = context.resolve()
    context.check_cache()
    return plan


def _announce(plan: RunPlan, config: RunConfig, console: Console) -> None:
    console.print(
        f"{config.name}: {plan.num_images:,} images of {plan.num_classes:,} classes, "
        f"{plan.total_steps:,} steps of {plan.global_batch_size} on {plan.world_size} "
        f"{'rank' if plan.world_size == 1 else 'ranks'} ({config.launch.launcher})",
        highlight=False,
        soft_wrap=True,
    )


# ---------------------------------------------------------------- after


@contextlib.contextmanager
def _status_of(folder: RunFolder, stop: StopRequest) -> Iterator[None]:
    """Mark the run stopped or failed if its launch ends in this way; for rank 0 or the driver."""
    try:
        yield
    except BaseException as error:
        # The status must not hide the error: the disk may be full.
        with contextlib.suppress(OSError, DmlDistError):
            if isinstance(error, KeyboardInterrupt) or (
                stop.reason is not None and isinstance(error, PeerLostError)
            ):
                reason = stop.reason or "interrupted"
                folder.end("stopped", reason, folder.last_checkpoint_step())
            else:
                folder.end("failed", str(error) or type(error).__name__)
        raise


def _resume_hint(folder: RunFolder, launch_config: LaunchConfig) -> str:
    """Return the line that says how to continue a run."""
    if not folder.info_path.is_file():
        return "nothing was trained yet: run the same command again"
    program = "python -m dml_dist" if Path(sys.argv[0]).name == "__main__.py" else "dml-dist"
    if launch_config.launcher == "torchrun":
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            return "continue with: the same torchrun commands on all nodes, with --resume"
        ranks_here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        program = f"torchrun --nproc-per-node {ranks_here} -m dml_dist"
    # Its own configuration holds what --set and other options changed.
    arguments = ["train", str(folder.config_path), "--run-dir", str(folder.path), "--resume"]
    return f"continue with: {program} {shlex.join(arguments)}"


def _conclude(folder: RunFolder, metrics: Mapping[str, Any], report: bool) -> Path | None:
    folder.finish(metrics)
    return try_to_write(write_report, folder.path) if report else None


# ---------------- quickstart

RECIPE = "quickstart.yaml"


def run_quickstart(
    console: Console, *, run_dir: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Draw glyphs, write shards, train on Ray Train workers, evaluate, and write the report.

    Everything is written below the current directory: the run folder `runs/quickstart-TIME`, and
    the tar shards, which later quickstarts use again.

    Args:
        console: Where progress and the table of results go.
        run_dir: The run's folder.
        overrides: Changes to the recipe.
    """
    name = f"name=quickstart-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    with resources.as_file(resources.files("dml_dist.orchestration") / RECIPE) as recipe:
        config = load_config(recipe, [name, *overrides])
    return run_training(config, console, run_dir=run_dir)
