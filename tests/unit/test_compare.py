"""Comparisons without training: the runs they consist of, what is refused."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from dml_dist.config.load import differing_paths, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.comparison import (
    COMPARE,
    axis_values,
    method_config,
    run_config,
    trial_config,
)
from dml_dist.runs.study import digest, fixed_differences
from dml_dist.studies import samplers
from dml_dist.studies.compare import _check_methods, dry_run_comparison


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


GRID = {
    "optim.lr": {"type": "float", "low": 0.005, "high": 0.015, "step": 0.005},
    "model.pooling": {"type": "categorical", "choices": ["avg", "gem"]},
}


def test_a_grid_that_is_larger_than_the_search_is_refused() -> None:
    search = {"trials": 5, "steps": 2, "space": GRID, "sampler": {"name": "grid"}}
    search["without"] = {"triplet": ["model.pooling"]}
    with pytest.raises(ConfigError, match=r"trials is 5, but the grid of nca has 6 points"):
        _check_methods(comparison(search=search))
    config = comparison(search={**search, "trials": 6})
    plain = dry_run(config)
    assert "search: sampler grid, seed 0" in plain
    rows = [re.findall(r"(\d+) x [27] steps", line) for line in plain.splitlines()]
    assert [row[0] for row in rows if row] == ["3", "6", "6"]  # triplet has the rate alone


def test_a_sampler_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"trials": 2, "steps": 2, "space": SPACE, "sampler": {"name": "cmaes"}}
    search["without"] = {"triplet": ["optim.proxy_lr"]}
    for found in (None, object()):
        monkeypatch.setattr(samplers, "find_spec", lambda name, found=found: found)
        if found is not None:
            _check_methods(comparison(search=search))
            continue
        with pytest.raises(ConfigError, match=r"cmaes needs the package cmaes.*pip install cmaes"):
            _check_methods(comparison(search=search))


def dry_run(config: RunConfig) -> str:
    text = io.StringIO()
    dry_run_comparison(config, Console(file=text, width=200))
    return text.getvalue()


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
