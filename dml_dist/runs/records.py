"""Append-only records of a run: one JSON object a line, with the attempt that wrote it.

A run that is killed and resumed writes some steps again. Written lines are never changed: the
reader uses the record of each step from its last attempt, and skips lines truncated by a crash.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dml_dist.errors import RunError
from dml_dist.files import plain

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # Not part of JSON.
_RESERVED = ("attempt", "step", "time")

Observer = Callable[[int, Mapping[str, Any]], None]
"""Called with the step and the values of a record."""


class RecordWriter:
    """Appends records to a file; only one writer may be open at a time."""

    def __init__(self, path: Path, attempt: int, observe: Observer | None = None) -> None:
        """Open the file; its folder must exist.

        Args:
            path: The file, created when it does not exist.
            attempt: Number of this attempt at the run, higher than those before.
            observe: Called with every record after it is written; it must not raise.

        Raises:
            RunError: If the file cannot be opened.
        """
        self._path = Path(path)
        self._attempt = attempt
        self._observe = observe
        try:
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise RunError(
                f"the record file {path} cannot be opened: {error}; make its folder writable and "
                "resume the run"
            ) from None
        self._truncated = self._ends_truncated()

    def write(self, step: int, **values: Any) -> None:
        """Append the record of a step: its values, and `attempt`, `step`, `time` (unix seconds).

        Values are numbers (numpy's too), text, booleans, None, and lists and mappings of them.
        Non-finite floats are supported. The text "nan", "inf" or "-inf" is read back as a float.

        Raises:
            ValueError: If a value has a reserved name: `attempt`, `step` or `time`.
            RunError: If the line cannot be written completely, for example on a full disk.
        """
        if taken := [name for name in _RESERVED if name in values]:
            raise ValueError(
                f"the names {', '.join(_RESERVED)} are reserved in records, but step {step} has "
                f"values named {', '.join(taken)}; rename them"
            )
        record = {"attempt": self._attempt, "step": step, "time": time.time(), **values}
        line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
        if self._truncated:
            line = b"\n" + line
        # One write call: readers see all of a line or none, and a kill truncates at most the last.
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RunError(
                f"a record cannot be written to {self._path}: {error}; free some disk "
                "space or remount the disk, and resume the run"
            ) from None
        self._truncated = written != len(line)
        if self._truncated:
            raise RunError(
                f"only {written} of {len(line)} bytes of a record could be written to "
                f"{self._path}; free some disk space and resume the run"
            )
        if self._observe is not None:
            self._observe(step, values)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ends_truncated(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file in the order of their steps; empty if there is no file.

    Of the records of one step, the last one of the last attempt counts. Records with different
    values of `split` or `protocol` (validation and test, final and literature, at the same step)
    are distinguished.
    """
    return latest_records(read_every_record(path))


def read_every_record(path: Path) -> list[dict[str, Any]]:
    """Return all records of a file in the order of its lines, steps made again included.

    Lines that are not complete records are skipped: a crash can truncate a line, and the next
    attempt then starts a new one.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    records = (_decode_line(line) for line in data.split(b"\n"))
    return [record for record in records if record is not None]


def latest_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that count, as in `read_records`."""
    latest: dict[tuple[int, str, str], dict[str, Any]] = {}
    for record in records:
        kinds = str(record.get("split", "")), str(record.get("protocol", ""))
        key = (record["step"], *kinds)
        if key not in latest or latest[key]["attempt"] <= record["attempt"]:
            latest[key] = record
    return sorted(latest.values(), key=lambda record: record["step"])


def _decode_line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also undecodable bytes
        return None
    if not isinstance(record, dict):
        return None
    if not all(type(record.get(name)) is int for name in ("step", "attempt")):
        return None
    return {name: _decode(value) for name, value in record.items()}


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
