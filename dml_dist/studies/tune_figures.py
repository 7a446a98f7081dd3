"""Figures of a search's trials: history, Pareto front, learning curves, cost.

Optuna's own figures use pyplot's global state and fixed colors; these follow the page's colors,
also in the dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dml_dist.config.study import ASHAPrunerConfig
from dml_dist.report.figures import (
    Colors,
    Picture,
    draw_picture,
    legend_above,
    new_axes,
    new_figure,
    style_axes,
    whole_numbers,
)
from dml_dist.report.formatting import metric_label
from dml_dist.runs.tuning import tune_section
from dml_dist.studies.samplers import first_rung
from dml_dist.studies.trials import STATES
from dml_dist.studies.tune_axes import (
    BEST,
    COLORS,
    MARKERS,
    axis_of,
    chosen_text,
    label_of,
    sentence,
)
from dml_dist.studies.tune_read import TrialResult, Tuning

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.4, 3.6)  # inches


def draw_history(tuning: Tuning, place: int) -> Picture:
    """Draw one objective of each trial against its number, and the best so far."""
    metric = tuning.objectives[place].metric
    text = sentence(f"{label_of(metric)} of each trial by its number; the line is the best so far.")
    text += " Failed, diverged and just started trials have no value and are at the bottom edge."
    if place == 0 and tuning.counts["pruned"]:
        text += " Pruned trials are at their last validation."
    if tuning.counts["outside"]:
        text += " Outside: values that a change of ranges has excluded."
    name = "history" if place == 0 else f"history-{place + 1}"
    return draw_picture(name, text, partial(_draw_history, tuning, place))


def _draw_history(tuning: Tuning, place: int, colors: Colors) -> Figure:
    objective = tuning.objectives[place]
    label, factor = axis_of(objective.metric)
    figure, axes = new_axes(colors, "trial", label, size=_SIZE)
    for state in STATES:
        trials = [trial for trial in tuning.trials if trial.state == state]
        values = [_value(trial, place) for trial in trials]
        pairs = list(zip(trials, values, strict=True))
        known = [(trial.number, factor * value) for trial, value in pairs if value is not None]
        lost = [trial.number for trial, value in pairs if value is None]
        style: dict[str, Any] = {
            "color": colors[COLORS[state]],
            "marker": MARKERS[state],
            "linestyle": "",
            "markersize": 5,
            "zorder": 3,
            "clip_on": False,
        }
        if known:
            axes.plot(*zip(*known, strict=True), **style, label=state)
        if lost:
            style["transform"] = axes.get_xaxis_transform()
            axes.plot(lost, [0.0] * len(lost), **style, label=None if known else state)
    done = [(trial.number, factor * trial.objectives[place]) for trial in tuning.complete]
    if done:
        numbers, values_N = map(np.array, zip(*done, strict=True))
        is_max = objective.direction == "maximize"
        best = (np.maximum if is_max else np.minimum).accumulate(values_N)
        end = tuning.trials[-1].number
        axes.step(
            [*numbers, end],
            [*best, best[-1]],
            where="post",
            color=colors[BEST],
            label="best so far",
        )
    axes.set_xlim(-0.5, max(1, tuning.trials[-1].number) + 0.5)
    whole_numbers(axes.xaxis)
    legend_above(figure, colors, columns=7, handlelength=1.4)
    return figure


def _value(trial: TrialResult, place: int) -> float | None:
    if trial.objectives:
        return trial.objectives[place]
    is_shown = trial.state in ("pruned", "outside", "running") and place == 0
    return trial.last if is_shown else None


# ---------------------------------------------------------------- two objectives


def draw_front(tuning: Tuning) -> Picture:
    """Draw the second objective against the first, and the Pareto front."""
    first, second = (label_of(objective.metric) for objective in tuning.objectives)
    text = sentence(f"{second} against {first} of complete trials. Orange, with trial numbers: the")
    text += " Pareto front, those than which no other is better in one and as good in the other."
    return draw_picture("front", text, partial(_draw_front, tuning))


def _draw_front(tuning: Tuning, colors: Colors) -> Figure:
    (x_label, x), (y_label, y) = (axis_of(objective.metric) for objective in tuning.objectives)
    figure, axes = new_axes(colors, x_label, y_label, size=_SIZE)
    rest = [trial.objectives for trial in tuning.complete if trial not in tuning.front]
    if rest:
        axes.plot(*_columns(rest, x, y), color=colors["recall"], marker="o", ls="", ms=5, alpha=0.6)
    front = _columns([trial.objectives for trial in tuning.front], x, y)
    axes.plot(*front, color=colors[BEST], marker="o", ms=6, linewidth=1)
    for trial, at in zip(tuning.front, zip(*front, strict=True), strict=True):
        axes.annotate(
            str(trial.number),
            at,
            xytext=(4, 4),
            textcoords="offset points",
            color=colors["muted"],
            fontsize=8,
        )
    return figure


def _columns(points: Sequence[Sequence[float]], x: float, y: float) -> np.ndarray:
    return np.array(points).T * np.array([[x], [y]])


# ---------------------------------------------------------------- training


def draw_learning(tuning: Tuning) -> list[Picture]:
    """Draw the validations of all trials during training; none without records."""
    metric = tuning.objectives[0].metric
    shown = "map_at_r" if metric == "train_seconds" else metric
    curves = [(trial, *trial.curve(shown, tuning.run_steps)) for trial in tuning.latest]
    kept = [(trial, steps, values) for trial, steps, values in curves if len(steps)]
    if not kept:
        return []
    section = tune_section(tuning.config)
    text = f"{metric_label(shown)} on validation classes of each trial against its step."
    if section.folds > 1:
        text += " A trial's folds follow one another."
    rungs = rungs_of(tuning)
    if rungs:
        text += " Dotted: the rungs at which ASHA prunes, steps "
        text += f"{', '.join(f'{rung:,}' for rung in rungs)}."
    draw = partial(_draw_learning, tuning, shown, kept, rungs)
    return [draw_picture("learning", text, draw)]


def rungs_of(tuning: Tuning) -> list[int]:
    """Return the steps at which ASHA prunes: its rungs below the end of a whole trial."""
    pruner, whole = tune_section(tuning.config).pruner, tuning.trial_steps
    if not isinstance(pruner, ASHAPrunerConfig) or whole is None:
        return []
    first = first_rung(pruner, whole)
    assert first is not None
    count = max(0, math.ceil(math.log(whole / first, pruner.reduction) - 1e-9))
    return [first * pruner.reduction**rung for rung in range(count)]


def _draw_learning(
    tuning: Tuning,
    metric: str,
    curves: Sequence[tuple[TrialResult, np.ndarray, np.ndarray]],
    rungs: Sequence[int],
    colors: Colors,
) -> Figure:
    label, factor = axis_of(metric)
    figure, axes = new_axes(colors, "step (optimizer updates)", label, size=(7.4, 4.2))
    for rung in rungs:
        axes.axvline(rung, color=colors["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
    names: dict[str, Any] = {}
    for trial, steps, values in curves:
        is_best = trial in tuning.chosen
        color = colors[BEST if is_best else COLORS[trial.state]]
        (line,) = axes.plot(
            steps,
            factor * values,
            color=color,
            linewidth=2.2 if is_best else 1.1,
            zorder=3 if is_best else 1 + (trial.state != "pruned") / 2,
        )
        marker = "o" if is_best else MARKERS[trial.state]
        end = np.flatnonzero(np.isfinite(values))[-1:]
        axes.plot(steps[end], factor * values[end], marker, color=color, ms=4)
        names[chosen_text(tuning) if is_best else trial.state] = line
    whole_numbers(axes.xaxis)
    axes.set_xlim(left=0)
    figure.legend(
        names.values(),
        names,
        loc="outside upper left",
        ncols=6,
        frameon=False,
        fontsize=8,
        labelcolor=colors["ink"],
        handlelength=1.4,
    )
    return figure


def draw_cost(tuning: Tuning) -> list[Picture]:
    """Draw seconds and steps of each trial; none before any has ended."""
    if not any(trial.steps or trial.seconds for trial in tuning.latest):
        return []
    text = "Time with evaluations, and steps of each trial in the order of their start."
    if tuning.counts["pruned"]:
        text += " Outlined: the steps that pruning saved."
    return [draw_picture("cost", text, partial(_draw_cost, tuning))]


def _draw_cost(tuning: Tuning, colors: Colors) -> Figure:
    figure = new_figure((7.4, 4.4))
    seconds, steps = figure.subplots(2, sharex=True)
    style_axes(seconds, colors, "", "seconds")
    style_axes(steps, colors, "trial", "steps")
    for state in STATES:
        trials = [trial for trial in tuning.latest if trial.state == state]
        numbers, color = [trial.number for trial in trials], colors[COLORS[state]]
        if trials:
            seconds.bar(numbers, [t.seconds or 0 for t in trials], color=color, label=state)
            steps.bar(numbers, [t.steps or 0 for t in trials], color=color)
        if state == "pruned" and trials and tuning.trial_steps:
            made = np.array([trial.steps or 0 for trial in trials])
            steps.bar(
                numbers,
                np.maximum(0, tuning.trial_steps - made),
                bottom=made,
                fill=False,
                edgecolor=color,
                linewidth=0.8,
            )
    whole_numbers(steps.xaxis)
    whole_numbers(steps.yaxis, 4)
    _grouped(seconds)
    legend_above(figure, colors, columns=5, handlelength=1.0)
    return figure


def _grouped(axes: Axes) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
