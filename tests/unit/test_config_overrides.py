"""Changes to a configuration from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from dml_dist.config.data import BalancedBatchesConfig
from dml_dist.config.model import ResNetConfig
from dml_dist.config.objective import AdamConfig, CosineScheduleConfig, SGDConfig
from tests.unit.test_config_load import (
    SMALL_YAML,
    config_of,
    message,
    text_message,
)


def test_overrides_are_yaml() -> None:
    config = config_of(
        "optim.lr=1e-5",
        "evaluation.recall_at=[1, 3]",
        "optim.head_lr=",
        "name=a=b".replace("=b", ""),
    )
    assert config.optim == AdamConfig(lr=1e-5)
    assert config.evaluation.recall_at == (1, 3)
    assert config.name == "a"


def test_an_override_of_a_section_that_is_not_there_takes_its_default() -> None:
    config = config_of("model.backbone.width=16", "validation.fraction=0.2")
    assert (config.model.backbone.name, config.validation.name) == ("conv4", "fraction")


def test_another_name_clears_the_old_keys() -> None:
    backbone = {"name": "resnet18", "norm": "group"}
    config = config_of(
        "model.backbone.name=conv4",
        "optim.name=sgd",
        optim={"eps": 1.0},
        model={"backbone": backbone},
    )
    assert config.model.backbone.name == "conv4"
    assert config.optim == SGDConfig()


def test_the_same_name_keeps_the_keys() -> None:
    assert config_of("optim.name=adam", optim={"eps": 1.0}).optim == AdamConfig(eps=1.0)


@pytest.mark.parametrize("order", [1, -1])
def test_overrides_hold_in_any_order(order: int) -> None:
    overrides = ["schedule.name=cosine", "schedule.final=0.5", "optim={name: sgd}", "optim.lr=2"]
    config = config_of(*overrides[::order], schedule={"name": "step", "milestones": [1]})
    assert config.schedule == CosineScheduleConfig(final=0.5)
    assert config.optim == SGDConfig(lr=2.0)


def test_of_two_overrides_of_a_path_the_last_holds() -> None:
    assert config_of("seed=1", "seed=2").seed == 2


def test_the_value_of_an_override_may_hold_an_equals_sign() -> None:
    assert config_of("data.path=a=b").data.path == "a=b"


def test_overrides_of_list_items() -> None:
    assert config_of("evaluation.recall_at.3=16").evaluation.recall_at == (1, 2, 4, 16)
    config = config_of("evaluation.recall_at.0=3", evaluation={"recall_at": [1, 5]})
    assert config.evaluation.recall_at == (3, 5)


def test_overrides_of_options() -> None:
    config = config_of("loss.name=custom", "loss.target=a:b", "loss.options.deep.key=1e-3")
    assert config.loss.model_dump()["options"] == {"deep": {"key": 1e-3}}


def test_overrides_of_nested_families() -> None:
    config = config_of(
        "data.batches.name=balanced", "data.batches.classes_per_batch=8",
        "data.batches.samples_per_class=8", "model.backbone.norm=group",
        "model.backbone.name=resnet18",
    )  # fmt: skip
    assert config.data.batches == BalancedBatchesConfig(classes_per_batch=8, samples_per_class=8)
    assert config.model.backbone == ResNetConfig(norm="group")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr", "--set needs path=value, such as optim.lr=1e-3, got 'optim.lr'"),
        ("=1", "--set needs path=value"),
        ("optim..lr=1", "--set needs path=value"),
        ("optim. lr=1", "--set needs path=value"),
        ("name=a: b: c", "syntax error in --set name=a: b: c"),
        ("seed.x=1", "--set seed.x=1: seed is a plain value without fields"),
        ("name.x=1", "name is the value 'demo' without fields"),
        ("data.path.x.y=1", "data.path is the value"),
        ("evaluation.recall_at.4=1", "an index from 0 to 3 below evaluation.recall_at"),
        ("evaluation.recall_at.x=1", "an index from 0 to 3 below evaluation.recall_at"),
        ("model.0=1", "model is not a list; give a key of it, not the index 0"),
        ("optm.lr=1", "optm (--set optm.lr=1): unknown key; did you mean optim?"),
        ("optim.lrr=1", "optim.lrr (--set optim.lrr=1): unknown key; did you mean optim.lr?"),
        ("optim={name: sgd, lr: x}", "optim.lr (--set optim={name: sgd, lr: x}): must be"),
        ("optim.lr=fast", "optim.lr (--set optim.lr=fast): must be a number > 0, got 'fast'"),
        ("optim.lr=1e999", "optim.lr (--set optim.lr=1e999): must be a finite number, got inf"),
        ("data=null", "data (--set data=null): must be a section with keys path"),
        ("loss.name=arc", "loss.name (--set loss.name=arc): must be one of proxy_nca, "),
    ],
)
def test_faulty_overrides(override: str, expected: str) -> None:
    assert expected in message(override)


def test_an_override_hides_the_line_of_what_it_replaces(tmp_path: Path) -> None:
    found = text_message(tmp_path, SMALL_YAML + "optim:\n  lr: 1\n", "optim={name: sgd, lr: x}")
    assert "optim.lr (--set optim={name: sgd, lr: x}): must be a number > 0" in found
