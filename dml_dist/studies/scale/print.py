"""What `dml-dist scale` prints: a line for each point, and the table of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dml_dist.report.formatting import MISSING, format_seconds
from dml_dist.studies.scale.plan import PlannedPoint
from dml_dist.studies.scale.points import ScalePoint


def progress_line(point: ScalePoint) -> str:
    """Return what is said of a point when it has been measured, or could not be."""
    if not point.measured:
        return f"{point.name}: {point.status}: {point.problem}"
    note = _note(point)
    return (
        f"{point.name}: {point.images_per_second:,.0f} images/s "
        f"({point.images_per_second_low:,.0f} to {point.images_per_second_high:,.0f}), "
        f"{_size(point.memory_measured)}, load {point.load:.1f}{f', {note}' if note else ''}"
    )


def print_points(points: Sequence[ScalePoint], console: Console) -> None:
    """Print the table of a study's points."""
    table = _table("point", "images/s", "efficiency", "memory", "sent", "note")
    for point in points:
        note = _note(point) if point.measured else point.status
        share = efficiency(point, points)
        table.add_row(
            point.name,
            _number(point.images_per_second, "{:,.0f}"),
            _number(100 * share, "{:.0f} %"),
            _size(point.memory_measured),
            _size(point.sent_counted),
            note,
        )
    console.print(table)
    for point in points:
        if point.problem:
            _say(console, f"{point.name}: {point.status}: {point.problem}")


def print_plan(planned: Sequence[PlannedPoint], console: Console) -> None:
    """Print the points of a study with their estimated time and memory."""
    table = _table("point", "batch", "steps", "time", "memory", "sent", "note")
    for one in planned:
        point = one.point
        table.add_row(
            point.name,
            f"{point.global_batch_size:,}",
            f"{one.course.total:,}",
            MISSING if math.isnan(one.seconds) else format_seconds(one.seconds),
            _size(point.memory_predicted),
            _size(point.sent_predicted),
            point.status if point.status == "refused" else _note(point),
        )
    console.print(table)
    for one in planned:
        if one.point.problem:
            _say(console, f"{one.point.name}: refused: {one.point.problem}")
    total = sum(one.seconds for one in planned if not math.isnan(one.seconds))
    count = sum(one.point.status != "refused" for one in planned)
    _say(
        console,
        f"{count} of {len(planned)} points to measure, about {format_seconds(total)} if none is "
        "measured again; times are orders of magnitude. Memory is that of a rank's proxies, logits "
        "and gathered batch, sent what a rank sends in a step.",
    )


def efficiency(point: ScalePoint, points: Sequence[ScalePoint]) -> float:
    """Return images/s over W times those of one rank; NaN if that was not measured.

    One rank has the same global batch (strong scaling) or the same images (weak scaling).
    """

    def key(one: ScalePoint, batch: int) -> tuple[object, ...]:
        same = (one.num_classes, one.embedding_size, one.backbone, one.image_size, one.proxies)
        return (*same, one.loader_workers, one.tar_shards, one.remote, one.device, batch)

    alone: Mapping[tuple[object, ...], float] = {
        key(one, one.global_batch_size): one.images_per_second
        for one in points
        if one.world_size == 1 and one.measured
    }
    for batch in (point.global_batch_size, point.global_batch_size // point.world_size):
        if (speed := alone.get(key(point, batch))) is not None:
            return point.images_per_second / (point.world_size * speed)
    return math.nan


def _note(point: ScalePoint) -> str:
    marks = {"noisy": point.noisy, f"W > {point.processors} CPUs": point.oversubscribed}
    return ", ".join(text for text, holds in marks.items() if holds)


def _number(value: float, form: str) -> str:
    return MISSING if math.isnan(value) else form.format(value)


def _size(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value / 1e3:,.0f} kB" if value < 1e6 else f"{value / 1e6:,.0f} MB"


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column(first, overflow="fold", min_width=20)
    for text in others:
        table.add_column(text, justify="left" if text == "note" else "right", no_wrap=True)
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
