"""Figures of what a scaling study measured: speed, efficiency, memory, time split, traffic."""

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
    new_figure,
    style_axes,
)
from dml_dist.report.formatting import format_count
from dml_dist.studies.scale.point_lines import SIZES, Batch, Line, lines_over
from dml_dist.studies.scale.points import SPANS, ScalePoint

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
    kept = [line for line in lines if any(_known(triple, line))]
    groups = list(dict.fromkeys(line.group for line in kept))
    pictures = []
    for start in range(0, len(groups), len(SERIES)):
        chosen = groups[start : start + len(SERIES)]
        some = [line for line in kept if line.group in chosen]
        caption = f"{text} {marks_text([point for line in some for point in line.points])}".strip()
        number = f"-{start // len(SERIES) + 1}" if start else ""
        draw = partial(_draw_lines, some, size, label, triple)
        pictures.append(draw_picture(f"{name}{number}", caption, draw))
    return pictures


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


# ---------------------------------------------------------------- time of a step

_SPLIT = {
    "data": ("fifth", ""),
    "forward": ("recall", ""),
    "wait": ("faint", ""),
    "gather": ("fourth", "////"),
    "objective": ("map", ""),
    "backward": ("sixth", ""),
    "reduction": ("third", "\\\\\\\\"),
    "optimizer": ("muted", ""),
    "between": ("rule", "...."),
}
"""Color and hatch of each part; hatched parts are communication."""


def split_of(point: ScalePoint) -> dict[str, float]:
    """Return seconds of each part of a step, in its order; `between` is in none of the spans."""
    spans = {name: getattr(point, f"seconds_{name}") for name in SPANS}
    known = {name: seconds if math.isfinite(seconds) else 0.0 for name, seconds in spans.items()}
    return {**known, "between": max(0.0, point.seconds_step - sum(known.values()))}


def has_split(point: ScalePoint) -> bool:
    """Whether the time of a point's step and of at least one span are there."""
    spans = [getattr(point, f"seconds_{name}") for name in SPANS]
    return point.measured and point.seconds_step > 0 and any(map(math.isfinite, spans))


def draw_split(points: Sequence[ScalePoint]) -> list[Picture]:
    """Draw the parts of a step as stacked bars, and its whole time."""
    kept = [point for point in points if has_split(point)]
    if not kept:
        return []
    text = (
        "Left: parts of a step in the order in which they happen, as shares of it. Hatched with "
        "lines: the gather, and the part of DDP's reduction that backward does not hide. Right: "
        "the whole step."
    )
    if any(point.oversubscribed for point in kept):
        text += " *: more ranks than processors."
    if any(point.noisy for point in kept):
        text += " †: the machine was not quiet."
    return [draw_picture("split", text, partial(_draw_split, kept))]


def _draw_split(points: Sequence[ScalePoint], colors: Colors) -> Figure:
    figure = new_figure((7.4, 1.3 + 0.24 * len(points)))
    shares, steps = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    style_axes(shares, colors, "share of a step (%)", "")
    style_axes(steps, colors, "step (ms)", "")
    rows = range(len(points))
    splits = [split_of(point) for point in points]
    left = [0.0] * len(points)
    for name, (color, hatch) in _SPLIT.items():
        widths = [
            100 * split[name] / max(point.seconds_step, sum(split.values()))
            for split, point in zip(splits, points, strict=True)
        ]
        shares.barh(
            rows,
            widths,
            0.74,
            left,
            color=colors[color],
            hatch=hatch or None,
            edgecolor=colors["ink"],
            linewidth=0,
            label=name,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    milliseconds = [1000 * point.seconds_step for point in points]
    steps.plot(milliseconds, rows, marker="o", ls="", color=colors["ink"], ms=4)
    set_axis(steps.xaxis, milliseconds, count=4)
    shares.set_yticks(rows, [name_of(point) for point in points], color=colors["ink"])
    shares.set_ylim(len(points) - 0.5, -0.5)
    shares.set_xlim(0, 100)
    steps.grid(axis="x", color=colors["rule"], linewidth=0.8)
    shares.grid(visible=False)
    legend_above(figure, colors, columns=5, handlelength=1.2)
    return figure


def name_of(point: ScalePoint) -> str:
    """Return a point's name for an axis, with its marks; long names are cut."""
    name = point.name if len(point.name) <= 30 else f"{point.name[:29]}…"
    marks = "*" * point.oversubscribed + "†" * point.noisy
    return f"{name} {marks}".strip().replace("$", r"\$")
