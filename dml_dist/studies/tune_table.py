"""What `dml-dist tune` shows while it runs: a live table; without a terminal a line per trial."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dml_dist.config.search_space import format_value
from dml_dist.config.study import ObjectiveConfig
from dml_dist.report.formatting import MISSING, format_seconds
from dml_dist.studies.trials import State
from dml_dist.studies.tune_axes import label_of, show

Shown = State | Literal["stopped"]
"""Stopped: a trial that the next command continues."""

_MAX_ROWS = 20
_REFRESHES_PER_SECOND = 2


@dataclass
class Row:
    """A trial as the table shows it.

    Attributes:
        label: Name of its run.
        values: Path -> value.
        state: State.
        last: Last intermediate value and its step, if there is one.
        objectives: Final values.
        seconds: Time of its processes, when it has ended.
        start: Time of `time.monotonic` when this command began it; None if an earlier one did.
    """

    label: str
    values: Mapping[str, Any]
    state: Shown = "running"
    last: tuple[int, float] | None = None
    objectives: Sequence[float] = ()
    seconds: float | None = None
    start: float | None = field(default_factory=lambda: time.monotonic())


def format_values(values: Mapping[str, Any]) -> str:
    """Return values as one line: optim.lr 0.003, loss.margin 0.1."""
    return ", ".join(f"{path} {format_value(value)}" for path, value in values.items())


class TrialTable:
    """Shows trials while they run; call its methods from one thread."""

    def __init__(self, console: Console, objectives: Sequence[ObjectiveConfig], total: int) -> None:
        """Prepare the table; it is shown inside `with`, if the console is a terminal.

        Args:
            console: Where it goes.
            objectives: The objectives of the search.
            total: Number of trials of the study.
        """
        self._console = console
        self._objectives = objectives
        self._labels = [label_of(one.metric) for one in objectives]
        self._total = total
        self._rows: dict[int, Row] = {}
        self._concurrent = 1
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
        )
        self._shown = console.is_terminal

    def __enter__(self) -> TrialTable:
        if self._shown:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            with contextlib.suppress(Exception):  # It must not hide the error of the search.
                self._live.stop()

    def put(self, number: int, row: Row) -> None:
        """Show a trial, also one of an earlier command."""
        self._rows[number] = row

    def set_concurrency(self, concurrent: int) -> None:
        """Take the number of trials at a time, for the time left."""
        self._concurrent = concurrent

    def progress(self, number: int, step: int, value: float) -> None:
        """Show an intermediate value."""
        self._rows[number].last = step, value

    def note(self, number: int, text: str) -> None:
        """Print a line about a trial; it stays above the table."""
        line = f"{self._rows[number].label}: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def end(self, number: int, state: Shown, objectives: Sequence[float], seconds: float) -> None:
        """Show that a trial ended; without a terminal print a line."""
        row = self._rows[number]
        row.state, row.objectives, row.seconds = state, tuple(objectives), seconds
        if not self._shown:
            line = (
                f"{row.label}: {format_values(row.values)}: {self._result(row)} ({state}, "
                f"{format_seconds(seconds)}); {self._summary()}"
            )
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Table:
        table = Table(title=self._summary(), title_justify="left", expand=False)
        for text in ("trial", "values", "last", *self._labels, "state"):
            table.add_column(text, overflow="fold", justify="left")
        rows = self._all()
        running = [row for row in rows if row.state == "running"]
        ended = [row for row in rows if row.state != "running"]
        kept = ended[-max(0, _MAX_ROWS - len(running)) :]
        for row in [*kept, *running]:
            finals = [
                show(one.metric, value)
                for one, value in zip(self._objectives, row.objectives, strict=False)
            ]
            style = "bold" if row is self._best() else "dim" if row in ended else ""
            table.add_row(
                row.label,
                format_values(row.values),
                self._last(row),
                *(finals or [MISSING] * len(self._objectives)),
                f"{row.state}{self._time_of(row)}",
                style=style,
            )
        if len(ended) > len(kept):
            table.caption = f"{len(ended) - len(kept)} earlier trials are not shown"
        return table

    def _all(self) -> list[Row]:
        return list(self._rows.values())  # A copy: the display reads it from its own thread.

    def _time_of(self, row: Row) -> str:
        if row.seconds is not None:
            return f", {format_seconds(row.seconds)}"
        if row.state == "running" and row.start is not None:
            return f", {format_seconds(time.monotonic() - row.start)}"
        return ""

    def _last(self, row: Row) -> str:
        if row.last is None:
            return MISSING
        step, value = row.last
        return f"{show(self._objectives[0].metric, value)} at {step:,}"

    def _result(self, row: Row) -> str:
        pairs = zip(self._objectives, row.objectives, strict=False)
        finals = [f"{label_of(one.metric)} {show(one.metric, value)}" for one, value in pairs]
        return ", ".join(finals) or f"{self._labels[0]} {self._last(row)}"

    def _best(self) -> Row | None:
        done = [row for row in self._all() if row.state == "complete" and row.objectives]
        sign = 1 if self._objectives[0].direction == "maximize" else -1
        return max(done, key=lambda row: sign * row.objectives[0], default=None)

    def _summary(self) -> str:
        ended = sum(row.state not in ("running", "stopped") for row in self._all())
        best = self._best()
        parts = [f"{ended} of {self._total} trials"]
        if best is not None:
            value = show(self._objectives[0].metric, best.objectives[0])
            parts.append(f"best {self._labels[0]} {value} ({best.label})")
        left = self._seconds_left(ended)
        if left is not None:
            parts.append(f"about {format_seconds(left)} left")
        return ", ".join(parts)

    def _seconds_left(self, ended: int) -> float | None:
        """Estimate from the trials so far; pruned ones are as likely later."""
        times = [
            row.seconds
            for row in self._all()
            if row.seconds is not None and row.state not in ("stopped", "failed")
        ]
        if not times or ended >= self._total:
            return None
        running = sum(row.state == "running" for row in self._all())
        begun = sum(
            time.monotonic() - row.start
            for row in self._all()
            if row.state == "running" and row.start is not None
        )
        mean = statistics.fmean(times)
        waiting = max(0, self._total - ended - running)
        work = waiting * mean + max(0.0, running * mean - begun)
        return math.ceil(work / max(1, min(self._concurrent, waiting + running)))
