"""Which trials a search ends early, against a plain reference; no run is made."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from dml_dist.studies.samplers import first_rung
from dml_dist.studies.trials import CONTINUES, LABEL, PRUNED_AT
from tests.unit.test_trials import TWO, open_trials, section, stored

ASHA = {"name": "asha", "grace_steps": 4, "reduction": 2}


class Halving:
    """Asynchronous successive halving, as in Li et al. (2020), Algorithm 2, without promotion of
    paused trials: a trial goes on from a rung if it is in the top 1 / reduction there.
    """

    def __init__(self, grace: int, reduction: int) -> None:
        self.grace, self.reduction = grace, reduction
        self.rungs: dict[int, dict[int, float]] = {}

    def is_pruned(self, number: int, step: int, value: float) -> bool:
        rung = 0
        while step >= self.grace * self.reduction**rung:
            values = self.rungs.setdefault(rung, {})
            if number not in values:
                values[number] = value
                kept = max(1, len(values) // self.reduction)
                if sum(other > value for other in values.values()) >= kept:
                    return True
            rung += 1
        return False


def reports(seed: int, count: int = 10) -> list[tuple[int, int, float]]:
    """Rising curves in a random order of reports; some steps jump over a rung."""
    draw = random.Random(seed)
    curves = {
        number: [
            (step, draw.random() + 0.02 * step) for step in range(2, 41, draw.choice([2, 3, 9]))
        ]
        for number in range(count)
    }
    order = []
    while curves:
        number = draw.choice(list(curves))
        order.append((number, *curves[number].pop(0)))
        curves = {key: curve for key, curve in curves.items() if curve}
    return order


@pytest.mark.parametrize("seed", range(3))
def test_asha_prunes_as_successive_halving_does(seed: int) -> None:
    trials = open_trials(section(pruner=ASHA))
    reference = Halving(4, 2)
    for _ in range(10):
        trials.suggest()
    pruned: dict[int, int] = {}
    for number, step, value in reports(seed):
        if number not in pruned:
            decision = trials.report(number, step, value)
            assert decision == reference.is_pruned(number, step, value), (number, step)
            if decision:
                pruned[number] = step
                trials.prune(number)
    assert 3 <= len(pruned) < 10
    assert {step >= 8 for step in pruned.values()} == {True, False}  # At more than one rung.
    for number, step in pruned.items():
        trial = trials.all()[number]
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs[PRUNED_AT] == step == trial.last_step


def test_asha_decides_the_same_after_the_study_is_opened_again(tmp_path: Path) -> None:
    """Before every report; trials that are continued report their last step again."""
    tune = section(pruner=ASHA)
    reference = Halving(4, 2)
    trials = open_trials(tune, stored(tmp_path))
    for _ in range(6):
        trials.suggest()
    pruned: set[int] = set()
    for number, step, value in reports(5, count=6):
        if number in pruned:
            continue
        trials = open_trials(tune, stored(tmp_path))
        while trials.interrupted() is not None:
            pass
        known = trials.all()[number].intermediate_values
        if known:
            assert not trials.report(number, max(known), -1.0)
            assert trials.all()[number].intermediate_values == known
        if trials.report(number, step, value):
            pruned.add(number)
            # The command ends before the trial does: the next one is told again.
            trials = open_trials(tune, stored(tmp_path))
            while trials.interrupted() is not None:
                pass
            assert trials.report(number, step, value)
            trials.prune(number)
        assert (number in pruned) == reference.is_pruned(number, step, value)
    assert pruned


def test_a_continued_trial_is_not_pruned_and_not_counted(tmp_path: Path) -> None:
    tune = section(pruner=ASHA)
    trials = open_trials(tune, stored(tmp_path))
    good, bad, later = (trials.suggest() for _ in range(3))
    assert not trials.report(good.number, 4, 0.5)
    assert trials.report(bad.number, 4, 0.1)
    trials.prune(bad.number)
    trials.add_continuation(bad.number)
    one = trials.interrupted()
    assert one is not None
    assert (one.number, one.label, one.values) == (3, bad.label, bad.values)
    assert trials.count() == 3
    assert not trials.report(one.number, 4, 0.0)
    # It is no competitor: by the values 0.5 and 0.1 alone 0.2 is not in the better half.
    assert trials.report(later.number, 4, 0.2)
    again = open_trials(tune, stored(tmp_path))
    again.interrupted()
    again.interrupted()
    assert again.interrupted() == one
    again.complete(one.number, [0.9])
    assert again.all()[3].user_attrs == {CONTINUES: 1, LABEL: "trial-1"}
    assert again.all()[1].state == TrialState.PRUNED


def test_nothing_is_pruned_with_two_objectives() -> None:
    trials = open_trials(section(objectives=TWO))
    one = trials.suggest()
    assert not trials.report(one.number, 10, 0.1)
    trials.complete(one.number, [0.1, 1.0])


def test_values_that_are_not_finite_do_not_reach_the_pruner() -> None:
    trials = open_trials(section(pruner=ASHA))
    one = trials.suggest()
    assert not trials.report(one.number, 4, math.nan)
    assert not trials.report(one.number, 5, math.inf)
    assert trials.all()[0].intermediate_values == {}


def test_median_prunes_below_the_median_after_its_startup() -> None:
    pruner = {"name": "median", "grace_steps": 3, "startup_trials": 3}
    trials = open_trials(section(pruner=pruner))
    for value in (0.1, 0.3, 0.5):
        one = trials.suggest()
        assert not trials.report(one.number, 3, value)
        trials.complete(one.number, [value])
    worse, better = trials.suggest(), trials.suggest()
    assert not trials.report(worse.number, 2, 0.0)
    assert trials.report(worse.number, 3, 0.29)
    assert not trials.report(better.number, 3, 0.31)


@pytest.mark.parametrize(
    ("pruner", "steps", "expected"),
    [
        ({"name": "asha"}, 90, 10),
        ({"name": "asha", "reduction": 2}, 90, 22),
        ({"name": "asha"}, 5, 1),
        ({"name": "asha", "grace_steps": 7}, 90, 7),
        ({"name": "median"}, 90, 10),
        ({"name": "none"}, 90, None),
    ],
)
def test_first_rung(pruner: dict[str, Any], steps: int, expected: int | None) -> None:
    assert first_rung(section(pruner=pruner).pruner, steps) == expected
