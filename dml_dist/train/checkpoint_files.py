"""The files of a checkpoint, without any process group: writing, verifying, finding, reading.

    step_00000500-a1/            500 updates, saved by attempt 1
        model.pt                 the network's state dict
        optim.pt                 optimiser state of what every rank holds, by name
        loss.pt                  parameters of the loss other than tables, by name; only if it does
        projections.pt           problem, representatives, last solution; only under projections
        proxies-0-250.pt         rows 0 .. 249 of the table "proxies" and their optimiser state
        proxies-250-500.pt
        manifest.json            what belongs to it: sizes, crc32, ranges, configuration

A checkpoint is written into a hidden folder and takes its name by one rename, the manifest being
its last file: a folder with this name is whole unless the disk damaged it later, which sizes and
checksums tell. Everything is tensors, numbers and JSON, read with `weights_only`.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from dml_dist.errors import CheckpointError, DataError
from dml_dist.files import read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.pt"
OPTIMIZER = "optim.pt"
LOSS = "loss.pt"
PROJECTIONS = "projections.pt"
BEST = "best.json"
"""Beside the checkpoints: which of them is the best."""

_NAME = re.compile(r"step_(\d+)-a(\d+)")
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class PartFile:
    """One file of a checkpoint.

    Attributes:
        name: File name in the checkpoint's folder.
        num_bytes: Its size.
        crc32: Checksum of its content.
        table: Name of the objective's table whose rows it holds, or None.
        low: First row.
        high: Row after the last.
    """

    name: str
    num_bytes: int
    crc32: int
    table: str | None = None
    low: int = 0
    high: int = 0


@dataclass(frozen=True)
class Best:
    """The checkpoint with the highest validation MAP@R so far.

    Attributes:
        folder: Its name in the folder of checkpoints.
        step: Updates made.
        map_at_r: MAP@R of the validation classes.
    """

    folder: str
    step: int
    map_at_r: float


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is.

    Attributes:
        step: Updates made; with the seed it fixes the next batches.
        epoch: Epochs completed.
        samples_seen: Images trained on, counted as often as they were.
        total_steps: Updates of the whole run, as planned when this was saved.
        attempt: The attempt that saved it.
        world_size: Number of ranks that saved it.
        num_classes: C, training classes.
        num_images: Training images.
        config: The run's configuration as JSON.
        best: The best checkpoint up to this one, or None without validation.
        files: All files but the manifest.
        format_version: Version of this format.
    """

    step: int
    epoch: int
    samples_seen: int
    total_steps: int
    attempt: int
    world_size: int
    num_classes: int
    num_images: int
    config: dict[str, Any]
    best: Best | None
    files: tuple[PartFile, ...] = field(default=())
    format_version: int = FORMAT_VERSION

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step_{self.step:08d}-a{self.attempt}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for manifest.json."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Manifest:
        """Return the manifest of what `to_json` gave."""
        best = values["best"]
        return Manifest(
            **{
                **values,
                "best": None if best is None else Best(**best),
                "files": tuple(PartFile(**file) for file in values["files"]),
            }
        )


class _Counted:
    """A file for torch.save that keeps size, checksum and the first error of writing.

    torch.save reports a full disk as an internal inconsistency of its writer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_bytes = 0
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.num_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def write_part(
    folder: Path, name: str, value: Any, *, table: str | None = None, low: int = 0, high: int = 0
) -> PartFile:
    """Write tensors and numbers to a new file, flushed to the disk, and return what it is.

    Raises:
        OSError: As `open` and `write` do.
    """
    with open(folder / name, "xb") as file:
        counted = _Counted(file)
        try:
            torch.save(value, cast(BinaryIO, counted))
        except Exception:
            if counted.error is not None:
                raise counted.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return PartFile(name, counted.num_bytes, counted.crc32, table, low, high)


def read_part(folder: Path, name: str, *, mmap: bool = False) -> Any:
    """Read one file onto the CPU; with `mmap` only what is used of it is read."""
    return torch.load(folder / name, map_location="cpu", weights_only=True, mmap=mmap)


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Return the folders that are named as checkpoints, newest first.

    A later attempt is newer at any step: it resumed from a checkpoint of an earlier one.
    """
    if not checkpoints.is_dir():
        return []
    found = []
    for path in checkpoints.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[2]), int(match[1]), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; its files are not looked at.

    Raises:
        CheckpointError: If it is missing, damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        values = read_json(path)
        version = values["format_version"]
    except (OSError, DataError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no checkpoint: its {MANIFEST} cannot be read ({error}); "
            "use another checkpoint"
        ) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {version}, but this version reads {FORMAT_VERSION}; "
            "use the version of dml-dist that wrote it"
        )
    try:
        return Manifest.from_json(values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the {MANIFEST} of the checkpoint {folder} is damaged ({error}); "
            "use another checkpoint"
        ) from None


def verify_checkpoint(folder: Path, only: Sequence[str] | None = None) -> Manifest:
    """Compare files with the manifest, in size and checksum, and return the manifest.

    Args:
        folder: The checkpoint.
        only: Names of the files to compare; all by default.

    Raises:
        CheckpointError: If a file is missing or damaged; it names the file.
    """
    manifest = read_manifest(folder)
    for file in manifest.files:
        if only is not None and file.name not in only:
            continue
        path = folder / file.name
        try:
            found = f"{path.stat().st_size} bytes"
            if path.stat().st_size == file.num_bytes:
                found = f"crc32 {_crc32(path):08x}"
        except OSError as error:
            found = str(error)
        if found != f"crc32 {file.crc32:08x}":
            raise CheckpointError(
                f"the checkpoint is damaged: {path} should have {file.num_bytes} bytes with crc32 "
                f"{file.crc32:08x}, found {found}"
            )
    return manifest


def is_whole(folder: Path) -> bool:
    """Whether nothing of a checkpoint is missing or damaged; reads all of its files."""
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def newest_checkpoint(checkpoints: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that is whole, or None when there is none at all.

    Damaged ones are skipped with a warning that names them.

    Raises:
        CheckpointError: If there are checkpoints and all of them are damaged.
    """
    problems = []
    for folder in checkpoint_folders(checkpoints):
        try:
            manifest = verify_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("%s: it is skipped, %s is used", problem, folder.name)
        return folder, manifest
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints in {checkpoints} are damaged: "
            + "; ".join(problems)
            + "; restore one from a copy, or start a new run in another folder"
        )
    return None


def _crc32(path: Path) -> int:
    crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc32 = zlib.crc32(block, crc32)
    return crc32
