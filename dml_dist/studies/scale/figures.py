"""Figures of what a scaling study measured by its sizes: speed, efficiency, traffic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dml_dist.report.figures import (
    SERIES,
    Colors,
    Picture,
    draw_picture,
    legend_above,
    new_axes,
)
from dml_dist.report.formatting import format_count
from dml_dist.studies.scale.point_lines import SIZES, Batch, Line, lines_over
from dml_dist.studies.scale.points import ScalePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.9, 3.9)  # inches
MEGABYTE = 1e6
_SHARDED = ("o", "^", "v", "p", "<", ">")
_REPLICATED = ("s", "D", "X", "P", "d", "h")
_LOG_FROM = 8.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def draw_throughput(points: Sequence[ScalePoint]) -> list[Picture]:
    """Draw images per second against the number of ranks, for weak and strong scaling."""
    pictures = []
    for batch, (kind, what) in _SCALING.items():
        text = (
            f"{what}: images per second of all ranks; the median of the repetitions, bars from the "
            "lowest to the highest."
        )
        lines = lines_over(points, "world_size", batch)
        pictures += _draw(f"throughput-{kind}", text, lines, "world_size", "images/s", _speed)
    return pictures


def draw_efficiency(points: Sequence[ScalePoint]) -> list[Picture]:
    """Draw images per second and rank, as a share of those with the fewest ranks."""
    pictures = []
    for batch, (kind, what) in _SCALING.items():
        text = (
            f"{what}: images per second and rank, as a share of those at the smallest number of "
            "ranks of the same line. Dashed: ideal, 100 %."
        )
        lines = [
            line
            for line in lines_over(points, "world_size", batch)
            if sum(point.measured for point in line.points) > 1
        ]
        over = [point for line in lines for point in line.points if point.oversubscribed]
        if over:
            most = max(over, key=lambda point: point.world_size / max(1, point.processors))
            text += (
                f" The ideal is out of reach with more ranks than processors: {most.world_size} "
                f"ranks share {most.processors}."
            )
        name = f"efficiency-{kind}"
        pictures += _draw(name, text, lines, "world_size", "efficiency (%)", _efficiency)
    return pictures


_SCALING: dict[Batch, tuple[str, str]] = {
    "per rank": ("weak", "Weak scaling, the rows of a rank fixed"),
    "global": ("strong", "Strong scaling, the global batch fixed"),
}


def draw_speeds(points: Sequence[ScalePoint]) -> list[Picture]:
    """Draw images per second against each other size that was varied."""
    pictures = []
    sizes = [name for name in SIZES if name not in ("world_size", "backbone", "proxies", "remote")]
    for size in sizes:
        text = f"Images per second of all ranks against {SIZES[size]}."
        lines = lines_over(points, size)
        pictures += _draw(f"speed-{size}", text, lines, size, "images/s", _speed)
    return pictures


def draw_traffic(points: Sequence[ScalePoint]) -> list[Picture]:
    """Draw counted bytes against classes."""
    lines = lines_over([p for p in points if p.world_size > 1], "num_classes")
    text = "Megabytes that a rank sends in a step, counted on the network interface."
    return _draw("traffic", text, lines, "num_classes", "MB sent per step", _sent)


def _draw(
    name: str, text: str, lines: Sequence[Line], size: str, label: str, triple: _Triple
) -> list[Picture]:
    """Draw lines, in several pictures if they are too many to be told apart."""
    pictures = []
    kept = [line for line in lines if any(_known(triple, line))]
    for number, some in numbered_pictures(name, kept):
        caption = f"{text} {marks_text([point for line in some for point in line.points])}".strip()
        draw = partial(_draw_lines, some, size, label, triple)
        pictures.append(draw_picture(number, caption, draw))
    return pictures


def numbered_pictures(name: str, lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Yield names and lines of pictures in which each group of lines has its own style."""
    groups = list(dict.fromkeys(line.group for line in lines))
    for start in range(0, len(groups), len(SERIES)):
        chosen = groups[start : start + len(SERIES)]
        number = f"{name}-{start // len(SERIES) + 1}" if start else name
        yield number, [line for line in lines if line.group in chosen]


# ---------------------------------------------------------------- values of a point

_Triple = Callable[[ScalePoint, Line], tuple[float, float, float]]
"""Lowest, median and highest value of a point of a line."""


def _speed(point: ScalePoint, _: Line) -> tuple[float, float, float]:
    return point.images_per_second_low, point.images_per_second, point.images_per_second_high


def _sent(point: ScalePoint, _: Line) -> tuple[float, float, float]:
    value = point.sent_counted / MEGABYTE
    return value, value, value


def _efficiency(point: ScalePoint, line: Line) -> tuple[float, float, float]:
    base = next(point for point in line.points if point.measured)
    ideal = base.images_per_second / base.world_size * point.world_size
    low, middle, high = _speed(point, line)
    return 100 * low / ideal, 100 * middle / ideal, 100 * high / ideal


def _known(triple: _Triple, line: Line) -> Iterator[ScalePoint]:
    """Yield the points of a line that have a value."""
    for point in line.points:
        if point.measured and math.isfinite(triple(point, line)[1]):
            yield point


# ---------------------------------------------------------------- lines


def _draw_lines(
    lines: Sequence[Line], size: str, label: str, triple: _Triple, colors: Colors
) -> Figure:
    figure, axes = new_axes(colors, SIZES[size], label, size=SIZE)
    values: list[float] = []
    for place, line in zip(places_of(lines), lines, strict=True):
        known = list(_known(triple, line))
        lows, middles, highs = zip(*(triple(point, line) for point in known), strict=True)
        values += middles
        style = line_style(place, line.replicated, colors)
        x = [getattr(point, size) for point in known]
        below = [max(0.0, m - low) for low, m in zip(lows, middles, strict=True)]
        above = [max(0.0, high - m) for m, high in zip(middles, highs, strict=True)]
        axes.plot(x, middles, **{**style, "marker": ""}, linewidth=1.5)
        axes.errorbar(x, middles, [below, above], color=style["color"], ls="", elinewidth=1)
        axes.plot([], [], **style, linewidth=1.5, label=line.label or "measured")
        put_points(axes, known, x, middles, style["marker"], style["color"], colors)
    if size == "world_size" and triple is _efficiency:
        axes.axhline(100, color=colors["muted"], linewidth=1, linestyle=(0, (5, 3)), label="ideal")
    every = [point for line in lines for point in line.points]
    set_axis(axes.xaxis, [float(getattr(point, size)) for point in every], at_values=True)
    if triple is _efficiency:
        axes.set_ylim(0, 1.08 * max(100.0, *values))
    else:
        set_axis(axes.yaxis, values)
    put_missing(axes, every, size, colors)
    add_mark_labels(axes, every, colors)
    legend_above(figure, colors)
    return figure


def places_of(lines: Sequence[Line]) -> list[int]:
    """Return the place of each line among the styles: the same for the lines of a group."""
    groups = list(dict.fromkeys(line.group for line in lines))
    return [groups.index(line.group) for line in lines]


def line_style(place: int, replicated: bool, colors: Colors) -> dict[str, Any]:
    """Return color, marker and line of the line at a place: dashed if proxies are replicated."""
    markers = _REPLICATED if replicated else _SHARDED
    return {
        "color": colors[SERIES[place % len(SERIES)]],
        "marker": markers[place % len(markers)],
        "linestyle": (0, (4, 2)) if replicated else "-",
        "markersize": 5,
    }


# ---------------------------------------------------------------- marks of points

_MISSING = {"failed": "x", "refused": "|"}


def put_points(
    axes: Axes,
    points: Sequence[ScalePoint],
    x: Sequence[float],
    y: Sequence[float],
    marker: str,
    color: str,
    colors: Colors,
) -> None:
    """Draw measured points: hollow with more ranks than processors, crossed if noisy."""
    for point, at in zip(points, zip(x, y, strict=True), strict=True):
        face = "none" if point.oversubscribed else color
        axes.plot(
            *at, marker=marker, mec=color, mfc=face, color=color, ms=5.5, mew=1.2, ls="", zorder=3
        )
        if point.noisy:
            axes.plot(*at, marker="x", color=colors["ink"], ms=8, mew=1.1, ls="", zorder=4)


def put_missing(axes: Axes, points: Sequence[ScalePoint], size: str, colors: Colors) -> None:
    """Mark failed and refused points at the bottom edge."""
    for status, marker in _MISSING.items():
        found = sorted({float(getattr(p, size)) for p in points if p.status == status})
        if found:
            axes.plot(
                found,
                [0.0] * len(found),
                transform=axes.get_xaxis_transform(),
                marker=marker,
                color=colors["ink"],
                ls="",
                ms=8,
                mew=1.6,
                clip_on=False,
                zorder=5,
                label=f"{status}: no value",
            )


def add_mark_labels(axes: Axes, points: Sequence[ScalePoint], colors: Colors) -> None:
    """Add the marks of measured points to the legend, as far as they occur."""
    measured = [point for point in points if point.measured]
    style: dict[str, Any] = {"color": colors["ink"], "ls": "", "label": None}
    if any(point.oversubscribed for point in measured):
        style["label"] = "hollow: more ranks than processors"
        axes.plot([], [], **style, marker="o", mfc="none", ms=5.5, mew=1.2)
    if any(point.noisy for point in measured):
        style["label"] = "crossed: the machine was not quiet"
        axes.plot([], [], **style, marker="x", ms=8, mew=1.1)


def marks_text(points: Sequence[ScalePoint]) -> str:
    """Return which points have no value, as a sentence; empty if all have one."""
    found = []
    for status in _MISSING:
        names = list(dict.fromkeys(point.name for point in points if point.status == status))
        if names:
            found.append(f"{status}: {', '.join(names)}")
    return f"At the bottom edge, without a value, {'; '.join(found)}." if found else ""


# ---------------------------------------------------------------- axes


def set_axis(
    axis: Any, values: Sequence[float], *, at_values: bool = False, count: int = 9
) -> None:
    """Choose the scale of an axis from its values, with plain numbers as ticks.

    Args:
        axis: The axis.
        values: What is drawn along it.
        at_values: Whether ticks are at the values, if these are few.
        count: Largest number of other ticks.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    kept = sorted({value for value in values if math.isfinite(value)})
    positive = [value for value in kept if value > 0]
    is_x = axis.axis_name == "x"
    set_limits = axis.axes.set_xlim if is_x else axis.axes.set_ylim
    if positive and positive == kept and kept[-1] / kept[0] >= (2 if at_values else _LOG_FROM):
        (axis.axes.set_xscale if is_x else axis.axes.set_yscale)("log")
        margin = (kept[-1] / kept[0]) ** 0.06
        low, high = kept[0] / margin, kept[-1] * margin
        ticks = kept if at_values and _are_apart(kept) else log_ticks(low, high, count)
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        set_limits(low, high)
    elif at_values:
        axis.set_major_locator(FixedLocator(kept))
    else:
        axis.set_major_locator(MaxNLocator(min(count, 6)))
        set_limits(0, 1.08 * max(kept, default=1.0) or 1.0)
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_number(value)))


def _are_apart(values: Sequence[float]) -> bool:
    """Return whether ticks at values of a logarithmic axis have space for their texts."""
    width = math.log(values[-1] / values[0])
    gaps = [math.log(b / a) for a, b in itertools.pairwise(values)]
    return len(values) <= 12 and min(gaps) > 0.07 * width


def log_ticks(low: float, high: float, count: int = 9) -> list[float]:
    """Return round numbers for a logarithmic axis."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**k for k in exponents for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) <= count:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]


def plain_number(value: float) -> str:
    """Return a number without an exponent: 0.02, 1,000, 29 M."""
    if abs(value) >= MEGABYTE:
        return f"{value / MEGABYTE:,g} M"
    return format_count(value) if abs(value) >= 100 else f"{value:.12g}"
