"""Tables of a comparison: results of methods, single runs, and gains over other methods.

Each table of the page is also written as CSV with plain numbers.
"""

from __future__ import annotations

import math
from typing import Any

from dml_dist.report.formatting import MISSING, format_metric, format_seconds, metric_label
from dml_dist.report.study.read import Comparison, MethodResult
from dml_dist.report.study.stats import LEVEL, Interval, format_interval

SINGLE_RUNS = "of single runs"
"""Heading of the column with the steps of the single runs."""
TIME = "time to it"
"""Heading of the column with the training time until the target recall."""


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of results, formatted."""
    recall, target = comparison.recall_key, comparison.target_recall
    header = ["method", "seeds", metric_label(recall), metric_label("map_at_r")]
    if target is not None:
        header += [f"steps to {format_metric(recall, target)}", SINGLE_RUNS, TIME]
    return header, [
        [
            method.name,
            str(len(method.runs)),
            format_interval(method.interval(recall)),
            format_interval(method.interval("map_at_r")),
            *(_reached(method, target) if target is not None else []),
        ]
        for method in comparison.methods
    ] + [
        [
            label,
            "",
            *(format_metric(key, values.get(key)) for key in (recall, "map_at_r")),
            *([MISSING] * (len(header) - 4)),
        ]
        for label, values in comparison.features.items()
    ]


def _reached(method: MethodResult, target: float) -> list[str]:
    if not method.runs:
        return [MISSING] * 3
    found = method.reached(target)
    steps = "not reached" if found.steps is None else f"{found.steps:,.0f}"
    runs = f"{len(found.of_runs)} of {found.num_runs}"
    if found.of_runs:
        low, high = min(found.of_runs), max(found.of_runs)
        span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        runs = span if len(found.of_runs) == found.num_runs else f"{span} ({runs})"
    return [steps, runs, MISSING if found.seconds is None else format_seconds(found.seconds)]


def plain_results(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the table of results as plain numbers."""
    recall, target = comparison.recall_key, comparison.target_recall
    header = ["method", "seeds"]
    for key in (recall, "map_at_r"):
        header += [key, f"{key}_low", f"{key}_high"]
    header += ["target_recall", "steps_to_target", "seconds_to_target", "runs_reaching_target"]
    rows = []
    for method in comparison.methods:
        row: list[Any] = [method.name, len(method.runs)]
        for key in (recall, "map_at_r"):
            interval = method.interval(key)
            row += [_cell(interval.mean), _cell(interval.low), _cell(interval.high)]
        if target is None or not method.runs:
            row += ["", "", "", ""]
        else:
            found = method.reached(target)
            row += [target, found.steps, found.seconds, len(found.of_runs)]
        rows.append(row)
    for label, values in comparison.features.items():
        scores = [x for key in (recall, "map_at_r") for x in (values.get(key), "", "")]
        rows.append([label, "", *scores, "", "", "", ""])
    return header, rows


def plain_runs(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the single runs as plain numbers."""
    recall = comparison.recall_key
    rows = [
        [
            *(method.name, run.seed, run.trained.get(recall), run.trained.get("map_at_r")),
            *(run.step, run.seconds),
        ]
        for method in comparison.methods
        for run in method.runs
    ]
    return [
        "method",
        "seed",
        recall,
        "map_at_r",
        "checkpoint_step",
        "seconds_with_evaluations",
    ], rows


# ---------------- gains

HIGHER, LOWER = "higher", "lower"
"""Word for a gain whose interval does not contain zero."""


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of differences, formatted; no rows without bases."""
    keys = (comparison.recall_key, "map_at_r")
    rows = [
        [method.name, base.name, *(format_gain(method.difference(base, key)) for key in keys)]
        for method, base in comparison.differences
    ]
    return ["method", "against", *map(metric_label, keys)], rows


def format_gain(gain: Interval) -> str:
    """Return a gain with its interval, and a word if it does not contain zero."""
    text = format_interval(gain, signed=True)
    if math.isnan(gain.half) or gain.low <= 0 <= gain.high:
        return text
    return f"{text}, {HIGHER if gain.low > 0 else LOWER}"


def difference_notes(comparison: Comparison) -> list[str]:
    """Return what the columns of the table mean."""
    if not comparison.differences:
        return []
    return [
        "Mean over the seeds of the difference between the two methods with the same seed, "
        f"± half the {LEVEL:.0%} interval by Student's t. “Higher” or “lower”: the interval does "
        f"not contain zero; by chance alone this happens in one of {1 / (1 - LEVEL):.0f} numbers."
    ]


def plain_differences(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of the differences as plain numbers."""
    keys = (comparison.recall_key, "map_at_r")
    header = ["method", "base", "seeds"]
    for key in keys:
        header += [key, f"{key}_low", f"{key}_high"]
    rows = []
    for method, base in comparison.differences:
        gains = [method.difference(base, key) for key in keys]
        row: list[Any] = [method.name, base.name, gains[0].count]
        for gain in gains:
            row += map(_cell, (gain.mean, gain.low, gain.high))
        rows.append(row)
    return header, rows


# ---------------- plain numbers


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value
