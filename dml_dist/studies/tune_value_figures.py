"""Figures of searched values: parallel coordinates, importances, slices, contour.

Paths are on the scales of their distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dml_dist.random_streams import Stream, seed_of
from dml_dist.report.figures import Colors, Picture, draw_picture, new_axes, new_figure
from dml_dist.runs.tuning import tune_section
from dml_dist.studies.tune_axes import (
    BEST,
    axis_of,
    chosen_text,
    label_of,
    plain_text,
    sentence,
    set_ticks,
    ticks_of,
    wrapped,
)
from dml_dist.studies.tune_read import Scale, Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMALL = (3.5, 2.3)  # inches
LEAST_FOR_IMPORTANCES = 5
"""Complete trials below which a forest says nothing about importances."""


def draw_parallel(tuning: Tuning) -> Picture:
    """Draw each complete trial as a line through its values."""
    metric = tuning.objectives[0].metric
    text = f"Each line is a complete trial, from its values to {label_of(metric)}. Orange:"
    text += f" {chosen_text(tuning)}; blue: the best quarter by {label_of(metric)}."
    if any(len(trial.values) < len(tuning.scales) for trial in tuning.complete):
        text += " A path that a trial's method does not have is below its axis."
    return draw_picture("parallel", text, partial(_draw_parallel, tuning))


def _draw_parallel(tuning: Tuning, colors: Colors) -> Figure:
    objective = tuning.objectives[0]
    label, factor = axis_of(objective.metric)
    results = [factor * trial.objectives[0] for trial in tuning.complete]
    scales = [*tuning.scales.values(), Scale(label, min(results), max(results))]
    figure = new_figure((7.4, 3.9))
    axes = figure.add_subplot()
    sign = 1 if objective.direction == "minimize" else -1
    ranked = sorted(tuning.complete, key=lambda trial: sign * trial.objectives[0], reverse=True)
    for place, trial in enumerate(ranked):
        values = [*(trial.values.get(path) for path in tuning.scales), factor * trial.objectives[0]]
        heights = [
            -0.12 if path in tuning.scales and path not in trial.values else scale.position(value)
            for path, scale, value in zip([*tuning.scales, ""], scales, values, strict=True)
        ]
        is_good = len(ranked) - place <= max(1, len(ranked) // 4)
        color, width = ("recall", 1.2) if is_good else ("faint", 0.8)
        if trial in tuning.chosen:
            color, width = BEST, 2.2
        axes.plot(heights, color=colors[color], linewidth=width)
    for place, scale in enumerate(scales):
        axes.plot([place, place], [0, 1], color=colors["muted"], linewidth=0.8, zorder=0)
        for height, text in ticks_of(scale):
            axes.text(
                place + 0.03,
                height,
                text,
                color=colors["muted"],
                fontsize=8,
                va="center",
                bbox={"facecolor": "none", "edgecolor": "none", "pad": 1},
            )
    axes.set_xticks(range(len(scales)), [wrapped(scale.path) for scale in scales])
    axes.tick_params(colors=colors["ink"], length=0, labelsize=8)
    axes.set_xlim(-0.2, len(scales) - 0.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def importances(tuning: Tuning, place: int) -> dict[str, float]:
    """Return path -> share of an objective's variance that it explains, falling.

    fANOVA integrates over its inputs; here they are positions on the scales of the search, so that
    each decade of a logarithmic range counts the same. Paths that only some methods have are left
    out.

    Raises:
        ValueError: If the trials do not tell; the message says why.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    trials = tuning.complete
    if len(trials) < LEAST_FOR_IMPORTANCES:
        raise ValueError(
            f"they need {LEAST_FOR_IMPORTANCES} complete trials, and there are {len(trials)}"
        )
    if len({trial.objectives[place] for trial in trials}) == 1:
        raise ValueError("all complete trials have the same value")
    scales = {
        path: scale
        for path, scale in tuning.scales.items()
        if all(path in trial.values for trial in trials)
    }
    if not scales:
        raise ValueError("no value is searched in all methods")
    distributions: dict[str, BaseDistribution] = {
        path: CategoricalDistribution(scale.choices) if scale.choices else FloatDistribution(0, 1)
        for path, scale in scales.items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for trial in trials:
        params = {
            path: trial.values[path] if scale.choices else scale.position(trial.values[path])
            for path, scale in scales.items()
        }
        value = trial.objectives[place]
        study.add_trial(
            optuna.trial.create_trial(value=value, params=params, distributions=distributions)
        )
    seed = seed_of(Stream.IMPORTANCES, tune_section(tuning.config).seed, place, bits=32)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def draw_importances(tuning: Tuning, importances: Mapping[str, float], place: int) -> Picture:
    """Draw the share of an objective's variance that each path explains."""
    label = label_of(tuning.objectives[place].metric)
    text = f"Share of the variance of {label} among complete trials that each value"
    text += " explains, alone and in interaction, by fANOVA on the scales of the search."
    if left_out := [path for path in tuning.scales if path not in importances]:
        text += f" Left out, since only some methods have them: {', '.join(left_out)}."
    name = "importances" if place == 0 else f"importances-{place + 1}"
    return draw_picture(name, text, partial(_draw_importances, importances))


def _draw_importances(importances: Mapping[str, float], colors: Colors) -> Figure:
    paths = list(importances)[::-1]
    figure, axes = new_axes(colors, "share (%)", "", size=(7.4, 0.9 + 0.32 * len(paths)))
    shares = [100 * importances[path] for path in paths]
    axes.barh(range(len(paths)), shares, color=colors["recall"], height=0.6)
    for place, share in enumerate(shares):
        axes.text(
            share + max(shares) / 100,
            place,
            f"{share:.0f}",
            va="center",
            color=colors["muted"],
            fontsize=8,
        )
    axes.set_yticks(range(len(paths)), [plain_text(path) for path in paths])
    axes.tick_params(axis="y", labelcolor=colors["ink"])
    axes.set_xlim(0, 1.08 * max(shares))
    axes.grid(visible=False)
    return figure


def draw_slices(tuning: Tuning) -> list[Picture]:
    """Draw the first objective against each searched value."""
    label = label_of(tuning.objectives[0].metric)
    return [
        draw_picture(
            f"slice-{place}",
            sentence(f"{label} against {path}."),
            partial(_draw_slice, tuning, scale),
            small=True,
        )
        for place, (path, scale) in enumerate(tuning.scales.items())
        if any(path in trial.values for trial in tuning.complete)
    ]


def _draw_slice(tuning: Tuning, scale: Scale, colors: Colors) -> Figure:
    label, factor = axis_of(tuning.objectives[0].metric)
    figure, axes = new_axes(colors, plain_text(scale.path), label, size=_SMALL)
    trials = [trial for trial in tuning.complete if scale.path in trial.values]
    for is_chosen, color, size in ((False, "recall", 4.5), (True, BEST, 7.0)):
        shown = [trial for trial in trials if (trial in tuning.chosen) == is_chosen]
        axes.plot(
            [scale.position(trial.values[scale.path]) for trial in shown],
            [factor * trial.objectives[0] for trial in shown],
            "o",
            color=colors[color],
            ms=size,
            alpha=1 if is_chosen else 0.6,
            clip_on=False,
        )
    set_ticks(axes.xaxis, scale)
    axes.set_xlim(-0.05, 1.05)
    return figure


def draw_contour(tuning: Tuning, paths: Sequence[str]) -> Picture | None:
    """Draw the first objective over the two most important paths; None if they span no area."""
    scales = [tuning.scales[path] for path in paths]
    factor = axis_of(tuning.objectives[0].metric)[1]
    found: dict[tuple[float, ...], list[float]] = {}
    for trial in tuning.complete:
        if all(path in trial.values for path in paths):
            at = tuple(scale.position(trial.values[scale.path]) for scale in scales)
            found.setdefault(at, []).append(factor * trial.objectives[0])
    points_N2 = np.array(list(found)).reshape(-1, 2)
    if len(points_N2) < 4 or np.linalg.matrix_rank(points_N2 - points_N2[0], tol=1e-3) < 2:
        return None
    values_N = np.array([np.mean(values) for values in found.values()])
    text = sentence(f"{label_of(tuning.objectives[0].metric)} over {paths[0]} and {paths[1]},")
    text += " interpolated linearly between complete trials (dots); trials with the same two values"
    text += f" are averaged. Orange: {chosen_text(tuning)}."
    return draw_picture(
        "contour", text, partial(_draw_contour, tuning, scales, points_N2, values_N)
    )


def _draw_contour(
    tuning: Tuning,
    scales: Sequence[Scale],
    points_N2: np.ndarray,
    values_N: np.ndarray,
    colors: Colors,
) -> Figure:
    from matplotlib.colors import to_rgba

    label, _ = axis_of(tuning.objectives[0].metric)
    x, y = (plain_text(scale.path) for scale in scales)
    figure, axes = new_axes(colors, x, y, size=(7.4, 4.2))
    levels = np.linspace(values_N.min(), values_N.max() + 1e-9, 9)
    # Shades of one color: the page replaces it in the dark.
    shades = [to_rgba(colors["recall"], alpha) for alpha in np.linspace(0.06, 0.8, 8)]
    x_N, y_N = points_N2.T
    filled = axes.tricontourf(x_N, y_N, values_N, levels=levels, colors=shades)
    axes.plot(x_N, y_N, "o", color=colors["ink"], ms=3)
    for trial in tuning.chosen:
        if all(scale.path in trial.values for scale in scales):
            at = [scale.position(trial.values[scale.path]) for scale in scales]
            axes.plot(*at, "o", color=colors[BEST], ms=8, clip_on=False)
    set_ticks(axes.xaxis, scales[0], 6)
    set_ticks(axes.yaxis, scales[1], 6)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.grid(visible=False)
    bar = figure.colorbar(filled, ax=axes, format="%.4g")
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.tick_params(colors=colors["muted"], length=0)
    bar.set_label(label, color=colors["muted"])
    return figure
