"""The members of a tar file by position: also behind an end-of-archive block, and through links."""

from __future__ import annotations

import os
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_BLOCK_BYTES = 512
_CHUNK_BYTES = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """A file in a tar file, or a link to one in it."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarContents:
    """What a tar file holds."""

    members: tuple[Member, ...]

    num_behind_end: int
    """The last of `members`, which stand behind an end-of-archive block (`cat a.tar b.tar`)."""

    lost_links: tuple[tuple[str, str], ...]
    """(name, target) of links whose target is not in this tar file."""

    damage: str | None
    """Why there may be more members; None if the tar file is whole."""


def read_members(path: Path) -> TarContents:
    """List a tar file; damage is reported, not raised."""
    found: list[tarfile.TarInfo] = []
    num_first = 0
    damage: str | None = None
    start: int | None = 0
    try:
        with open(path, "rb") as file:
            damage = _compression(file)
            while damage is None and start is not None:
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for info in tar:
                        found.append(info)
                    end = tar.offset
                num_first = num_first if start else len(found)
                # tarfile stops without an error at a damaged header, or where a file was cut.
                if os.pread(file.fileno(), _BLOCK_BYTES, end) != bytes(_BLOCK_BYTES):
                    damage = f"truncated or damaged at byte {end}, where a member or the end begins"
                start = _next_block(file, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        damage = f"truncated or damaged: {error}"
        num_first = num_first if start else len(found)
    files = [info for info in found if info.isreg() or info.islnk() or info.issym()]
    behind = {id(info) for info in found[num_first:]}
    members, lost = _resolved(files)
    num_behind = sum(id(info) in behind for info, _ in members)
    return TarContents(tuple(member for _, member in members), num_behind, tuple(lost), damage)


def _compression(file: BinaryIO) -> str | None:
    begin = file.read(8)
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            return f"it is compressed with {name}, so no image has a position; decompress it"
    return None


def _next_block(file: BinaryIO, end: int) -> int | None:
    """Return the position of the first block at or behind `end` that is not zeros."""
    file.seek(end)
    while chunk := file.read(_CHUNK_BYTES):
        if chunk.count(0) != len(chunk):
            first = len(chunk) - len(chunk.lstrip(b"\0"))
            return end + first // _BLOCK_BYTES * _BLOCK_BYTES
        end += len(chunk)
    return None


def _resolved(
    files: list[tarfile.TarInfo],
) -> tuple[list[tuple[tarfile.TarInfo, Member]], list[tuple[str, str]]]:
    """Return the files with their positions, and (name, target) of links that lead out."""
    by_name = {posixpath.normpath(info.name): info for info in files}
    members: list[tuple[tarfile.TarInfo, Member]] = []
    lost: list[tuple[str, str]] = []
    for info in files:
        target: tarfile.TarInfo | None = info
        passed: set[int] = set()
        while target is not None and not target.isreg():
            # The target of a hard link is a name in the archive, of a symbolic one a path from it.
            base = "" if target.islnk() else posixpath.dirname(target.name)
            following = by_name.get(posixpath.normpath(posixpath.join(base, target.linkname)))
            passed.add(id(target))
            target = None if following is None or id(following) in passed else following
        if target is None:
            lost.append((info.name, info.linkname))
        else:
            members.append((info, Member(info.name, target.offset_data, target.size)))
    return members, lost
