"""Tables of a scaling study's page: all points, time split, memory, traffic, results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dml_dist.report.formatting import MISSING, format_count, format_metric
from dml_dist.studies.scale.point_lines import sizes_text, varied_sizes
from dml_dist.studies.scale.points import SPANS, ScalePoint
from dml_dist.studies.scale.step_split import has_split, split_of

Table = tuple[list[str], list[list[str]]]
"""Header and rows, formatted; the first column names the point."""

NO_ROWS: Table = ([], [])

_SHOWN = 4
"""Points that a sentence names."""

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_bytes(value: float) -> str:
    """Return bytes as text: 12.3 MB."""
    if not math.isfinite(value):
        return MISSING
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{format_number(value / size)} {unit}"
    return f"{value:.0f} B"


def format_number(value: float) -> str:
    """Return a number with three digits or as a whole one; a dash for NaN."""
    if not math.isfinite(value):
        return MISSING
    return format_count(round(value)) if abs(value) >= 100 else f"{value:.3g}"


def format_share(value: float) -> str:
    """Return a relative difference in percent; a dash for NaN."""
    return f"{100 * value:+.1f} %" if math.isfinite(value) else MISSING


def names_of(points: Iterable[ScalePoint]) -> str:
    """Return names of points, of many the first ones and how many more there are."""
    names = [point.name for point in points]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def state_of(point: ScalePoint) -> str:
    """Return a point's status with its marks."""
    marks: list[str] = [point.status]
    if point.measured and point.noisy:
        marks.append("noisy")
    if point.measured and point.oversubscribed:
        marks.append("oversubscribed")
    if point.tries > 1:
        marks.append(f"{point.tries} tries")
    return ", ".join(marks)


# ---------------------------------------------------------------- all points


@dataclass(frozen=True)
class PointRow:
    """A row of the table of all points."""

    name: str
    state: str
    is_marked: bool
    sizes: str
    problem: str
    cells: list[str]


POINT_CELLS = ("images/s", "lowest to highest", "step, ms", "repetitions", "other processes")


def point_rows(points: Sequence[ScalePoint]) -> list[PointRow]:
    """Return all points, also those without numbers."""
    names = varied_sizes(points) or ["world_size", "num_classes"]
    return [
        PointRow(
            name=point.name,
            state=state_of(point),
            is_marked=not point.measured or point.noisy or point.oversubscribed,
            sizes=sizes_text(point, names),
            problem=point.problem,
            cells=_cells(point) if point.measured else [MISSING] * len(POINT_CELLS),
        )
        for point in points
    ]


def _cells(point: ScalePoint) -> list[str]:
    low, high = point.images_per_second_low, point.images_per_second_high
    return [
        format_number(point.images_per_second),
        f"{format_number(low)} to {format_number(high)}",
        format_number(1000 * point.seconds_step),
        f"{point.repetitions} x {point.steps:,} steps",
        f"{point.load:.1f} / {point.processors}" if math.isfinite(point.load) else MISSING,
    ]


# ---------------------------------------------------------------- parts


def split_table(points: Sequence[ScalePoint]) -> Table:
    """Return milliseconds of each part of a step."""
    names = [*SPANS, "between"]
    rows = []
    for point in filter(has_split, points):
        split = split_of(point)
        cells = [format_number(1000 * split[name]) if split[name] else MISSING for name in names]
        rows.append([point.name, format_number(1000 * point.seconds_step), *cells])
    return ["point", "step, ms", *names], rows


def traffic_table(points: Sequence[ScalePoint]) -> Table:
    """Return bytes that a rank sends in a step."""
    header = ["point", "predicted", "counted", "counted above predicted", "DDP's gradients"]
    rows = []
    for point in points:
        predicted, counted = point.sent_predicted, point.sent_counted
        if predicted > 0 or counted > 0:
            above = format_share(counted / predicted - 1 if predicted else math.nan)
            cells = format_bytes(predicted), format_bytes(counted), above
            rows.append([point.name, *cells, format_bytes(point.gradient_bytes)])
    return header, rows


def memory_table(points: Sequence[ScalePoint]) -> Table:
    """Return bytes of a rank's memory."""
    header = ["point", "predicted part", "measured", "rest, network and activations"]
    rows = []
    for point in points:
        predicted, measured = point.memory_predicted, point.memory_measured
        if math.isfinite(predicted) or math.isfinite(measured):
            cells = [format_bytes(value) for value in (predicted, measured, measured - predicted)]
            rows.append([point.name, *cells])
    return header, rows


def results_table(points: Sequence[ScalePoint]) -> Table:
    """Return recall at the images seen, and the loss against that of one rank."""
    rows = [
        [
            point.name,
            f"{point.images_seen:,}",
            _recall(point),
            _loss(point),
        ]
        for point in points
        if math.isfinite(point.recall_at_1) or math.isfinite(point.loss_difference)
    ]
    return ["point", "images seen", "R@1, validation classes", "loss, largest difference"], rows


def _recall(point: ScalePoint) -> str:
    known = math.isfinite(point.recall_at_1)
    return format_metric("recall_at_1", point.recall_at_1) if known else MISSING


def _loss(point: ScalePoint) -> str:
    if point.world_size == 1:
        return "one rank"
    return f"{point.loss_difference:.1e}" if math.isfinite(point.loss_difference) else MISSING


def results_notes(points: Sequence[ScalePoint]) -> list[str]:
    """Return the largest difference of the losses, and what can be compared, as sentences."""
    notes = []
    known = [p for p in points if p.world_size > 1 and math.isfinite(p.loss_difference)]
    if known:
        worst = max(known, key=lambda point: point.loss_difference)
        notes.append(
            "The loss with several ranks differs from that of one rank with the same global batch "
            f"by at most {worst.loss_difference:.1e} of it, over all steps ({worst.name})."
        )
    return [*notes, "Recall can be compared between points with equal images seen."]
