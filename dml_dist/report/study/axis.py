"""Final results of methods against a field in which they differ."""

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
)
from dml_dist.report.formatting import metric_label
from dml_dist.report.study.read import Comparison
from dml_dist.report.study.stats import LEVEL
from dml_dist.runs.study import axis_values, compare_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7.4, 4.0)  # inches
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
            f"{LEVEL:.0%} interval by Student t."
        )
        draw = partial(_draw, _lines(comparison, key), axis.path, label)
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


def _draw(lines: dict[str, Points], path: str, label: str, colors: Colors) -> Figure:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, axes = new_axes(colors, path, f"{label} (%)", size=_SIZE)
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
