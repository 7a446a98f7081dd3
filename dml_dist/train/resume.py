"""Going on from a checkpoint: whether the configuration allows it, and where it stands."""

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
        config: The configuration to go on with.

    Raises:
        CheckpointError: If a difference is not resumable; lists all that are not.
    """
    try:
        saved = RunConfig.model_validate_json(json.dumps(manifest.config))
    except ValidationError as error:
        raise CheckpointError(
            f"required the configuration of {folder} in this version's schema, got: {error}; "
            "use the version of dml-dist that saved it"
        ) from None
    return resumable_differences(saved, config, folder)


def resumable_differences(saved: RunConfig, config: RunConfig, where: Path) -> list[Difference]:
    """Return the differences between a run's configuration and the one to go on with.

    Args:
        saved: The run's configuration.
        config: The one to go on with.
        where: The run or checkpoint, for errors.

    Raises:
        CheckpointError: If a difference is not resumable; lists all that are not.
    """
    differences = differing_paths(saved, config)
    refused = [str(difference) for difference in differences if not difference.resumable]
    if refused:
        raise CheckpointError(
            f"--resume goes on with the configuration of {where}, got another one in "
            f"{len(refused)} {'field' if len(refused) == 1 else 'fields'} (run -> given): "
            f"{'; '.join(refused)}; take these back, or start a new run with another --run-dir or "
            "name"
        )
    return differences


def check_plan(folder: Path, manifest: Manifest, config: RunConfig, plan: RunPlan) -> None:
    """Refuse data or a length of the run that a checkpoint cannot go on with.

    Raises:
        CheckpointError: If the training images changed, the run would end before the checkpoint,
            or the schedule would have been another.
    """
    saved = (manifest.num_images, manifest.num_classes)
    if saved != (plan.num_images, plan.num_classes):
        raise CheckpointError(
            f"required the training data of {folder} ({saved[0]} images of {saved[1]} classes), "
            f"got {plan.num_images} images of {plan.num_classes} classes; give data.path the data "
            "it was saved with, or start a new run"
        )
    if manifest.step > plan.total_steps:
        raise CheckpointError(
            f"required at least the {manifest.step} steps that {folder} has made, got a run of "
            f"{plan.total_steps} steps in all; raise train.steps or train.epochs, or start a new "
            "run in another folder"
        )
    if depends_on_total_steps(config.schedule) and manifest.total_steps != plan.total_steps:
        raise CheckpointError(
            f"required {manifest.total_steps} steps in all as in {folder}, "
            f"got {plan.total_steps}: the schedule {config.schedule.name} depends on the number "
            "of steps from the first one on; keep train.steps and train.epochs, or start a new "
            "run with another schedule"
        )
