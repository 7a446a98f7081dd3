"""Changes of a search's ranges: no trial is lost, and a killed command leaves no half of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dml_dist.config.schema import RunConfig
from dml_dist.runs.tuning import TuningFolder, tune_section
from dml_dist.studies import ranges
from dml_dist.studies.ranges import CHANGES, READY
from dml_dist.studies.storage import load_study, open_trials, trials_left
from dml_dist.studies.trials import LABEL, OUTSIDE, PROBLEM
from tests.tuning import LR, add, begin, configuration

PRUNER = {"name": "asha", "grace_steps": 4, "reduction": 2}


@pytest.fixture
def folder(tmp_path: Path) -> TuningFolder:
    return TuningFolder(tmp_path / "study")


def changed(*ends: float, **fields: Any) -> RunConfig:
    low, high = ends
    space = {"optim.lr": {**LR, "low": low, "high": high}}
    return configuration(space=space, pruner=PRUNER, trials=20, **fields)


def facts(trial: optuna.trial.FrozenTrial) -> tuple[Any, ...]:
    """All but the distributions and Optuna's own number of the trial."""
    return (
        *(trial.number, trial.state, trial.values, trial.params, trial.intermediate_values),
        *(trial.user_attrs, trial.system_attrs, trial.datetime_start, trial.datetime_complete),
    )


def all_states(folder: TuningFolder) -> list[optuna.trial.FrozenTrial]:
    """Make a study with trials of every state, inside and outside of 0.001 to 0.1."""
    trials, _ = begin(changed(1e-4, 0.1), folder)
    for lr in (0.01, 0.0002):
        complete, pruned, failed, diverged = (add(trials, lr=lr * place) for place in range(1, 5))
        for number, value in ((complete, 0.5), (pruned, 0.1)):
            is_pruned = trials.report(number, 4, value)
        assert is_pruned
        trials.prune(pruned)
        trials.complete(complete, [0.6])
        trials.fail(failed, "no memory")
        trials.diverged(diverged, "loss nan")
    add(trials, lr=0.05)
    add(trials, lr=0.0005)
    trials.enqueue([{"optim.lr": 0.06}, {"optim.lr": 0.0007}])
    return trials.all()


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_change_of_ranges_keeps_all_trials(folder: TuningFolder, kind: str) -> None:
    """Those inside as they are; those outside are restored when the ranges contain them again."""
    old = all_states(TuningFolder(folder.path)) if kind == "journal" else None
    if kind == "sqlite":
        trials, _ = begin(changed(1e-4, 0.1, storage="sqlite"), folder)
        add(trials, 0.5, lr=0.0002)
        add(trials, lr=0.01)
        old = trials.all()
    assert old is not None
    config = changed(0.001, 0.1, storage=kind)
    trials, notes = begin(config, folder)
    assert "range of optim.lr: 0.0001 to 0.1 (log) -> 0.001 to 0.1 (log)" in notes
    assert trials.study.study_name == "demo (2)" == load_study(folder).study_name
    new = trials.all()
    assert len(new) == len(old)
    for before, after in zip(old, new, strict=True):
        lr = before.params.get(
            "optim.lr", before.system_attrs.get("fixed_params", {}).get("optim.lr")
        )
        if lr >= 0.001 or before.state == TrialState.FAIL:
            assert facts(after) == facts(before)
            continue
        assert after.state == TrialState.FAIL
        assert after.params == before.params
        assert after.intermediate_values == before.intermediate_values
        assert after.user_attrs[PROBLEM].startswith("outside the ranges since 2")
        assert after.user_attrs[OUTSIDE]["values"] == before.values
        assert after.user_attrs.get(LABEL) == before.user_attrs.get(LABEL)
        assert not any("rung" in key for key in after.system_attrs)
    for trial in new:
        if trial.params and trial.params["optim.lr"] >= 0.001:
            assert trial.distributions["optim.lr"].low == 0.001  # type: ignore[attr-defined]
    (text,) = trials.study.user_attrs[CHANGES]
    assert text.endswith("UTC: optim.lr: 0.0001 to 0.1 (log) -> 0.001 to 0.1 (log)")

    # Nothing is copied again, although a killed command would not have written tune.yaml.
    trials, _ = open_trials(config, folder, 20)
    assert trials.study.study_name == "demo (2)"
    # A third one: those outside stay, and the old ranges restore all of them.
    trials, _ = begin(changed(0.001, 0.2, storage=kind), folder)
    assert [trial.user_attrs for trial in trials.all()] == [trial.user_attrs for trial in new]
    trials, _ = begin(changed(1e-4, 0.1, storage=kind), folder)
    assert trials.study.study_name == "demo (4)"
    assert [facts(trial) for trial in trials.all()] == [facts(trial) for trial in old]
    assert len(trials.study.user_attrs[CHANGES]) == 3


def test_a_search_goes_on_after_a_change_of_ranges(folder: TuningFolder) -> None:
    old = all_states(folder)
    trials, notes = begin(changed(0.001, 0.1), folder)
    assert notes[-1] == (
        "10 trials so far: 2 complete, 1 pruned, 2 failed, 4 outside the ranges, 1 interrupted, "
        "to be continued first"
    )
    assert trials_left(tune_section(changed(0.001, 0.1)), trials) == 10
    one = trials.interrupted()
    assert one is not None
    assert (one.number, one.values) == (8, {"optim.lr": 0.05})
    assert trials.interrupted() is None
    # Of the rung's values 0.5, 0.1 and those outside, only the first two compete.
    assert not trials.report(one.number, 4, 0.5)
    trials.complete(one.number, [0.7])
    waiting = trials.suggest()
    assert (waiting.number, waiting.values) == (10, {"optim.lr": 0.06})
    assert trials.suggest().number == len(old)
    best = trials.best()
    assert best is not None
    assert best.number == 8
    for _ in range(3):
        suggestion = trials.suggest()
        assert 0.001 <= suggestion.values["optim.lr"] <= 0.1
        trials.complete(suggestion.number, [0.2])


def test_a_copy_that_was_killed_is_never_read(
    folder: TuningFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any of its trials, and before it is marked."""
    old = all_states(folder)
    config = changed(0.001, 0.1)
    set_attribute = optuna.Study.set_user_attr
    add_trial = optuna.Study.add_trial

    def killed_add(self: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if len(self.get_trials(deepcopy=False)) == 5:
            raise KeyboardInterrupt
        add_trial(self, trial)

    def killed_mark(self: optuna.Study, key: str, value: Any) -> None:
        if key == READY:
            raise KeyboardInterrupt
        set_attribute(self, key, value)

    for name, function in (("add_trial", killed_add), ("set_user_attr", killed_mark)):
        with monkeypatch.context() as patch:
            patch.setattr(optuna.Study, name, function)
            with pytest.raises(KeyboardInterrupt):
                open_trials(config, folder, 20)
        study = load_study(folder)
        assert study.study_name == "demo"
        assert [facts(trial) for trial in study.trials] == [facts(trial) for trial in old]
    trials, _ = open_trials(config, folder, 20)
    assert len(trials.all()) == len(old)
    assert optuna.get_all_study_names(trials.study._storage) == ["demo", "demo (2)"]


def test_the_state_of_cmaes_is_not_copied() -> None:
    """It is of the old ranges: Optuna would go on with a distribution of values outside."""
    trial = optuna.trial.create_trial(
        value=1.0, system_attrs={"cma:generation": 3, "completed_rung_0": 0.5}
    )
    moved = ranges._restored(trial)
    assert moved.system_attrs == {"completed_rung_0": 0.5}
