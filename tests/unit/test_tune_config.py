"""The section `tune`: what it accepts and what it refuses, before anything is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dml_dist.config.load import load_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

LOG = {"type": "float", "low": 1e-4, "high": 0.1, "log": True}
SPACE = {
    "optim.lr": LOG,
    "optim.proxy_lr": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.25},
    "model.embedding_size": {"type": "int", "low": 16, "high": 64, "step": 16},
    "model.pooling": {"type": "categorical", "choices": ["avg", "gem"]},
}
METHODS = {"nca": [], "triplet": ["loss.name=triplet"]}
WITHOUT = {"triplet": ["optim.proxy_lr"]}


def mapping(*, other: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    return {
        "name": "demo",
        "data": {"path": "nowhere"},
        "train": {"steps": 10},
        "tune": {"space": SPACE, **section},
        **(other or {}),
    }


def search(**section: Any) -> RunConfig:
    return parse_config(mapping(**section))


def test_a_section_needs_its_space_alone() -> None:
    section = search().tune
    assert section is not None
    assert (section.trials, section.folds, section.start, section.methods) == (32, 1, (), {})
    assert (section.sampler.name, section.pruner.name, section.storage) == ("tpe", "asha", "auto")
    assert [(one.metric, one.direction) for one in section.objectives] == [("map_at_r", "maximize")]
    with pytest.raises(ConfigError, match=r"tune\.space: missing"):
        parse_config({**mapping(), "tune": {}})


def test_starting_points_have_values_of_the_space() -> None:
    points = [
        {"method": "nca", "optim.lr": 0.1, "optim.proxy_lr": 0.75, "model.pooling": "gem"},
        {"method": "triplet", "model.embedding_size": 48},
        {"method": "nca"},
    ]
    section = search(start=points, methods=METHODS, without=WITHOUT).tune
    assert section is not None
    assert list(section.start) == points


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"optim.eps": 1.0}, r"paths of space \(optim\.lr, .*, model\.pooling\), got optim\.eps$"),
        ({"method": "nca"}, r"start\.1 must name paths of space .*, got method$"),
        ({"optim.lr": 0.10001}, r"start\.1\.optim\.lr must be 0\.0001 to 0\.1 .*, got 0\.10001$"),
        ({"optim.lr": 9e-5}, r"start\.1\.optim\.lr must be .*, got 9e-05$"),
        ({"optim.lr": "fast"}, r"must be .*, got 'fast'$"),
        ({"optim.lr": True}, r"must be .*, got True$"),
        ({"optim.proxy_lr": 0.3}, r"must be 0 to 1 in steps of 0\.25, as in space, got 0\.3$"),
        ({"model.embedding_size": 40}, r"must be 16 to 64 in steps of 16, as in space, got 40$"),
        ({"model.pooling": "max"}, r"must be one of avg, gem, as in space, got 'max'$"),
        ({"model.pooling": ["avg"]}, r"must be one of avg, gem, as in space, got \['avg'\]$"),
    ],
)
def test_other_starting_points_are_refused(point: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        search(start=[{"optim.lr": 0.01}, point])
    assert_problem(str(error.value), message)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        (
            {"optim.lr": 0.01},
            r"start\.0\.method must be one of the .* nca, triplet, got null$",
        ),
        ({"method": "nir"}, r"start\.0\.method must be one of .*, got nir$"),
        ({"method": ["nca"]}, r"start\.0\.method must be one of .*, got \['nca'\]$"),
        (
            {"method": "triplet", "optim.proxy_lr": 0.5},
            r"start\.0 must name paths of space that triplet has \(optim\.lr, "
            r"model\.embedding_size, model\.pooling\), got optim\.proxy_lr$",
        ),
    ],
)
def test_starting_points_are_those_of_a_method(point: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        search(start=[point], methods=METHODS, without=WITHOUT)
    assert_problem(str(error.value), message)


TWO = [{"metric": "map_at_r"}, {"metric": "recall_at_1"}]
GRID = {"optim.proxy_lr": SPACE["optim.proxy_lr"], "model.pooling": SPACE["model.pooling"]}
NUMBERS = {"optim.lr": LOG}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"without": WITHOUT}, r"without must name methods \(there are none\), got triplet$"),
        (
            {"methods": METHODS, "without": {"nir": []}},
            r"without must name methods \(nca, triplet\), got nir$",
        ),
        (
            {"methods": METHODS, "without": {"nca": ["optim.head_lr"]}},
            r"without\.nca must name paths of space \(optim\.lr, .*\), got optim\.head_lr$",
        ),
        (
            {"sampler": {"name": "grid"}},
            r"sampler grid needs .*, got optim\.lr: 0\.0001 to 0\.1 \(log\)$",
        ),
        (
            {"sampler": {"name": "grid"}, "space": {"a": {"type": "float", "low": 0, "high": 1}}},
            r"sampler grid needs .*, got a: 0 to 1$",
        ),
        (
            {"sampler": {"name": "cmaes"}},
            r"sampler cmaes draws numbers only, got model\.pooling: one of avg, gem; .*$",
        ),
        (
            {"sampler": {"name": "cmaes"}, "space": NUMBERS, "methods": METHODS},
            r"sampler cmaes cannot choose among methods.*$",
        ),
        (
            {"sampler": {"name": "gp"}, "methods": METHODS},
            r"sampler gp cannot choose among methods.*$",
        ),
        (
            {
                "sampler": {"name": "cmaes"},
                "space": NUMBERS,
                "objectives": TWO,
                "pruner": {"name": "none"},
            },
            r"sampler cmaes has one objective, got two.*$",
        ),
        ({"objectives": TWO}, r"pruner must be none with two objectives, got asha.*$"),
        (
            {"objectives": TWO, "pruner": {"name": "median"}},
            r"pruner must be none with two objectives, got median.*$",
        ),
        (
            {"objectives": [TWO[0], TWO[0]], "pruner": {"name": "none"}},
            r"objectives must have different metrics, got map_at_r, map_at_r$",
        ),
        ({"final_seeds": [0, 1, 0]}, r"final_seeds must differ .*, got \[0, 1, 0\]$"),
    ],
)
def test_what_does_not_fit_together_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        search(**section)
    assert_problem(str(error.value), message)


@pytest.mark.parametrize(
    "section",
    [
        {"sampler": {"name": "grid"}, "space": GRID, "methods": METHODS},
        {"sampler": {"name": "cmaes"}, "space": NUMBERS},
        {"sampler": {"name": "gp"}},
        {"sampler": {"name": "gp"}, "objectives": TWO, "pruner": {"name": "none"}},
        {"objectives": [TWO[0], {"metric": "train_seconds", "direction": "minimize"}]}
        | {"pruner": {"name": "none"}},
        {"folds": 2, "other": {"validation": {"name": "none"}}},
    ],
)
def test_what_fits_is_accepted(section: dict[str, Any]) -> None:
    assert parse_config(mapping(**section)).tune is not None


def test_lists_and_time_have_their_bounds() -> None:
    three = [*TWO, {"metric": "r_precision"}]
    with pytest.raises(ConfigError, match=r"tune\.objectives"):
        search(objectives=three, pruner={"name": "none"})
    with pytest.raises(ConfigError, match=r"objectives\.0: train_seconds needs direction minimize"):
        search(objectives=[{"metric": "train_seconds"}])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"compare": {"methods": {"a": []}}},
            "tune and compare are two studies, so give one of them, got both",
        ),
        ({"validation": {"name": "none"}}, "got validation.name none and tune.folds 1"),
        ({"launch": {"launcher": "torchrun"}}, "launch.launcher must be inprocess or ray, got"),
        ({"evaluation": {"final": "none"}}, "evaluation.final must be full or metrics, got none"),
    ],
)
def test_the_rest_of_the_configuration_must_allow_a_search(
    other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(mapping(other=other))
    assert message in str(error.value)


def test_problems_name_their_path_and_line(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    wrong = mapping(start=[{"optim.lr": 1.0}])
    path.write_text(yaml.safe_dump(wrong, sort_keys=False))
    line = path.read_text().splitlines().index("tune:") + 1
    with pytest.raises(ConfigError, match=rf"  tune \(line {line}\): start\.0\.optim\.lr must be"):
        load_config(path)
    wrong["tune"] = {"space": {**SPACE, "optim.lr": {**LOG, "low": 0.0}}}
    path.write_text(yaml.safe_dump(wrong, sort_keys=False))
    with pytest.raises(ConfigError, match=r"'optim\.lr' \(line \d+\): log needs low > 0"):
        load_config(path)


def assert_problem(text: str, pattern: str) -> None:
    """Check that an error has one problem, at the section tune, and what it says."""
    lines = text.splitlines()
    assert lines[0].startswith("1 problem in"), text
    assert re.match(r"  tune[\w.]*: ", lines[1]), text
    assert re.search(pattern, lines[1]), text
