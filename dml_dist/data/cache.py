"""A bounded folder of whole tar shards that came from elsewhere, shared by processes and runs.

    .lock                        held for every look at the folder and every change of it
    .leases/HOST-PID-RANDOM      what one process keeps from being removed; locked while it lives
    FOLDER/NAME                  a file; one appears whole or not at all, by renaming
    FOLDER/.NAME.part            a file that is coming; locked by the process that copies it, and
                                 as long as the file will be, so that its room is counted at once

Locks are flock's and end with their process, so nothing that a killed process leaves behind is
waited for: its lease and its part are removed by the next that needs room.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from dml_dist.files import sync_folder

WAIT_SECONDS = 600.0
"""How long a process waits for room that others hold, or for a file that another one copies,
without any change; as long as ranks wait for each other by default."""

_POLL_SECONDS = 0.05
_LOCK, _LEASES = ".lock", ".leases"


@dataclass(eq=False)
class ShardCache:
    """Files kept within a limit; the least recently used that nobody leases go first.

    Attributes:
        folder: Where; made when it is missing. A local disk, or one shared by machines whose file
            system has locks.
        max_bytes: The limit of all files together.
        wait_seconds: How long others' leases and copies are waited for.
        untouched: Names of small files that are neither counted nor removed.
    """

    folder: Path
    max_bytes: int
    wait_seconds: float = WAIT_SECONDS
    untouched: frozenset[str] = frozenset()
    _own: _Leases = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            (self.folder / _LEASES).mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise ConfigError(
                f"data.cache.folder must be a folder that can be written and locked, got "
                f"{self.folder}: {error.strerror or error}; give another one"
            ) from error
        self._own = _Leases(self.folder / _LEASES)

    def lease(
        self, path: Path, size_of: Callable[[], int], copy: Callable[[BinaryIO], None]
    ) -> None:
        """Make sure that a file is there, and keep it until `release` or the end of this process.

        Of all processes that want a missing file at once, one copies it. Leases are counted.

        Args:
            path: The file, in a folder below the cache's.
            size_of: Gives the bytes of the file; called when it is missing.
            copy: Writes the file's content.

        Raises:
            RunError: If there is no room: other leases fill the cache, or the disk is full.
            Exception: What `size_of` or `copy` raises; nothing is left behind then.
        """
        size: int | None = None
        patience = _Patience(path, self.wait_seconds)
        while True:
            with self._locked():
                if path.is_file():
                    self._own.add(self._name(path))
                    os.utime(path)
                    return
                part = None if size is None else self._claim(path, size)
            if part is not None:
                break
            if size is None:
                size = size_of()
                continue
            if patience.is_over():
                raise RunError(
                    f"{path} did not come within {self.wait_seconds:.0f} s: other processes copy "
                    f"it or lease what fills the cache; {self._advice(size)}"
                )
            time.sleep(_POLL_SECONDS)
        self._fill(path, part, copy)

    def release(self, path: Path) -> None:
        """Give up one lease; the file may be removed when others need its room."""
        with self._locked():
            self._own.remove(self._name(path))
            with contextlib.suppress(FileNotFoundError):  # Somebody emptied the cache by hand.
                os.utime(path)

    def has(self, path: Path) -> bool:
        """Tell whether a file is there now."""
        return path.is_file()

    def _fill(self, path: Path, part: BinaryIO, copy: Callable[[BinaryIO], None]) -> None:
        try:
            copy(part)
            with self._writing(path):
                part.truncate()  # What came may be shorter than the room that was kept.
                part.flush()
                os.fsync(part.fileno())
                with self._locked():
                    os.replace(part.name, path)
                    self._own.add(self._name(path))
                sync_folder(path.parent)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)  # Before its lock is gone: it is ours.
            raise
        finally:
            part.close()

    def _claim(self, path: Path, size: int) -> BinaryIO | None:
        """Open the part of a file with its room kept, None if that must wait; under the lock."""
        part = part_of(path)
        if part.exists() and not _remove_if_left(part):
            return None
        own = sum(_size(self.folder / name) for name in self._own.counts)
        if own + size > self.max_bytes:
            raise RunError(
                f"{path.name} ({_mib(size)}) is needed together with {_mib(own)} that are in use; "
                + self._advice(size)
            )
        if not self._make_room(size):
            return None
        with self._writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(part, "w+b")  # noqa: SIM115  (handed on)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(size)
            return file

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest until `size` more bytes fit; under the lock."""
        files = self._files()
        leased = self._leased()
        excess = sum(status.st_size for status in files.values()) + size - self.max_bytes
        free = shutil.disk_usage(self.folder).free
        excess = max(excess, size - free)
        movable = [
            (status.st_mtime_ns, name)
            for name, status in files.items()
            if name not in leased and not name.endswith(".part")
        ]
        if sum(files[name].st_size for _, name in movable) < excess:
            if free < size:
                raise RunError(
                    f"{self.folder} has {_mib(free)} free on its disk, {_mib(size)} are required; "
                    "make room, or give another data.cache.folder"
                )
            return False
        for _, name in sorted(movable):
            if excess <= 0:
                break
            (self.folder / name).unlink(missing_ok=True)
            excess -= files[name].st_size
        return True

    def _files(self) -> dict[str, os.stat_result]:
        """Return all files and parts by their names below the folder; dead parts are removed."""
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
                    if is_part and _remove_if_left(path):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        found[self._name(path)] = path.stat()
        return found

    def _leased(self) -> set[str]:
        """Return the names that living processes lease."""
        names = set(self._own.counts)
        for path in (self.folder / _LEASES).iterdir():
            if path != self._own.path and not _remove_if_left(path):
                names |= set(json.loads(path.read_text(encoding="utf-8") or "{}"))
        return names

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _advice(self, size: int) -> str:
        return (
            f"the cache {self.folder} takes {_mib(self.max_bytes)}: raise data.cache.max_gb by "
            f"{_mib(size)} or more, or lower data.batches.window or data.prefetch"
        )

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {error.strerror or error}; make room, or give another "
                "data.cache.folder"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the cache's lock; each holder opens the file, so that threads exclude each other."""
        with open(self.folder / _LOCK, "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Patience:
    """How long a file that another process copies is waited for: anew whenever more of it came."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.part = part_of(path)
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
    """What this process leases, written where other processes see it; used under the lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._counts: dict[str, int] = {}
        self._file: IO[str] | None = None
        self._pid = os.getpid()

    @property
    def counts(self) -> dict[str, int]:
        """Name -> number of leases, of this process: a forked child begins with none."""
        if self._pid != os.getpid():
            self._counts, self._file, self.path, self._pid = {}, None, None, os.getpid()
        return self._counts

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_pid": -1}  # Another process leases nothing yet.

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
            self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  (kept)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        self._file.truncate()
        json.dump(self._counts, self._file)
        self._file.flush()
        if not self._counts:
            assert self.path is not None
            self.path.unlink(missing_ok=True)
            # Loader workers that were forked meanwhile hold the file open, and with it its lock.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = self.path = None


def part_of(path: Path) -> Path:
    """Return where a file is while it comes."""
    return path.with_name(f".{path.name}.part")


def _remove_if_left(path: Path) -> bool:
    """Remove a file whose owner's lock is gone with its process; tell whether it is gone."""
    try:
        with open(path, "r+b") as file:
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
