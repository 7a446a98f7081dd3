"""Labels, colors and ticks of a search's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dml_dist.config.search_space import format_value
from dml_dist.report.formatting import format_metric, format_seconds, is_share, metric_label
from dml_dist.studies.trials import State
from dml_dist.studies.tune_read import Scale, Tuning

COLORS: Mapping[State, str] = {
    "complete": "recall",
    "pruned": "faint",
    "failed": "fifth",
    "diverged": "fourth",
    "outside": "sixth",
    "running": "third",
    "waiting": "third",
}
BEST = "map"
MARKERS: Mapping[State, str] = {
    "complete": "o",
    "pruned": "v",
    "failed": "x",
    "diverged": "D",
    "outside": "^",
    "running": "s",
    "waiting": "s",
}
_LONGEST_TICK = 16  # characters


def show(metric: str, value: float) -> str:
    """Return a value of an objective as text."""
    return format_seconds(value) if metric == "train_seconds" else format_metric(metric, value)


def label_of(metric: str) -> str:
    """Return the display name of an objective."""
    return "training time" if metric == "train_seconds" else metric_label(metric)


def sentence(text: str) -> str:
    """Return text that begins with a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def chosen_text(tuning: Tuning) -> str:
    """Return what the highlighted trials are."""
    return "the best trial" if len(tuning.objectives) == 1 else "the Pareto front"


def axis_of(metric: str) -> tuple[str, float]:
    """Return the label of an objective's axis, and the factor of its values there."""
    if metric == "train_seconds":
        return "training time (s)", 1.0
    if is_share(metric):
        return f"{metric_label(metric)} (%)", 100.0
    return metric_label(metric), 1.0


def plain_text(text: str) -> str:
    """Return text in which matplotlib finds no formulas."""
    return text.replace("$", r"\$")


def wrapped(path: str) -> str:
    """Return a path on a line for each of its parts."""
    return plain_text(path.replace(".", ".\n"))


def ticks_of(scale: Scale, count: int = 4) -> list[tuple[float, str]]:
    """Return positions and texts of an axis's ticks."""
    from matplotlib.ticker import MaxNLocator

    if scale.choices:
        texts = [format_value(choice) for choice in scale.choices]
        cut = [t if len(t) <= _LONGEST_TICK else f"{t[: _LONGEST_TICK - 1]}…" for t in texts]
        places = map(scale.position, scale.choices)
        return [(place, plain_text(text)) for place, text in zip(places, cut, strict=True)]
    low, high = scale.low, scale.high
    if low == high:
        return [(0.5, f"{low:g}")]
    linear = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=scale.whole)
    values = _inside(linear.tick_values(low, high), low, high)
    if scale.grid:
        values = list(scale.grid)
    elif scale.log:
        # The first of these that has ticks; a narrow range keeps those of a linear axis.
        for digits in ((1,), (1, 2, 5)):
            found = _inside([d * 10.0**k for k in _exponents(low, high) for d in digits], low, high)
            if len(found) > 1:
                values = found[:: math.ceil(len(found) / (count + 1))]
                break
    return [(scale.position(value), f"{value:g}") for value in values]


def _exponents(low: float, high: float) -> range:
    return range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)


def _inside(values: Sequence[float], low: float, high: float) -> list[float]:
    slack = 1e-9 * (high - low)
    return [float(value) for value in values if low - slack <= value <= high + slack]


def set_ticks(axis: Any, scale: Scale, count: int = 4) -> None:
    """Give an axis of positions the ticks of a scale."""
    ticks = ticks_of(scale, count)
    axis.set_ticks([place for place, _ in ticks], [text for _, text in ticks])
