"""Interface of importers: samples, their sources, and facts known without reading images."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from dml_dist.errors import DataError

ROLES = ("both", "query", "gallery")
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "bmp", "gif", "webp", "tif", "tiff"}
    | {"ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "avif"}
)
# A tar header holds 100 bytes of name; the longest extension we add is ".json".
_MAX_KEY_BYTES = 90
# make_keys cuts here, to leave room for a number.
_CUT_KEY_BYTES = 80


class ImageSource(Protocol):
    """The source of one image's bytes; pickled to the process that writes its tar shard.

    `repr` must be equal for equal images and differ for different ones: it identifies an import.
    `str` names the image in messages.
    """

    def read(self) -> tuple[bytes, str]:
        """Return the encoded image and its file extension (lower case, without a dot)."""
        ...


@dataclass(frozen=True)
class FileSource:
    """An image file, stored byte for byte.

    It is identified by its name, size and modification time: a replaced file is a different image,
    and a folder that was moved as a whole holds the same images.
    """

    path: str = field(repr=False)

    name: str = ""
    """The path relative to the folder of the data set; empty takes `path`."""

    size: int = field(init=False)
    """Bytes of the file when it was listed, -1 if there was none."""

    mtime_ns: int = field(init=False)
    """Modification time in nanoseconds."""

    def __post_init__(self) -> None:
        try:
            found = os.stat(self.path)
            size, mtime_ns = found.st_size, found.st_mtime_ns
        except OSError:  # `read` raises the error.
            size, mtime_ns = -1, 0
        values = {"name": self.name or self.path, "size": size, "mtime_ns": mtime_ns}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def read(self) -> tuple[bytes, str]:
        """Return the file's bytes and its normalized extension."""
        return Path(self.path).read_bytes(), image_extension(self.path)

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Sample:
    """One image of a data set before it is written."""

    key: str
    """Unique in the data set, without dots: webdataset ends a key at the first one."""

    class_name: str

    split: str
    """"train", "test", or another name given by a table or folder."""

    source: ImageSource

    super_class: str | None = None

    role: str = "both"
    """Use in retrieval: one of `ROLES`."""


@dataclass(frozen=True)
class DatasetFacts:
    """Sizes of a data set, as a dry run needs them."""

    class_sizes: dict[str, tuple[int, ...]]
    """Split name -> number of images of each of its classes, in label order."""

    exact: bool
    """False when estimated without the data."""


class Classified(Protocol):
    """What is counted: a sample, or an image of a listing."""

    @property
    def class_name(self) -> str:
        """As in `Sample`."""
        ...

    @property
    def split(self) -> str:
        """As in `Sample`."""
        ...


@runtime_checkable
class Importer(Protocol):
    """A data set in its raw layout."""

    def samples(self) -> Sequence[Sample]:
        """List all images in a fixed order, without reading them."""
        ...

    def facts(self) -> DatasetFacts | None:
        """Return the sizes of all classes without reading an image; None when unknown."""
        ...


def image_extension(path: str) -> str:
    """Return the extension of an image file, lower case, without a dot, `jpg` for `jpeg`."""
    extension = path.rpartition(".")[2].lower()
    return {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif"}.get(extension, extension)


def class_order(names: Iterable[str]) -> list[str]:
    """Return the distinct names in label order: by value if all are whole numbers, else sorted."""
    distinct = set(names)
    if all(re.fullmatch(r"-?\d{1,18}", name) for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def facts_of(samples: Sequence[Classified]) -> DatasetFacts:
    """Count the images of each class in each split."""
    rank = {name: label for label, name in enumerate(class_order(s.class_name for s in samples))}
    counts = Counter((sample.split, rank[sample.class_name]) for sample in samples)
    sizes: dict[str, list[int]] = {}
    for (split, _), count in sorted(counts.items()):
        sizes.setdefault(split, []).append(count)
    return DatasetFacts({split: tuple(counts) for split, counts in sizes.items()}, exact=True)


def make_keys(paths: Sequence[str]) -> list[str]:
    """Make a unique key of each relative path: the path without extension and without dots.

    Characters other than letters, digits, `_`, `-` and `/` become `_`; a duplicate key gets a
    number, and a key too long for a tar header is cut and gets a digest of the path.

    Args:
        paths: Distinct paths with `/` between folders.

    Returns:
        Keys in the order of `paths`.
    """
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        folder, slash, name = path.lstrip("/").rpartition("/")
        stem = name.rpartition(".")[0] or name
        key = re.sub(r"[^\w/-]", "_", folder + slash + stem)
        if len(key.encode()) > _CUT_KEY_BYTES:
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            key = re.sub(r"[^\w-]", "_", key.encode()[:60].decode(errors="ignore")) + "-" + digest
        candidate, number = key, 1
        while candidate in taken:
            number += 1
            candidate = f"{key}-{number}"
        taken.add(candidate)
        keys.append(candidate)
    return keys


def check_samples(samples: Sequence[Sample]) -> None:
    """Check that samples can be stored in tar shards.

    Raises:
        DataError: If there are none, or a key, class, split or role is not acceptable.
    """
    if not samples:
        raise DataError("the data set has no images; check its source")
    keys: set[str] = set()
    for sample in samples:
        where = f"sample {sample.key!r} ({sample.source})"
        is_short = len(sample.key.encode("utf-8", "surrogatepass")) <= _MAX_KEY_BYTES
        if not (re.fullmatch(r"[\w-][\w/-]*", sample.key) and is_short):
            raise DataError(
                f"{where}: a key must be letters, digits, '_', '-' and '/', no dots, at most "
                f"{_MAX_KEY_BYTES} bytes; use dml_dist.data.sample.make_keys"
            )
        if sample.key in keys:
            raise DataError(f"{where}: keys must be unique, but this one is given twice")
        keys.add(sample.key)
        if not sample.class_name or not _is_text(sample.class_name):
            raise DataError(
                f"{where}: the class name must be non-empty Unicode text, "
                f"got {sample.class_name!r}; rename the class"
            )
        if not re.fullmatch(r"[\w-]+", sample.split):
            raise DataError(
                f"{where}: a split must be named by letters, digits, '_' and '-' (it names tar "
                f"files), got {sample.split!r}"
            )
        if sample.role not in ROLES:
            raise DataError(f"{where}: role must be one of {', '.join(ROLES)}, got {sample.role!r}")


def _is_text(name: str) -> bool:
    """Return whether a name can be written as UTF-8 (undecodable file names cannot)."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in name)
