"""Append-only records of a run: one JSON object a line, with the attempt that wrote it.

A run that is killed and resumed writes some steps again. Nothing is ever rewritten: the reader
takes each step from the last attempt that recorded it, and skips a line torn by a crash.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dml_dist.errors import RunError
from dml_dist.files import plain

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no words for them
_RESERVED = ("attempt", "step", "time")

Observer = Callable[[int, Mapping[str, Any]], None]
"""Takes the step and the values of a record."""


class RecordWriter:
    """Appends records to a file; one writer at a time."""

    def __init__(self, path: Path, attempt: int, observe: Observer | None = None) -> None:
        """Open the file; its folder must exist.

        Args:
            path: The file, created when it does not exist.
            attempt: Number of this attempt at the run, rising from one to the next.
            observe: Called with every record once it is written; it must not raise.

        Raises:
            RunError: If the file cannot be opened.
        """
        self._path = Path(path)
        self._attempt = attempt
        self._observe = observe
        try:
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise RunError(f"required a writable record file, got {path}: {error}") from None
        self._torn = self._ends_torn()

    def write(self, step: int, **values: Any) -> None:
        """Append the record of a step: its values, and `attempt`, `step`, `time` (unix seconds).

        Values are numbers (numpy's too), text, booleans, None, and lists and mappings of them.
        Non-finite floats are kept. The text "nan", "inf" or "-inf" would be read as a float.

        Raises:
            ValueError: If a value has the name of a field that is added here.
            RunError: If the line cannot be written whole, as on a full disk.
        """
        if taken := [name for name in _RESERVED if name in values]:
            raise ValueError(f"required values other than {', '.join(_RESERVED)}, got {taken}")
        record = {"attempt": self._attempt, "step": step, "time": time.time(), **values}
        line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        # One write call: readers see the line or not, and a kill tears the last line at most.
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RunError(f"required room for a record, got {self._path}: {error}") from None
        self._torn = written != len(line)
        if self._torn:
            raise RunError(
                f"required room for a record of {len(line)} bytes, but {self._path} took "
                f"{written}; free some disk space and resume the run"
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

    def _ends_torn(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file in the order of their steps; none when there is no file.

    Of the records of one step, the last one of the last attempt counts. Records with different
    values of `split` or `protocol` (validation and test, final and literature, at the same step)
    are told apart. Lines that are not whole records are skipped: a crash tears a line, which the
    next attempt closes.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    latest: dict[tuple[int, str, str], dict[str, Any]] = {}
    for line in data.split(b"\n"):
        record = _decode_line(line)
        if record is not None:
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
