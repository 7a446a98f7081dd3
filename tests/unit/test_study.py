"""Studies without training: which runs are the same, what a folder allows, search spaces."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from pydantic import TypeAdapter, ValidationError

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import DistributionConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.study import (
    FREE,
    StudyFolder,
    StudyKind,
    check_identity,
    digest,
    fixed_differences,
    read_untrained,
    untrained_digest,
    value_at,
    with_values,
    write_untrained,
)
from dml_dist.studies.pool import finished_metrics
from dml_dist.studies.samplers import distribution

# Runs of several sizes: what is otherwise where and how fast is here what tells them apart.
SCALE = StudyKind("scale", identity=("name", "launch.num_workers"), free=FREE)


def configuration(*changes: str) -> RunConfig:
    return parse_config(
        {
            "name": "demo",
            "data": {"path": "nowhere/shards"},
            "train": {"global_batch_size": 16, "steps": 20},
            "launch": {"launcher": "ray"},
        },
        list(changes),
    )


# ---------------------------------------------------------------- identity


def test_runs_that_differ_only_in_world_size_are_two_runs() -> None:
    one, two = (configuration(f"launch.num_workers={size}") for size in (1, 2))
    assert digest(one, SCALE) != digest(two, SCALE)
    assert [diff.path for diff in fixed_differences(one, two, SCALE)] == ["launch.num_workers"]
    # The rest of `launch` stays free, and where `launch.num_workers` is no identity, it is, too.
    threads = configuration("launch.num_workers=1", "launch.threads_per_rank=3")
    assert digest(one, SCALE) == digest(threads, SCALE)
    assert fixed_differences(one, threads, SCALE) == []
    seeds = StudyKind("seeds", identity=("name", "seed"), free=FREE)
    assert digest(one, seeds) == digest(two, seeds)
    assert fixed_differences(one, two, seeds) == []


def test_a_run_differs_from_its_study_in_identity_alone() -> None:
    study = configuration()
    run = configuration("name=two", "launch.num_workers=2")
    check_identity(study, run, SCALE.identity, "scale.points.two")
    other = configuration("launch.num_workers=2", "optim.lr=0.5", "launch.address=auto")
    with pytest.raises(ConfigError) as error:
        check_identity(study, other, SCALE.identity, "scale.points.two")
    message = str(error.value)
    assert message.startswith("scale.points.two changes fields")
    assert "optim.lr: 0.001 -> 0.5; launch.address: null -> 'auto'" in message
    assert "num_workers:" not in message
    assert message.endswith("name, launch.num_workers only")


def test_a_finished_run_counts_only_if_it_is_the_one_asked_for(tmp_path: Path) -> None:
    asked = configuration("launch.num_workers=2")
    run = RunFolder.create(tmp_path / "run", dump_config(asked), name="demo", seed=0)
    assert finished_metrics(asked, run.path, SCALE) is None
    run.finish({"trained": {"map_at_r": 0.5}})
    faster = configuration("launch.num_workers=2", "launch.threads_per_rank=2")
    assert finished_metrics(faster, run.path, SCALE) == {"trained": {"map_at_r": 0.5}}
    with pytest.raises(ConfigError, match=r"\(there -> now\): launch\.num_workers: 2 -> 1;"):
        finished_metrics(configuration("launch.num_workers=1"), run.path, SCALE)
    assert finished_metrics(asked, tmp_path / "other", SCALE) is None


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ("optim.lr=0.5", True),
        ("loss.name=triplet", True),
        ("train.steps=3", True),
        ("evaluation.every_steps=3", True),
        ("evaluation.backend=torch", True),
        ("data.path=elsewhere", True),
        ("data.batches.window=3", True),
        ("launch.num_workers=2", True),
        ("seed=1", False),
        ("model.embedding_size=8", False),
        ("data.transform.size=64", False),
        ("data.test_split=validation", False),
        ("validation.fraction=0.3", False),
        ("evaluation.distance=euclidean", False),
        ("evaluation.metrics=[]", False),
        ("train.precision=float64", False),
    ],
)
def test_what_an_untrained_network_depends_on(change: str, is_same: bool) -> None:
    own = untrained_digest(configuration(), "cpu")
    assert (untrained_digest(configuration(change), "cpu") == own) == is_same
    assert untrained_digest(configuration(), "cuda") != own


# ---------------------------------------------------------------- the folder


def test_a_folder_is_begun_once_and_continued_with_what_is_free(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study", SCALE)
    config = configuration()
    folder.check(config, resume=False)
    assert not folder.path.exists()
    with pytest.raises(ConfigError, match=r"found no scale\.yaml .* leave out --resume"):
        folder.check(config, resume=True)
    with folder.lock():
        folder.check(config, resume=False)  # Its own lock file is no content.
        folder.write_config(config)
        with pytest.raises(ConfigError, match="another command works on"), folder.lock():
            pass
    assert folder.config() == config
    with pytest.raises(ConfigError, match="already holds a study; continue it with --resume"):
        folder.check(config, resume=False)
    folder.check(configuration("launch.threads_per_rank=2"), resume=True)
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 0\.5; undo"):
        folder.check(configuration("optim.lr=0.5"), resume=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare.yaml").write_text("name: x")
    folder = StudyFolder(tmp_path, SCALE)
    with pytest.raises(ConfigError, match=r"is not empty and holds no scale\.yaml"):
        folder.check(configuration(), resume=False)
    with pytest.raises(ConfigError, match=r"holds no scale\.yaml; give the folder"):
        folder.config()


def test_outcomes_are_listed_by_number(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, SCALE)
    for number in (10, 2, 0):
        folder.write_outcome("group", number, {"values": {"seed": number}})
    assert [one["values"]["seed"] for one in folder.outcomes("group")] == [0, 2, 10]
    assert folder.outcome("group", 1) is None
    assert folder.outcomes("other") == []


def test_a_damaged_file_of_an_untrained_network_is_measured_anew(tmp_path: Path) -> None:
    folder = tmp_path / "untrained"
    assert read_untrained(folder, "a") is None
    write_untrained(folder, "a", {"map_at_r": 1 / 3})
    assert read_untrained(folder, "a") == {"map_at_r": 1 / 3}
    (folder / "a.json").write_text('{"map_at')
    assert read_untrained(folder, "a") is None


# ---------------------------------------------------------------- search spaces

SPACES: list[dict[str, Any]] = [
    {"type": "float", "low": -1.5, "high": 2.0},
    {"type": "float", "low": 0.0, "high": 0.3, "step": 0.1},
    {"type": "float", "low": 1e-5, "high": 1e-5, "log": True},
    {"type": "int", "low": -4, "high": 4},
    {"type": "int", "low": 16, "high": 64, "step": 16},
    {"type": "int", "low": 1, "high": 100, "log": True},
    {"type": "categorical", "choices": ["gem", None, 2, 0.5, True]},
    # What Optuna refuses, or changes with a warning.
    {"type": "float", "low": 1.0, "high": 0.5},
    {"type": "float", "low": 0.0, "high": 1.0, "log": True},
    {"type": "float", "low": 0.1, "high": 1.0, "log": True, "step": 0.1},
    {"type": "float", "low": 0.0, "high": 1.0, "step": 0.3},
    {"type": "int", "low": 2, "high": 1},
    {"type": "int", "low": 0, "high": 9, "log": True},
    {"type": "int", "low": 1, "high": 9, "log": True, "step": 2},
    {"type": "int", "low": 1, "high": 9, "step": 3},
    {"type": "categorical", "choices": []},
]
OPTUNA = {
    "float": optuna.distributions.FloatDistribution,
    "int": optuna.distributions.IntDistribution,
    "categorical": optuna.distributions.CategoricalDistribution,
}
ADAPTER: TypeAdapter[Any] = TypeAdapter(DistributionConfig)


def of_optuna(space: dict[str, Any]) -> optuna.distributions.BaseDistribution | None:
    """Return Optuna's own distribution, None where it refuses or changes what is given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return OPTUNA[space["type"]](**{k: v for k, v in space.items() if k != "type"})
    except (ValueError, UserWarning):
        return None


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_are_those_that_optuna_takes(space: dict[str, Any]) -> None:
    expected = of_optuna(space)
    if expected is None:
        with pytest.raises(ValidationError):
            ADAPTER.validate_python(space, strict=False)
        return
    config = ADAPTER.validate_python(space, strict=False)
    found = distribution(config)
    assert found == expected
    for value in (-4, -1.5, 0.0, 0.1, 0.15, 0.2, 0.3, 1e-5, 1, 2, 16, 24, 48, 64, 100, 101, "gem"):
        try:
            contained = expected._contains(expected.to_internal_repr(value))
        except ValueError:
            contained = False
        assert config.contains(value) == contained, value


@pytest.mark.parametrize("space", [SPACES[0], SPACES[3], SPACES[5]], ids=str)
def test_a_truth_value_is_no_number(space: dict[str, Any]) -> None:
    config = ADAPTER.validate_python(space, strict=False)
    assert config.contains(1)
    assert not config.contains(True)
    assert not config.contains(None)
    assert not config.contains("1")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([1, True], "differ from each other, got 1, true"),
        ([[1]], "numbers, text, booleans or null"),
    ],
)
def test_choices_are_plain_and_differ(choices: list[Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python({"type": "categorical", "choices": choices}, strict=False)


def test_distributions_describe_themselves() -> None:
    texts = [str(ADAPTER.validate_python(space, strict=False)) for space in SPACES[:7]]
    assert texts == [
        "-1.5 to 2",
        "0 to 0.3 in steps of 0.1",
        "1e-05 to 1e-05 (log)",
        "-4 to 4",
        "16 to 64 in steps of 16",
        "1 to 100 (log)",
        "one of gem, null, 2, 0.5, true",
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optim.lr", 0.012345678901234567),
        ("optim.lr", 1e-05),
        ("model.embedding_size", 48),
        ("model.pooling", "avg+max"),
        ("data.dataset", None),
        ("train.max_grad_norm", 1e300),
        ("evaluation.save_embeddings", False),
        ("data.path", "yes: [it] is # text"),
    ],
)
def test_values_arrive_as_they_are(path: str, value: Any) -> None:
    found = value_at(with_values(configuration(), {path: value}, "a trial"), path)
    assert (found, type(found)) == (value, type(value))
