"""Curves of a run: training and evaluation records by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dml_dist.report.attempts import Mark
from dml_dist.report.figures import (
    Colors,
    Picture,
    draw_picture,
    legend_above,
    new_axes,
    whole_numbers,
)
from dml_dist.report.formatting import metric_label, recall_key
from dml_dist.report.summary import RunSummary, Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_XLABEL = "step (optimizer updates)"
_SMALL = (3.5, 2.1)  # inches
_MARKS_UP_TO = 30  # evaluations of a line that get a marker each
_SMOOTH_FROM = 40  # records from which a running mean is drawn as well
_MOST_POINTS = 1500  # of a line: more than a screen has columns
_MOST_LABELS = 10  # of marks, side by side: each as wide as "128 → 120"


def draw_curves(summary: RunSummary) -> list[Picture]:
    """Draw the curves for which there are records.

    The loss, the scores of evaluations, the learning rate, the speed, and the gradient norm.
    """
    curves = []
    marks = (*summary.history.marks, *_problem_marks(summary))
    loss = summary.training("loss")
    if len(loss):
        draw = partial(_draw_series, loss, "training loss", marks, smooth=True, size=None)
        curves.append(draw_picture("loss", _loss_caption(loss) + _marks_caption(marks), draw))
    lines = _retrieval_lines(summary)
    if lines:
        draw = partial(_draw_retrieval, lines, marks)
        caption = _retrieval_caption(summary) + _marks_caption(marks)
        curves.append(draw_picture("retrieval", caption, draw))
    for key, label, caption, smooth in (
        ("lr", "learning rate", "Learning rate of the backbone against the step.", False),
        ("gradient_norm", "gradient norm", "Norm of all gradients before clipping.", True),
        ("table_loss", "loss", "Loss between the batch and all representatives.", True),
        ("in_batch_loss", "loss", "Loss within the batch.", True),
        ("flow_nll", "NLL", "Negative log-likelihood of the embeddings under the flow.", True),
        ("distance_to_last_solution", "distance", "Distance to the last solution.", False),
        ("images_per_second", "images/s", "Training speed of all ranks together.", True),
    ):
        series = summary.training(key)
        if len(series) > 1 and np.isfinite(series.values).any():
            smoothed = smooth and len(series) >= _SMOOTH_FROM
            text = f"{caption[:-1]}{_smoothed(series)}." if smoothed else caption
            draw = partial(_draw_series, series, label, marks, smooth=smooth, size=_SMALL)
            curves.append(draw_picture(key.replace("_", "-"), text, draw, small=True))
    return curves


@dataclass(frozen=True)
class _Line:
    series: Series
    label: str
    color: str
    dashed: bool


def _retrieval_lines(summary: RunSummary) -> list[_Line]:
    """Return recall and MAP@R on validation and, if evaluated during training, test classes."""
    keys = [("map_at_r", "map")]
    recall = recall_key(*summary.evaluations)
    if recall is not None:
        keys.insert(0, (recall, "recall"))
    lines = []
    for protocol, dashed in (("validation", False), ("literature", True)):
        for key, color in keys:
            series = summary.evaluation(key, protocol)
            if len(series):
                where = "test, literature protocol" if dashed else "validation"
                lines.append(_Line(series, f"{metric_label(key)} {where}", color, dashed))
    return lines


def _loss_caption(loss: Series) -> str:
    text = "Training loss against the step"
    if len(loss) >= _SMOOTH_FROM:
        text += _smoothed(loss)
    if loss.num_non_finite:
        text += f"; {loss.num_non_finite:,} records have no finite loss"
    return text + "."


def _problem_marks(summary: RunSummary) -> list[Mark]:
    """Return where a problem of alternating projections was first recorded, after the first."""
    problems = summary.training("problem")
    begins = np.flatnonzero(np.diff(problems.values) > 0) + 1
    return [Mark(int(step), "", problem=True) for step in problems.steps[begins]]


def _marks_caption(marks: Sequence[Mark]) -> str:
    text = ""
    if not all(mark.problem for mark in marks):
        text += " Vertical lines: restarts, with the number of ranks where it changed."
    if any(mark.problem for mark in marks):
        text += " Dotted lines: the next problem of alternating projections."
    return text


def _smoothed(series: Series) -> str:
    return f"; the heavy line is the mean over {_window(len(series)):,} records"


def _retrieval_caption(summary: RunSummary) -> str:
    text = "Retrieval among held-out classes against the step."
    if len(summary.evaluation("map_at_r", "literature")):
        text = (
            "Retrieval against the step. Dashed: test classes evaluated during training, as in "
            "much of the literature (“literature protocol”); nothing was selected by them."
        )
    return text


def _step_axes(
    colors: Colors, ylabel: str, size: tuple[float, float] | None = None
) -> tuple[Figure, Any]:
    figure, axes = new_axes(colors, _XLABEL, ylabel, **({"size": size} if size else {}))
    whole_numbers(axes.xaxis, 6 if size is None else 4)
    return figure, axes


def _draw_series(
    series: Series,
    label: str,
    marks: Sequence[Mark],
    colors: Colors,
    *,
    smooth: bool,
    size: tuple[float, float] | None,
) -> Figure:
    from matplotlib.ticker import FuncFormatter

    figure, axes = _step_axes(colors, label, size)
    smooth = smooth and len(series) >= _SMOOTH_FROM
    drawn = _thinned(series)
    axes.plot(
        drawn.steps,
        drawn.values,
        color=colors["recall"],
        linewidth=0.8 if smooth else 1.6,
        alpha=0.4 if smooth else 1.0,
        marker="o" if len(series) == 1 else None,
    )
    if smooth:
        mean = _running_mean(series.values, _window(len(series)))
        drawn = _thinned(Series(series.steps, mean))
        axes.plot(drawn.steps, drawn.values, color=colors["recall"], linewidth=1.8)
    if label != "training loss":  # the others are compared with zero
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    _draw_marks(axes, marks, colors, labels=size is None)
    return figure


def _draw_retrieval(lines: list[_Line], marks: Sequence[Mark], colors: Colors) -> Figure:
    figure, axes = _step_axes(colors, "score (%)")
    crowded = max(len(line.series) for line in lines) > _MARKS_UP_TO
    for line in lines:
        drawn = _thinned(line.series)
        axes.plot(
            drawn.steps,
            100 * drawn.values,
            color=colors[line.color],
            linewidth=1.6,
            linestyle="--" if line.dashed else "-",
            marker=None if crowded else "o" if line.color == "recall" else "s",
            markersize=3.5,
            # Open markers show the test split where dashes are too short to be seen.
            markerfacecolor="none" if line.dashed else colors[line.color],
            label=line.label,
        )
    axes.set_ylim(0, 102)
    _draw_marks(axes, marks, colors, labels=True)
    legend_above(figure, colors)
    return figure


def _draw_marks(axes: Any, marks: Sequence[Mark], colors: Colors, *, labels: bool) -> None:
    """Draw a line where training continued after a restart; labels that fit give the ranks."""
    for mark in marks:
        style = ":" if mark.problem else "-"
        axes.axvline(
            mark.step, color=colors["muted"], linewidth=0.7, linestyle=style, alpha=0.6, zorder=1
        )
    first, last = axes.get_xlim()
    free_from = first
    for mark in marks:
        if labels and mark.text and mark.step >= free_from:
            axes.annotate(
                mark.text,
                (mark.step, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                color=colors["muted"],
                fontsize=7,
            )
            free_from = mark.step + (last - first) / _MOST_LABELS


def _thinned(series: Series) -> Series:
    """Return at most _MOST_POINTS points that look the same: the extremes of each interval."""
    if len(series) <= _MOST_POINTS:
        return series
    kept = {0, len(series) - 1}
    for interval in np.array_split(np.arange(len(series)), _MOST_POINTS // 2 - 1):
        values = series.values[interval]
        if np.isfinite(values).any():
            kept |= {int(interval[np.nanargmin(values)]), int(interval[np.nanargmax(values)])}
        else:
            kept.add(int(interval[0]))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def _window(num_records: int) -> int:
    return max(5, num_records // 40 // 2 * 2 + 1)  # odd, so that it has a center


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the finite values in a centered window, NaN where there is none."""
    finite = np.isfinite(values)
    weights = np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), weights, mode="same")
    counts = np.convolve(finite.astype(np.float64), weights, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
