"""One tar shard: written with webdataset, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dml_dist.data.image_check import check_image
from dml_dist.data.sample import IMAGE_EXTENSIONS, Sample
from dml_dist.errors import DataError
from dml_dist.files import open_atomic, read_json, write_json_atomic

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class ShardTask:
    """One tar shard to write: everything the writer process needs."""

    path: Path

    record: Path
    """Where the positions of its images are kept until the index stands."""

    samples: tuple[Sample, ...]
    labels: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Of the samples and their images, as far as their `repr` tells them apart."""
        text = repr((self.samples, self.labels))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_complete(task: ShardTask) -> bool:
    """Tell whether a tar shard of these samples was finished; its record is written after it."""
    if not (task.record.exists() and task.path.exists()):
        return False
    record = read_json(task.record)
    same = record["tar_bytes"] == task.path.stat().st_size and record["digest"] == task.digest
    return bool(same)


def write_tar_shard(task: ShardTask) -> list[str]:
    """Write one tar shard and its record, or neither if an image is broken.

    Returns:
        What is wrong with its images, one line each; empty when it was written.
    """
    try:
        with open_atomic(task.path) as file:
            rows = _write_members(task, file)
            tar_bytes = file.tell()
    except _BrokenImagesError as error:
        return error.problems
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    write_json_atomic(task.record, {"tar_bytes": tar_bytes, "digest": task.digest, **columns})
    return []


class _BrokenImagesError(Exception):
    """Leaves the block that writes a tar shard which shall not exist."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems


def _write_members(task: ShardTask, file: BinaryIO) -> list[dict[str, Any]]:
    """Write `<key>.<ext>`, `<key>.cls`, `<key>.json` of every sample; return rows."""
    from webdataset.writer import TarWriter

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    # Nothing of time, user or machine may enter the bytes.
    with TarWriter(file, encoder=False, user="dml_dist", group="dml_dist", mtime=0) as tar:
        for sample, label in zip(task.samples, task.labels, strict=True):
            try:
                data, extension = sample.source.read()
                width, height = check_image(data, whole=True)
                _check_extension(extension)
            except (DataError, OSError) as error:
                problems.append(f"{sample.source}: {error}")
                continue
            tar.write({"__key__": sample.key, extension: data})
            # Headers differ in length (a key that is not ASCII needs a longer one), but the image
            # is the last thing written, filled up to whole blocks.
            offset = tar.tarstream.offset - -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
            facts = {
                "label": label,
                "class": sample.class_name,
                "super_class": sample.super_class or "",
                "split": sample.split,
                "role": sample.role,
            }
            tar.write(
                {
                    "__key__": sample.key,
                    "cls": str(label).encode(),
                    "json": json.dumps(facts, ensure_ascii=False).encode(),
                }
            )
            rows.append(
                {
                    "offset": offset,
                    "length": len(data),
                    "crc32": zlib.crc32(data),
                    "extension": extension,
                    "width": width,
                    "height": height,
                }
            )
    if problems:
        raise _BrokenImagesError(problems)
    return rows


def _check_extension(extension: str) -> None:
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(
            f"the extension of an image must be one of {', '.join(sorted(IMAGE_EXTENSIONS))}, "
            f"got {extension!r}"
        )
