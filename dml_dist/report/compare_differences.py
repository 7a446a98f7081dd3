"""What methods gain over the one that each should improve, with intervals over the same seeds."""

from __future__ import annotations

import math
from typing import Any

from dml_dist.report.compare_read import Comparison
from dml_dist.report.compare_stats import LEVEL, Interval, format_interval
from dml_dist.report.tables import MISSING, metric_label


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of differences, for people; no rows without bases."""
    keys = (comparison.recall_key, "map_at_r")
    header = ["method", "against"]
    for key in keys:
        header += [metric_label(key), "it is"]
    rows = []
    for method, base in comparison.differences:
        row = [method.name, base.name]
        for key in keys:
            gain = method.difference(base, key)
            row += [format_interval(gain, signed=True), verdict(gain)]
        rows.append(row)
    return header, rows


def verdict(gain: Interval) -> str:
    """Return in a word on which side of zero an interval lies."""
    if math.isnan(gain.half):
        return MISSING
    if gain.low > 0:
        return "higher"
    return "lower" if gain.high < 0 else "not told apart"


def difference_notes(comparison: Comparison) -> list[str]:
    """Return what the columns of the table mean."""
    if not comparison.differences:
        return []
    return [
        "Mean over the seeds of the method's number less that of the other method with the same "
        f"seed, ± half the {LEVEL:.0%} interval by Student t. Not told apart: zero lies inside. "
        f"Of many such rows about one in {1 / (1 - LEVEL):.0f} lies outside by chance alone."
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
