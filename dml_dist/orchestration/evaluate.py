"""`dml-dist evaluate`: evaluate a run's checkpoint on a split, with the code that training uses."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dml_dist.config.load import differing_paths, load_config, with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration.launch import joined, launch, on_main
from dml_dist.orchestration.tables import print_metrics
from dml_dist.runs.artifacts import write_metrics
from dml_dist.runs.code_note import say_if_code
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.progress import Display, discard
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import Assignment

# The only fields that may change among those on which a run's results depend.
_CHANGEABLE = "evaluation."


def run_evaluation(
    run_dir: Path,
    console: Console,
    *,
    split: str,
    checkpoint: str,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a checkpoint and write metrics and results of each class next to the run's own.

    Args:
        run_dir: The run's folder.
        console: Where progress and the table go.
        split: `validation`, or a split of the index.
        checkpoint: `best`, `last` or the folder of a checkpoint.
        overrides: Changes to the run's configuration: evaluation, launch, paths.

    Raises:
        ConfigError: If the folder holds no run, or a field is changed that may not be.
        CheckpointError: If the checkpoint is missing or damaged.
        DataError: If the data is missing or damaged, or the split does not exist.
    """
    folder = RunFolder.open(run_dir)
    config = evaluation_config(folder, overrides)
    assignment = Assignment(
        kind="evaluate",
        config=config,
        run_dir=str(folder.path),
        split=split,
        checkpoint=checkpoint,
    )
    target, per_class = folder.evaluation(split, checkpoint)
    with joined(config.launch) as comm:
        if comm.rank == 0:
            say_if_code(folder.path, console)
        with Display(console) if comm.rank == 0 else contextlib.nullcontext(discard) as emit:
            metrics = launch(assignment, comm, emit, StopRequest())
        on_main(comm, lambda: write_metrics(target, metrics))
        if comm.rank == 0:
            print_metrics(metrics, console)
            console.print(f"metrics: {target}", highlight=False, soft_wrap=True)
            console.print(f"classes: {per_class}", highlight=False, soft_wrap=True)
    return metrics


def evaluation_config(folder: RunFolder, overrides: Sequence[str]) -> RunConfig:
    """Return a run's own configuration with changes that do not affect its embeddings.

    Args:
        folder: The run.
        overrides: Changes to evaluation, launch, paths.

    Raises:
        ConfigError: If a field is changed that may not be.
    """
    recorded = load_config(folder.config_path)
    config = with_absolute_paths(load_config(folder.config_path, overrides))
    refused = [
        difference
        for difference in differing_paths(recorded, config)
        if not difference.resumable and not difference.path.startswith(_CHANGEABLE)
    ]
    if refused:
        raise ConfigError(
            f"{folder.path} is evaluated with its own configuration; only evaluation, launch and "
            f"paths may change, not {'; '.join(map(str, refused))}; leave these changes out"
        )
    return config
