"""The figure of where the time of a step goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from dml_dist.report.figures import (
    Colors,
    Picture,
    draw_picture,
    legend_above,
    new_figure,
    style_axes,
)
from dml_dist.studies.scale.figures import set_axis
from dml_dist.studies.scale.points import SPANS, ScalePoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
