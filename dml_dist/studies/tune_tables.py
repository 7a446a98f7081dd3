"""Tables of a search of values: best values, Pareto front, cost, all trials, test classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_dist.config.search_space import format_value
from dml_dist.config.study import METHOD_KEY
from dml_dist.report.formatting import MISSING, format_seconds, is_share, metric_label
from dml_dist.report.study.stats import LEVEL, format_interval
from dml_dist.runs.study import value_at
from dml_dist.runs.tuning import own_values, tune_section, tuned_config
from dml_dist.studies.final import read_final
from dml_dist.studies.tune_axes import label_of, show
from dml_dist.studies.tune_read import TrialResult, Tuning, edge_of

Table = tuple[list[str], list[list[str]]]
"""Header and rows, formatted."""


def best_table(tuning: Tuning) -> Table:
    """Return path, best and own value, range, and whether the best is at an end of the range."""
    best, space = tuning.best, tune_section(tuning.config).space
    if best is None:
        return [], []
    method = best.values.get(METHOD_KEY)
    own = tuned_config(tuning.config, {} if method is None else {METHOD_KEY: method})
    header = ["path", "best", "configuration", "range", "at an end of its range"]
    rows = []
    if method is not None:
        choices = ", ".join(tune_section(tuning.config).methods)
        rows.append([METHOD_KEY, str(method), MISSING, f"one of {choices}", ""])
    for path, value in best.values.items():
        if path != METHOD_KEY:
            edge = edge_of(space[path], value)
            mark = "" if edge is None else f"{edge} end: widen the range"
            own_value = value_at(own, path)
            own_text = format_value(own_value)
            if not space[path].contains(own_value):
                own_text += ", outside the range"
            rows.append([path, format_value(value), own_text, str(space[path]), mark])
    return header, rows


def best_notes(tuning: Tuning) -> list[str]:
    """Return what the best trial reaches, against the first one."""
    if tuning.best is None:
        return []
    metric, best = tuning.objectives[0].metric, tuning.best
    text = f"{label_of(metric)} of the best trial, {best.label}: {show(metric, best.objectives[0])}"
    first = tuning.trials[0]
    if first.objectives:
        text += f"; of the first trial, {first.label}{_own_text(tuning, first)}: "
        text += show(metric, first.objectives[0])
    else:
        text += f"; the first trial, {first.label}{_own_text(tuning, first)}, is {first.state}"
    return [
        f"{text}. The best of many trials is chosen by these validation classes, so its value on "
        "them is too good; --final measures it on test classes."
    ]


def _own_text(tuning: Tuning, trial: TrialResult) -> str:
    own = own_values(tuning.config, trial.values.get(METHOD_KEY))
    return " with the configuration's own values" if own == trial.values else ""


def front_table(tuning: Tuning) -> Table:
    """Return the trials of the Pareto front, by the first objective."""
    if not tuning.front:
        return [], []
    paths = list(tuning.scales)
    metrics = [objective.metric for objective in tuning.objectives]
    rows = [
        [
            trial.label,
            *(show(m, value) for m, value in zip(metrics, trial.objectives, strict=True)),
            *(_value_text(trial, path) for path in paths),
        ]
        for trial in tuning.front
    ]
    return ["trial", *map(label_of, metrics), *paths], rows


def _value_text(trial: TrialResult, path: str) -> str:
    return format_value(trial.values[path]) if path in trial.values else "not used"


# ---------------------------------------------------------------- cost and trials


def cost_text(tuning: Tuning) -> str:
    """Return what all trials cost, and what pruning saved."""
    text = f"All trials together: {format_seconds(tuning.seconds)}, "
    text += f"{sum(trial.steps or 0 for trial in tuning.latest):,} steps."
    saved = tuning.savings
    if saved.trials:
        count = "trial" if saved.trials == 1 else "trials"
        text += (
            f" Pruning {saved.trials} {count} saved {saved.steps:,} steps, {100 * saved.share:.0f} "
            f"% of the steps without pruning; at the speed of the same trials, about "
            f"{format_seconds(saved.seconds)}."
        )
    return text


@dataclass(frozen=True)
class TrialRow:
    """A row of the table of all trials; `links` has the name and folder of each run."""

    label: str
    links: list[tuple[str, str]]
    state: str
    values: str
    objectives: list[str]
    steps: str
    seconds: str
    problem: str


def trial_rows(tuning: Tuning) -> list[TrialRow]:
    """Return the table of all trials."""
    return [_trial_row(tuning, trial) for trial in tuning.trials]


def _trial_row(tuning: Tuning, trial: TrialResult) -> TrialRow:
    metrics = [objective.metric for objective in tuning.objectives]
    values = [show(m, v) for m, v in zip(metrics, trial.objectives, strict=False)]
    if not values:
        values = [MISSING] * len(metrics)
        if trial.state == "pruned" and trial.last is not None:
            values[0] = f"{show(metrics[0], trial.last)} so far"
    state: str = trial.state
    if trial in tuning.chosen:
        state = "best" if len(metrics) == 1 else "Pareto front"
    return TrialRow(
        label=trial.label,
        links=[
            (run.name, Path(os.path.relpath(run, tuning.folder.report_dir)).as_posix())
            for run in trial.runs
        ],
        state=state if trial.continues is None else f"{state}, continues trial {trial.continues}",
        values=", ".join(f"{path} {format_value(value)}" for path, value in trial.values.items()),
        objectives=values,
        steps=MISSING if trial.steps is None else f"{trial.steps:,}",
        seconds=MISSING if trial.seconds is None else format_seconds(trial.seconds),
        problem=trial.problem or "",
    )


def plain_trials(tuning: Tuning) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of all trials as plain numbers."""
    metrics = [objective.metric for objective in tuning.objectives]
    paths = list(tuning.scales)
    header = ["trial", "label", "state", *metrics, "last_value", *paths]
    rows = [
        [
            *(trial.number, trial.label, trial.state),
            *(trial.objectives or [""] * len(metrics)),
            trial.last,
            *(trial.values.get(path, "") for path in paths),
            *(trial.steps, trial.seconds, trial.problem),
        ]
        for trial in tuning.trials
    ]
    return [*header, "steps", "seconds", "problem"], rows


# ---------------------------------------------------------------- test classes


@dataclass(frozen=True)
class FinalSection:
    """The table of --final, and what it says."""

    table: Table
    notes: list[str]


def final_section(tuning: Tuning) -> FinalSection | None:
    """Return the results of --final; None before it has begun."""
    final = read_final(tuning.folder)
    if final is None:
        return None
    rows = [
        [
            metric_label(key),
            *(format_interval(one.interval(key), share=is_share(key)) for one in final.variants),
            format_interval(final.difference(key), share=is_share(key), signed=True),
        ]
        for key in final.keys
    ]
    values = ", ".join(f"{path} {format_value(value)}" for path, value in final.values.items())
    notes = [
        f"Tuned: {final.label} with {values}; untuned: the configuration's own values. Mean over "
        f"seeds {', '.join(map(str, final.seeds))} ± half the {LEVEL:.0%} interval by Student's t; "
        "the difference is taken seed by seed."
    ]
    if final.missing:
        notes.append(f"Not finished: {', '.join(final.missing)}.")
    header = ["test classes", *(one.name for one in final.variants), "difference"]
    return FinalSection((header, rows), notes)
