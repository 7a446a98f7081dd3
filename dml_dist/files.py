"""Atomic file writes and lock files.

A reader sees the old content of a file or the new one, never a part. A file is written under a
temporary name in its own folder, flushed to the disk and renamed, and the folder is flushed. A
killed process leaves at most a hidden file `.<name>.<random>.tmp`, which nothing reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import pwd
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dml_dist.errors import DataError
from dml_dist.urls import has_secret

_RETRY_SECONDS = 0.1

# POSIX locks belong to a process; this map excludes other holders within the process.
_held: dict[Path, BinaryIO] = {}


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it survives a power failure."""
    if os.name != "posix":
        return  # only POSIX systems open folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush folders: nothing more can be done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def open_atomic(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends without an error.

    The folder must exist. Permissions follow the umask, as with `open`; a private file can be read
    by its owner alone.

    Raises:
        OSError: As by `open`, `write` and `rename`; the file at `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb", opener=_open_private if private else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_bytes_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write bytes to a file atomically."""
    with open_atomic(path, private=private) as file:
        file.write(data)


def write_text_atomic(path: Path, text: str, *, private: bool = False) -> None:
    """Write text as UTF-8 atomically, with its line ends unchanged."""
    write_bytes_atomic(path, text.encode(), private=private)


def write_config_atomic(path: Path, text: str) -> None:
    """Write a configuration; with a secret in a URL, file and folder become its owner's alone."""
    if private := has_secret(text):
        path.parent.chmod(0o700)
    write_text_atomic(path, text, private=private)


def write_json_atomic(path: Path, value: Any) -> None:
    """Write a value as indented JSON atomically.

    Beside JSON types, numpy scalars and arrays and paths are supported (`plain`). Non-finite floats
    are written as the strings "nan", "inf" and "-inf", as in records.

    Raises:
        TypeError: If the value holds an object of another kind; nothing is written.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: If it does not exist.
        DataError: If it is not JSON, with the line and column.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}, which is damaged ({error}); restore it from a copy or remove it"
        ) from None


def make_own_folder(path: Path) -> None:
    """Make a folder that only this user can enter, or check one that is there.

    Raises:
        PermissionError: If it belongs to somebody else, or is a link of somebody else: whoever owns
            a folder decides what its files are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    for status in (os.lstat(path), os.stat(path)):
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"it belongs to {_user(status.st_uid)}", str(path))
    if status.st_mode & 0o022:  # Made by an earlier version, or with a wide umask.
        path.chmod(status.st_mode & 0o755)


def open_own(path: Path, *, create: bool = True) -> BinaryIO:
    """Open a file to read and write; what is in it stays.

    Args:
        path: The file.
        create: Whether to make it if it is missing.

    Raises:
        PermissionError: If it is a link, has another name elsewhere, belongs to somebody else, or
            is no file: in a folder of many, what is written would go to another place.
    """
    return open(path, "r+b", opener=_open_or_create if create else _open_own)


def _open_or_create(path: str, flags: int) -> int:
    return _open_own(path, flags | os.O_CREAT)


def _open_own(path: str, flags: int) -> int:
    descriptor = _open_no_link(path, flags, 0o600)
    status = os.fstat(descriptor)
    why = None
    if status.st_uid != os.geteuid():
        why = f"it belongs to {_user(status.st_uid)}"
    elif not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        why = "it is no file, or a second name of one"
    if why is not None:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, why, path)
    return descriptor


def _open_no_link(path: str, flags: int, mode: int = 0o666) -> int:
    """Open a file that is no link: whoever made one would choose which file is changed."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise PermissionError(errno.EPERM, "it is a link; remove it", path) from None


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"


@contextmanager
def lock_file(path: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a file, also across machines that share its file system.

    The lock is released when this process ends, in any way. Unlike with `flock`, forked processes
    do not inherit it: loader workers outlive a killed rank by some seconds.

    Args:
        path: The lock file; it is created, and never removed.
        wait_seconds: Maximum time to wait for another holder.

    Raises:
        BlockingIOError: If another process holds it; `strerror` names the process.
    """
    path = Path(path).parent.resolve() / path.name
    deadline = time.monotonic() + wait_seconds
    while (owner := _try_lock(path)) is not None:
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, f"held by {owner}", str(path))
        time.sleep(_RETRY_SECONDS)
    try:
        yield
    finally:
        _held.pop(path).close()


def _try_lock(path: Path) -> str | None:
    """Lock the file and return None, or return the process that holds it."""
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if path in _held:
        return me  # Closing a second descriptor of the file would release the lock.
    file = open(path, "a+b", buffering=0, opener=_open_no_link)  # noqa: SIM115 (lock_file closes it)
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
    """Convert a value to JSON types, recursively.

    Numpy scalars and arrays, tensors and paths are converted; non-finite floats become the strings
    "nan", "inf" and "-inf". Other objects are returned as they are, and `json` rejects them.
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
