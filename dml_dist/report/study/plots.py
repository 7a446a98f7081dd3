"""Figures of a comparison: convergence of its methods, and results against a field."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dml_dist.report.figures import (
    SERIES,
    Colors,
    Picture,
    draw_picture,
    legend_above,
    new_axes,
    whole_numbers,
)
from dml_dist.report.formatting import format_metric, metric_label
from dml_dist.report.study.read import Comparison
from dml_dist.report.study.stats import LEVEL, Band
from dml_dist.runs.comparison import axis_values, compare_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7.4, 4.2)  # inches
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
"""Line styles, one for each cycle through the colors."""
_COLUMNS = 4  # of the legend


def draw_convergence(comparison: Comparison) -> list[Picture]:
    """Draw mean curves with bands from the lowest to the highest run; none without curves."""
    bands = [(method.name, method.band) for method in comparison.methods if len(method.band.mean)]
    if not bands:
        return []
    label = metric_label(comparison.recall_key)
    what = (
        "test classes evaluated during training (“literature protocol”; nothing selected by them)"
        if comparison.protocol == "literature"
        else "validation classes"
    )
    text = f"{label} on {what}: mean over the seeds, band from the lowest to the highest run."
    target, reference = comparison.target_recall, comparison.reference
    if target is not None and reference is not None:
        best = format_metric(comparison.recall_key, target)
        text += f" Dotted: the target recall, {best}, the best of {reference.name}."
    draw = partial(_draw, bands, target, label)
    return [
        draw_picture(
            "convergence-steps",
            f"Against the step. {text}",
            partial(draw, against="step (optimizer updates)"),
        ),
        draw_picture(
            "convergence-time",
            "Against the time spent on training, without evaluations, checkpoints and start-up, "
            f"measured with {_concurrency(comparison)}. {text}",
            partial(draw, against="seconds of training"),
        ),
    ]


def _concurrency(comparison: Comparison) -> str:
    section = comparison.config.compare
    parallel = 1 if section is None else section.parallel
    return "one run at a time" if parallel == 1 else f"{parallel} runs at a time"


def _draw(
    bands: list[tuple[str, Band]],
    target: float | None,
    label: str,
    colors: Colors,
    *,
    against: str,
) -> Figure:
    figure, axes = new_axes(colors, against, f"{label} (%)", size=_SIZE)
    alpha = 0.13 if len(bands) <= len(SERIES) else 0.07
    for place, (name, band) in enumerate(bands):
        color = colors[SERIES[place % len(SERIES)]]
        x = band.mean.steps if against.startswith("step") else band.mean.seconds
        if not np.array_equal(band.low, band.high):
            axes.fill_between(
                x, 100 * band.low, 100 * band.high, color=color, alpha=alpha, linewidth=0
            )
        axes.plot(
            x,
            100 * band.mean.recall,
            color=color,
            linewidth=1.7,
            linestyle=_DASHES[place // len(SERIES) % len(_DASHES)],
            marker="o" if len(band.mean) == 1 else None,
            markersize=4,
            label=name,
        )
    if target is not None:
        axes.axhline(100 * target, color=colors["muted"], linewidth=1, linestyle=(0, (1, 2)))
    if against.startswith("step"):
        whole_numbers(axes.xaxis)
    axes.set_xlim(left=0)
    legend_above(figure, colors, columns=min(_COLUMNS, len(bands)))
    return figure


# ---------------- results against a field

_AXIS_SIZE = (7.4, 4.0)  # inches
_LOG_FROM = 4.0
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""

Points = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Values of the field, means and half intervals (NaN of a single seed), each (n,)."""


def draw_axis(comparison: Comparison) -> list[Picture]:
    """Draw recall and MAP@R on test classes against the field of `compare.axis`."""
    axis = compare_section(comparison.config).axis
    if axis is None or not comparison.runs:
        return []
    pictures = []
    for name, key in (("axis-recall", comparison.recall_key), ("axis-map", "map_at_r")):
        label = metric_label(key)
        text = (
            f"{label} on test classes against {axis.path}: mean over the seeds, with its "
            f"{LEVEL:.0%} interval by Student's t."
        )
        draw = partial(_draw_axis, _lines(comparison, key), axis.path, label)
        pictures.append(draw_picture(name, text, draw))
    return pictures


def _lines(comparison: Comparison, key: str) -> dict[str, Points]:
    methods = {method.name: method for method in comparison.methods}
    lines = {}
    for line, points in axis_values(comparison.config).items():
        found = [(value, methods[name].interval(key)) for value, name in points]
        kept = [(value, one.mean, one.half) for value, one in found if one.count]
        columns = np.array(kept, dtype=np.float64).reshape(-1, 3).T
        lines[line] = (columns[0], 100 * columns[1], 100 * columns[2])
    return lines


def _draw_axis(lines: dict[str, Points], path: str, label: str, colors: Colors) -> Figure:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = new_axes(colors, path, f"{label} (%)", size=_AXIS_SIZE)
    for place, (name, (x, mean, half)) in enumerate(lines.items()):
        axes.errorbar(
            x,
            mean,
            yerr=np.nan_to_num(half),
            color=colors[SERIES[place % len(SERIES)]],
            linewidth=1.7,
            elinewidth=1.0,
            capsize=3,
            marker="o",
            markersize=4,
            label=name,
        )
    ticks = np.unique(np.concatenate([x for x, _, _ in lines.values()]))
    if len(ticks) and ticks[0] > 0 and ticks[-1] / ticks[0] >= _LOG_FROM:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend_above(figure, colors, columns=len(lines))
    return figure
