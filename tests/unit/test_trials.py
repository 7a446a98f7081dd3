"""Trials of a search in Optuna's storage, samplers and pruners; no run is made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dml_dist.config.study import ObjectiveConfig, TuneConfig
from dml_dist.errors import ConfigError
from dml_dist.studies import samplers
from dml_dist.studies.samplers import create_study, grid_points
from dml_dist.studies.trials import LABEL, PROBLEM, SECONDS, Trials

SPACE = {
    "optim.lr": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
    "loss.scale": {"type": "int", "low": 1, "high": 64},
    "model.pooling": {"type": "categorical", "choices": ["gem", "avg"]},
}
METHODS = {
    "methods": {"plain": [], "flow": []},
    "without": {"plain": ["loss.scale"]},
}
TWO = [{"metric": "map_at_r"}, {"metric": "train_seconds", "direction": "minimize"}]


def section(**fields: Any) -> TuneConfig:
    values = {"space": SPACE, "pruner": {"name": "none"}, **fields}
    return TuneConfig.model_validate_json(json.dumps(values))  # Lists for tuples, as in YAML.


def open_trials(tune: TuneConfig, storage: BaseStorage | None = None, steps: int = 90) -> Trials:
    study = create_study(
        tune, tune.objectives, tune.pruner, steps=steps, name="demo", storage=storage
    )

    def paths_of(method: str | None) -> Sequence[str]:
        return [path for path in tune.space if path not in tune.without.get(str(method), ())]

    return Trials(study, tune.space, paths_of, tuple(tune.methods))


def stored(folder: Path) -> BaseStorage:
    """Open a storage as another process does: of the kind that opens fast."""
    return JournalStorage(JournalFileBackend(f"{folder}/optuna.journal"))


def score(values: dict[str, Any]) -> float:
    """The best values are lr = 0.01 and gem."""
    return (
        1 - abs(math.log10(values["optim.lr"]) + 2) / 4 - 0.1 * (values["model.pooling"] != "gem")
    )


def search(trials: Trials, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        one = trials.suggest()
        trials.complete(one.number, [score(one.values)])
        found.append(one.values)
    return found


# ---------------------------------------------------------------- suggestions


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_seeded_search_repeats_and_goes_on_with_other_values(
    tmp_path: Path, sampler: str
) -> None:
    """With methods, whose values differ; TPE's model is in use, since two trials start it."""
    fields = {"sampler": {"name": sampler}, **METHODS}
    if sampler == "tpe":
        fields["sampler"]["startup_trials"] = 2
    tune = section(**fields)
    first = search(open_trials(tune, stored(tmp_path)), 8)
    assert search(open_trials(tune), 8) == first
    assert search(open_trials(section(**fields, seed=1)), 8) != first
    for values in first:
        assert ("loss.scale" in values) == (values["method"] == "flow")
    assert {values["method"] for values in first} == {"plain", "flow"}

    again = open_trials(tune, stored(tmp_path))
    assert again.interrupted() is None
    assert again.count() == 8
    later = search(again, 4)
    assert [one.user_attrs[LABEL] for one in again.all()] == [f"trial-{n}" for n in range(12)]
    assert not {values["optim.lr"] for values in first} & {values["optim.lr"] for values in later}


def test_tpe_finds_better_values_than_random() -> None:
    """The medians of 30 trials: a sampler that does not learn would be at the random one."""

    def median(sampler: str) -> float:
        values = search(open_trials(section(sampler={"name": sampler}, **METHODS)), 30)
        return sorted(map(score, values[10:]))[10]

    assert median("tpe") > median("random") + 0.05


@pytest.mark.parametrize("sampler", ["gp", "cmaes"])
def test_other_samplers_suggest_values_of_the_space(sampler: str) -> None:
    numbers = {path: one for path, one in SPACE.items() if one["type"] != "categorical"}
    tune = section(
        sampler={"name": sampler, "startup_trials": 2}, space=SPACE if sampler == "gp" else numbers
    )
    trials = open_trials(tune)
    for _ in range(4):
        one = trials.suggest()
        trials.complete(one.number, [one.values["loss.scale"] / 64])
        assert one.values.keys() == tune.space.keys()
        assert all(tune.space[path].contains(value) for path, value in one.values.items())


def test_cmaes_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"optim.lr": SPACE["optim.lr"]}
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install cmaes"):
        open_trials(section(space=space, sampler={"name": "cmaes"}))


def test_enqueued_values_come_first_and_once(tmp_path: Path) -> None:
    """Types are those of the space, as they are when the trial is read from the storage."""
    space = {
        "optim.lr": {"type": "float", "low": 0, "high": 2},
        "model.dim": {"type": "categorical", "choices": [1, 2.5, None]},
    }
    trials = open_trials(section(space=space), stored(tmp_path))
    point = {"optim.lr": 1, "model.dim": 1.0}
    trials.enqueue([point, {"model.dim": None}, point, {"optim.lr": 1.0, "model.dim": 1}])
    assert trials.waiting() == 2
    one = trials.suggest()
    assert repr(one.values) == "{'optim.lr': 1.0, 'model.dim': 1}"
    assert repr(open_trials(section(space=space), stored(tmp_path)).interrupted().values) == repr(
        one.values
    )
    assert trials.suggest().values["model.dim"] is None
    trials.enqueue([point], limit=1)
    trials.enqueue([{"optim.lr": 0.1}, {"optim.lr": 0.2}, {"optim.lr": 0.3}], limit=2)
    assert [trials.suggest().values["optim.lr"] for _ in range(2)] == [0.1, 0.2]
    assert (trials.waiting(), trials.count()) == (0, 4)


def test_grid_has_every_combination_of_a_method_once() -> None:
    space = {
        "optim.lr": {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1},
        "loss.scale": {"type": "int", "low": 1, "high": 2},
    }
    tune = section(space=space, sampler={"name": "grid"}, **METHODS)
    points = list(
        grid_points(
            tune.space,
            lambda method: ["optim.lr"] if method == "plain" else list(space),
            list(tune.methods),
        )
    )
    plain = [point for point in points if point["method"] == "plain"]
    assert [round(point["optim.lr"], 6) for point in plain] == [0.1, 0.2, 0.3]
    flow = [(round(p["optim.lr"], 6), p["loss.scale"]) for p in points if p["method"] == "flow"]
    assert flow == [(lr, scale) for lr in (0.1, 0.2, 0.3) for scale in (1, 2)]
    assert len(points) == 9


# ---------------------------------------------------------------- interruptions and outcomes


def test_interrupted_trials_keep_number_and_values(tmp_path: Path) -> None:
    tune = section(**METHODS)
    trials = open_trials(tune, stored(tmp_path))
    search(trials, 1)
    left = [trials.suggest(), trials.suggest()]
    again = open_trials(tune, stored(tmp_path))
    assert [again.interrupted(), again.interrupted(), again.interrupted()] == [*left, None]
    again.complete(left[1].number, [0.5], **{SECONDS: 3.0})
    assert again.suggest().number == 3
    third = open_trials(tune, stored(tmp_path))
    assert third.interrupted() == left[0]
    assert third.all()[2].values == [0.5]
    assert third.all()[2].user_attrs == {LABEL: "trial-2", SECONDS: 3.0}


def test_a_suggestion_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    """Killed after the first value: it stays, the others are drawn."""
    tune = section(sampler={"name": "tpe", "startup_trials": 2})
    trials = open_trials(tune, stored(tmp_path))
    search(trials, 3)
    begun = trials.study.ask()
    first = begun.suggest_float("optim.lr", 1e-4, 1.0, log=True)
    again = open_trials(tune, stored(tmp_path))
    assert again.count() == 4
    one = again.interrupted()
    assert one is not None
    assert (one.number, one.label, one.values["optim.lr"]) == (3, "trial-3", first)
    assert one.values.keys() == SPACE.keys()
    assert again.all()[3].params == one.values


def test_values_that_are_not_finite_are_the_worst() -> None:
    trials = open_trials(section(objectives=TWO))
    pairs: list[list[float]] = [[0.5, 30.0], [-0.1, 20.0], [math.nan, 10.0], [0.4, math.inf]]
    for values in pairs:
        trials.complete(trials.suggest().number, values)
    trials.diverged(trials.suggest().number, "loss nan at step 3", **{SECONDS: 1.0})
    trials.fail(trials.suggest().number, "no memory")
    found = [trial.values for trial in trials.all()]
    assert found == [[0.5, 30.0], [-0.1, 20.0], [-0.1, 10.0], [0.4, 30.0], [-0.1, 30.0], None]
    assert trials.all()[4].user_attrs[PROBLEM] == "loss nan at step 3"
    assert trials.all()[5].state == TrialState.FAIL
    assert trials.all()[5].user_attrs[PROBLEM] == "no memory"
    # A first trial that diverges is not the fastest one.
    first = open_trials(section(objectives=TWO))
    first.diverged(first.suggest().number, "loss nan")
    first.complete(first.suggest().number, [0.1, 5000.0])
    assert [trial.number for trial in first.study.best_trials] == [1]


def test_best_trial_is_no_made_up_one() -> None:
    lower = ObjectiveConfig(metric="train_seconds", direction="minimize")
    for objective, expected in ((ObjectiveConfig(), 2), (lower, 1)):
        trials = open_trials(section(objectives=[objective.model_dump()]))
        assert trials.best() is None
        trials.diverged(trials.suggest().number, "loss nan")
        assert trials.best() is None
        for value in (0.2, 0.3, 0.3):
            trials.complete(trials.suggest().number, [value])
        best = trials.best()
        assert best is not None
        assert best.number == expected


def test_optuna_is_quiet() -> None:
    open_trials(section())
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


def test_a_trial_that_was_stopped_is_given_again() -> None:
    trials = open_trials(section())
    begun = trials.suggest()
    assert not trials.has_interrupted
    trials.pause(begun.number, seconds=3.0)
    assert trials.has_interrupted
    assert trials.interrupted() == begun
    assert not trials.has_interrupted
    assert trials.all()[begun.number].user_attrs["seconds"] == 3.0
    trials.complete(begun.number, [0.5])
