"""Verification of tar shards against their index by reading every byte."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dml_dist.data.index import INDEX_NAME, Index, RemoteTarShards, bytes_needed, read_index
from dml_dist.data.pool import run_tasks
from dml_dist.data.shard_scan import (
    ScannedImage,
    ScannedShard,
    ScanTask,
    list_tar_shards,
    scan_tar_shard,
)
from dml_dist.errors import DataError


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    problems: list[str]
    """One line each, naming the tar shard and, where there is one, the key; empty if all is well.
    """

    num_samples: int
    """Images of the index."""

    num_bytes: int
    """Bytes of these images."""


def verify(
    root: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    processes: int | None = None,
) -> VerifyReport:
    """Read every member of every tar shard and compare it with the index.

    Args:
        root: Folder of tar shards with their index.
        progress: Called with (images checked, all images).
        processes: Number of reading processes; None takes one for each CPU core.

    Raises:
        DataError: If the index itself cannot be used.
    """
    index = read_index(root, check_shards=False)
    problems: dict[str, list[str]] = {}
    rows_of = _rows_of(index)
    present = [name for name in index.tar_shards if (root / name).is_file()]
    needed = dict(zip(index.tar_shards, bytes_needed(index).tolist(), strict=True))
    for name in set(index.tar_shards) - set(present):
        problems[name] = [f"{name}: the file is missing, with {len(rows_of[name])} images"]
    done = len(index) - sum(len(rows_of[name]) for name in present)
    tasks = [ScanTask(root, name, measure=False) for name in present]
    for at, shard in run_tasks(scan_tar_shard, tasks, processes):
        name = present[at]
        problems[name] = _check_tar_shard(index, name, rows_of[name], needed[name], shard)
        done += len(rows_of[name])
        if progress is not None:
            progress(done, len(index))
    for name in set(list_tar_shards(root)) - set(index.tar_shards):
        problems[name] = [f"{name}: {INDEX_NAME} does not name this file"]
    lines = [line for name in sorted(problems) for line in problems[name]]
    return VerifyReport(lines, len(index), int(index.length.sum()))


def verify_remote(index: Index, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Copy the tar shards of a remote folder into the cache, one by one, and compare each.

    Args:
        index: The folder's, with `remote`.
        progress: Called with (images checked, all images).

    Raises:
        RunError: If the server does not answer, or the cache has no room for a tar shard.
    """
    assert index.remote is not None
    problems: list[str] = []
    rows_of = _rows_of(index)
    needed = bytes_needed(index).tolist()
    done = 0
    for at, name in enumerate(index.tar_shards):
        try:
            index.remote.lease(at)
            try:
                shard = scan_tar_shard(ScanTask(index.root, name, measure=False))
                problems += _check_tar_shard(index, name, rows_of[name], needed[at], shard)
                problems += _against_server(index, index.remote, at)
            finally:
                index.remote.release(at)
        except DataError as error:
            problems.append(f"{name}: {error}")
        done += len(rows_of[name])
        if progress is not None:
            progress(done, len(index))
    return VerifyReport(problems, len(index), int(index.length.sum()))


def _against_server(index: Index, remote: RemoteTarShards, tar_shard: int) -> list[str]:
    """Return problems if the server's tar shard is no longer the one that was copied."""
    name = index.tar_shards[tar_shard]
    found, copied = remote.folder.size(name), (index.root / name).stat().st_size
    if found in (None, copied):
        return []
    return [f"{name}: the server has {found} bytes, the copy {copied}: it was replaced there"]


def _rows_of(index: Index) -> dict[str, np.ndarray]:
    """Return the rows of each tar shard."""
    order = np.argsort(index.tar_shard, kind="stable")
    bounds = np.searchsorted(index.tar_shard[order], np.arange(len(index.tar_shards) + 1))
    return {name: order[bounds[at] : bounds[at + 1]] for at, name in enumerate(index.tar_shards)}


def _check_tar_shard(
    index: Index, name: str, rows: np.ndarray, needed: int, shard: ScannedShard
) -> list[str]:
    path = index.root / name
    size = path.stat().st_size
    inside = index.offset[rows] + index.length[rows] <= size
    lost = set(index.keys[rows[~inside]].tolist())
    lines: list[str] = []
    found = list(shard.problems)
    if lost:
        # What the scan reported at the end is the same damage: report it once.
        found = [
            problem for problem in found if problem.key is not None and problem.key not in lost
        ]
        lines.append(
            f"{name}: truncated: {size} bytes of at least {needed}, {len(lost)} images are lost, "
            f"the first is key {index.keys[rows[~inside][0]]!r}"
        )
    lines += [str(problem) for problem in found]
    named = {problem.key for problem in found}
    at_offset = {image.offset: image for image in shard.images}
    with open(path, "rb") as file:
        for row in rows[inside].tolist():
            key, offset = index.keys[row], int(index.offset[row])
            image = at_offset.pop(offset, None)
            if image is not None:
                what = _difference(index, row, image)
            elif key in named:
                continue
            elif shard.complete:
                what = f"no image begins at byte {offset}, {INDEX_NAME} says so"
            else:
                data = os.pread(file.fileno(), int(index.length[row]), offset)
                what = _crc_difference(index, row, zlib.crc32(data))
            if what is not None:
                lines.append(f"{name}: key {key!r}: {what}")
    if at_offset:
        first = next(iter(at_offset.values())).key
        lines.append(
            f"{name}: {INDEX_NAME} lacks {len(at_offset)} images, the first is key {first!r}"
        )
    return lines


def _difference(index: Index, row: int, image: ScannedImage) -> str | None:
    """Return how an image differs from its row, None if it does not."""
    if image.key != index.keys[row]:
        return f"byte {image.offset} holds key {image.key!r}: the index belongs to another tar file"
    if image.length != index.length[row]:
        return f"{INDEX_NAME} says {index.length[row]} bytes, the tar file {image.length}"
    damage = _crc_difference(index, row, image.crc32)
    if damage is not None:
        return damage
    expected = (index.class_names[index.label[row]], index.super_class[row], index.role[row])
    found = (image.class_text, image.super_class, image.role)
    if expected != found:
        return f"{INDEX_NAME} says class, super_class, role {expected}, the tar file {found}"
    if image.split is not None and image.split != index.split[row]:
        return f"{INDEX_NAME} says split {index.split[row]!r}, the tar file {image.split!r}"
    return None


def _crc_difference(index: Index, row: int, found: int) -> str | None:
    expected = int(index.crc32[row])
    if found == expected:
        return None
    return f"damaged: crc32 is {found:#010x}, expected {expected:#010x}"
