"""Resuming a run from a checkpoint: which changes of configuration and data are allowed."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from dml_dist.config.load import Difference, differing_paths
from dml_dist.config.schema import RunConfig
from dml_dist.errors import CheckpointError
from dml_dist.train.checkpoint_files import Manifest
from dml_dist.train.optim import depends_on_total_steps
from dml_dist.train.run_plan import RunPlan


def check_resume(folder: Path, manifest: Manifest, config: RunConfig) -> list[Difference]:
    """Return the differences between a checkpoint's configuration and the new one.

    Args:
        folder: The checkpoint, for errors.
        manifest: What it is.
        config: The configuration to resume with.

    Raises:
        CheckpointError: If a difference is not resumable; lists all that are not.
    """
    try:
        saved = RunConfig.model_validate_json(json.dumps(manifest.config))
    except ValidationError as error:
        raise CheckpointError(
            f"this version of dml-dist cannot read the configuration in {folder}: {error}; "
            "use the version that saved it"
        ) from None
    return resumable_differences(saved, config, folder)


def resumable_differences(saved: RunConfig, config: RunConfig, where: Path) -> list[Difference]:
    """Return the differences between a run's configuration and the one to resume it with.

    Args:
        saved: The run's configuration.
        config: The one to resume with.
        where: The run or checkpoint, for errors.

    Raises:
        CheckpointError: If a difference is not resumable; lists all that are not.
    """
    differences = differing_paths(saved, config)
    refused = [str(difference) for difference in differences if not difference.resumable]
    if refused:
        raise CheckpointError(
            f"--resume continues {where} with its own configuration, but {len(refused)} "
            f"{'field differs' if len(refused) == 1 else 'fields differ'} (run -> given): "
            f"{'; '.join(refused)}; undo these changes, or start a new run with another --run-dir "
            "or name"
        )
    return differences


def check_plan(folder: Path, manifest: Manifest, config: RunConfig, plan: RunPlan) -> None:
    """Refuse data or a number of steps that do not fit a checkpoint.

    Raises:
        CheckpointError: If the training images changed, the run would end before the checkpoint,
            or the schedule would have been another.
    """
    saved = (manifest.num_images, manifest.num_classes)
    if saved != (plan.num_images, plan.num_classes):
        raise CheckpointError(
            f"{folder} was trained on {saved[0]} images of {saved[1]} classes, but the data now "
            f"has {plan.num_images} images of {plan.num_classes} classes; set data.path to the "
            "data it was saved with, or start a new run"
        )
    if manifest.step > plan.total_steps:
        raise CheckpointError(
            f"{folder} has made {manifest.step} steps already, more than the {plan.total_steps} "
            "steps of the whole run; raise train.steps or train.epochs, or start a new run in "
            "another folder"
        )
    if depends_on_total_steps(config.schedule) and manifest.total_steps != plan.total_steps:
        raise CheckpointError(
            f"the run in {folder} has {manifest.total_steps} steps in all, not "
            f"{plan.total_steps}: the schedule {config.schedule.name} depends on that number from "
            "the first step on; keep train.steps and train.epochs, or start a new run with another "
            "schedule"
        )
