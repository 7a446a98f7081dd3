"""The convergence of methods: R@1 against the step, and against the time spent on training."""

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
from dml_dist.report.study.stats import Band

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (7.4, 4.2)  # inches
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)))
"""One for each round through the colors."""
_COLUMNS = 4  # of the legend


def draw_convergence(comparison: Comparison) -> list[Picture]:
    """Draw mean lines with bands from the lowest to the highest run; none without curves."""
    bands = [(method.name, method.band) for method in comparison.methods if len(method.band.mean)]
    if not bands:
        return []
    label = metric_label(comparison.recall_key)
    what = (
        "test classes watched during training (“literature protocol”; nothing was selected by it)"
        if comparison.protocol == "literature"
        else "validation classes"
    )
    text = f"{label} on {what}: mean of the seeds, from the lowest to the highest run."
    mark, reference = comparison.mark, comparison.reference
    if mark is not None and reference is not None:
        best = format_metric(comparison.recall_key, mark)
        text += f" Dotted: the best of {reference.name}, {best}."
    draw = partial(_draw, bands, mark, label)
    return [
        draw_picture(
            "convergence-steps",
            f"Against the step. {text}",
            partial(draw, against="step (optimizer updates)"),
        ),
        draw_picture(
            "convergence-time",
            "Against the time spent on training, without evaluations, checkpoints and start-up, "
            f"as it was with {_others(comparison)}. {text}",
            partial(draw, against="seconds of training"),
        ),
    ]


def _others(comparison: Comparison) -> str:
    section = comparison.config.compare
    parallel = 1 if section is None else section.parallel
    return "one run at a time" if parallel == 1 else f"{parallel} runs side by side"


def _draw(
    bands: list[tuple[str, Band]],
    mark: float | None,
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
    if mark is not None:
        axes.axhline(100 * mark, color=colors["muted"], linewidth=1, linestyle=(0, (1, 2)))
    if against.startswith("step"):
        whole_numbers(axes.xaxis)
    axes.set_xlim(left=0)
    legend_above(figure, colors, columns=min(_COLUMNS, len(bands)))
    return figure
