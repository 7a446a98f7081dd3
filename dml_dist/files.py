"""Writing files so that a reader sees the old content or the new one, never half of it.

A file is written under a temporary name in its own folder, flushed to the disk, renamed over the
final name, and the folder's entry is flushed. A process that is killed leaves at most a hidden
file `.<name>.<random>.tmp` behind, which nothing reads.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dml_dist.errors import DataError


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power failure."""
    if os.name != "posix":
        return  # only POSIX systems open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush folders; their renames are as durable as
        # they can make them.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing in binary that takes its name when the block ends without an error.

    The folder must exist. Permissions follow the umask, as with `open`.

    Raises:
        OSError: As `open`, `write` and `rename` do; the file at `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write bytes to a file, completely or not at all."""
    with open_atomic(path) as file:
        file.write(data)


def write_text_atomic(path: Path, text: str) -> None:
    """Write text as UTF-8 with the line ends it has, completely or not at all."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as indented JSON, completely or not at all.

    Besides what JSON knows, numpy scalars and arrays and paths are taken. Floats that JSON has no
    word for are written as the strings "nan", "inf" and "-inf", as in records.

    Raises:
        TypeError: If the value holds an object of another kind; nothing is written.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If there is none.
        DataError: If it is not JSON, with the line and column.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"required a JSON file, got {path}, which is damaged ({error}); "
            "restore it from a copy or remove it"
        ) from None


def plain(value: Any) -> Any:
    """Return a value made of what JSON knows, at any depth.

    Numpy scalars and arrays, tensors, and paths become plain; non-finite floats become the words
    "nan", "inf" and "-inf". Objects of other kinds stay, and `json` refuses them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Path):
        return str(value)
    return value
