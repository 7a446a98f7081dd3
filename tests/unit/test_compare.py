"""Comparisons without training: the runs they consist of, their search, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from dml_dist.config.load import differing_paths, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, RunError
from dml_dist.random_streams import Stream, seed_of
from dml_dist.runs.comparison import (
    COMPARE,
    ComparisonFolder,
    axis_values,
    method_config,
    run_config,
    searched_paths,
    trial_config,
)
from dml_dist.runs.records import RecordWriter
from dml_dist.runs.study import digest, fixed_differences, value_at
from dml_dist.studies.compare import _check_methods
from dml_dist.studies.search import own_values, search_method


def floats(low: float, high: float) -> dict[str, Any]:
    return {"type": "float", "low": low, "high": high, "log": True}


SPACE = {"optim.lr": floats(1e-4, 1e-1), "optim.proxy_lr": floats(1e-3, 1.0)}


def comparison(*changes: str, **values: Any) -> RunConfig:
    section = {
        "methods": {
            "triplet": ["loss={name: triplet, margin: 0.2}", "optim.proxy_lr=null"],
            "nca": ["loss.proxy_scale=4.0"],
            "nir": ["nir={flow_weight: 0.5}"],
        },
        "seeds": [3, 4],
        "search": {
            "trials": 5,
            "steps": 7,
            "space": SPACE,
            "without": {"triplet": ["optim.proxy_lr"]},
        },
        **values,
    }
    return parse_config(
        {
            "name": "demo",
            "data": {
                "path": "nowhere/shards",
                "dataset": {"name": "glyphs", "num_classes": 40, "images_per_class": 4},
            },
            "optim": {"lr": 0.01, "proxy_lr": 0.1},
            "train": {"global_batch_size": 16, "steps": 20},
            "evaluation": {"evaluate_test_every": 5},
            "compare": section,
        },
        list(changes),
    )


# ---------------------------------------------------------------- the runs


def test_a_run_is_the_configuration_with_its_changes() -> None:
    config = comparison()
    run = run_config(config, "triplet", 4, {"optim.lr": 0.012345678901234567})
    assert run.compare is None
    assert (run.name, run.seed, run.loss.name) == ("triplet-seed-4", 4, "triplet")
    assert run.optim.lr == 0.012345678901234567
    assert run.optim.proxy_lr is None
    base = config.model_copy(update={"compare": None})
    changed = {one.path for one in differing_paths(base, run_config(config, "nca", 0))}
    assert changed == {"name", "loss.proxy_scale"}
    assert run_config(config, "nir", 0).nir is not None


def test_a_trial_reads_no_test_class() -> None:
    trial = trial_config(comparison(), "nca", 2, {"optim.lr": 0.02})
    assert (trial.data.test_split, trial.evaluation.evaluate_test_every) == ("validation", None)
    assert (trial.train.steps, trial.seed, trial.optim.lr) == (7, 0, 0.02)
    assert trial.evaluation.final == "none"
    distributed = comparison("launch.launcher=ray", "launch.num_workers=2")
    assert trial_config(distributed, "nca", 0, {}).launch.launcher == "inprocess"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps=30", "train.steps: 20 -> 30"),
        ("train.global_batch_size=8", "train.global_batch_size: 16 -> 8"),
        ("seed=5", "seed: 0 -> 5"),
        ("validation={name: none}", "validation.name"),
        ("evaluation.distance=euclidean", "evaluation.distance: 'cosine' -> 'euclidean'"),
        ("data.dataset.seed=2", "data.dataset.seed: 0 -> 2"),
    ],
)
def test_methods_share_data_steps_and_evaluation(change: str, message: str) -> None:
    config = comparison(methods={"other": [change]}, search=None)
    with pytest.raises(ConfigError, match="must be the same for all runs of demo") as error:
        method_config(config, "other")
    assert message in str(error.value)


def test_what_decides_on_a_result_and_what_does_not() -> None:
    run = run_config(comparison(), "nca", 0)
    own = digest(run, COMPARE)
    for change in ({"seed": 1}, {"name": "x"}):
        assert digest(run.model_copy(update=change), COMPARE) != digest(run, COMPARE)
    for free in ("launch.threads_per_rank=2", "data.path=elsewhere", "data.loader_workers=0"):
        assert digest(run_config(comparison(free), "nca", 0), COMPARE) == own, free
    for other in ("optim.lr=0.02", "evaluation.every_steps=3", "train.steps=21"):
        assert digest(run_config(comparison(other), "nca", 0), COMPARE) != own, other


def test_differences_that_are_refused_are_cut_to_what_differs() -> None:
    old = comparison()
    free = comparison("launch.num_workers=2", "compare.parallel=3")
    assert fixed_differences(old, free, COMPARE) == []
    methods = {"triplet": ["loss.name=triplet"], "nca": ["loss.proxy_scale=4.0"]}
    new = comparison("optim.lr=0.02", methods=methods, seeds=[3])
    found = fixed_differences(old, new, COMPARE)
    assert [one.path for one in found] == [
        *("optim.lr", "compare.methods.triplet", "compare.methods.nir", "compare.seeds"),
    ]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        ({"seeds": [1, 1]}, [], "seeds must differ from each other, got \\[1, 1\\]"),
        ({"reference": "x"}, [], "one of the methods triplet, nca, nir, got x"),
        ({"methods": {}}, [], "compare.methods"),
        ({"bases": {"nir": "ncaa"}}, [], "bases must name methods .*, got ncaa"),
        ({"bases": {"nir": "nir"}}, [], "bases must name another method, got nir: nir"),
        (
            {"axis": {"path": "optim.lr", "lines": {"a": ["nir", "x"]}}},
            [],
            r"axis\.lines must name methods .*, got x",
        ),
        ({"methods": {"a b": []}}, [], "a b"),
        ({"parallel": 2}, ["launch.launcher=ray"], "parallel 2 needs launch.launcher: inprocess"),
        ({}, ["train={global_batch_size: 16, epochs: 2}"], "compare needs train.steps"),
        ({}, ["validation={name: none}"], "needs validation classes to select by"),
        ({}, ["evaluation.final=none"], "evaluation.final must be full or metrics, got none"),
    ],
)
def test_sections_that_do_not_fit(values: Any, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        comparison(*changes, **values)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"without": {"triplet": ["loss.margin"]}}, "must name paths of space"),
        ({"without": {"other": []}}, "must name methods"),
    ],
)
def test_searches_that_do_not_fit(search: dict[str, Any], message: str) -> None:
    whole = {"trials": 2, "steps": 2, "space": SPACE, **search}
    with pytest.raises(ConfigError, match=message):
        comparison(search=whole)


@pytest.mark.parametrize(
    ("space", "without", "message"),
    [
        (SPACE, {}, r"optim.proxy_lr does nothing for triplet.*compare.search.without.triplet"),
        ({"loss.margin": floats(0.1, 0.3)}, {}, "nca cannot take loss.margin = 0.1 of 0.1 to 0.3"),
        ({"optim.lr": floats(0.1, 1.0)}, {"nca": ["optim.lr"]}, None),
        (
            {"loss.margin": floats(0.1, 3.0)},
            {"nca": ["loss.margin"], "nir": ["loss.margin"]},
            r"triplet cannot take loss.margin = 3(.|\n)*margin must be at most 2",
        ),
        (
            {"loss.margin": floats(3.0, 4.0)},
            {"nca": ["loss.margin"], "nir": ["loss.margin"]},
            r"triplet cannot take loss.margin = 3 ",
        ),
        ({"optim.lrr": floats(0.1, 1.0)}, {}, r"did you mean optim\.lr\?"),
        (
            {"model.embedding_size": {"type": "int", "low": 0, "high": 64, "step": 16}},
            {},
            r"model.embedding_size = 0 of 0 to 64 in steps of 16",
        ),
        ({"model.embedding_size": floats(8, 64)}, {}, r"embedding_size = 8 (.|\n)*an integer"),
        (
            {"model.pooling": {"type": "categorical", "choices": ["gem", "avg", "gym"]}},
            {},
            r"model.pooling = gym of one of gem, avg, gym(.|\n)*did you mean gem\?",
        ),
        (
            {"train.max_grad_norm": {"type": "categorical", "choices": [None, 1, 0.5]}},
            {},
            None,
        ),
        (
            {"train.global_batch_size": {"type": "int", "low": 8, "high": 16}},
            {},
            r"global_batch_size: 16 -> 8(.|\n)*runs differ in",
        ),
    ],
)
def test_spaces_are_checked_for_every_method(space: Any, without: Any, message: str | None) -> None:
    config = comparison(
        search={"trials": 2, "steps": 2, "space": space, "without": without}, reference="nca"
    )
    if message is None:
        assert list(_check_methods(config)) == ["triplet", "nca", "nir"]
        return
    with pytest.raises(ConfigError, match=message):
        _check_methods(config)


def test_errors_name_the_method() -> None:
    config = comparison(methods={"p": ["projections={steps_per_problem: 40}"]}, search=None)
    with pytest.raises(ConfigError, match=r"method p: projections needs data\.batches\.name"):
        _check_methods(config)
    with pytest.raises(ConfigError, match=r"loss\.margim .*: unknown key"):
        _check_methods(comparison(methods={"p": ["loss={name: triplet, margim: 1}"]}, search=None))
    with pytest.raises(ConfigError, match=r"must be inprocess or ray, got torchrun"):
        _check_methods(comparison("launch.launcher=torchrun"))


def test_a_figure_needs_a_number_of_each_method() -> None:
    methods = {f"nca_{n}": [f"loss.proxy_scale={n}.5"] for n in (4, 2, 3)}
    axis = {"path": "loss.proxy_scale", "lines": {"nca": list(methods)}}
    config = comparison(methods=methods, search=None, axis=axis)
    assert axis_values(config) == {"nca": [(2.5, "nca_2"), (3.5, "nca_3"), (4.5, "nca_4")]}
    _check_methods(config)
    for path in ("loss.margim", "loss.name", "loss.use_labels"):
        wrong = comparison(methods=methods, search=None, axis={**axis, "path": path})
        with pytest.raises(ConfigError, match=f"{path} must be a number in every method"):
            _check_methods(wrong)


# ---------------------------------------------------------------- search


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
            (folder / "records").mkdir(parents=True)
            with RecordWriter(folder / "records/steps.jsonl", 1) as records:
                records.write(3, loss=math.nan)
            raise RunError("the loss is not finite")
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
    seed = seed_of(Stream.HYPERPARAMETERS, 0, bits=32)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=2)
    study = optuna.create_study(direction="maximize", sampler=sampler)
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
    assert own_values(config, "nca") == own
    runs = FakeRuns()
    best, outcomes = search(tmp_path, runs, config=config)
    # The files are enough: the same again without any run.
    assert search(tmp_path, FakeRuns(end_after=0), config=config) == (best, outcomes)

    seed = seed_of(Stream.HYPERPARAMETERS, 0, bits=32)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=sampler)
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
    assert own_values(config, "nca") == {"optim.proxy_lr": 0.1}
    _, outcomes = search(tmp_path, FakeRuns(), config=config)
    assert outcomes[0]["values"]["optim.proxy_lr"] == 0.1
    assert all(1e-4 <= outcome["values"]["optim.lr"] <= 1e-1 for outcome in outcomes)


def test_trials_that_diverge_are_counted_and_others_win(tmp_path: Path) -> None:
    found, outcomes = search(tmp_path / "some", FakeRuns(diverge_above=0.009))
    assert outcomes[0]["map_at_r"] is None
    assert outcomes[0]["problem"] == "the loss is not finite"
    assert found["optim.lr"] <= 0.009
    # The answer is kept: it is not tried again.
    assert search(tmp_path / "some", runs := FakeRuns())[0] == found
    assert runs.configs == []
    with pytest.raises(RunError, match="none of the 5 trials of nca had a finite loss"):
        search(tmp_path / "none", FakeRuns(diverge_above=0.0))


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
