"""Scan of a tar shard: its images with their labels, and its problems."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_dist.data.labels import class_text, whole_number
from dml_dist.data.sample import IMAGE_EXTENSIONS, ROLES, image_extension
from dml_dist.data.tar_members import Member, read_members
from dml_dist.errors import DataError

# webdataset's rule: the extension begins at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|z)|tgz|tbz2?|txz)$")
_LABELS = frozenset({"cls", "json"})
_SHOWN = 3
BEHIND_END = (
    "members stand behind an end-of-archive block, where other readers stop (they are read here)"
)
_ORPHANS = "members are labels without an image and are left out"
_UNKNOWN = "members belong to labelled samples without an image of a known type and are left out"
_NO_KEY = "images have no key (a hidden file) and are left out"
_DOTTED = "dotted"


@dataclass(frozen=True)
class ScanTask:
    """One tar shard to read."""

    root: Path
    tar_shard: str
    """File name relative to root."""


@dataclass(frozen=True)
class ScannedImage:
    """One image of a tar shard with its label; its bytes are not read."""

    key: str
    extension: str
    offset: int
    length: int
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

    passed_over: Mapping[str, list[str]]
    """What no image of an index shows, and the names of the members."""

    spellings: frozenset[tuple[str, str]]
    """(class as written, its text) of all images."""


def list_tar_shards(root: Path) -> list[str]:
    """Return the tar files below a folder, relative to it, rising; hidden ones are left out."""
    return [path for path in _files(root) if path.lower().endswith(".tar") and not _hidden(path)]


def list_other_tars(root: Path) -> tuple[list[str], list[str]]:
    """Return the compressed tar files and the hidden ones below a folder, which are not read."""
    compressed = [path for path in _files(root) if _COMPRESSED_TAR.search(path.lower())]
    hidden = [path for path in _files(root) if path.lower().endswith(".tar") and _hidden(path)]
    return [path for path in compressed if not _hidden(path)], hidden


def _files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def scan_tar_shard(task: ScanTask) -> ScannedShard:
    """Read the labels of every image of a tar shard; damage becomes a problem, not an error."""
    images: list[ScannedImage] = []
    problems: list[Problem] = []
    passed: dict[str, list[str]] = {}
    spellings: set[tuple[str, str]] = set()
    path = task.root / task.tar_shard
    contents = read_members(path)
    if contents.members:
        with open(path, "rb") as file:
            for key, members in _samples(contents.members):
                try:
                    image = _scan_sample(key, members, file.fileno(), spellings)
                except DataError as error:
                    problems.append(Problem(task.tar_shard, key, str(error)))
                    continue
                if image is not None:
                    images.append(image)
                elif kind := _kind_without_image(members):
                    passed.setdefault(kind, []).extend(member.name for member in members.values())
    if dotted := passed.pop(_DOTTED, []):
        problems.append(Problem(task.tar_shard, None, _dots_in_keys(dotted)))
    for name, target in contents.lost_links:
        if _is_part(name):
            what = (
                f"{name!r} is a link to {target!r}, which is not in this tar file; pack the file "
                "itself (tar --dereference --hard-dereference)"
            )
            problems.append(Problem(task.tar_shard, None, what))
    if contents.num_behind_end:
        behind = contents.members[-contents.num_behind_end :]
        passed[BEHIND_END] = [member.name for member in behind]
    if hidden := [
        m.name for m in contents.members if _is_image(m.name) and not _MEMBER.fullmatch(m.name)
    ]:
        passed[_NO_KEY] = hidden
    if contents.damage is not None:
        problems.append(Problem(task.tar_shard, None, contents.damage))
    complete = contents.damage is None
    return ScannedShard(tuple(images), tuple(problems), complete, passed, frozenset(spellings))


def passed_over_lines(shards: Mapping[str, ScannedShard]) -> list[str]:
    """Return a line for each kind of members that no image of an index shows, with their number.

    Args:
        shards: Tar shard -> what was found in it.
    """
    lines = []
    for kind in dict.fromkeys(kind for shard in shards.values() for kind in shard.passed_over):
        found = [
            f"{member} in {name}"
            for name in sorted(shards)
            for member in shards[name].passed_over.get(kind, ())
        ]
        more = ", ..." if len(found) > _SHOWN else ""
        lines.append(f"{len(found):,} {kind}: {', '.join(found[:_SHOWN])}{more}")
    return lines


def _samples(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, extension -> member) of each run of members with one key."""
    current: str | None = None
    sample: dict[str, Member] = {}
    for member in members:
        match = _MEMBER.fullmatch(member.name)
        if match is None:
            continue
        key, extension = match.group(1), match.group(2).lower()
        if key != current or extension in sample:
            if current is not None:
                yield current, sample
            current, sample = key, {}
        sample[extension] = member
    if current is not None:
        yield current, sample


def _is_image(name: str) -> bool:
    return image_extension(name) in IMAGE_EXTENSIONS


def _is_part(name: str) -> bool:
    """Tell whether a member is an image or a label."""
    return _is_image(name) or name.rpartition(".")[2].lower() in _LABELS


def _kind_without_image(members: Mapping[str, Member]) -> str | None:
    """Return which kind of sample without an image this is, None if it has no label either."""
    if any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in members):
        return _DOTTED
    if not _LABELS & members.keys():
        return None
    return _ORPHANS if members.keys() <= _LABELS else _UNKNOWN


def _dots_in_keys(names: list[str]) -> str:
    names = [name for name in names if _is_image(name)]
    match = _MEMBER.fullmatch(names[0])
    assert match is not None, "only names of this form are samples"
    key, extension = match.groups()
    return (
        f"{len(names)} images have a dot in their key and would be left out: the first, "
        f"{names[0]!r}, has the key {key!r} and the extension {extension!r}, because a key ends at "
        "the first dot; rewrite the tar files with '_' in place of the dots"
    )


def _scan_sample(
    key: str, members: dict[str, Member], descriptor: int, spellings: set[tuple[str, str]]
) -> ScannedImage | None:
    """Read one sample; None if it holds no image, a DataError if it cannot be used."""
    extensions = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if not extensions:
        return None
    if len(extensions) > 1:
        raise DataError(f"a sample must have one image, it has {', '.join(sorted(extensions))}")
    member = members[extensions[0]]
    facts = _read_json(descriptor, members["json"]) if "json" in members else {}
    given = [facts[name] for name in ("label", "cls") if name in facts]
    if "cls" in members:
        given.append(_decode(_read(descriptor, members["cls"]), "cls").rstrip("\r\n"))
    number, name = _label(given, facts.get("class"), spellings)
    role = facts.get("role") or "both"
    if role not in ROLES:
        raise DataError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    super_class, split = facts.get("super_class"), facts.get("split")
    return ScannedImage(
        key=key,
        extension=image_extension(f".{extensions[0]}"),
        offset=member.offset,
        length=member.size,
        number=number,
        name=name,
        super_class="" if _absent(super_class) else class_text(super_class, "super class"),
        split=None if _absent(split) else class_text(split, "split"),
        role=role,
    )


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _label(
    given: list[Any], class_name: Any, spellings: set[tuple[str, str]]
) -> tuple[int | None, str | None]:
    """Return the (number, name) of a class from what .json and .cls say, which must agree."""
    labels = {class_text(value): value for value in given if not _absent(value)}
    if len(labels) > 1:
        raise DataError(f".json and .cls must give one label, they give {' and '.join(labels)}")
    name = None if _absent(class_name) else class_text(class_name, "class name")
    if name is not None:
        spellings.add((str(class_name), name))
    for text, value in labels.items():
        if name is None:
            spellings.add((str(value), text))
        number = whole_number(text)
        return number, text if name is None and number is None else name
    if name is None:
        raise DataError(
            "the sample has no label; add a .cls member, or `label` or `class` in a .json member"
        )
    return whole_number(name), name


def _read_json(descriptor: int, member: Member) -> dict[str, Any]:
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


def _read(descriptor: int, member: Member) -> bytes:
    data = os.pread(descriptor, member.size, member.offset)
    if len(data) != member.size:
        raise DataError(
            f"truncated: {member.name} has {member.size} bytes, the tar file ends after {len(data)}"
        )
    return data
