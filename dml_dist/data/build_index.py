"""Indexing of tar shards that other programs made: reads every label and decodes every image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dml_dist.data import scanned
from dml_dist.data.import_summary import SkippedImage, write_summary
from dml_dist.data.index import PROGRESS_FOLDER, Index, write_index
from dml_dist.data.labels import joined_line
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
from dml_dist.data.split_names import split_of_names
from dml_dist.data.stored_images import StoredImage, inspect_images
from dml_dist.data.tar_shard import OnBroken
from dml_dist.errors import DataError

_SHOWN = 20
_log = logging.getLogger(__name__)

Found = list[tuple[int, ScannedImage]]
"""(Tar shard, image), in the order of the tar files."""


def build_index(
    root: Path,
    split: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    on_broken: OnBroken = "raise",
    processes: int | None = None,
) -> Index:
    """Read all tar shards below a folder, decode their images and write their index.parquet.

    A sample is an image with `<key>.cls` or `<key>.json` (label, class, super_class, split, role)
    beside it. Whole-number labels keep their order and become dense; texts become class names
    (`dml_dist.data.labels`). Whatever is passed over is counted in warnings in the log, as are tar
    shards sorted by class, which are accepted.

    Args:
        root: The folder.
        split: Split of the images whose .json does not name one; None takes it from the names of
            folders and tar shards (`dml_dist.data.split_names`), else "train".
        progress: Called with ("read labels" or "decode images", done, all).
        on_broken: Whether images that cannot be decoded are an error that names them all, or are
            left out of the index and listed in skipped.csv.
        processes: Number of reading processes; None takes one for each CPU core.

    Raises:
        DataError: If there are no tar shards, an import into the folder was not finished, or a
            sample cannot be used; tar file and key named.
    """
    names = _tar_shards(root)
    shards = _scan(root, names, progress, processes)
    images: Found = [(at, image) for at, name in enumerate(names) for image in shards[name].images]
    problems = [str(problem) for shard in shards.values() for problem in shard.problems]
    problems += scanned.repeated_keys(images, names)
    if not images and not problems:
        seen = "".join(f"\n  {line}" for line in passed_over_lines(shards))
        raise DataError(f"{root}: the tar shards hold no image with a known extension{seen}")
    _raise(root, problems)
    stored = inspect_images(
        root,
        [names[at] for at, _ in images],
        np.array([image.offset for _, image in images], dtype=np.int64),
        np.array([image.length for _, image in images], dtype=np.int64),
        processes,
        None if progress is None else lambda *done: progress("decode images", *done),
    )
    splits = [
        image.split or split or split_of_names(names[at], image.key) or "train"
        for at, image in images
    ]
    damaged = [at for at, image in enumerate(stored) if image.damage is not None]
    if on_broken == "raise" and damaged:
        raise _broken(root, names, [images[at] for at in damaged], [stored[at] for at in damaged])
    skipped = [
        SkippedImage(
            images[at][1].key,
            splits[at],
            images[at][1].class_text,
            f"{names[images[at][0]]}: key {images[at][1].key!r}: {stored[at].damage}",
        )
        for at in damaged
    ]
    kept = [at for at, image in enumerate(stored) if image.damage is None]
    if not kept:
        raise DataError(
            f"{root}: none of {len(images)} images can be decoded; the first: {skipped[0].reason}"
        )
    index = _index(
        root,
        names,
        [images[at] for at in kept],
        [stored[at] for at in kept],
        [splits[at] for at in kept],
    )
    lost = sorted({item.class_name for item in skipped} - set(index.class_names))
    turned = sum(stored[at].orientation != 1 for at in kept)
    write_summary(index, skipped, lost, (), turned)
    write_index(index, skipped=[item.key for item in skipped])
    _warn(index, shards)
    return index


def _tar_shards(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the folder that holds the tar shards")
    if (root / PROGRESS_FOLDER).exists():
        raise DataError(
            f"{root}: an import into this folder was not finished; run the import again, finished "
            "tar shards are kept and the import writes the index"
        )
    compressed, hidden = list_other_tars(root)
    if compressed:
        raise DataError(
            f"{root}: images are read by position, which compressed tar files do not have: "
            f"{_few(compressed)}; decompress them (`gunzip FILE.tar.gz`), or move them away"
        )
    if hidden:
        _log.warning("%s: %d hidden tar files are left out: %s", root, len(hidden), _few(hidden))
    names = list_tar_shards(root)
    if not names:
        raise DataError(f"{root} holds no tar shards (*.tar); check the path")
    return names


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scan(
    root: Path,
    names: list[str],
    progress: Callable[[str, int, int], None] | None,
    processes: int | None,
) -> dict[str, ScannedShard]:
    found: dict[str, ScannedShard] = {}
    for at, shard in run_tasks(scan_tar_shard, [ScanTask(root, name) for name in names], processes):
        found[names[at]] = shard
        if progress is not None:
            progress("read labels", len(found), len(names))
    return {name: found[name] for name in names}


def _raise(root: Path, problems: list[str]) -> None:
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{root}: the tar shards cannot be indexed:\n  "
            + "\n  ".join(sorted(problems)[:_SHOWN])
            + more
        )


def _broken(root: Path, names: list[str], images: Found, stored: list[StoredImage]) -> DataError:
    lines = [
        f"{names[at]}: key {image.key!r}: {facts.damage}"
        for (at, image), facts in zip(images, stored, strict=True)
    ]
    return DataError(
        f"{root}: every image must be readable, {len(lines)} are not:\n  "
        + "\n  ".join(lines)
        + "\nreplace them, or leave them out with --on-broken skip"
    )


def _index(
    root: Path, names: list[str], images: Found, stored: list[StoredImage], splits: list[str]
) -> Index:
    used, columns, class_names = scanned.columns(images, stored, names, root)
    return Index(
        root=root,
        tar_shards=used,
        class_names=class_names,
        remote=None,
        exif="apply",
        split=np.array(splits, dtype=object),
        **columns,
    )


def _warn(index: Index, shards: dict[str, ScannedShard]) -> None:
    lines = passed_over_lines(shards)
    if joined := joined_line(set().union(*(shard.spellings for shard in shards.values()))):
        lines.append(joined)
    for line in lines:
        _log.warning("%s: %s", index.root, line)
    for line in class_sorted_warnings(index):
        _log.warning("%s", line)


def class_sorted_warnings(index: Index) -> list[str]:
    """Return a warning for each split whose tar shards are sorted by class.

    A shuffled epoch reads a few tar shards at a time, so its batches see only their classes.
    """
    lines = []
    for split in sorted(set(index.split.tolist())):
        rows = index.rows(split)
        typical, mixed = scanned.classes_per_shard(index.tar_shard[rows], index.label[rows])
        if typical < mixed / 2:
            lines.append(
                f"{index.root}: the tar shards of the split {split!r} are sorted by class: "
                f"a tar shard holds {typical:.0f} classes (median), a shuffled one would hold "
                f"{mixed:.0f}; batches of a shuffled epoch see only the classes of its window of "
                "tar shards. Rewrite them in shuffled order, or choose balanced batches"
            )
    return lines
