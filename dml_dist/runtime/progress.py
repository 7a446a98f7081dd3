"""Progress of long operations: events that ranks send, and the display that shows them.

An event is a small dictionary, which any process can receive:

* `{"kind": "phase", "phase": text, "done": int, "total": int, "detail": text}`: progress;
* `{"kind": "note", "text": text}`: a permanent line, such as a validation result;
* `{"kind": "fatal", "error": class name, "message": text, "rank": int}`: an error
  that a restart would not fix.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dml_dist.terminal import printable

Event = dict[str, Any]
Emit = Callable[[Event], None]

# Without a terminal a bar cannot be redrawn: lines show the progress instead.
SECONDS_BETWEEN_LINES = 5.0


def phase(name: str, done: int, total: int, detail: str = "") -> Event:
    """Return a progress event: `done` of `total` units of phase `name`."""
    return {"kind": "phase", "phase": name, "done": done, "total": total, "detail": detail}


def note(text: str) -> Event:
    """Return an event that is shown as a separate line."""
    return {"kind": "note", "text": text}


def discard(event: Event) -> None:
    """Ignore an event; for ranks without a display."""


class _Notes(logging.Handler):
    def __init__(self, emit: Emit) -> None:
        super().__init__(logging.WARNING)
        self._emit = emit
        self._sent: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Send a log record as a note, once: a run builds the same network several times."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if text not in self._sent:
            self._sent.add(text)
            self._emit(note(text))


@contextmanager
def warnings_as_notes(emit: Emit) -> Iterator[None]:
    """Send the package's warnings as events, because the output of ranks may not be visible."""
    logger, handler = logging.getLogger("dml_dist"), _Notes(emit)
    propagate, level = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # The root's level may be higher, as in Ray's processes.
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        logger.setLevel(level)


class Display:
    """Shows events: bars on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event["kind"]:
            case "note":
                self._console.print(event["text"], highlight=False, markup=False, soft_wrap=True)
            case "phase":
                self._show_phase(event["phase"], event["done"], event["total"], event["detail"])

    def _show_phase(self, name: str, done: int, total: int, detail: str) -> None:
        name, detail = printable(name), printable(detail)
        if not self._console.is_terminal:
            now = time.monotonic()
            if done >= total or now - self._last_line.get(name, 0.0) >= SECONDS_BETWEEN_LINES:
                self._last_line[name] = now
                line = f"{name}: {done:,} of {total:,}" + (f", {detail}" if detail else "")
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, detail=detail)
        self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)
