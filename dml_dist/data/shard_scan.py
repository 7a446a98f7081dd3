"""Scan of a tar shard: its images with their labels, and its problems."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_dist.data.image_check import check_image
from dml_dist.data.sample import IMAGE_EXTENSIONS, ROLES, image_extension
from dml_dist.errors import DataError

_BLOCK_BYTES = 512
# webdataset's rule: the extension begins at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class ScanTask:
    """One tar shard to read."""

    root: Path
    tar_shard: str
    """File name relative to root."""

    measure: bool
    """Whether to read the width and height of images."""


@dataclass(frozen=True)
class ScannedImage:
    """One image of a tar shard with its label."""

    key: str
    extension: str
    offset: int
    length: int
    crc32: int
    width: int
    height: int
    number: int | None
    """The label, if it is a whole number."""

    name: str | None
    """The class name, or the label if it is a text."""

    super_class: str
    split: str | None
    role: str

    @property
    def class_text(self) -> str:
        """The class as text: its name, else its number."""
        return self.name if self.name is not None else str(self.number)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a tar shard, or with one sample of it."""

    tar_shard: str
    key: str | None
    what: str

    def __str__(self) -> str:
        where = self.tar_shard if self.key is None else f"{self.tar_shard}: key {self.key!r}"
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class ScannedShard:
    """All that was found in a tar shard."""

    images: tuple[ScannedImage, ...]
    problems: tuple[Problem, ...]

    complete: bool
    """False if the tar file breaks off or is damaged, so that there may have been more."""


def list_tar_shards(root: Path) -> list[str]:
    """Return the tar files below a folder, relative to it, rising; hidden ones are left out."""
    paths = (path.relative_to(root) for path in root.rglob("*.tar"))
    return sorted(
        path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)
    )


def scan_tar_shard(task: ScanTask) -> ScannedShard:
    """Read every member of a tar shard; damage becomes a problem, not an error."""
    images: list[ScannedImage] = []
    problems: list[Problem] = []
    skipped_names: list[str] = []
    path = task.root / task.tar_shard
    complete = False
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            for key, members in _samples(tar):
                try:
                    image = _scan_sample(key, members, file.fileno(), task.measure)
                except DataError as error:
                    problems.append(Problem(task.tar_shard, key, str(error)))
                else:
                    images += [image] if image is not None else []
                    skipped_names += _image_names(members) if image is None else []
            complete = _is_end(file.fileno(), tar.offset)
            if not complete:
                what = (
                    f"truncated or damaged at byte {tar.offset}, where a member or the end begins"
                )
                problems.append(Problem(task.tar_shard, None, what))
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(Problem(task.tar_shard, None, f"truncated or damaged: {error}"))
    if skipped_names:
        problems.append(Problem(task.tar_shard, None, _dots_in_keys(skipped_names)))
    return ScannedShard(tuple(images), tuple(problems), complete)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield (key, extension -> member) of each run of members with one key."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        match = _MEMBER.fullmatch(member.name)
        if not member.isreg() or match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if key != current or extension in members:
            if current is not None:
                yield current, members
            current, members = key, {}
        members[extension] = member
    if current is not None:
        yield current, members


def _image_names(members: dict[str, tarfile.TarInfo]) -> list[str]:
    """Return the names of members that are images but for a dot before their last one."""
    return [
        member.name
        for extension, member in members.items()
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS
    ]


def _dots_in_keys(names: list[str]) -> str:
    match = _MEMBER.fullmatch(names[0])
    assert match is not None, "only names of this form are samples"
    key, extension = match.groups()
    return (
        f"{len(names)} images have a dot in their key and would be left out: the first, "
        f"{names[0]!r}, has the key {key!r} and the extension {extension!r}, because a key ends at "
        "the first dot; rewrite the tar files with '_' in place of the dots"
    )


def _scan_sample(
    key: str, members: dict[str, tarfile.TarInfo], descriptor: int, measure: bool
) -> ScannedImage | None:
    """Read one sample; None if it holds no image, a DataError if it cannot be used."""
    extensions = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if not extensions:
        return None
    if len(extensions) > 1:
        raise DataError(f"a sample must have one image, it has {', '.join(sorted(extensions))}")
    member = members[extensions[0]]
    data = _read(descriptor, member)
    width, height = check_image(data, whole=False) if measure else (0, 0)
    facts = _read_json(descriptor, members["json"]) if "json" in members else {}
    given = [facts[name] for name in ("label", "cls") if name in facts]
    if "cls" in members:
        given.append(_decode(_read(descriptor, members["cls"]), "cls").strip())
    number, name = _label(given, facts.get("class"))
    role = facts.get("role") or "both"
    if role not in ROLES:
        raise DataError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    return ScannedImage(
        key=key,
        extension=image_extension(f".{extensions[0]}"),
        offset=member.offset_data,
        length=member.size,
        crc32=zlib.crc32(data),
        width=width,
        height=height,
        number=number,
        name=name,
        super_class=str(facts.get("super_class") or ""),
        split=str(facts["split"]) if facts.get("split") else None,
        role=role,
    )


def _label(given: list[Any], class_name: Any) -> tuple[int | None, str | None]:
    """Return the (number, name) of a class from what .json and .cls say, which must agree."""
    texts = {str(value) for value in given if value is not None and str(value)}
    if len(texts) > 1:
        raise DataError(f".json and .cls must give one label, they give {' and '.join(texts)}")
    text = texts.pop() if texts else None
    name = str(class_name) if class_name not in (None, "") else None
    if text is None and name is None:
        raise DataError(
            "the sample has no label; add a .cls member, or `label` or `class` in a .json member"
        )
    if text is not None and re.fullmatch(r"-?\d{1,18}", text):
        return int(text), name
    return None, name if name is not None else text


def _read_json(descriptor: int, member: tarfile.TarInfo) -> dict[str, Any]:
    try:
        facts = json.loads(_decode(_read(descriptor, member), "json"))
    except json.JSONDecodeError as error:
        raise DataError(f"the .json member is damaged ({error})") from error
    return facts if isinstance(facts, dict) else {"label": facts}


def _decode(data: bytes, extension: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"the .{extension} member must be UTF-8 text ({error})") from error


def _read(descriptor: int, member: tarfile.TarInfo) -> bytes:
    data = os.pread(descriptor, member.size, member.offset_data)
    if len(data) != member.size:
        raise DataError(
            f"truncated: {member.name} has {member.size} bytes, the tar file ends after {len(data)}"
        )
    return data


def _is_end(descriptor: int, offset: int) -> bool:
    """Tell whether an archive ends at `offset` as it should, with a block of zeros.

    tarfile stops without an error at a damaged header or where a file was cut between members.
    """
    return os.pread(descriptor, _BLOCK_BYTES, offset) == bytes(_BLOCK_BYTES)
