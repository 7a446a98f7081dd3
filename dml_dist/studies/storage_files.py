"""The file of Optuna's storage in a study's folder: which kind it is, and how it is opened."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dml_dist.errors import ConfigError, DataError
from dml_dist.runs.tuning import TuningFolder

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

StorageKind = Literal["auto", "sqlite", "journal"]

_MOUNTS = Path("/proc/self/mounts")
_LOCAL = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs"),
    *("tmpfs", "ramfs", "overlay", "overlayfs", "vfat", "exfat", "ntfs3", "fuseblk"),
}
"""File systems of one machine, on which SQLite's locks are safe."""

_SQLITE_TIMEOUT_SECONDS = 60.0
_FIRST_KEY = b'{"op_code":'  # Of each of Optuna's journal lines.
_FIRST_LINE = b'{"op_code":0,'  # Makes a study.


def choose_storage(folder: TuningFolder, kind: StorageKind) -> tuple[Path, str]:
    """Return the storage's file and one line on which it is and why; nothing is written.

    Args:
        folder: The study's folder, which need not exist yet.
        kind: As in the configuration.

    Raises:
        ConfigError: If the folder has a storage of another kind than the configuration names.
    """
    files = {"sqlite": folder.sqlite_path, "journal": folder.journal_path}
    found = [name for name, path in files.items() if path.exists()]
    if len(found) > 1:
        raise ConfigError(
            f"{folder.path} holds two storages, {folder.sqlite_path.name} and "
            f"{folder.journal_path.name}, and only one can be the study's; remove the other one"
        )
    if found and kind not in ("auto", *found):
        raise ConfigError(
            f"tune.storage is {kind}, but the study in {folder.path} has its trials in "
            f"{files[found[0]].name}; set tune.storage to auto or {found[0]}"
        )
    if found:
        return files[found[0]], f"storage: {files[found[0]].name}, which is there"
    if kind != "auto":
        return files[kind], f"storage: {files[kind].name}, as tune.storage says"
    type_ = file_system(folder.path)
    if type_ in _LOCAL:
        return files["sqlite"], f"storage: {files['sqlite'].name}, on a local disk ({type_})"
    reason = f"{type_} may be shared between machines" if type_ else "the file system is not known"
    return files["journal"], f"storage: {files['journal'].name}, since {reason}"


def file_system(path: Path) -> str | None:
    """Return the type of the file system of a path; None where the system does not tell."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    return mounted_type(path.resolve(), lines)


def mounted_type(path: Path, mounts: list[str]) -> str | None:
    """Return the file system's type of an absolute path from lines of /proc/self/mounts."""
    best: tuple[int, str | None] = (-1, None)
    for line in mounts:
        _, place, type_, *_ = line.split(" ")
        # The kernel writes space, tab, line feed and backslash in octal.
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place))
        # A later mount at the same place hides the earlier one.
        if path.is_relative_to(point) and len(point.parts) >= best[0]:
            best = len(point.parts), type_
    return best[1]


def open_storage(folder: TuningFolder, kind: StorageKind) -> tuple[BaseStorage, str]:
    """Open the storage of a study whose lock is held, and make it where there is none.

    Args:
        folder: The study's folder.
        kind: As in the configuration; a file that exists decides over auto.

    Returns:
        The storage, and one line on which it is and why.

    Raises:
        ConfigError: If the configuration names another kind than the folder has.
        DataError: If the file is damaged or is not Optuna's.
    """
    path, reason = choose_storage(folder, kind)
    if path == folder.journal_path and path.exists():
        with _reported(path):
            _remove_partial_line(path)
    return _open(path, folder), reason


def read_storage(folder: TuningFolder) -> BaseStorage | None:
    """Open the storage of a study for reading; None if there is none.

    Raises:
        DataError: If the file is damaged or is not Optuna's.
    """
    path, _ = choose_storage(folder, "auto")
    return _open(path, folder) if path.exists() else None


def _open(path: Path, folder: TuningFolder) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    with _reported(path):
        if path == folder.journal_path:
            if path.exists():
                _check_journal(path)
            # Symbolic links, the default lock, do not exist on every shared file system.
            lock = JournalFileOpenLock(str(path))
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        if path.exists():
            _check_sqlite(path)

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(path, timeout=_SQLITE_TIMEOUT_SECONDS, check_same_thread=False)

        # Optuna formats the URL, in which the path's braces and question marks mean something.
        return RDBStorage(f"sqlite:///{path.name}", engine_kwargs={"creator": connect})


def _check_sqlite(path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=_SQLITE_TIMEOUT_SECONDS)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if tables and "studies" not in tables:
            raise ValueError("it has no table of studies")
        result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise ValueError(result)


def _check_journal(path: Path) -> None:
    """Check every whole line: Optuna ignores a damaged last one, and trials without a study."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # It is being written.
            key = _FIRST_KEY if number > 1 else _FIRST_LINE
            if not (line.startswith(key) and isinstance(json.loads(line), dict)):
                raise ValueError(f"line {number} is none of Optuna's")


def _remove_partial_line(path: Path) -> None:
    """Remove what a killed process has written of a line: the next one would be joined to it."""
    data = path.read_bytes()
    rest = data[data.rfind(b"\n") + 1 :]
    if rest and not rest.startswith(_FIRST_KEY[: len(rest)]):
        raise ValueError("its last line is none of Optuna's")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(data) - len(rest))


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (
        *(OptunaError, SQLAlchemyError, sqlite3.Error, RuntimeError),
        *(ValueError, KeyError, TypeError, AssertionError),  # Of lines without what they need.
    ) as error:
        raise DataError(
            f"{path} cannot be read as Optuna's storage ({type(error).__name__}: {error}); restore "
            "it from a copy, or give another --run-dir"
        ) from None
