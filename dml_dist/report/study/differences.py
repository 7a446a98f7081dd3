"""What methods gain over the one that each should improve, with intervals over the same seeds."""

from __future__ import annotations

import math
from typing import Any

from dml_dist.report.formatting import metric_label
from dml_dist.report.study.read import Comparison
from dml_dist.report.study.stats import LEVEL, Interval, format_interval

HIGHER, LOWER = "higher", "lower"
"""What is said of a gain whose interval does not hold zero."""


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of differences, for people; no rows without bases."""
    keys = (comparison.recall_key, "map_at_r")
    rows = [
        [method.name, base.name, *(format_gain(method.difference(base, key)) for key in keys)]
        for method, base in comparison.differences
    ]
    return ["method", "against", *map(metric_label, keys)], rows


def format_gain(gain: Interval) -> str:
    """Return a gain with its interval, and a word where zero does not lie in it."""
    text = format_interval(gain, signed=True)
    if math.isnan(gain.half) or gain.low <= 0 <= gain.high:
        return text
    return f"{text}, {HIGHER if gain.low > 0 else LOWER}"


def difference_notes(comparison: Comparison) -> list[str]:
    """Return what the columns of the table mean."""
    if not comparison.differences:
        return []
    return [
        "Mean over the seeds of the method's number less that of the other method with the same "
        f"seed, ± half the {LEVEL:.0%} interval by Student t; higher or lower where zero lies "
        f"outside of it, which happens by chance alone in one of {1 / (1 - LEVEL):.0f} numbers."
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
            row += ["" if math.isnan(x) else x for x in (gain.mean, gain.low, gain.high)]
        rows.append(row)
    return header, rows
