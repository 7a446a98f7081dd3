"""`dml-dist quickstart`: the main job from nothing, on the embedded data set."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dml_dist.config.load import parse_config
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
    text = resources.files("dml_dist.orchestration").joinpath(RECIPE).read_text(encoding="utf-8")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"name=quickstart-{stamp}"
    config = parse_config(yaml.safe_load(text), [name, *overrides], source=RECIPE)
    return run_training(config, console, run_dir=run_dir)
