"""Writing of one tar shard with webdataset, atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dml_dist.data.image_check import ImageFacts, inspect_image, shrink_image
from dml_dist.data.sample import IMAGE_EXTENSIONS, Sample
from dml_dist.errors import DataError
from dml_dist.files import open_atomic, read_json, write_json_atomic

OnBroken = Literal["raise", "skip"]
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class ShardTask:
    """One tar shard to write: everything the writer process needs."""

    path: Path

    record: Path
    """File that keeps the positions of its images until the index is written."""

    samples: tuple[Sample, ...]
    labels: tuple[int, ...]

    max_side: int | None = None
    """Larger images are shrunk to this longer side, in pixels."""

    on_broken: OnBroken = "raise"
    """Whether an image that is missing or cannot be decoded is an error or is skipped."""

    @property
    def digest(self) -> str:
        """Digest of the samples and their images, by their `repr`."""
        text = repr((self.samples, self.labels, self.max_side))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def is_complete(task: ShardTask) -> bool:
    """Return whether a tar shard of these samples was finished; its record is written last."""
    if not task.record.exists():
        return False
    record = read_json(task.record)
    if record["digest"] != task.digest or (record["skipped"] and task.on_broken == "raise"):
        return False
    tar_bytes = task.path.stat().st_size if task.path.exists() else 0
    return bool(record["tar_bytes"] == tar_bytes)


def write_tar_shard(task: ShardTask) -> list[str]:
    """Write one tar shard and its record, or neither if an image is broken.

    If broken images are skipped, the record names them, and a tar shard without any other image is
    not written.

    Returns:
        The problems of its images, one line each; empty if the shard was written.
    """
    try:
        with open_atomic(task.path) as file:
            written = _write_members(task, file)
            if written.problems or not written.rows:
                raise _NoTarShardError(written)
            tar_bytes = file.tell()
    except _NoTarShardError as error:
        written, tar_bytes = error.written, 0
        if written.problems:
            return written.problems
        task.path.unlink(missing_ok=True)  # It may hold images that have changed since.
    record = {"tar_bytes": tar_bytes, "digest": task.digest, "skipped": written.skipped}
    columns = {name: [row[name] for row in written.rows] for name in _COLUMNS}
    write_json_atomic(task.record, {**record, **columns})
    return []


# Columns of a record, one value per image; `position` is that in the samples of the tar shard.
_COLUMNS = (
    "position",
    "offset",
    "length",
    "crc32",
    "extension",
    "width",
    "height",
    "fingerprint",
    "source_digest",
    "orientation",
)


@dataclass(frozen=True)
class _Written:
    rows: list[dict[str, Any]]

    skipped: list[tuple[int, str]]
    """Position and problem."""

    problems: list[str]


class _NoTarShardError(Exception):
    """Ends the block that writes a tar shard, so that the file is not created."""

    def __init__(self, written: _Written) -> None:
        super().__init__(written)
        self.written = written


def _write_members(task: ShardTask, file: BinaryIO) -> _Written:
    """Write `<key>.<ext>`, `<key>.cls`, `<key>.json` of every sample."""
    from webdataset.writer import TarWriter

    written = _Written([], [], [])
    # Fixed user, group and time: equal images give equal bytes on every machine.
    with TarWriter(file, encoder=False, user="dml_dist", group="dml_dist", mtime=0) as tar:
        for position, (sample, label) in enumerate(zip(task.samples, task.labels, strict=True)):
            try:
                data, extension, facts, source_digest = _read(sample, task.max_side)
            except (DataError, OSError) as error:
                reason = f"{sample.source}: {error}"
                # Other system errors are not about this image: the next one may fail too.
                broken = isinstance(error, DataError | FileNotFoundError)
                if broken and task.on_broken == "skip":
                    written.skipped.append((position, reason))
                else:
                    written.problems.append(reason)
                continue
            tar.write({"__key__": sample.key, extension: data})
            # Headers differ in length (a non-ASCII key needs a longer one), but the image is the
            # last member written, padded to whole blocks.
            offset = tar.tarstream.offset - -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
            tar.write({"__key__": sample.key, **_members(sample, label)})
            row = (
                position,
                offset,
                len(data),
                zlib.crc32(data),
                extension,
                facts.width,
                facts.height,
                facts.fingerprint,
                source_digest,
                facts.orientation,
            )
            written.rows.append(dict(zip(_COLUMNS, row, strict=True)))
    return written


def _read(sample: Sample, max_side: int | None) -> tuple[bytes, str, ImageFacts, str]:
    """Return the bytes to store, their extension and facts, and the digest of the bytes read."""
    data, extension = sample.source.read()
    _check_extension(extension)
    facts = inspect_image(data)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    small = None if max_side is None else shrink_image(data, max_side)
    if small is not None:
        stored = inspect_image(small)
        facts = dataclasses.replace(facts, width=stored.width, height=stored.height)
        data, extension = small, "jpg"
    return data, extension, facts, digest


def _members(sample: Sample, label: int) -> dict[str, bytes]:
    """Return the members that describe an image in the tar shard."""
    facts = {
        "label": label,
        "class": sample.class_name,
        "super_class": sample.super_class or "",
        "split": sample.split,
        "role": sample.role,
    }
    return {
        "cls": str(label).encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def _check_extension(extension: str) -> None:
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(
            f"the extension of an image must be one of {', '.join(sorted(IMAGE_EXTENSIONS))}, "
            f"got {extension!r}"
        )
