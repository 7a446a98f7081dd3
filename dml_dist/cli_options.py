"""Options that several subcommands share, and the changes of a configuration that they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from dml_dist.urls import output_path

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a field, e.g. optim.lr=1e-3; repeatable."
    ),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=output_path,
        metavar="DIR",
        help="New folder; default runs/NAME.",
    ),
]
Launcher = Literal["ray", "torchrun", "inprocess"]
LauncherOption = Annotated[
    Launcher | None, typer.Option("--launcher", help="Launcher that starts the ranks.")
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Number of ranks under Ray.")
]


def overrides_of(
    changes: list[str] | None, launcher: Launcher | None, workers: int | None
) -> list[str]:
    """Return all overrides; ranks under torchrun are detected by their environment."""
    result = list(changes or [])
    if launcher is None and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun"
    if launcher is not None:
        result.append(f"launch.launcher={launcher}")
    if workers is not None:
        result.append(f"launch.num_workers={workers}")
    return result
