"""Disk cache of remote tar shards with a size limit, shared by processes and runs.

    .lock                        held while the folder is read or changed
    .leases/HOST-PID-RANDOM      files that one process uses; locked while the process lives
    FOLDER/NAME                  a complete file, renamed from its part
    FOLDER/.NAME.part            a file being copied; locked by the process that copies it, and
                                 already as long as the whole file, so that its space is counted

Locks are flock's and end with their process. So nobody waits for a killed process: its leases and
parts are removed by the next process that needs space.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from dml_dist.errors import ConfigError, RunError
from dml_dist.files import make_own_folder, open_own, sync_folder

WAIT_SECONDS = 600.0
"""How long a process waits for space, or for a file that another process copies without progress;
as long as ranks wait for each other by default."""

_POLL_SECONDS = 0.05
_LOCK, _LEASES = ".lock", ".leases"


@dataclass(eq=False)
class ShardCache:
    """A least-recently-used cache of files; leased files are never removed.

    Attributes:
        folder: The cache's folder, created when missing: on a local disk, or on a shared file
            system with locks.
        max_bytes: Limit of the total size.
        wait_seconds: How long to wait for leases and copies of other processes.
        untouched: Names of small files that are neither counted nor removed.
    """

    folder: Path
    max_bytes: int
    wait_seconds: float = WAIT_SECONDS
    untouched: frozenset[str] = frozenset()
    _own: _Leases = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            make_own_folder(self.folder)
            make_own_folder(self.folder / _LEASES)
            with self._locked():
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache.folder {self.folder} cannot be written and locked "
                f"({error.strerror or error}); choose another folder, of your own"
            ) from error
        self._own = _Leases(self.folder / _LEASES)

    def lease(
        self, path: Path, size_of: Callable[[], int], copy: Callable[[BinaryIO], None]
    ) -> None:
        """Copy a file if it is missing, and keep it until `release` or the end of this process.

        When several processes need a missing file at once, one of them copies it. Leases are
        counted.

        Args:
            path: The file, in a folder below the cache's.
            size_of: Returns the file's size in bytes; called when it is missing.
            copy: Writes the file's content.

        Raises:
            RunError: If there is no space: other leases fill the cache, or the disk is full.
            Exception: What `size_of` or `copy` raises; the partial copy is removed.
        """
        size: int | None = None
        deadline = _Deadline(path, self.wait_seconds)
        while True:
            with self._locked():
                if self.has(path):
                    self._own.add(self._name(path))
                    os.utime(path)
                    return
                part = None if size is None else self._claim(path, size)
            if part is not None:
                break
            if size is None:
                # Outside the lock: it may ask a slow server.
                size = size_of()
                continue
            if deadline.is_over():
                raise RunError(
                    f"{path} was not available within {self.wait_seconds:.0f} s: another process "
                    f"copies it, or leased files fill the cache; {self._advice(size)}"
                )
            time.sleep(_POLL_SECONDS)
        self._fill(path, part, copy)

    def release(self, path: Path) -> None:
        """Give up one lease; without leases the file may be removed to free space."""
        with self._locked():
            self._own.remove(self._name(path))
            with contextlib.suppress(FileNotFoundError):  # The cache was emptied by hand.
                os.utime(path)

    def has(self, path: Path) -> bool:
        """Tell whether a file is there now; a link is none, as its target is not ours."""
        return path.is_file() and not path.is_symlink()

    def _fill(self, path: Path, part: BinaryIO, copy: Callable[[BinaryIO], None]) -> None:
        try:
            copy(part)
            with self._writing(path):
                part.truncate()  # The file may be shorter than the reserved size.
                part.flush()
                os.fsync(part.fileno())
                # Under one lock, so that no other process removes the file before it is leased.
                with self._locked():
                    os.replace(part.name, path)
                    self._own.add(self._name(path))
                sync_folder(path.parent)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)  # Before close, which releases its lock.
            raise
        finally:
            part.close()

    def _claim(self, path: Path, size: int) -> BinaryIO | None:
        """Reserve space for a file and open its part, None if that must wait; under the lock."""
        part = part_path(path)
        if part.exists() and not _remove_if_unlocked(part):
            return None
        own = sum(_size(self.folder / name) for name in self._own.counts)
        if own + size > self.max_bytes:
            raise RunError(
                f"{path.name} ({_mib(size)}) does not fit with the {_mib(own)} already in use; "
                + self._advice(size)
            )
        if not self._make_room(size):
            return None
        with self._writing(path):
            place = self.folder
            for name in path.parent.relative_to(self.folder).parts:
                make_own_folder(place := place / name)
            file = open_own(part)
            # Locked before the cache's lock is released, so that nobody takes it for a leftover.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.truncate(size)
            return file

    def _make_room(self, size: int) -> bool:
        """Remove least recently used files until `size` more bytes fit; under the lock."""
        files = self._files()
        leased = self._leased()
        excess = sum(status.st_size for status in files.values()) + size - self.max_bytes
        free = shutil.disk_usage(self.folder).free
        excess = max(excess, size - free)
        removable = [
            (status.st_mtime_ns, name)
            for name, status in files.items()
            if name not in leased and not name.endswith(".part")
        ]
        if sum(files[name].st_size for _, name in removable) < excess:
            if free < size:
                raise RunError(
                    f"the disk of {self.folder} has {_mib(free)} free, but {_mib(size)} are "
                    "needed; free some space, or choose another data.cache.folder"
                )
            return False
        for _, name in sorted(removable):
            if excess <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess -= files[name].st_size
        return True

    def _files(self) -> dict[str, os.stat_result]:
        """Return all files and parts by name; parts of dead processes are removed."""
        found = {}
        for top in os.scandir(self.folder):
            if not top.is_dir() or top.name == _LEASES:
                continue
            for place, _, names in os.walk(top.path):
                for name in names:
                    path = Path(place, name)
                    is_part = name.startswith(".") and name.endswith(".part")
                    if name.startswith(".") != is_part or name in self.untouched:
                        continue
                    if is_part and _remove_if_unlocked(path):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        found[self._name(path)] = path.stat()
        return found

    def _leased(self) -> set[str]:
        """Return the names that living processes lease."""
        names = set(self._own.counts)
        for path in (self.folder / _LEASES).iterdir():
            if path != self._own.path and not _remove_if_unlocked(path):
                names |= set(json.loads(path.read_text(encoding="utf-8") or "{}"))
        return names

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _advice(self, size: int) -> str:
        return (
            f"the cache {self.folder} is limited to {_mib(self.max_bytes)}; "
            f"raise data.cache.max_gb by {_mib(size)} or more, or lower data.batches.window or "
            "data.prefetch"
        )

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror or error}; free some space, or choose "
                "another data.cache.folder"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the cache's lock; each holder opens the file, so that threads exclude each other."""
        with open_own(self.folder / _LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Deadline:
    """A deadline that starts again whenever another process's copy has grown."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.part = part_path(path)
        self.seconds = seconds
        self.seen = 0
        self.deadline = time.monotonic() + seconds

    def is_over(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            written = self.part.stat().st_mtime_ns
            if written != self.seen:
                self.seen, self.deadline = written, time.monotonic() + self.seconds
        return time.monotonic() > self.deadline


class _Leases:
    """The leases of this process, in a file that other processes read; used under the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._counts: dict[str, int] = {}
        self._file: IO[str] | None = None
        self._pid = os.getpid()

    @property
    def counts(self) -> dict[str, int]:
        """Name -> number of leases of this process."""
        # A forked child inherits the object, but the leases belong to its parent.
        if self._pid != os.getpid():
            self._counts, self._file, self.path, self._pid = {}, None, None, os.getpid()
        return self._counts

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_pid": -1}  # Unpickled in another process, without leases.

    def add(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.counts[name] == 1:
            self._write()

    def remove(self, name: str) -> None:
        self.counts[name] -= 1
        if not self.counts[name]:
            del self.counts[name]
            self._write()

    def _write(self) -> None:
        if self._file is None:
            own = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
            self.path = self.folder / own
            self._file = io.TextIOWrapper(open_own(self.path), encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        self._file.truncate()
        json.dump(self._counts, self._file)
        self._file.flush()
        if not self._counts:
            assert self.path is not None
            self.path.unlink(missing_ok=True)
            # Loader workers forked in the meantime inherited the open file and with it the lock, so
            # closing our copy would not release it.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = self.path = None


def part_path(path: Path) -> Path:
    """Return the path of a file while it is being copied."""
    return path.with_name(f".{path.name}.part")


def _remove_if_unlocked(path: Path) -> bool:
    """Remove a lease or part whose process has ended; return whether it no longer exists."""
    try:
        with open_own(path, create=False) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
