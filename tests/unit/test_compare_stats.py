"""Intervals against scipy, and target recalls on curves worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dml_dist.report.study.comparison_tables import format_gain
from dml_dist.report.study.stats import (
    Curve,
    Interval,
    band_of,
    format_interval,
    reached,
    t_interval,
)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_intervals_are_those_of_student(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 0.1, count)
    found = t_interval(values.tolist())
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert found.count == count


def test_intervals_of_one_value_and_of_none() -> None:
    one, none = t_interval([0.25]), t_interval([])
    assert (one.mean, one.count) == (0.25, 1)
    assert math.isnan(one.half)
    assert math.isnan(none.mean)


def test_gains_report_their_sign() -> None:
    for values in ([0.01, 0.02, 0.03], [-0.01, -0.02, -0.03], [0.01, -0.02, 0.03], [0.5]):
        gain = t_interval(values)
        assert format_gain(gain) == format_interval(gain, signed=True)
    assert format_gain(t_interval([0.02, 0.02, 0.021])).endswith("%, higher")
    assert format_gain(t_interval([-0.02, -0.02, -0.021])).endswith("%, lower")
    assert format_interval(Interval(0.0123, 0.004, 3), signed=True) == "+1.23 ± 0.40 %"
    assert format_interval(Interval(-0.0123, math.nan, 1), signed=True) == "-1.23 %"


def curve(recall: list[float], steps: list[float] | None = None, speed: float = 2.0) -> Curve:
    at = np.array(steps or [10.0 * (n + 1) for n in range(len(recall))])
    return Curve(at, at / speed, np.array(recall))


def test_the_band_is_that_of_common_steps() -> None:
    band = band_of([curve([0.1, 0.2, 0.6]), curve([0.3, 0.4], [10.0, 30.0], speed=1.0)])
    np.testing.assert_array_equal(band.mean.steps, [10, 30])
    np.testing.assert_allclose(band.mean.recall, [0.2, 0.5])
    np.testing.assert_allclose(band.mean.seconds, [7.5, 22.5])
    np.testing.assert_array_equal(band.low, [0.1, 0.4])
    np.testing.assert_array_equal(band.high, [0.3, 0.6])
    assert len(band_of([]).mean) == 0
    assert len(band_of([curve([0.1], [1.0]), curve([0.1], [2.0])]).mean) == 0


def test_the_step_at_which_a_target_recall_is_reached() -> None:
    # The mean is 0.2, 0.4, 0.3, 0.5: a curve that falls again has reached its target.
    curves = [curve([0.1, 0.5, 0.3, 0.4]), curve([0.3, 0.3, 0.3, 0.6])]
    found = reached(curves, 0.4)
    assert (found.steps, found.seconds) == (20, 10)
    assert found.of_runs == (20, 40)
    assert found.num_runs == 2

    found = reached(curves, 0.45)
    assert (found.steps, found.of_runs) == (40, (20, 40))
    found = reached(curves, 0.55)
    assert (found.steps, found.seconds, found.of_runs) == (None, None, (40,))
    assert reached(curves, 0.05).steps == 10
    assert reached([], 0.1).steps is None


def test_a_target_recall_that_is_the_curves_own_best_is_reached() -> None:
    curves = [curve([0.1, 0.7]), curve([0.2, 0.1]), curve([0.3, 0.2])]
    best = float(band_of(curves).mean.recall.max())
    assert reached(curves, best).steps == 20
    assert reached(curves[::-1], best).steps == 20  # sums in another order
