"""Checks shared by the importers of data sets with an official split.

An importer reads the listing of its data set. This module finds the listed files, counts classes
and images, and compares them with the published numbers. All differences are reported together: as
an error, or as a warning if a part of the data set is accepted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from dml_dist.config.data import OfficialSection
from dml_dist.data.datasets import on_disk
from dml_dist.data.datasets.expected import spread
from dml_dist.data.sample import DatasetFacts, FileSource, Sample, facts_of, make_keys
from dml_dist.errors import DataError

_SHOWN = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """Size of one part of a data set."""

    classes: int
    images: int


@dataclass(frozen=True)
class Official:
    """Published facts about a data set."""

    title: str

    counts: Mapping[str, Counts]
    """Split, or split and role as `test query`, -> its size."""

    archives: Mapping[str, str] = field(default_factory=dict)
    """File name of an archive -> md5; checked if the archive is next to the data."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """File name of a listing -> md5."""


@dataclass(frozen=True)
class ListedImage:
    """One image of a listing."""

    path: str
    """As in the listing, relative to the base folder."""

    class_name: str
    split: str
    super_class: str | None = None
    role: str = "both"


@dataclass(frozen=True)
class Listing:
    """The listing of a data set, as an importer has read it."""

    base: Path
    """The folder that image paths are relative to."""

    images: list[ListedImage]

    files: list[Path]
    """The files that the listing was read from."""

    differences: list[str] = field(default_factory=list)
    """Differences from the official rules other than counts, one line each."""


@dataclass(frozen=True)
class OfficialImporter(ABC):
    """A data set whose split, counts and class rule were published."""

    config: OfficialSection
    official: ClassVar[Official]

    @abstractmethod
    def listing(self, source: Path) -> Listing:
        """Read paths and classes of the images; the images are not opened.

        Raises:
            DataError: If the layout is unknown, or a line of a listing cannot be read.
        """

    def samples(self) -> list[Sample]:
        """List the images in the order of the listing.

        Raises:
            DataError: If the source is missing or unreadable, or it differs from the published
                data set and `allow_partial` is not set.
        """
        return self._samples

    def facts(self) -> DatasetFacts:
        """Count the images of each class; without the source, return the published counts."""
        if not os.path.exists(self.config.source):
            return official_facts(self.official)
        _, there = self._found
        return facts_of([image for image, _ in there])

    @cached_property
    def _samples(self) -> list[Sample]:
        listing, there = self._found
        _warn_of_irregularities(listing, self._source, self.official, there)
        return _samples_of(there)

    @cached_property
    def _found(self) -> tuple[Listing, list[tuple[ListedImage, str]]]:
        """The listing, and its images that exist with their files."""
        source = _require_folder(self._source, self.official)
        listing = self.listing(source)
        return listing, _checked(listing, source, self.official, self.config.allow_partial)

    @property
    def _source(self) -> Path:
        return Path(os.path.abspath(self.config.source))


def official_facts(official: Official) -> DatasetFacts:
    """Return the published counts, with images spread evenly over classes as an estimate."""
    sizes: dict[str, tuple[int, ...]] = {}
    for split in sorted({part.split()[0] for part in official.counts}):
        parts = [counts for part, counts in official.counts.items() if part.split()[0] == split]
        classes, images = max(part.classes for part in parts), sum(part.images for part in parts)
        sizes[split] = spread(classes, images)
    return DatasetFacts(sizes, exact=False)


def find_root(source: Path, names: Sequence[str], title: str) -> Path:
    """Return the source, or the folder in it, that holds one of these files or folders.

    Args:
        source: An existing folder.
        names: Relative paths; any of them identifies the folder.
        title: Name of the data set in the message.

    Raises:
        DataError: If there is none.
    """
    folders, files = on_disk.visible(source)
    for root in (source, *(source / folder for folder in folders)):
        if any(on_disk.find_listed(root, names)):
            return root
    there = [f"{name}/" for name in folders] + files
    more = ", ..." if len(there) > _SHOWN else ""
    raise DataError(
        f"source must be the folder of {title} with {' or '.join(names)}, {source} holds "
        f"{', '.join(there[:_SHOWN]) + more if there else 'nothing'}; correct the path, or unpack "
        "the official archive there"
    )


def find_file(root: Path, *names: str) -> Path | None:
    """Return the first of these files that exists below a folder, ignoring letter case."""
    return next((Path(path) for path in on_disk.find_listed(root, names) if path), None)


def require_file(root: Path, *names: str) -> Path:
    """Return the first of these files that exists below a folder.

    Raises:
        DataError: If none does.
    """
    path = find_file(root, *names)
    if path is None:
        raise DataError(
            f"{' or '.join(names)} does not exist in {root}; it is part of the official archive"
        )
    return path


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, with their numbers from 1."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [(at, line.strip()) for at, line in enumerate(file, start=1) if line.strip()]


def split_lines(
    path: Path, lines: Sequence[tuple[int, str]], columns: Sequence[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line; fields are separated by white space.

    Raises:
        DataError: If a line has too few fields; extra ones belong to the last field.
    """
    for number, line in lines:
        fields = line.split(None, len(columns) - 1)
        if len(fields) != len(columns):
            raise DataError(
                f"{path}, line {number}: {line[:80]!r} does not have the columns "
                f"{' '.join(columns)}; the file is damaged, extract it from the official archive "
                "again"
            )
        yield number, fields


def whole_number(path: Path, number: int, name: str, text: str) -> int:
    """Return a field as a number.

    Raises:
        DataError: If it is not a whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"{path}, line {number}: {name} must be a whole number, got {text[:80]!r}; the file is "
            "damaged, extract it from the official archive again"
        ) from None


def first_few(items: Sequence[str]) -> str:
    """Return the first items as text."""
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def md5_of(path: Path) -> str:
    """Return the md5 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _require_folder(source: Path, official: Official) -> Path:
    if source.is_dir():
        return source
    if not source.exists():
        raise DataError(
            f"source must be the folder of {official.title}, {source} does not exist; correct the "
            "path, or unpack the official archive there"
        )
    verdict = _md5_difference(source, official.archives) if source.is_file() else None
    known = source.name in official.archives
    raise DataError(
        f"source must be the folder that the archive of {official.title} unpacks to, {source} is "
        f"a file{'' if not known or verdict else ' (its md5 is the published one)'}; "
        + (f"{verdict}; download it again" if verdict else "unpack it and give the folder")
    )


def _md5_difference(path: Path, published: Mapping[str, str]) -> str | None:
    """Describe how a file differs from its published md5; None if equal or not published."""
    expected = published.get(path.name)
    if expected is None or (found := md5_of(path)) == expected:
        return None
    return f"{path}: md5 is {found}, published is {expected}"


def _checked(
    listing: Listing, source: Path, official: Official, allow_partial: bool
) -> list[tuple[ListedImage, str]]:
    """Find the listed files, compare them with the published data set, return those that exist."""
    _refuse_repeated(listing)
    files = on_disk.find_listed(listing.base, [image.path for image in listing.images])
    there = [(image, file) for image, file in zip(listing.images, files, strict=True) if file]
    differences = _count_differences([image for image, _ in there], official)
    missing = [image.path for image, file in zip(listing.images, files, strict=True) if not file]
    if missing:
        differences.append(
            f"{len(missing):,} of {len(files):,} listed images do not exist below {listing.base}: "
            f"{first_few(missing)}"
        )
    differences += listing.differences
    md5s = [_md5_difference(path, official.metadata) for path in listing.files]
    differences += [line for line in md5s if line is not None]
    if differences:
        message = (
            f"{official.title} in {source} differs from the published data set:\n"
            + "\n".join(f"  {line}" for line in differences)
        )
        if not there:
            raise DataError(
                f"{message}\nno listed image exists; correct the path, or unpack the images"
            )
        if not allow_partial:
            raise DataError(
                f"{message}\ncomplete it from the official archive, or import the existing images "
                "with --allow-partial (allow_partial: true)"
            )
        _log.warning("%s\nimporting the existing images because allow_partial is set", message)
    return there


def _samples_of(there: Sequence[tuple[ListedImage, str]]) -> list[Sample]:
    return [
        Sample(
            key,
            image.class_name,
            image.split,
            FileSource(file, image.path),
            image.super_class,
            image.role,
        )
        for key, (image, file) in zip(
            make_keys([image.path for image, _ in there]), there, strict=True
        )
    ]


def _refuse_repeated(listing: Listing) -> None:
    seen: set[str] = set()
    for image in listing.images:
        if image.path in seen:
            raise DataError(
                f"{', '.join(str(file) for file in listing.files)}: every image must be listed "
                f"once, but {image.path!r} is listed twice; extract the file from the official "
                "archive again"
            )
        seen.add(image.path)


def _count_differences(images: Sequence[ListedImage], official: Official) -> list[str]:
    """Return a table of published and found counts if any of them differs."""
    classes: dict[str, set[str]] = {part: set() for part in official.counts}
    number = dict.fromkeys(official.counts, 0)
    for image in images:
        part = image.split if image.role == "both" else f"{image.split} {image.role}"
        classes[part].add(image.class_name)
        number[part] += 1
    found = {part: Counts(len(classes[part]), number[part]) for part in official.counts}
    if found == dict(official.counts):
        return []
    width = max(len(part) for part in official.counts)
    lines = [f"{'':{width}}  {'classes':>15}{'':12}{'images':>15}"]
    lines.append(f"{'':{width}}  {'published':>15}{'found':>12}{'published':>15}{'found':>12}")
    for part, expected in official.counts.items():
        lines.append(
            f"{part:{width}}  {expected.classes:15,}{found[part].classes:12,}"
            f"{expected.images:15,}{found[part].images:12,}"
        )
    return lines


def _warn_of_irregularities(
    listing: Listing,
    source: Path,
    official: Official,
    there: Sequence[tuple[ListedImage, str]],
) -> None:
    """Log irregularities that do not stop an import."""
    other_case = sum(
        file != os.path.normpath(os.path.join(listing.base, image.path)) for image, file in there
    )
    if other_case:
        _log.warning(
            "%s: the names of %d images differ in letter case between the disk and the listing",
            listing.base, other_case,
        )  # fmt: skip
    if others := on_disk.num_other_images([file for _, file in there]):
        _log.warning("%s: %d images are not in the listing and are left out", listing.base, others)
    for folder in (source, source.parent):
        for name in official.archives:
            path = folder / name
            if path.is_file() and (line := _md5_difference(path, official.archives)):
                _log.warning("%s; the files unpacked from it may be damaged", line)
