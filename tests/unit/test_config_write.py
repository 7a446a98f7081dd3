"""Writing configurations, and comparing two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dml_dist.config.load import (
    ABSENT,
    Difference,
    differing_paths,
    dump_config,
    load_config,
    parse_config,
)
from dml_dist.config.schema import RunConfig
from dml_dist.config.yaml_text import dump_yaml, read_yaml
from dml_dist.errors import ConfigError
from tests.unit.test_config_load import (
    config_of,
    load_text,
)


def everything() -> RunConfig:
    return config_of(
        "optim.eps=1e-08",
        "optim.lr=1e+16",
        "data.path='1e-4'",
        "data.train_split='yes'",
        "data.test_split='010'",
        "launch.use_gpu=no",
        "launch.address='a: b\n # \x85é😀'",
        "loss={name: custom, target: 'a.b:c', options: {x: [{y: 1e-5}], 'on': '', z: -0.0}}",
        validation={"name": "classes", "classes": ["~", "12:30"]},
    )


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = everything()
    text = dump_config(config)
    assert load_text(tmp_path, text) == config
    assert parse_config(yaml.safe_load(text)) == config
    assert dump_config(load_text(tmp_path, text)) == text


def test_dump_writes_every_field_and_the_name_first() -> None:
    text = dump_config(config_of("model.backbone={name: resnet18, norm: group}"))
    assert "  backbone:\n    name: resnet18\n    weights: none\n" in text
    assert "recall_at: [1, 2, 4, 8]\n" in text
    assert "  head_lr: null\n" in text


def test_options_unsupported_by_yaml_are_not_written() -> None:
    config = config_of("loss={name: custom, target: 'a:b'}")
    options = {"key": object()}
    loss = config.loss.model_copy(update={"options": options})
    with pytest.raises(ConfigError, match=r"loss\.options\.key: must be a plain value"):
        dump_config(config.model_copy(update={"loss": loss}))


CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "references")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    config = load_config(path)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_equal_configurations_do_not_differ() -> None:
    assert differing_paths(everything(), everything()) == []


def test_differences_name_path_values_and_resumability() -> None:
    old, new = config_of(), config_of("optim.lr=0.5", "launch.num_workers=3", "train.steps=20")
    assert differing_paths(old, new) == [
        Difference("optim.lr", 0.001, 0.5, False),
        Difference("train.steps", 10, 20, True),
        Difference("launch.num_workers", 1, 3, True),
    ]
    assert str(differing_paths(old, new)[0]) == "optim.lr: 0.001 -> 0.5"


def test_another_member_differs_in_its_name_and_its_own_fields() -> None:
    found = differing_paths(config_of(), config_of("optim.name=sgd"))
    assert found == [
        Difference("optim.name", "adam", "sgd", False),
        Difference("optim.betas", [0.9, 0.999], ABSENT, False),
        Difference("optim.eps", 1e-8, ABSENT, False),
        Difference("optim.momentum", ABSENT, 0.9, False),
        Difference("optim.nesterov", ABSENT, False, False),
    ]
    assert str(found[2]) == "optim.eps: 1e-08 -> (absent)"


def test_a_section_that_was_null() -> None:
    found = differing_paths(config_of(), config_of("data.dataset={name: table, source: t.csv}"))
    assert Difference("data.dataset.name", ABSENT, "table", False) in found
    assert Difference("data.dataset.source", ABSENT, "t.csv", True) in found
    assert all(one.path.startswith("data.dataset.") and one.old is ABSENT for one in found)


def test_an_integer_is_no_boolean_in_options() -> None:
    custom = "loss={name: custom, target: 'a:b', options: {x: %s}}"
    assert len(differing_paths(config_of(custom % "1"), config_of(custom % "true"))) == 1


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_text_in_blocks_reads_back_equal(end: str) -> None:
    value = {
        "plain": f"name: demo\n  # Comment.\n\ndata: 'x'{end}",
        "odd": [f" a \n b\x85\u2028\t😀{end}", "1e5", {"deep": f"{end}a\n b"}],
        "list": [1, "yes", None],
    }
    text = dump_yaml(value, blocks=True)
    assert yaml.safe_load(text) == value
    assert read_yaml(text, "here").value == value
    assert "plain: |" in text
    assert "list: [1, 'yes', null]\n" in text
