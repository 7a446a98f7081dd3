"""Figures of what was predicted for a scaling study: memory, traffic, step time, extrapolation."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

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
from dml_dist.studies.scale.figures import (
    MEGABYTE,
    add_mark_labels,
    line_style,
    marks_text,
    numbered_pictures,
    places_of,
    put_missing,
    put_points,
    set_axis,
)
from dml_dist.studies.scale.point_lines import SIZES, Line, lines_over
from dml_dist.studies.scale.points import ScalePoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PeerMemory:
    """Published memory of a GPU by classes.

    Attributes:
        label: Method and machine.
        num_classes: Classes of each point.
        num_bytes: Memory of each point.
    """

    label: str
    num_classes: Sequence[float]
    num_bytes: Sequence[float]


@dataclass(frozen=True)
class Pair:
    """A measured value and what was predicted for it.

    Attributes:
        point: The point.
        group: Which of the figure's groups it belongs to.
        predicted: What was predicted.
        low: Lower end of the bracket.
        high: Upper end of the bracket.
        measured: What was measured.
        deviation: How far they are apart, relative to one of them.
    """

    point: ScalePoint
    group: str
    predicted: float
    low: float
    high: float
    measured: float
    deviation: float


@dataclass(frozen=True)
class Forecast:
    """Images per second by a size, as predicted.

    Attributes:
        label: What is predicted.
        size: A key of SIZES.
        values: Of the size.
        low: Lower end of the bracket at each.
        middle: Images per second at each.
        high: Upper end of the bracket at each.
        marked: Whether each is far from what was measured.
        measured: Measured points of the same other sizes.
    """

    label: str
    size: str
    values: Sequence[int]
    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]
    marked: Sequence[bool]
    measured: Sequence[ScalePoint] = ()


# ---------------------------------------------------------------- memory


def draw_memory(points: Sequence[ScalePoint], peers: Sequence[PeerMemory]) -> list[Picture]:
    """Draw measured and predicted memory against classes, and what peers published."""
    lines = [
        line
        for line in lines_over(points, "num_classes")
        if any(_has_memory(point) for point in line.points)
    ]
    if not lines:
        return []
    text = (
        "Memory of a rank against classes. Points: its peak above that before the network and the "
        "proxies were built. Thin lines: predicted for proxies, their gradient and optimiser "
        "state, logits and the gathered batch, without the network and its activations."
    )
    if peers:
        text += (
            " Gray: published by peers for a whole GPU, with their networks, embedding sizes and "
            "batches; compare slopes, not heights."
        )
    pictures = []
    for name, some in numbered_pictures("memory", lines):
        caption = f"{text} {marks_text([point for line in some for point in line.points])}".strip()
        pictures.append(draw_picture(name, caption, partial(_draw_memory, some, peers)))
    return pictures


def _has_memory(point: ScalePoint) -> bool:
    measured = point.measured and math.isfinite(point.memory_measured)
    return measured or math.isfinite(point.memory_predicted)


def _draw_memory(lines: Sequence[Line], peers: Sequence[PeerMemory], colors: Colors) -> Figure:
    figure, axes = new_axes(colors, SIZES["num_classes"], "memory of a rank (MB)", size=(7.4, 4.8))
    x_values: list[float] = []
    y_values: list[float] = []
    for place, line in zip(places_of(lines), lines, strict=True):
        style = line_style(place, line.replicated, colors)
        known = [p for p in line.points if p.measured and math.isfinite(p.memory_measured)]
        x = [float(point.num_classes) for point in known]
        y = [point.memory_measured / MEGABYTE for point in known]
        axes.plot(x, y, **{**style, "marker": ""}, linewidth=1.5)
        axes.plot([], [], **style, linewidth=1.5, label=line.label or "measured")
        put_points(axes, known, x, y, style["marker"], style["color"], colors)
        planned = [p for p in line.points if p.memory_predicted > 0]
        x_planned = [float(point.num_classes) for point in planned]
        y_planned = [point.memory_predicted / MEGABYTE for point in planned]
        axes.plot(x_planned, y_planned, color=style["color"], linewidth=0.8, ls=(0, (1, 1.5)))
        x_values += [*x, *x_planned]
        y_values += [*y, *y_planned]
    axes.plot([], [], color=colors["ink"], linewidth=0.8, ls=(0, (1, 1.5)), label="predicted part")
    for peer, marker in zip(peers, itertools.cycle("*12348")):
        y = [value / MEGABYTE for value in peer.num_bytes]
        style = {"marker": marker, "ms": 7, "mew": 1.3, "ls": (0, (1, 2)), "lw": 0.8}
        axes.plot(peer.num_classes, y, color=colors["muted"], **style, label=peer.label)
        x_values += peer.num_classes
        y_values += y
    every = [point for line in lines for point in line.points]
    set_axis(axes.xaxis, x_values)
    set_axis(axes.yaxis, y_values)
    put_missing(axes, every, "num_classes", colors)
    add_mark_labels(axes, every, colors)
    legend_above(figure, colors, columns=3)
    return figure


# ---------------------------------------------------------------- predicted and measured


def draw_pairs(
    name: str, text: str, pairs: Sequence[Pair], unit: str, above: str, band: float | None = None
) -> list[Picture]:
    """Draw measured against predicted values, and by how much they differ.

    Args:
        name: Of the picture.
        text: Its caption.
        pairs: What is drawn, in `unit`.
        unit: What the axes show, such as "step (ms)".
        above: What the deviation is, such as "model above measured".
        band: Half the width of the band of accepted deviations; None draws none.
    """
    if not pairs:
        return []
    return [draw_picture(name, text, partial(_draw_pairs, pairs, unit, above, band))]


def _draw_pairs(
    pairs: Sequence[Pair], unit: str, above: str, band: float | None, colors: Colors
) -> Figure:
    figure = new_figure((7.4, 3.9))
    both, rest = figure.subplots(1, 2)
    style_axes(both, colors, f"predicted {unit}", f"measured {unit}")
    style_axes(rest, colors, f"predicted {unit}", f"{above} (%)")
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    for place, (group, members) in enumerate(groups.items()):
        style = line_style(place, bool(place % 2), colors)
        x = [pair.predicted for pair in members]
        y = [pair.measured for pair in members]
        left = [max(0.0, pair.predicted - pair.low) for pair in members]
        right = [max(0.0, pair.high - pair.predicted) for pair in members]
        both.errorbar(x, y, xerr=[left, right], color=style["color"], ls="", elinewidth=1)
        points = [pair.point for pair in members]
        marks = style["marker"], style["color"], colors
        put_points(both, points, x, y, *marks)
        put_points(rest, points, x, [100 * pair.deviation for pair in members], *marks)
        both.plot([], [], **{**style, "linestyle": ""}, label=group)
    _scale_pairs(both, rest, pairs)
    low, high = both.get_xlim()
    both.plot([low, high], [low, high], color=colors["muted"], lw=1, ls=(0, (5, 3)), label="equal")
    rest.axhline(0, color=colors["muted"], linewidth=1, linestyle=(0, (5, 3)))
    if band is not None:
        label = f"within {100 * band:g} %"
        rest.axhspan(-100 * band, 100 * band, color=colors["rule"], lw=0, zorder=0, label=label)
    add_mark_labels(both, [pair.point for pair in pairs], colors)
    legend_above(figure, colors, columns=3)
    return figure


def _scale_pairs(both: Axes, rest: Axes, pairs: Sequence[Pair]) -> None:
    ends = [value for pair in pairs for value in (pair.low, pair.predicted, pair.high)]
    values = [value for value in [*ends, *(pair.measured for pair in pairs)] if value > 0]
    for axis in (both.xaxis, both.yaxis, rest.xaxis):
        set_axis(axis, values, count=5)
    most = max(abs(100 * pair.deviation) for pair in pairs)
    rest.set_ylim(-1.2 * max(most, 6), 1.2 * max(most, 6))


# ---------------------------------------------------------------- extrapolation


def draw_forecast(name: str, text: str, forecasts: Sequence[Forecast]) -> list[Picture]:
    """Draw predicted images per second against a size, with their brackets."""
    if not forecasts:
        return []
    return [draw_picture(name, text, partial(_draw_forecast, forecasts))]


def _draw_forecast(forecasts: Sequence[Forecast], colors: Colors) -> Figure:
    label = "images/s, by the model"
    figure, axes = new_axes(colors, SIZES[forecasts[0].size], label, size=(7.4, 4.2))
    x_values: list[float] = []
    y_values: list[float] = []
    for place, one in enumerate(forecasts):
        color = colors[SERIES[place % len(SERIES)]]
        axes.fill_between(one.values, one.low, one.high, color=color, alpha=0.16, linewidth=0)
        near = [math.nan if far else y for y, far in zip(one.middle, one.marked, strict=True)]
        axes.plot(one.values, one.middle, color=color, lw=1.5, ls=(0, (1, 1.5)))
        axes.plot(one.values, near, color=color, lw=1.8)
        shape = _SHAPES[place % len(_SHAPES)]
        axes.plot([], [], color=color, marker=shape, ms=5, lw=1.8, label=one.label)
        if not one.measured:
            axes.plot(one.values, one.middle, color=color, marker=shape, ms=4, ls="")
        x = [float(getattr(point, one.size)) for point in one.measured]
        y = [point.images_per_second for point in one.measured]
        put_points(axes, one.measured, x, y, shape, color, colors)
        x_values += [*map(float, one.values), *x]
        y_values += [*one.low, *one.high, *y]
    if any(any(one.marked) for one in forecasts):
        axes.plot([], [], color=colors["ink"], lw=1.5, ls=(0, (1, 1.5)), label="far from measured")
    set_axis(axes.xaxis, x_values, at_values=True)
    set_axis(axes.yaxis, y_values)
    add_mark_labels(axes, [point for one in forecasts for point in one.measured], colors)
    legend_above(figure, colors, columns=3)
    return figure


_SHAPES = ("o", "s", "^", "D", "v", "P")
