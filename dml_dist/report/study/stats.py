"""Statistics of a comparison: means with intervals, and when a target recall is reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dml_dist.report.formatting import MISSING

LEVEL = 0.95
"""Confidence level of the intervals."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its confidence interval of LEVEL, by Student's t.

    Attributes:
        mean: NaN of no value.
        half: Half the width of the interval; NaN of fewer than two values.
        count: Number of values.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def t_interval(values: Sequence[float]) -> Interval:
    """Return mean and LEVEL interval of a few values: mean +- t * s / sqrt(n), n - 1 degrees.

    s is the standard deviation with n - 1 in its denominator, t the quantile of Student's t.
    """
    from scipy.stats import t

    count = len(values)
    mean = statistics.fmean(values) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, count)
    quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), count)


def format_interval(interval: Interval, *, signed: bool = False, share: bool = True) -> str:
    """Return a mean with half the width of its interval, where there is one; shares in percent."""
    if math.isnan(interval.mean):
        return MISSING
    factor, digits, unit = (100, 2, " %") if share else (1, 4, "")
    text = f"{factor * interval.mean:{'+' if signed else ''}.{digits}f}"
    if not math.isnan(interval.half):
        text += f" ± {factor * interval.half:.{digits}f}"
    return text + unit


@dataclass(frozen=True, eq=False)
class Curve:
    """R@1 of one run during training, or the mean of some runs.

    Attributes:
        steps: (n,) float64, rising.
        seconds: (n,) float64, time spent on training until then, without evaluations.
        recall: (n,) float64 in [0, 1].
    """

    steps: np.ndarray
    seconds: np.ndarray
    recall: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, eq=False)
class Band:
    """Curves of one method on the steps that all its runs have.

    Attributes:
        mean: The mean curve.
        low: (n,) lowest R@1 of the runs.
        high: (n,) highest.
    """

    mean: Curve
    low: np.ndarray
    high: np.ndarray


def band_of(curves: Sequence[Curve]) -> Band:
    """Return mean, minimum and maximum of curves; empty when they share no step."""
    if not curves:
        nothing = np.zeros(0)
        return Band(Curve(nothing, nothing, nothing), nothing, nothing)
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    places = [np.searchsorted(curve.steps, steps) for curve in curves]
    pairs = list(zip(curves, places, strict=True))
    recall = np.stack([curve.recall[at] for curve, at in pairs])
    seconds = np.stack([curve.seconds[at] for curve, at in pairs])
    mean = Curve(steps, seconds.mean(axis=0), recall.mean(axis=0))
    return Band(mean, recall.min(axis=0), recall.max(axis=0))


@dataclass(frozen=True)
class Reached:
    """Where curves first reach a target recall, among the evaluated steps.

    Attributes:
        steps: Of the mean curve; None if it never reaches the target.
        seconds: Its training time there.
        of_runs: Steps of the single runs that reach it.
        num_runs: Number of all runs.
    """

    steps: float | None
    seconds: float | None
    of_runs: tuple[float, ...]
    num_runs: int


def reached(curves: Sequence[Curve], target: float) -> Reached:
    """Return where the mean of some curves, and each of them, first reaches a target recall."""
    mean = band_of(curves).mean
    at = _first(mean, target)
    found = [curve.steps[place] for curve in curves if (place := _first(curve, target)) is not None]
    return Reached(
        steps=None if at is None else float(mean.steps[at]),
        seconds=None if at is None else float(mean.seconds[at]),
        of_runs=tuple(float(step) for step in found),
        num_runs=len(curves),
    )


def _first(curve: Curve, target: float) -> int | None:
    # A mean of the same numbers may differ in its last bit.
    high = np.flatnonzero(curve.recall >= target - 1e-12)
    return int(high[0]) if len(high) else None
