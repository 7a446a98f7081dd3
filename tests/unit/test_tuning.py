"""The runs that a search of values consists of, and which classes they read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dml_dist.config.load import ABSENT, differing_paths, dump_config, parse_config
from dml_dist.config.schema import FractionValidationConfig, RunConfig
from dml_dist.config.yaml_text import read_yaml
from dml_dist.data.classes import ClassSplit, split_classes
from dml_dist.data.index import Index
from dml_dist.errors import ConfigError
from dml_dist.runs.study import digest, is_below
from dml_dist.runs.tuning import (
    TUNE,
    final_config,
    own_values,
    searched_paths,
    trial_configs,
    tune_section,
    tuned_config,
)
from tests.unit.tiny_shards import make_index

RATE = {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}
PROXY_RATE = {"type": "float", "low": 0.5, "high": 1.0}
MARGIN = {"type": "float", "low": 0.1, "high": 0.3}
METHODS = {
    "triplet": ["loss={name: triplet, margin: 0.2}", "optim.proxy_lr=null"],
    "nca": ["loss.proxy_scale=4.0"],
}
WITH_METHODS = {
    "methods": METHODS,
    "space": {"optim.lr": RATE, "optim.proxy_lr": PROXY_RATE, "loss.margin": MARGIN},
    "without": {"triplet": ["optim.proxy_lr"], "nca": ["loss.margin"]},
}


def tuning(*changes: str, **values: Any) -> RunConfig:
    """Return the configuration of a search; `values` replace those of its section `tune`."""
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
            "loggers": [{"name": "tensorboard"}],
            "tune": {"space": {"optim.lr": RATE}, **values},
        },
        list(changes),
    )


def changed(config: RunConfig, run: RunConfig) -> set[str]:
    return {one.path for one in differing_paths(config.model_copy(update={"tune": None}), run)}


# ---------------------------------------------------------------- what a trial is

# What makes every run of a search a trial: nothing of it changes how a network is trained.
OF_TRIALS = {
    *("data.test_split", "evaluation.evaluate_test_every", "evaluation.final"),
    *("checkpoint.keep", "loggers"),
}


def test_a_trial_differs_from_its_study_in_its_identity() -> None:
    config = tuning()
    (trial,) = trial_configs(config, "trial-3", {"optim.lr": 0.02, "loss.proxy_scale": 2.0})
    assert changed(config, trial) == {"name", "optim.lr", "loss.proxy_scale", *OF_TRIALS}
    assert (trial.name, trial.optim.lr, trial.loss.proxy_scale) == ("trial-3", 0.02, 2.0)  # type: ignore[union-attr]
    assert trial.validation == config.validation
    # Two trials differ in identity alone, with methods, too.
    config = tuning(**WITH_METHODS)
    (one,) = trial_configs(config, "trial-0", {"method": "triplet", "loss.margin": 0.25})
    (two,) = trial_configs(config, "trial-1", {"method": "nca", "optim.proxy_lr": 0.6})
    differing = {found.path for found in differing_paths(one, two)}
    assert {"name", "loss.name", "optim.proxy_lr"} <= differing
    assert all(is_below(path, TUNE.identity) for path in differing)
    assert digest(one, TUNE) != digest(two, TUNE)


def test_a_trial_evaluates_validation_classes_alone() -> None:
    for folds in (1, 3):
        for trial in trial_configs(tuning(folds=folds), "trial-0", {}):
            assert trial.data.test_split == "validation"
            assert trial.evaluation.evaluate_test_every is None
            assert trial.evaluation.final == "none"


def test_a_trial_with_folds_is_a_run_of_each() -> None:
    config = tuning("validation.name=none", folds=3)
    runs = trial_configs(config, "trial-7", {"optim.lr": 0.05})
    assert [run.name for run in runs] == ["trial-7-fold-0", "trial-7-fold-1", "trial-7-fold-2"]
    assert [(run.validation.num_folds, run.validation.fold) for run in runs] == [  # type: ignore[union-attr]
        *((3, 0), (3, 1), (3, 2)),
    ]
    assert {path for run in runs for path in changed(runs[0], run)} == {"name", "validation.fold"}
    assert {run.optim.lr for run in runs} == {0.05}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Five images of each of 8 classes; the first six are training classes."""
    return make_index(tmp_path_factory.mktemp("shards"))


def split_of(index: Index, run: RunConfig) -> ClassSplit:
    return split_classes(index, run.data, run.validation, run.seed)


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_are_disjoint_and_cover_the_training_classes(index: Index, folds: int) -> None:
    splits = [split_of(index, run) for run in trial_configs(tuning(folds=folds), "trial-0", {})]
    held_out = np.concatenate([split.validation_classes for split in splits])
    assert sorted(held_out.tolist()) == list(range(6))  # each once, and no test class
    for split in splits:
        assert not np.intersect1d(split.train_classes, split.validation_classes).size
        assert sorted([*split.train_classes, *split.validation_classes]) == list(range(6))
    # All trials are judged by the same classes.
    others = [split_of(index, run) for run in trial_configs(tuning(folds=folds), "trial-1", {})]
    for one, two in zip(splits, others, strict=True):
        np.testing.assert_array_equal(one.validation_classes, two.validation_classes)


# ---------------------------------------------------------------- values


VALUES = [
    ("optim.lr", 0.012345678901234567),
    ("optim.lr", 5e-324),
    ("optim.lr", 1e-05),
    ("optim.lr", 0.1 + 0.2),
    ("loss.proxy_scale", 1e16),
    ("loss.proxy_scale", math.nextafter(1.0, 2.0)),
    ("model.embedding_size", 12345),
    ("train.global_batch_size", 24),
    ("model.pooling", "gem"),
    ("train.max_grad_norm", None),
    ("model.layer_norm", True),
    ("model.layer_norm", False),
    ("data.transform.crop_scale.0", 0.123),
    ("loss.options.rate", 1e-05),
    ("loss.options.kind", "1e-05"),
    ("loss.options.kind", "null"),
    ("loss.options.kind", "a=b: 'ü\"\n"),
    ("loss.options.kind", "\U0001f600"),
    ("loss.options.count", 3),
    ("loss.options.flag", True),
]
CUSTOM = "loss={name: custom, target: 'a.b:C', options: {kind: x}}"


@pytest.mark.parametrize(("path", "value"), VALUES)
def test_values_reach_the_run_unchanged(path: str, value: Any) -> None:
    config = tuning(*([CUSTOM] if ".options." in path else []))
    for run in (tuned_config(config, {path: value}), *trial_configs(config, "t", {path: value})):
        found: Any = read_yaml(dump_config(run), "the run").value
        for part in path.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert (type(found), found) == (type(value), value)


def test_an_integer_is_a_value_of_a_number_field() -> None:
    assert tuned_config(tuning(), {"loss.proxy_scale": 16}).loss.proxy_scale == 16.0  # type: ignore[union-attr]


def test_values_apply_in_any_order() -> None:
    """The name of a section clears its fields, whichever path the storage gives first."""
    values = {"loss.margin": 0.25, "loss.name": "triplet", "optim.lr": 0.5, "optim.name": "sgd"}
    one = tuned_config(tuning(), values)
    assert one == tuned_config(tuning(), dict(reversed(values.items())))
    assert (one.loss.name, one.loss.margin) == ("triplet", 0.25)  # type: ignore[union-attr]
    assert (one.optim.name, one.optim.lr) == ("sgd", 0.5)


def test_a_method_comes_before_the_values() -> None:
    run = tuned_config(tuning(**WITH_METHODS), {"loss.margin": 0.25, "method": "triplet"})
    assert (run.loss.name, run.loss.margin, run.optim.proxy_lr) == ("triplet", 0.25, None)  # type: ignore[union-attr]
    assert run.tune is None


def test_own_values_are_those_that_the_space_has() -> None:
    config = tuning(**WITH_METHODS)
    assert searched_paths(config, "triplet") == ["optim.lr", "loss.margin"]
    assert own_values(config, "triplet") == {
        "method": "triplet",
        "optim.lr": 0.01,
        "loss.margin": 0.2,
    }
    # optim.proxy_lr is 0.1, below the range.
    assert own_values(config, "nca") == {"method": "nca", "optim.lr": 0.01}
    space = {
        "train.max_grad_norm": {"type": "categorical", "choices": [1.0, None]},
        "data.transform.crop_scale.0": {"type": "float", "low": 0.1, "high": 0.5},
        "loss.options.rate": {"type": "float", "low": 0.0, "high": 1.0},
        "loss.options.other": {"type": "float", "low": 0.0, "high": 1.0},
    }
    custom = "loss={name: custom, target: 'a.b:C', options: {rate: 0.5}}"
    assert own_values(tuning(custom, space=space), None) == {
        "train.max_grad_norm": None,
        "data.transform.crop_scale.0": 0.16,
        "loss.options.rate": 0.5,
    }


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("launch.num_workers", 2),
        ("data.path", "elsewhere"),
        ("data.test_split", "validation"),
        ("data.loader_workers", 2),
        ("evaluation.distance", "euclidean"),
        ("validation.fraction", 0.2),
        ("train.steps", 30),
        ("train.log_every", 3),
        ("checkpoint.every_steps", 3),
        ("seed", 1),
        ("name", "other"),
        ("tune.trials", 3),
    ],
)
def test_what_trials_share_cannot_be_searched(path: str, value: Any) -> None:
    config = tuning()
    for make in (tuned_config, lambda *given: trial_configs(given[0], "trial-0", given[1])):
        with pytest.raises(ConfigError, match=f"tune.space cannot search {path}: all trials"):
            make(config, {"optim.lr": 0.02, path: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.steps=30", "train.steps: 20 -> 30"),
        ("seed=5", "seed: 0 -> 5"),
        ("validation.fraction=0.5", "validation.fraction: 0.1 -> 0.5"),
        ("evaluation.distance=euclidean", "evaluation.distance: 'cosine' -> 'euclidean'"),
        ("data.dataset.seed=2", "data.dataset.seed: 0 -> 2"),
        ("launch.threads_per_rank=2", "launch.threads_per_rank: null -> 2"),
        ("tune={space: {optim.lr: {type: float, low: 0.1, high: 1}}}", "tune.space"),
    ],
)
def test_methods_cannot_change_what_trials_share(change: str, message: str) -> None:
    config = tuning(methods={"other": [change]})
    with pytest.raises(ConfigError, match=r"tune\.methods\.other changes fields") as error:
        tuned_config(config, {"method": "other"})
    assert message in str(error.value)


def test_values_that_a_run_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr\?"):
        tuned_config(tuning(), {"optim.lrr": 0.1})
    with pytest.raises(ConfigError, match=r"demo with optim\.lr=-1"):
        tuned_config(tuning(), {"optim.lr": -1})


def test_a_configuration_without_the_section() -> None:
    with pytest.raises(ConfigError, match="demo has no section tune"):
        tune_section(tuning().model_copy(update={"tune": None}))


# ---------------------------------------------------------------- --final


def test_a_final_run_trains_on_all_classes_with_the_configured_evaluation(index: Index) -> None:
    config = tuning("evaluation.final=metrics", folds=3)
    run = final_config(config, "tuned", 4, {"optim.lr": 0.02})
    differing = {
        one.path
        for one in differing_paths(config.model_copy(update={"tune": None}), run)
        if one.new is not ABSENT  # the fraction that the other kind of validation has
    }
    assert differing == {"name", "seed", "optim.lr", "validation.name", "loggers"}
    assert (run.name, run.seed, run.validation.name) == ("tuned-seed-4", 4, "none")
    assert (run.data.test_split, run.evaluation.final) == ("test", "metrics")
    split = split_of(index, run)
    assert split.train_classes.tolist() == list(range(6))
    assert not split.validation_rows.size
    # Trials see fewer classes.
    (trial,) = trial_configs(tuning(), "trial-0", {})
    assert isinstance(trial.validation, FractionValidationConfig)
    assert len(split_of(index, trial).train_classes) == 4


def test_the_untuned_variant_has_the_methods_own_values() -> None:
    config = tuning(**WITH_METHODS)
    run = final_config(config, "untuned", 0, {"method": "triplet"})
    assert (run.optim.lr, run.loss.name, run.loss.margin) == (0.01, "triplet", 0.2)  # type: ignore[union-attr]
    assert run.train == config.train
