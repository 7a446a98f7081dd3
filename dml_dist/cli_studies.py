"""The subcommands `dml-dist compare`, `dml-dist tune` and `dml-dist scale`: studies of runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dml_dist.cli_data import console
from dml_dist.cli_options import (
    ConfigArgument,
    LauncherOption,
    RunDirOption,
    SetOption,
    WorkersOption,
    overrides_of,
)
from dml_dist.errors import RunStopped


@contextmanager
def _repeatable(more: list[str]) -> Iterator[None]:
    """Say how to continue a study that was stopped: with this command line and `more`."""
    try:
        yield
    except RunStopped as stop:
        what = str(stop).partition("\n")[0]
        program = "python -m dml_dist" if Path(sys.argv[0]).name == "__main__.py" else "dml-dist"
        again = shlex.join([*sys.argv[1:], *more])
        raise RunStopped(f"{what}\ncontinue with: {program} {again}") from None


def compare(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: RunDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a comparison that was stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and their plans, and exit.")
    ] = False,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", min=1, help="Number of parallel runs, each in one process."),
    ] = None,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Compare methods over seeds at equal steps, with a report of tables and curves."""
    from dml_dist.config.load import load_config
    from dml_dist.studies.compare import dry_run_comparison, run_comparison

    overrides = overrides_of(changes, launcher, workers)
    if parallel is not None:
        overrides.append(f"compare.parallel={parallel}")
    resolved = load_config(config, overrides)
    if dry_run:
        dry_run_comparison(resolved, console)
        return
    with _repeatable([] if resume else ["--resume"]):
        run_comparison(resolved, console, run_dir=run_dir, resume=resume)


def tune(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: RunDirOption = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Number of trials of the whole search.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, help="Number of trials at a time.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", help="Time limit of this call of the command.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Search whose best values are tried first."),
    ] = None,
    final: Annotated[
        bool,
        typer.Option(
            "--final", help="At the end train the best values again and evaluate test classes."
        ),
    ] = False,
    continue_trial: Annotated[
        int | None,
        typer.Option("--continue-trial", min=0, help="Train a pruned trial to its end."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the space and the cost, and exit.")
    ] = False,
    launcher: LauncherOption = None,
    workers: WorkersOption = None,
) -> None:
    """Search hyper-parameters on validation classes; the same command continues a search."""
    from dml_dist.config.load import load_config

    overrides = overrides_of(changes, launcher, workers)
    options = {"trials": trials, "parallel": parallel, "hours": hours}
    overrides += [f"tune.{key}={value}" for key, value in options.items() if value is not None]
    resolved = load_config(config, overrides)
    if dry_run:
        from dml_dist.studies.tune_check import dry_run_tuning

        dry_run_tuning(resolved, console)
        return
    from dml_dist.studies.tune import run_tuning

    with _repeatable([]):
        run_tuning(
            resolved,
            console,
            run_dir=run_dir,
            source=source,
            final=final,
            continue_trial=continue_trial,
        )


def scale(
    config: ConfigArgument,
    changes: SetOption = None,
    run_dir: RunDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure the points that are left.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the points and their cost, and exit.")
    ] = False,
    ask: Annotated[
        str | None,
        typer.Option(
            "--ask",
            metavar="QUESTION",
            help='Answer such as "gpus=64 classes=10000000" from the points measured, and exit.',
        ),
    ] = None,
) -> None:
    """Measure speed, traffic and memory over sizes, with a report and a model of larger ones."""
    from dml_dist.config.load import load_config
    from dml_dist.studies.scale.study import ask_scaling, dry_run_scaling, run_scaling

    resolved = load_config(config, overrides_of(changes, None, None))
    if ask is not None:
        ask_scaling(ask, resolved, console, run_dir=run_dir)
    elif dry_run:
        dry_run_scaling(resolved, console)
    else:
        with _repeatable([] if resume else ["--resume"]):
            run_scaling(resolved, console, run_dir=run_dir, resume=resume)
