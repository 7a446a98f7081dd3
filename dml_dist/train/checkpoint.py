"""Saving the state of all ranks as one checkpoint, and reading it on any number of ranks.

Every rank calls these functions. A failure on one rank (a full disk) ends all ranks with its
message, leaves no half checkpoint behind and the earlier ones as they are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dml_dist.errors import CheckpointError, RunError
from dml_dist.files import sync_folder, write_json_atomic
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import OwnedBuffer, OwnedRows
from dml_dist.train.checkpoint_files import (
    BEST,
    LOSS,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PROJECTIONS,
    Manifest,
    PartFile,
    checkpoint_folders,
    is_whole,
    read_part,
    write_part,
)
from dml_dist.train.optim import OWNED_PREFIX
from dml_dist.train.optim_state import (
    State,
    join_rows,
    load_named_states,
    named_states,
    split_rows,
)
from dml_dist.train.state import TrainState


def save_checkpoint(checkpoints: Path, state: TrainState, manifest: Manifest, *, keep: int) -> Path:
    """Write a checkpoint, then delete old ones.

    Args:
        checkpoints: Folder of the run's checkpoints.
        state: What is saved.
        manifest: What it is; its files and world size are filled in here.
        keep: Number of newest whole checkpoints that are kept, in addition to `manifest.best`.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: If a rank could not write.
    """
    comm = state.comm
    final = checkpoints / manifest.folder
    temporary = checkpoints / f".{manifest.folder}.tmp"
    main = comm.topology.is_main
    _all_or_none(comm, lambda: _prepare(temporary) if main else None, temporary, final)
    parts: list[PartFile] = []
    _all_or_none(comm, lambda: parts.extend(_write_parts(temporary, state)), temporary, final)
    files = tuple(file for own in comm.gather_objects(parts, what="parts") for file in own)
    manifest = replace(manifest, files=files, world_size=comm.world_size)

    def publish() -> None:
        write_json_atomic(temporary / MANIFEST, manifest.to_json())
        _take_name(temporary, final)
        if manifest.best is not None:
            write_json_atomic(checkpoints / BEST, asdict(manifest.best))
        _delete_old(checkpoints, manifest, keep)

    _all_or_none(comm, lambda: publish() if main else None, temporary, final)
    return final


def load_checkpoint(folder: Path, manifest: Manifest, state: TrainState) -> None:
    """Put a checkpoint's weights, proxies, optimiser state and step into `state`.

    Each rank reads what it owns, whatever number of ranks wrote it.

    Raises:
        CheckpointError: If the checkpoint does not fit the state, or cannot be read.
    """
    error: Exception | None = None
    try:
        _load(folder, manifest, state)
    except CheckpointError as caught:
        error = caught
    except Exception as caught:  # Handed to all ranks by agree: torch.load raises many classes.
        error = CheckpointError(
            f"{folder} does not hold the state of this network and objective "
            f"({type(caught).__name__}: {caught}); use the configuration and data the checkpoint "
            "was saved with"
        )
    state.comm.agree(error, what="loading a checkpoint")


def delete_interrupted(checkpoints: Path) -> None:
    """Delete what killed ranks left half written or half deleted; only rank 0 calls this.

    What cannot be deleted stays: its name is not that of a checkpoint.
    """
    for stale in checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _owned(state: TrainState) -> dict[str, OwnedRows | OwnedBuffer]:
    """Return this rank's rows of all tables: those that are optimised, and counts."""
    return {**state.objective.owned_parameters(), **state.objective.owned_buffers()}


# ---------------------------------------------------------------- writing


def _all_or_none(comm: Comm, action: Callable[[], object], temporary: Path, final: Path) -> None:
    """Call `action` on every rank; if one fails, all raise and no partial file is left."""
    error: Exception | None = None
    try:
        action()
    except RunError as caught:
        error = caught
    except Exception as caught:  # Handed to all ranks by agree.
        error = RunError(
            f"the checkpoint {final} could not be written ({type(caught).__name__}: {caught}); "
            "check disk space and permissions, then continue from the checkpoint before it with "
            "--resume"
        )
    try:
        comm.agree(error, what="writing a checkpoint")
    except Exception:
        if comm.topology.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    delete_interrupted(temporary.parent)
    temporary.mkdir()


def _write_parts(folder: Path, state: TrainState) -> list[PartFile]:
    """Write this rank's files."""
    states = named_states(state.optimizer)
    parts = []
    if state.comm.topology.is_main:
        parts.append(write_part(folder, MODEL, state.model.state_dict()))
        shared = {k: v for k, v in states.items() if not k.startswith(OWNED_PREFIX)}
        parts.append(write_part(folder, OPTIMIZER, shared))
        if replicated := state.replicated:
            values = {name: parameter.detach() for name, parameter in replicated.items()}
            parts.append(write_part(folder, LOSS, values))
        if state.projections is not None:
            parts.append(write_part(folder, PROJECTIONS, state.projections.state_dict()))
    for name, (parameter, low, high, _) in _owned(state).items():
        rows, scalars = split_rows(parameter, states.get(OWNED_PREFIX + name, {}))
        value = {"values": parameter.detach(), "rows": rows, "shared": scalars}
        file = f"{name}-{low}-{high}.pt"
        parts.append(write_part(folder, file, value, table=name, low=low, high=high))
    return parts


def _take_name(temporary: Path, final: Path) -> None:
    """Rename the whole folder; replaces an older one of the same name, which was damaged."""
    sync_folder(temporary)
    if final.exists():
        _delete(final)
    os.rename(temporary, final)
    sync_folder(final.parent)


def _delete_old(checkpoints: Path, manifest: Manifest, keep: int) -> None:
    """Keep the newest whole checkpoints and the best one; delete older ones, damaged or not.

    Checkpoints of earlier attempts are verified before they count as kept: a damaged one must not
    take the place of a whole one. Those of this attempt were written just now.
    """
    best = manifest.best.folder if manifest.best else None
    num_whole = 0
    for folder in checkpoint_folders(checkpoints):
        if num_whole < keep:
            own = folder.name.endswith(f"-a{manifest.attempt}")
            num_whole += own or is_whole(folder)
        elif folder.name != best:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint; if interrupted, no folder with a checkpoint's name is left."""
    hidden = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


# ---------------------------------------------------------------- reading


def _load(folder: Path, manifest: Manifest, state: TrainState) -> None:
    state.model.load_state_dict(read_part(folder, MODEL))
    states: dict[str, State] = read_part(folder, OPTIMIZER)
    _load_replicated(folder, manifest, state)
    if state.projections is not None:
        state.projections.load_state_dict(read_part(folder, PROJECTIONS))
    for name, (parameter, low, high, num_rows) in _owned(state).items():
        values, states[OWNED_PREFIX + name] = _read_rows(folder, manifest, name, low, high)
        saved = max((file.high for file in manifest.files if file.table == name), default=0)
        if values.shape != parameter.shape or saved != num_rows:
            raise CheckpointError(
                f"{name} has {num_rows} rows, and shape {tuple(parameter.shape)} on this rank, "
                f"but {folder} holds {saved} rows, and shape {tuple(values.shape)}; "
                "use the data and the loss the checkpoint was saved with"
            )
        with torch.no_grad():
            parameter.copy_(values)
    load_named_states(state.optimizer, {name: value for name, value in states.items() if value})
    state.step = manifest.step


def _load_replicated(folder: Path, manifest: Manifest, state: TrainState) -> None:
    """Load the loss's own parameters, other than tables."""
    has_file = any(file.name == LOSS for file in manifest.files)
    values: dict[str, Tensor] = read_part(folder, LOSS) if has_file else {}
    needed = {name: tuple(parameter.shape) for name, parameter in state.replicated.items()}
    saved = {name: tuple(value.shape) for name, value in values.items()}
    if saved != needed:
        raise CheckpointError(
            f"the loss has the parameters {needed}, but {folder} holds {saved}; "
            "use the loss the checkpoint was saved with"
        )
    with torch.no_grad():
        for name, parameter in state.replicated.items():
            parameter.copy_(values[name])


def _read_rows(
    folder: Path, manifest: Manifest, table: str, low: int, high: int
) -> tuple[Tensor, State]:
    """Return rows `low` .. `high - 1` of a table and their optimiser state, from any shards."""
    values: list[Tensor] = []
    states: list[tuple[dict[str, Tensor], State]] = []
    files = [file for file in manifest.files if file.table == table]
    for file in sorted(files, key=lambda file: file.low):
        first, end = max(low, file.low), min(high, file.high)
        if first >= end:
            continue
        part: dict[str, Any] = read_part(folder, file.name, mmap=True)
        cut = slice(first - file.low, end - file.low)
        values.append(part["values"][cut])
        states.append(({key: rows[cut] for key, rows in part["rows"].items()}, part["shared"]))
    if not values:
        raise CheckpointError(
            f"{folder} holds none of the rows {low} to {high - 1} of {table}; "
            "use the loss the checkpoint was saved with"
        )
    return torch.cat(values), join_rows(states)
