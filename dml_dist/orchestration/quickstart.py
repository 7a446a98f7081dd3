"""`dml-dist quickstart`: the main job from nothing, on the embedded data set."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from dml_dist.config.load import load_config
from dml_dist.orchestration.train import run_training

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
