"""The first values of a search: own ones, those of `start`, the best of another search."""

from __future__ import annotations

from pathlib import Path

import pytest

from dml_dist.errors import ConfigError
from dml_dist.runs.tuning import TuningFolder
from dml_dist.studies.storage import (
    check_tuning,
    starting_points,
)
from tests.tuning import LR, add, begin, configuration


def test_starting_points_of_methods() -> None:
    config = configuration(
        "optim.lr=0.001",
        space={"optim.lr": LR, "optim.weight_decay": {"type": "float", "low": 0.5, "high": 0.9}},
        methods={"one": [], "two": ["optim.lr=0.01"], "three": ["optim.lr=7"]},
        start=[{"method": "one", "optim.lr": 0.02}, {"method": "two", "optim.lr": 0.01}],
    )
    points, notes = starting_points(config)
    assert points == [
        {"method": "one", "optim.lr": 0.001},
        {"method": "two", "optim.lr": 0.01},
        {"method": "one", "optim.lr": 0.02},  # The rate 7 of method three is outside: no point.
    ]
    assert notes == []


def test_a_new_study_begins_with_the_best_values_of_an_old_one(tmp_path: Path) -> None:
    old = TuningFolder(tmp_path / "old")
    trials, _ = begin(configuration(), old)
    for number, lr in enumerate((0.09, 0.01, 0.02, 0.03, 0.0002, 0.04, 0.05, 0.06)):
        add(trials, 1 - number / 10, lr=lr)
    trials.diverged(add(trials, lr=0.07), "loss nan")
    trials.fail(add(trials, lr=0.08), "no memory")
    space = {"optim.lr": {**LR, "low": 0.005, "high": 0.08}}
    config = configuration(space=space)
    points, notes = starting_points(config, old.path)
    assert [point["optim.lr"] for point in points] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert notes == [
        f"--from {old.path}: begins with the best 5 of 8 complete trials; 2 better ones do not "
        "fit the space"
    ]
    other = configuration(space={"optim.weight_decay": LR})
    assert starting_points(other, old.path)[0] == []
    with pytest.raises(ConfigError, match="holds no trials"):
        check_tuning(config, TuningFolder(tmp_path / "new"), tmp_path / "missing")
    new = TuningFolder(tmp_path / "new")
    trials, notes = begin(config, new, source=old.path)
    assert trials.suggest().values == {"optim.lr": 0.01}
    _, notes = begin(config, new, source=old.path)
    assert f"--from {old.path}: not read, since this study has begun" in notes


def test_the_best_of_two_objectives_are_the_pareto_front(tmp_path: Path) -> None:
    objectives = [{"metric": "map_at_r"}, {"metric": "train_seconds", "direction": "minimize"}]
    config = configuration(objectives=objectives, pruner={"name": "none"})
    old = TuningFolder(tmp_path / "old")
    trials, _ = begin(config, old)
    for lr, values in ((0.01, [0.5, 9.0]), (0.02, [0.9, 10.0]), (0.03, [0.8, 11.0])):
        trials.complete(add(trials, lr=lr), values)
    points, _ = starting_points(config, old.path)
    assert points == [{"optim.lr": 0.02}, {"optim.lr": 0.01}]
