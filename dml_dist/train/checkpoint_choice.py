"""Choosing a checkpoint: the newest whole one, the best one, or one by name."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import torch

from dml_dist.config.model import ModelConfig
from dml_dist.errors import CheckpointError, DataError
from dml_dist.files import read_json, write_json_atomic
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.train.checkpoint_files import (
    BEST,
    MANIFEST,
    MODEL,
    Best,
    Manifest,
    checkpoint_folders,
    newest_checkpoint,
    read_part,
    verify_checkpoint,
)

logger = logging.getLogger(__name__)


def find_checkpoint(checkpoints: Path, comm: Comm) -> tuple[Path, Manifest] | None:
    """Return the newest whole checkpoint, as rank 0 finds it, or None when there is none.

    Raises:
        CheckpointError: If all are damaged.
    """
    found: tuple[Path, Manifest] | None = None
    error: Exception | None = None
    if comm.topology.is_main:
        try:
            found = newest_checkpoint(checkpoints)
        except Exception as caught:  # Handed to all ranks by agree.
            error = caught
    comm.agree(error, what="finding a checkpoint")
    answer: tuple[Path, Manifest] | None = comm.broadcast_object(found, what="checkpoint")
    return answer


def best_checkpoint(checkpoints: Path) -> Best | None:
    """Return the best checkpoint that is on record, or None without validation."""
    try:
        values = read_json(checkpoints / BEST)
        return Best(**values)
    except FileNotFoundError:
        return None
    except (DataError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoints / BEST}, which names the best checkpoint, is damaged ({error}); "
            f"evaluate the last checkpoint, or one by its folder"
        ) from None


def restore_best(checkpoints: Path, best: Best | None, comm: Comm) -> Best | None:
    """Put best.json back to what a resumed checkpoint knew; every rank calls this.

    Returns:
        `best`, or None when that checkpoint is gone or damaged: the next validation is the best.
    """
    error: Exception | None = None
    if comm.topology.is_main:
        try:
            best = _restore_best(checkpoints, best)
        except Exception as caught:  # Handed to all ranks by agree.
            error = caught
    comm.agree(error, what="restoring the best checkpoint")
    answer: Best | None = comm.broadcast_object(best, what="best checkpoint")
    return answer


def select_checkpoint(checkpoints: Path, which: str) -> Path:
    """Return the folder of a checkpoint.

    Args:
        checkpoints: Folder of the run's checkpoints.
        which: "best" (the last where nothing was validated), "last", or the name of a folder.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    if which == "best" and (best := best_checkpoint(checkpoints)) is not None:
        return checkpoints / best.folder
    if which in ("best", "last"):
        found = newest_checkpoint(checkpoints)
        if found is None:
            raise CheckpointError(f"there is no checkpoint in {checkpoints}; train the run first")
        return found[0]
    folder = checkpoints / which
    if not (folder / MANIFEST).is_file():
        names = [path.name for path in checkpoint_folders(checkpoints)]
        raise CheckpointError(
            f"{checkpoints} has no checkpoint {which!r}; give best, last or one of {names}"
        )
    return folder


def load_model(
    folder: Path, config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> EmbeddingModel:
    """Return the network of a checkpoint on the CPU, verified, in evaluation mode.

    Raises:
        CheckpointError: If its file is damaged or holds another network.
    """
    verify_checkpoint(folder, only=[MODEL])
    model = build_model(config, seed=seed, pretrained=False, dtype=dtype)
    try:
        model.load_state_dict(read_part(folder, MODEL))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / MODEL} does not hold the network of the configuration: "
            f"{str(error)[:600]}; use the run's own configuration"
        ) from error
    return model.eval()


def _restore_best(checkpoints: Path, best: Best | None) -> Best | None:
    if best is not None:
        try:
            verify_checkpoint(checkpoints / best.folder)
        except CheckpointError as problem:
            logger.warning("%s: the next validation is the best", problem)
            best = None
    if best is None:
        (checkpoints / BEST).unlink(missing_ok=True)
    else:
        write_json_atomic(checkpoints / BEST, asdict(best))
    return best
