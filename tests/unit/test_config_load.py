"""Reading and validating run configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dml_dist.config.data import FolderConfig
from dml_dist.config.load import (
    load_config,
    parse_config,
)
from dml_dist.config.objective import AdamConfig
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

SMALL: dict[str, Any] = {"name": "demo", "data": {"path": "shards"}, "train": {"steps": 10}}
SMALL_YAML = "name: demo\ndata:\n  path: shards\ntrain:\n  steps: 10\n"


def config_of(*overrides: str, **sections: Any) -> RunConfig:
    return parse_config({**SMALL, **sections}, overrides)


def message(*overrides: str, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(*overrides, **sections)
    return str(caught.value)


def load_text(folder: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def text_message(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, text, *overrides)
    return str(caught.value)


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("+2", 2),
        ("-0.0", -0.0),
        ("100_000", 100_000),
        ("0x1f", 31),
        ("0o17", 15),
        ("0", 0),
        ("010", "010"),
        ("1_", "1_"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    config = load_text(
        tmp_path,
        SMALL_YAML + f"loss:\n  name: custom\n  target: a:b\n  options: {{key: {text}}}\n",
    )
    read = config.loss.model_dump()["options"]["key"]
    assert (read, type(read)) == (value, type(value))


def test_numbers_of_fields(tmp_path: Path) -> None:
    config = load_text(tmp_path, SMALL_YAML + "optim: {name: adam, lr: 1e-4, eps: 1}\n")
    assert config.optim == AdamConfig(lr=1e-4, eps=1.0)
    assert isinstance(config.optim, AdamConfig)
    assert type(config.optim.eps) is float


def test_words_that_other_yaml_reads_as_booleans(tmp_path: Path) -> None:
    assert load_text(tmp_path, SMALL_YAML + "launch: {use_gpu: no}\n").launch.use_gpu == "no"


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    text = text_message(tmp_path, SMALL_YAML + "  epochs: 1\n\n  steps: 20\n")
    assert "train.steps on line 5 and again on line 8" in text
    assert str(tmp_path / "run.yaml") in text


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        SMALL_YAML.replace("path: shards", "path: &where shards\n  train_split: *where")
        + "evaluation: &often {every_steps: 5}\ncheckpoint:\n  <<: *often\n  keep: 3\n",
    )
    assert config.data.train_split == "shards"
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (5, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty file"),
        ("# only a comment\n", "empty file"),
        ("- a\n- b\n", "a mapping of sections"),
        ("just words\n", "a mapping of sections"),
        ("name: [\n", "line 2"),
        ("name: a: b\n", "in quotes"),
        ("a:\n\tb: 1\n", "use spaces, not tabs"),
        ("name: *missing\n", "undefined alias 'missing'"),
        ("name: &a [*a]\n", "contains itself"),
        ("name: a\n---\nname: b\n", "a single document"),
        ("name: !!python/object/apply:os.system [ls]\n", "remove it"),
        ("name: !!binary aGk=\n", "!!binary"),
        ("1: 2\n", "a key must be text, got 1"),
        ("? [a]\n: 1\n", "a key must be text, got a collection"),
        ("name: a\0b\n", "U+0000"),
        ('name: "\\U99999999"\n', "syntax error"),
        ("name: !!int word\n", "of kind int, got 'word'"),
        ("seed: " + "9" * 5000 + "\n", "of kind int"),
        ("<<: 1\n", "<< must be followed by a mapping"),
        ("[" * 5000, "nested more than"),
        ("{a: " * 5000, "nested more than"),
        ("\ufeffname: é\n", "must be a name of letters"),
    ],
)
def test_text_that_is_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    found = text_message(tmp_path, text)
    assert expected in found
    assert "run.yaml" in found


def test_aliases_do_not_multiply_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    assert "aliases multiply" in text_message(tmp_path, "\n".join(lines))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    found = text_message(tmp_path, SMALL_YAML.encode() + b"# caf\xe9\n")
    assert "line 6 has the byte 0xe9" in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train_cub.yaml").write_text(SMALL_YAML)
    (tmp_path / "other.yaml").write_text(SMALL_YAML)
    with pytest.raises(
        ConfigError, match=r"does not exist; in .* there are train_cub.yaml, other.yaml$"
    ):
        load_config(tmp_path / "train_cubs.yaml")
    with pytest.raises(ConfigError, match=r"is a folder, .* other\.yaml, train_cub\.yaml"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        load_config(tmp_path / "missing" / "a.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Path("a\0b"))
    (tmp_path / "big.yaml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(ConfigError, match="at most 1 MiB"):
        load_config(tmp_path / "big.yaml")


# ---------------------------------------------------------------- validation


def test_defaults_and_lists() -> None:
    config = config_of(
        evaluation={"recall_at": [1, 10]},
        data={"path": "p", "dataset": {"name": "folder", "source": "images"}},
    )
    assert config.evaluation.recall_at == (1, 10)
    assert config.data.dataset == FolderConfig(source="images")
    assert config.schedule.name == "constant"


def test_a_section_without_name_is_its_default() -> None:
    assert config_of(optim={"lr": 0.5}).optim == AdamConfig(lr=0.5)
    assert config_of(model={"backbone": {"width": 32}}).model.backbone.name == "conv4"


def test_the_mapping_is_not_changed() -> None:
    mapping = {**SMALL, "optim": {"lr": 0.5}}
    parse_config(mapping, ["optim.name=sgd", "data.path=elsewhere"])
    assert mapping == {**SMALL, "optim": {"lr": 0.5}}
    assert SMALL["data"] == {"path": "shards"}


def test_all_problems_are_listed_with_lines(tmp_path: Path) -> None:
    found = text_message(
        tmp_path,
        "name: demo\ndata:\n  path: 12\noptim:\n  lr: -1\n  momentun: 0.9\n"
        "train:\n  steps: true\nloss:\n  name: proxy_nka\n",
    )
    assert "5 problems in" in found
    lines = [line.strip() for line in found.splitlines()]
    assert lines[1] == "data.path (line 3): must be text, got 12; put it in quotes"
    assert lines[2] == "optim.lr (line 5): must be a number > 0, got -1"
    assert lines[3].startswith("optim.momentun (line 6): unknown key; did you mean optim.momentum?")
    assert lines[4] == "train.steps (line 8): must be an integer >= 0, or null, got true"
    assert lines[5] == (
        "loss.name (line 10): must be one of proxy_nca, proxy_anchor, soft_triple, "
        "normalized_softmax, cosface, arcface, contrastive, triplet, margin, multi_similarity, "
        "custom, got 'proxy_nka'; "
        "did you mean proxy_nca?"
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        # unknown keys
        ({"lr": 1}, "lr: unknown key; did you mean optim.lr? keys of the top level: name, seed"),
        ({"optimm": {}}, "optimm: unknown key; did you mean optim?"),
        ({"loss": {"embeding_scale": 1}}, "did you mean loss.embedding_scale? keys of loss (name:"),
        ({"model": {"width": 8}}, "model.width: unknown key; did you mean model.backbone.width or"),
        ({"loss": {"nmae": "custom"}}, "did you mean loss.name?"),
        ({"optim": {"name": "sgd", "eps": 1}}, "a key with name: adam or adamw or rmsprop"),
        ({"optim.lr": 1}, "'optim.lr': unknown key; write what follows each dot indented"),
        ({"wombat": 1}, "wombat: unknown key; keys of the top level: name, seed, data"),
        ({"Optim": {}}, "did you mean optim?"),
        # wrong names
        ({"schedule": {"name": "cosin"}}, "one of constant, step, cosine, got 'cosin'; did you"),
        ({"schedule": {"name": 3}}, "schedule.name: must be one of constant, step, cosine, got 3"),
        ({"schedule": {"name": ["step"]}}, "schedule.name: must be one of"),
        ({"schedule": "cosine"}, "got 'cosine'; write {name: cosine}"),
        ({"schedule": None}, "schedule: must be a section with a name of constant"),
        ({"model": [1]}, "model: must be a section with keys backbone, pooling"),
        (
            {"data": {"path": "p", "dataset": {"source": "x"}}},
            "data.dataset.name: missing; give one of glyphs, sop_shape, folder, ",
        ),
        # wrong types
        ({"seed": True}, "seed: must be an integer >= 0, got true"),
        ({"seed": 1.0}, "seed: must be an integer >= 0, got 1.0; write 1"),
        ({"seed": "1"}, "got '1'; remove the quotes"),
        ({"seed": 2**63}, "seed: must be an integer of at most 64 bits"),
        ({"seed": 10**5000}, "seed: must be an integer of at most 64 bits, got an integer of"),
        ({"model": {10**5000: 1}}, "a key must be text, got an integer of"),
        ({"optim": {"lr": False}}, "optim.lr: must be a number > 0, got false"),
        ({"optim": {"lr": float("nan")}}, "optim.lr: must be a finite number, got nan"),
        ({"train": {"steps": 1, "max_grad_norm": "None"}}, "got 'None'; write null"),
        ({"train": {"steps": 1, "precision": "bf-16"}}, "got 'bf-16'; did you mean bf16?"),
        ({"model": {"layer_norm": 1}}, "model.layer_norm: must be true or false, got 1"),
        ({"launch": {"use_gpu": True}}, "got true; write yes"),
        ({"evaluation": {"recall_at": 5}}, "each an integer >= 1, got 5; write [5]"),
        ({"evaluation": {"recall_at": []}}, "a list with at least 1 item"),
        ({"evaluation": {"recall_at": [1, "x"]}}, "recall_at.1: must be an integer >= 1, got 'x'"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: must be a list of 2 items"),
        ({"optim": {"betas": [0.9, 0.9, 0.9]}}, "optim.betas: must be a list of 2 items"),
        ({"name": "../x"}, "name: must be a name of letters, digits"),
        ({"name": "a\0b"}, "name: must be text without the character NUL"),
        ({"name": "\ud800"}, "name: must be Unicode text"),
        ({"name": object()}, "name: must be a plain value"),
        ({"name": b"bytes"}, "got an object of builtins.bytes"),
        ({"loss": {"name": "custom", "target": "x.y"}}, "of the form package.module:name, got"),
        ({"loss": {"name": "custom", "target": "x..y:z"}}, "of the form package.module:name, got"),
        ({"loss": {"name": "custom", "target": "x:y", "options": [1]}}, "a mapping of names"),
        ({"[key]": 1}, "'[key]': unknown key"),
        ({"loss": {1: 2}}, "a key must be text, got 1"),
        # fields that are missing or do not fit together
        ({"train": {}}, "train: give exactly one of steps and epochs, got steps=None"),
        ({"train": None}, "train: must be a section with keys global_batch_size"),
        ({"data": {}}, "data.path: missing; give text"),
        (
            {"data": {"path": "p", "batches": {"name": "balanced", "samples_per_class": 1}}},
            "data.batches.classes_per_batch: missing; give an integer >= 2",
        ),
        (
            {"train": {"steps": 1, "global_batch_size": 99}, "data": {"path": "p", "batches": {
                "name": "balanced", "classes_per_batch": 16, "samples_per_class": 4}}},
            "classes_per_batch 16 x samples_per_class 4 = 64 must equal train.global_batch_size 99",
        ),
        (
            {"launch": {"launcher": "ray", "num_workers": 100}},
            "train.global_batch_size 64 must be at least launch.num_workers 100",
        ),
    ],
)  # fmt: skip
def test_problems(sections: dict[str, Any], expected: str) -> None:
    found = message(**sections)
    assert expected in found
    assert found.startswith("1 problem in the configuration:")
    assert "config --explain" in found


def test_faulty_items_are_reported_once() -> None:
    found = message(validation={"name": "classes", "classes": [1, 2]})
    assert "2 problems" in found
    assert "validation.classes.0: must be text, got 1; put it in quotes" in found


def test_a_value_that_is_no_plain_one_is_reported_once() -> None:
    found = message(optim={"lr": object(), "eps": -1})
    assert "2 problems" in found


def test_values_that_hold_themselves() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = {"once": loop}
    found = message(loss={"name": "custom", "target": "a:b", "options": loop})
    assert "loss.options.again.once: contains itself" in found
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert "at most 60 levels" in message(model=deep)


def test_the_configuration_must_be_a_mapping() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in ([1], deep, 10**5000, "text", None, object(), [10**5000] * 3):
        with pytest.raises(ConfigError, match="a mapping of sections in here"):
            parse_config(value, source="here")  # type: ignore[arg-type]


def test_a_range_of_workers() -> None:
    """`num_workers: {min: M, max: N}` is short for two fields."""

    def ray(**values: Any) -> dict[str, Any]:
        return {"launcher": "ray", **values}

    short = config_of(launch=ray(num_workers={"min": 1, "max": 3}))
    assert short == config_of(launch=ray(num_workers=3, min_workers=1))
    assert short.launch.fewest_workers == 1
    assert config_of(launch=ray(num_workers=3)).launch.fewest_workers == 3
    assert config_of("launch.num_workers={min: 2, max: 3}").launch.min_workers == 2
    for values, text in (
        ({"num_workers": {"min": 4, "max": 3}}, "min_workers 4 must be at most num_workers 3"),
        ({"num_workers": {"min": 1, "mx": 3}}, "num_workers: must be an integer"),
        ({"num_workers": {"min": 0, "max": 3}}, "min_workers: must be an integer >= 1"),
        ({"num_workers": {"min": 1, "max": 3}, "min_workers": 2}, "not both"),
    ):
        assert text in message(launch=ray(**values))
