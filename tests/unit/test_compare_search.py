"""The search of a comparison without training: trials, their values, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, DivergedError, RunError
from dml_dist.random_streams import Stream, seed_of
from dml_dist.runs.comparison import (
    ComparisonFolder,
    run_config,
    searched_paths,
)
from dml_dist.runs.study import value_at
from dml_dist.studies.search import num_trials, search_method, starting_points
from tests.unit.test_compare import comparison, floats


def sampler_of_optuna(startup: int) -> optuna.samplers.TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed_of(Stream.HYPERPARAMETERS, 0, bits=32),
            n_startup_trials=startup,
            multivariate=True,
            group=True,
            constant_liar=True,
        )


class FakeRuns:
    """Runs whose MAP@R is a smooth function of their rates; some end, or diverge."""

    def __init__(self, end_after: int = 1000, diverge_above: float = math.inf) -> None:
        self.configs: list[RunConfig] = []
        self.end_after = end_after
        self.diverge_above = diverge_above

    def __call__(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        if len(self.configs) == self.end_after:
            raise KeyboardInterrupt
        self.configs.append(config)
        if config.optim.lr > self.diverge_above:
            raise DivergedError("the loss is not finite")
        distance = (math.log10(config.optim.lr) + 2.5) ** 2
        distance += (math.log10(config.optim.proxy_lr or 0.01) + 1) ** 2
        return {"validation": {"map_at_r": 1 / (1 + distance)}}


def search(
    folder: Path, runs: FakeRuns, method: str = "nca", config: RunConfig | None = None
) -> tuple[dict[str, float], list[Mapping[str, Any]]]:
    outcomes: list[Mapping[str, Any]] = []
    found = search_method(
        config or comparison(),
        method,
        ComparisonFolder(folder),
        runs,
        lambda name, number, outcome: outcomes.append(outcome),
    )
    return found, outcomes


def test_a_search_is_the_same_again_and_when_it_is_continued(tmp_path: Path) -> None:
    whole, outcomes = search(tmp_path / "whole", FakeRuns())
    assert outcomes[0]["values"] == {
        "optim.lr": 0.01,
        "optim.proxy_lr": 0.1,
    }  # the method's own
    assert len({json.dumps(outcome["values"]) for outcome in outcomes}) == 5
    best = max(outcomes, key=lambda outcome: outcome["map_at_r"])
    assert whole == best["values"]

    first, second = FakeRuns(end_after=2), FakeRuns()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", first)
    again, others = search(tmp_path / "cut", second)
    assert again == whole
    assert others == outcomes
    assert [len(runs.configs) for runs in (first, second)] == [2, 3]
    assert search(tmp_path / "cut", third := FakeRuns())[0] == whole
    assert third.configs == []


def test_a_search_is_that_of_optuna(tmp_path: Path) -> None:
    """An own loop over ask and tell with the same seed draws the same values."""
    _, outcomes = search(tmp_path, FakeRuns())
    study = optuna.create_study(direction="maximize", sampler=sampler_of_optuna(startup=2))
    study.enqueue_trial({"optim.lr": 0.01, "optim.proxy_lr": 0.1})

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("optim.lr", 1e-4, 1e-1, log=True)
        proxy_lr = trial.suggest_float("optim.proxy_lr", 1e-3, 1.0, log=True)
        return 1 / (1 + (math.log10(lr) + 2.5) ** 2 + (math.log10(proxy_lr) + 1) ** 2)

    study.optimize(objective, n_trials=5)
    assert [trial.params for trial in study.trials] == [one["values"] for one in outcomes]
    assert [trial.value for trial in study.trials] == pytest.approx(
        [one["map_at_r"] for one in outcomes]
    )


MIXED = {
    "optim.lr": floats(1e-4, 1e-1),
    "optim.proxy_lr": {"type": "float", "low": 0.1, "high": 0.5, "step": 0.2},
    "model.embedding_size": {"type": "int", "low": 16, "high": 512, "step": 16},
    "model.pooling": {"type": "categorical", "choices": ["avg", "gem"]},
    "train.max_grad_norm": {"type": "categorical", "choices": [1.5, None]},
}


def test_values_of_all_kinds_are_those_of_optuna_and_reach_the_runs(tmp_path: Path) -> None:
    search_section = {"trials": 10, "steps": 7, "space": MIXED}
    config = comparison(methods={"nca": []}, search=search_section)
    own = {
        "optim.lr": 0.01,
        "optim.proxy_lr": 0.1,
        "model.embedding_size": 128,
        "model.pooling": "avg",
        "train.max_grad_norm": None,
    }
    assert starting_points(config, "nca") == [own]
    runs = FakeRuns()
    best, outcomes = search(tmp_path, runs, config=config)
    # The files are enough: the same again without any run.
    assert search(tmp_path, FakeRuns(end_after=0), config=config) == (best, outcomes)

    study = optuna.create_study(direction="maximize", sampler=sampler_of_optuna(startup=5))
    study.enqueue_trial(own)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("optim.lr", 1e-4, 1e-1, log=True)
        proxy_lr = trial.suggest_float("optim.proxy_lr", 0.1, 0.5, step=0.2)
        trial.suggest_int("model.embedding_size", 16, 512, step=16)
        trial.suggest_categorical("model.pooling", ["avg", "gem"])
        trial.suggest_categorical("train.max_grad_norm", [1.5, None])
        return 1 / (1 + (math.log10(lr) + 2.5) ** 2 + (math.log10(proxy_lr) + 1) ** 2)

    study.optimize(objective, n_trials=10)
    assert [trial.params for trial in study.trials] == [one["values"] for one in outcomes]
    found = [{path: value_at(config, path) for path in MIXED} for config in runs.configs]
    assert found == [one["values"] for one in outcomes]
    assert len({one["model.pooling"] for one in found}) == 2
    assert len({one["train.max_grad_norm"] for one in found}) == 2
    assert run_config(config, "nca", 3, best).model.embedding_size == best["model.embedding_size"]


def test_trials_use_validation_classes_and_only_the_paths_of_the_method(tmp_path: Path) -> None:
    runs = FakeRuns()
    found, _ = search(tmp_path, runs, "triplet")
    assert list(found) == ["optim.lr"]
    assert searched_paths(comparison(), "triplet") == ["optim.lr"]
    for config in runs.configs:
        assert config.optim.proxy_lr is None
        assert config.data.test_split == "validation"
        assert config.evaluation.evaluate_test_every is None
        assert config.seed == 0


def test_own_values_outside_the_ranges_are_not_tried(tmp_path: Path) -> None:
    config = comparison("optim.lr=0.5")
    assert starting_points(config, "nca") == [{"optim.proxy_lr": 0.1}]
    _, outcomes = search(tmp_path, FakeRuns(), config=config)
    assert outcomes[0]["values"]["optim.proxy_lr"] == 0.1
    assert all(1e-4 <= outcome["values"]["optim.lr"] <= 1e-1 for outcome in outcomes)


def files_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads((folder / f"search/nca/trial-{number}.json").read_text()) for number in range(5)
    ]


def test_the_best_values_are_those_of_the_files(tmp_path: Path) -> None:
    found, outcomes = search(tmp_path, FakeRuns())
    files = files_of(tmp_path)
    assert files == outcomes
    assert [one["values"] for one in files if one["map_at_r"] == best_of(files)] == [found]


def best_of(files: list[dict[str, Any]]) -> float:
    return max(one["map_at_r"] for one in files if one["map_at_r"] is not None)


def test_trials_that_diverge_have_the_worst_value_and_others_win(tmp_path: Path) -> None:
    found, outcomes = search(tmp_path, FakeRuns(diverge_above=0.009))
    assert outcomes[0]["map_at_r"] is None
    assert outcomes[0]["problem"] == "the loss is not finite"
    assert found["optim.lr"] <= 0.009
    # The answer is kept: it is not tried again.
    assert search(tmp_path, runs := FakeRuns()) == (found, outcomes)
    assert runs.configs == []

    # Optuna's own loop, with MAP@R 0 where the loss was not finite, draws the same values.
    study = optuna.create_study(direction="maximize", sampler=sampler_of_optuna(startup=2))
    study.enqueue_trial({"optim.lr": 0.01, "optim.proxy_lr": 0.1})
    values = iter(0.0 if one["map_at_r"] is None else one["map_at_r"] for one in outcomes)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("optim.lr", 1e-4, 1e-1, log=True)
        trial.suggest_float("optim.proxy_lr", 1e-3, 1.0, log=True)
        return next(values)

    study.optimize(objective, n_trials=5)
    assert [trial.params for trial in study.trials] == [one["values"] for one in outcomes]


def test_no_trial_with_a_finite_loss(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none of the 5 trials of nca had a finite loss"):
        search(tmp_path, FakeRuns(diverge_above=0.0))
    assert [one["map_at_r"] for one in files_of(tmp_path)] == [None] * 5


# ---------------------------------------------------------------- samplers


def with_sampler(name: str, space: dict[str, Any], trials: int) -> RunConfig:
    whole = {"trials": trials, "steps": 7, "space": space, "sampler": {"name": name}}
    return comparison(methods={"nca": []}, search=whole)


SPACE = {"optim.lr": floats(1e-4, 1e-1), "optim.proxy_lr": floats(1e-3, 1.0)}
GRID = {
    "optim.lr": {"type": "float", "low": 0.005, "high": 0.015, "step": 0.005},
    "model.pooling": {"type": "categorical", "choices": ["avg", "gem"]},
}


def test_random_values_do_not_depend_on_results(tmp_path: Path) -> None:
    config = with_sampler("random", SPACE, 20)
    _, first = search(tmp_path / "first", FakeRuns(), config=config)
    _, second = search(tmp_path / "second", FakeRuns(diverge_above=1e-3), config=config)
    values = [one["values"] for one in first]
    assert values == [one["values"] for one in second]
    assert values[0] == {"optim.lr": 0.01, "optim.proxy_lr": 0.1}
    rng = np.random.RandomState(seed_of(Stream.HYPERPARAMETERS, 0, bits=32))
    # The first trial is given.
    drawn = rng.uniform(math.log(1e-4), math.log(1e-1))
    assert values[1]["optim.lr"] == pytest.approx(math.exp(drawn))


def test_a_grid_is_tried_once_with_the_own_values_first(tmp_path: Path) -> None:
    config = with_sampler("grid", GRID, 40)
    assert num_trials(config, "nca") == 6
    runs = FakeRuns()
    _, outcomes = search(tmp_path, runs, config=config)
    points = [tuple(one["values"].values()) for one in outcomes]
    assert points == [
        *((0.01, "avg"), (0.005, "avg"), (0.005, "gem")),
        *((0.01, "gem"), (0.015, "avg"), (0.015, "gem")),
    ]
    assert search(tmp_path, again := FakeRuns(), config=config)[1] == outcomes
    assert again.configs == []


def test_a_grid_has_no_trials_between_its_points(tmp_path: Path) -> None:
    config = with_sampler("grid", GRID | {"optim.lr": GRID["optim.lr"] | {"high": 0.005}}, 40)
    _, outcomes = search(tmp_path, FakeRuns(), config=config)  # Its own rate is 0.01.
    assert [tuple(one["values"].values()) for one in outcomes] == [(0.005, "avg"), (0.005, "gem")]


def test_a_gaussian_process_is_continued_with_the_same_values(tmp_path: Path) -> None:
    config = with_sampler("gp", SPACE, 13)
    whole, outcomes = search(tmp_path / "whole", FakeRuns(), config=config)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", FakeRuns(end_after=12), config=config)
    assert search(tmp_path / "cut", FakeRuns(), config=config) == (whole, outcomes)


# ---------------------------------------------------------------- what is refused


def test_other_failures_end_the_search(tmp_path: Path) -> None:
    def fail(config: RunConfig, folder: Path) -> dict[str, Any]:
        raise RunError("disk full")

    with pytest.raises(RunError, match="disk full"):
        search_method(comparison(), "nca", ComparisonFolder(tmp_path), fail, lambda *_: None)
    assert not list(tmp_path.rglob("*.json"))


def test_trials_of_another_configuration_are_refused(tmp_path: Path) -> None:
    search(tmp_path, FakeRuns())
    with pytest.raises(ConfigError, match=r"trial 0 of nca in .* is of another configuration"):
        search(tmp_path, FakeRuns(), config=comparison("optim.eps=0.5"))
