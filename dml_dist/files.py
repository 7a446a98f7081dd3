"""Writing files so that a reader sees the old content or the new one, never half of it.

A file is written under a temporary name in its own folder, flushed to the disk, renamed over the
final name, and the folder's entry is flushed. A process that is killed leaves at most a hidden
file `.<name>.<random>.tmp` behind, which nothing reads.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dml_dist.errors import DataError

_SECONDS_BETWEEN_TRIES = 0.1

# The system keeps these locks by process: holders in one process are told apart here.
_held: dict[Path, BinaryIO] = {}


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


@contextmanager
def hold(path: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file against all other holders, also those on other machines of a shared disk.

    The lock ends with this process, however that ends. Processes that were forked from it do not
    keep it, as they would with `flock`: loader workers outlive a killed rank by some seconds.

    Args:
        path: The lock file; it is made, and stays.
        wait_seconds: How long to wait for another holder to end.

    Raises:
        BlockingIOError: If another one holds it; `strerror` names the process.
    """
    path = Path(path).resolve()
    deadline = time.monotonic() + wait_seconds
    while (owner := _try_to_hold(path)) is not None:
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, f"held by {owner}", str(path))
        time.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        yield
    finally:
        _held.pop(path).close()


def _try_to_hold(path: Path) -> str | None:
    """Hold the file and return None, or return who holds it."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if path in _held:
        return me  # To open and close the file once more would give the lock up.
    file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by hold)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(me.encode())
    except OSError as error:
        file.seek(0)
        owner = file.read().decode(errors="replace")
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return owner or "another process"
        raise
    _held[path] = file
    return None


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
