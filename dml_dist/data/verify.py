"""Verification of tar shards against their index: every label is read, every image decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dml_dist.data.index import INDEX_NAME, Index, RemoteTarShards, read_index, skipped_keys
from dml_dist.data.labels import class_text
from dml_dist.data.pool import run_tasks
from dml_dist.data.shard_scan import (
    ScannedImage,
    ScannedShard,
    ScanTask,
    list_other_tars,
    list_tar_shards,
    passed_over_lines,
    scan_tar_shard,
)
from dml_dist.data.stored_images import StoredImage, inspect_images
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

    notes: list[str]
    """What is no damage: members that are passed over, broken images that indexing left out."""


def verify(
    root: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    processes: int | None = None,
) -> VerifyReport:
    """Read every member of every tar shard, decode every image and compare them with the index.

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
    for name in set(index.tar_shards) - set(present):
        problems[name] = [f"{name}: the file is missing, with {len(rows_of[name])} images"]
    shards = {
        present[at]: shard
        for at, shard in run_tasks(
            scan_tar_shard, [ScanTask(root, name) for name in present], processes
        )
    }
    absent = len(index) - sum(len(rows_of[name]) for name in present)
    stored = _decoded(
        index,
        np.concatenate([np.zeros(0, np.int64), *(rows_of[name] for name in present)]),
        processes,
        None if progress is None else lambda done, _: progress(absent + done, len(index)),
    )
    skipped = skipped_keys(root)
    for name, shard in shards.items():
        problems[name] = _check_tar_shard(index, name, rows_of[name], shard, stored, skipped)
    for name in set(list_tar_shards(root)) - set(index.tar_shards):
        problems[name] = [f"{name}: {INDEX_NAME} does not name this file"]
    for name in list_other_tars(root)[0]:
        problems[name] = [f"{name}: it is compressed, so its images are in no index"]
    lines = [line for name in sorted(problems) for line in problems[name]]
    return VerifyReport(lines, len(index), int(index.length.sum()), _notes(shards, skipped))


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
    skipped = skipped_keys(index.root)
    shards: dict[str, ScannedShard] = {}
    done = 0
    for at, name in enumerate(index.tar_shards):
        try:
            index.remote.lease(at)
            try:
                shards[name] = scan_tar_shard(ScanTask(index.root, name))
                stored = _decoded(index, rows_of[name])
                problems += _check_tar_shard(
                    index, name, rows_of[name], shards[name], stored, skipped
                )
                problems += _against_server(index, index.remote, at)
            finally:
                index.remote.release(at)
        except DataError as error:
            problems.append(f"{name}: {error}")
        done += len(rows_of[name])
        if progress is not None:
            progress(done, len(index))
    return VerifyReport(problems, len(index), int(index.length.sum()), _notes(shards, skipped))


def _decoded(
    index: Index,
    rows: np.ndarray,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, StoredImage]:
    """Decode images by their position in the index; row -> what was found."""
    found = inspect_images(
        index.root,
        [index.tar_shards[at] for at in index.tar_shard[rows].tolist()],
        index.offset[rows],
        index.length[rows],
        processes,
        progress,
    )
    return dict(zip(rows.tolist(), found, strict=True))


def _notes(shards: Mapping[str, ScannedShard], skipped: frozenset[str]) -> list[str]:
    notes = passed_over_lines(shards)
    if skipped:
        notes.append(f"{len(skipped):,} broken images were left out of the index when it was made")
    return notes


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
    index: Index,
    name: str,
    rows: np.ndarray,
    shard: ScannedShard,
    stored: Mapping[int, StoredImage],
    skipped: frozenset[str],
) -> list[str]:
    size = (index.root / name).stat().st_size
    ends = index.offset[rows] + index.length[rows]
    inside = ends <= size
    lost = set(index.keys[rows[~inside]].tolist())
    lines: list[str] = []
    found = list(shard.problems)
    if lost:
        # What the scan reported at the end is the same damage: report it once.
        found = [
            problem for problem in found if problem.key is not None and problem.key not in lost
        ]
        lines.append(
            f"{name}: truncated: {size} bytes of at least {ends.max()}, {len(lost)} images are "
            f"lost, the first is key {index.keys[rows[~inside][0]]!r}"
        )
    lines += [str(problem) for problem in found]
    named = {problem.key for problem in found}
    by_key = {image.key: image for image in shard.images}
    at_offset = {image.offset: image for image in shard.images}
    for row in rows[inside].tolist():
        key, offset = index.keys[row], int(index.offset[row])
        image = by_key.get(key)
        if image is None or image.offset != offset:
            image = at_offset.get(offset)
        if image is not None:
            by_key.pop(image.key, None)
            what = _difference(index, row, image, stored[row])
        elif key in named:
            continue
        elif shard.complete:
            what = f"no image begins at byte {offset}, {INDEX_NAME} says so"
        else:
            what = _damage(index, row, stored[row])
        if what is not None:
            lines.append(f"{name}: key {key!r}: {what}")
    unknown = [key for key in by_key if key not in skipped]
    if unknown:
        lines.append(
            f"{name}: {INDEX_NAME} lacks {len(unknown)} images, the first is key {unknown[0]!r}"
        )
    return lines


def _difference(index: Index, row: int, image: ScannedImage, stored: StoredImage) -> str | None:
    """Return how an image differs from its row, None if it does not."""
    if image.key != index.keys[row]:
        return f"byte {image.offset} holds key {image.key!r}: the index belongs to another tar file"
    if image.length != index.length[row]:
        return f"{INDEX_NAME} says {index.length[row]} bytes, the tar file {image.length}"
    damage = _damage(index, row, stored)
    if damage is not None:
        return damage
    name = index.class_names[index.label[row]]
    # Older versions kept spaces, decomposed Unicode and 3.0 in the names that they imported.
    name = image.class_text if _is_spelling(name, image.class_text) else name
    expected = (name, index.super_class[row], index.role[row])
    found = (image.class_text, image.super_class, image.role)
    if expected != found:
        return f"{INDEX_NAME} says class, super_class, role {expected}, the tar file {found}"
    if image.split is not None and image.split != index.split[row]:
        return f"{INDEX_NAME} says split {index.split[row]!r}, the tar file {image.split!r}"
    return None


def _is_spelling(name: str, text: str) -> bool:
    try:
        return name == text or class_text(name) == text
    except DataError:
        return False


def _damage(index: Index, row: int, stored: StoredImage) -> str | None:
    expected = int(index.crc32[row])
    if stored.crc32 != expected:
        return f"damaged: crc32 is {stored.crc32:#010x}, expected {expected:#010x}"
    if stored.damage is not None:
        return stored.damage
    size = (int(index.width[row]), int(index.height[row]))
    if size != (stored.width, stored.height):
        return (
            f"{INDEX_NAME} says {size[0]} x {size[1]} pixels, the image has {stored.width} x "
            f"{stored.height}"
        )
    return None
