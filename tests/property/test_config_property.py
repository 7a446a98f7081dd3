"""Any input is a valid configuration or a ConfigError, never another exception."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from dml_dist.config.load import differing_paths, dump_config, load_config, parse_config
from dml_dist.config.problems import dotted
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

COMMON = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

VALID: dict[str, Any] = {
    "name": "demo",
    "seed": 1,
    "data": {
        "path": "shards",
        "dataset": {"name": "folder", "source": "images", "split": {"train": 0.5, "by": "class"}},
        "batches": {"name": "balanced", "classes_per_batch": 16, "samples_per_class": 4},
        "transform": {"name": "standard", "size": 64, "crop_scale": [0.2, 1.0], "std": [1, 1, 1]},
    },
    "model": {"backbone": {"name": "resnet18", "norm": "group"}, "pooling": "gem"},
    "loss": {"name": "custom", "target": "a.b:c", "options": {"deep": {"list": [1, {"x": None}]}}},
    "optim": {"name": "sgd", "lr": 0.1, "no_weight_decay": ["biases"]},
    "schedule": {"name": "step", "milestones": [3, 5], "gamma": 0.5},
    "train": {"global_batch_size": 64, "steps": 10, "max_grad_norm": None},
    "validation": {"name": "classes", "classes": ["a", "b"]},
    "evaluation": {"recall_at": [1, 2], "memory_mb": 64.0},
    "launch": {"launcher": "ray", "num_workers": 2, "use_gpu": "no"},
}
Path_ = tuple[str | int, ...]


def _paths(value: Any, prefix: Path_ = ()) -> list[Path_]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    found = [prefix] if prefix else []
    for key, item in items:
        found += _paths(item, (*prefix, key))
    return found


PATHS = _paths(VALID)

WORDS = ["name", "lr", "custom", "cosine", "none", "null", "True", "1e-4", "a:b", "a.b", "<<"]
WORDS += ["", "\0", "\ud800", "\x85\u2028", "é😀", "x" * 300]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**64), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
ODD = st.sampled_from(
    [b"bytes", object(), {1, 2}, 1j, Path("x"), RunConfig, (1, 2), {1: 2}, {None: 3}]
)
VALUES = st.one_of(
    SCALARS,
    ODD,
    st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    ),
)


def _deep(depth: int, leaf: Any) -> Any:
    value = leaf
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _parent(config: Any, path: Path_) -> Any:
    for key in path[:-1]:
        config = config[key]
    return config


@st.composite
def mutated(draw: st.DrawFn) -> tuple[Any, list[Path_]]:
    """A valid configuration with one to three faults, and the paths that were touched."""
    config = copy.deepcopy(VALID)
    touched = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in PATHS if _exists(config, path)] or [()]))
        if not path:
            break
        parent, key = _parent(config, path), path[-1]
        kind = draw(
            st.sampled_from(["drop", "rename", "retype", "nest", "wrap", "deep", "add", "cycle"])
        )
        touched.append(path)
        if kind == "drop":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            word = draw(st.sampled_from(WORDS) | st.text(max_size=5) | st.just(f"{key}x"))
            parent[word] = parent.pop(key)
            touched.append((*path[:-1], word))
        elif kind == "nest":
            parent[key] = {str(key): parent[key]}
        elif kind == "wrap":
            parent[key] = [parent[key]]
        elif kind == "deep":
            parent[key] = _deep(draw(st.sampled_from([3, 59, 61, 1500])), 1)
        elif kind == "add" and isinstance(parent, dict):
            word = draw(st.sampled_from(WORDS) | st.text(max_size=5))
            parent[word] = draw(VALUES)
            touched.append((*path[:-1], word))
        elif kind == "cycle":
            parent[key] = config
        else:
            parent[key] = draw(VALUES)
    return config, touched


def _exists(config: Any, path: Path_) -> bool:
    for key in path:
        try:
            config = config[key]
        except (KeyError, IndexError, TypeError):
            return False
        if config is VALID:
            return False
    return True


def _check(error: ConfigError, needle: str = "") -> None:
    message = str(error)
    assert needle in message
    assert len(message) < 20_000  # huge values are shown cut


def _check_any(error: ConfigError, needles: list[str]) -> None:
    assert any(needle in str(error) for needle in needles), str(error)


def _at(plain: Any, path: Sequence[str | int]) -> Any:
    for key in path:
        plain = plain[key]
    return plain


def _read_back(config: RunConfig) -> Any:
    """Return a configuration as plain values, read from its text, which gives it back."""
    plain = yaml.safe_load(dump_config(config))
    assert parse_config(plain) == config
    return plain


def _assert_holds(found: Any, given: Any) -> None:
    """Check that plain values hold what was given, apart from defaults that were filled in."""
    if isinstance(given, dict) and isinstance(found, dict):
        for key, value in given.items():
            assert key in found
            _assert_holds(found[key], value)
    elif isinstance(given, list | tuple) and isinstance(found, list):
        for one, other in zip(found, given, strict=True):
            _assert_holds(one, other)
    else:
        assert found == given
        assert isinstance(found, bool) == isinstance(given, bool)  # True == 1


def _assert_holds_text(found: Any, given: Any) -> None:
    """Check the same of values that were given as texts of YAML."""
    if isinstance(given, dict):
        merged = [value for key, value in given.items() if key == "<<"]
        for key, value in given.items():
            assert key in found or merged, key
            if key in found:
                _assert_holds_text(found[key], value)
    elif isinstance(given, list):
        assert isinstance(found, list)
        for one, other in zip(found, given, strict=True):
            _assert_holds_text(one, other)
    elif isinstance(found, bool):
        assert given.lower() == str(found).lower()
    elif isinstance(found, int | float):
        assert found == (int(given, 0) if given[:2] in ("0x", "0o") else float(given))
    elif found is None:
        assert given.lower() in ("", "~", "null")
    else:
        assert found == given


@settings(COMMON, max_examples=1000)
@given(mutated())
def test_malformed_mappings(case: tuple[Any, list[Path_]]) -> None:
    mapping, touched = case
    try:
        config = parse_config(mapping, source="here.yaml")
    except ConfigError as error:
        event("refused")
        _check(error, "here.yaml")
        _check_any(error, [dotted(path[:1]) for path in touched])
    else:
        event("accepted")
        assert parse_config(yaml.safe_load(dump_config(config))) == config


@settings(COMMON, max_examples=300)
@given(st.sampled_from(PATHS), VALUES)
def test_a_retyped_value_is_named_by_its_path(path: Path_, value: Any) -> None:
    mapping = copy.deepcopy(VALID)
    _parent(mapping, path)[path[-1]] = value
    try:
        config = parse_config(mapping)
    except ConfigError as error:
        _check(error)
        # The path or something below it, or the section whose fields no longer fit together.
        above = [".".join(map(str, path[:length])) for length in range(1, len(path) + 1)]
        _check_any(error, [*(f"\n  {one}" for one in above), "do not fit together"])
    else:
        event("accepted")
        plain = _read_back(config)
        _assert_holds(_at(plain, path), value)
        for section in plain.keys() & VALID.keys() - {path[0]}:
            _assert_holds(plain[section], VALID[section])


NOISE = [" ", "\n", "\t", ": ", "- ", "[", "}", "&a ", "*a", "!!", "%", "'", '"', "<<: ", "\0", "#"]
NOISE += ["", "|\n", "? ", "---\n", "é", "!!python/name:os.system ", "."]


@settings(COMMON, max_examples=200)
@given(text=st.data())
def test_malformed_text(text: st.DataObject, tmp_path_factory: Any) -> None:
    source = yaml.safe_dump(VALID, sort_keys=False)
    for _ in range(text.draw(st.integers(0, 3))):  # changes that leave it valid, mostly
        at = text.draw(st.sampled_from([i for i, sign in enumerate(source) if sign in "56789\n"]))
        new = " # a note\n" if source[at] == "\n" else text.draw(st.sampled_from("56789"))
        source = source[:at] + new + source[at + 1 :]
    for _ in range(text.draw(st.integers(0, 3))):
        low = text.draw(st.integers(0, len(source)))
        high = low + text.draw(st.sampled_from([0, 0, 1, 2, 30]))
        piece = text.draw(st.sampled_from(NOISE) | st.text(max_size=4))
        source = source[:low] + piece + source[high:]
    _load_bytes(source.encode("utf-8", "surrogatepass"), tmp_path_factory)


@settings(COMMON, max_examples=200)
@given(data=st.binary(max_size=60) | st.text("abc:-[]{}&*!|>'\"%@#,?\n \t\\<0e.", max_size=60))
def test_random_files(data: bytes | str, tmp_path_factory: Any) -> None:
    _load_bytes(data.encode() if isinstance(data, str) else data, tmp_path_factory)


def _load_bytes(data: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "property.yaml"
    path.write_bytes(data)
    try:
        config = load_config(path)
    except ConfigError as error:
        _check(error, "property.yaml")
    else:
        event("accepted")
        # PyYAML with every scalar as text, which leaves the reading of scalars to this test.
        _assert_holds_text(_read_back(config), yaml.load(data, yaml.BaseLoader))


CHANGES = ["seed=0o17", "seed=0x1F", "optim.lr=1e-3", "optim.lr=.5", "train.steps=1_000"]
CHANGES += ["name=010", "data.train_split='yes'", "data.train_split=off", "launch.use_gpu=no"]
CHANGES += ["data.transform.std.1=2", "data.transform.std=[1, 2e0, 3]", "train.max_grad_norm=~"]
CHANGES += ["loss.options={a: [x, {b: True}]}", "loss.options.deep.list.0=1.5", "seed=0"]
CHANGES += ["optim.no_weight_decay=[]", "nir={flow: {depth: 3}}", "evaluation.recall_at=[1, 10]"]


@settings(COMMON, max_examples=300)
@given(
    st.lists(
        st.sampled_from(CHANGES)
        | st.tuples(
            st.sampled_from([".".join(map(str, path)) for path in PATHS]) | st.text(max_size=12),
            st.sampled_from(["=", "=", "=", "", ".x=", ".0="]),
            st.sampled_from(
                ["1", "-1", "x", "[1]", "{a: 1}", "null", "", "custom", "sgd", ": :", "*"]
            )
            | st.text(max_size=5),
        ).map("".join),
        max_size=3,
    )
)
def test_overrides(overrides: list[str]) -> None:
    try:
        config = parse_config(VALID, overrides)
    except ConfigError as error:
        _check(error, "--set" if len(overrides) == 1 and "do not fit" not in str(error) else "")
    else:
        event("accepted")
        _assert_overridden(config, overrides)


@pytest.mark.parametrize("change", CHANGES)
def test_an_override_changes_its_value_alone(change: str) -> None:
    _assert_overridden(parse_config(VALID, [change]), [change])


def _assert_overridden(config: RunConfig, overrides: list[str]) -> None:
    """Check that sections without a change are as before, and that a single change is there."""
    plain, before = _read_back(config), _read_back(parse_config(VALID))
    changed = {override.partition("=")[0].strip().split(".")[0] for override in overrides}
    for section in (plain.keys() | before.keys()) - changed:
        assert plain[section] == before[section]
    if len(overrides) == 1:
        path, _, value = overrides[0].partition("=")
        keys = [int(part) if part.isdecimal() else part for part in path.strip().split(".")]
        _assert_holds_text(_at(plain, keys), yaml.load(value, yaml.BaseLoader))


# ---------------------------------------------------------------- valid configurations

FLOATS = st.floats(min_value=1e-300, max_value=1e300)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
OPTIONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
VALID_CONFIGS = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
        "data": st.fixed_dictionaries({"path": TEXT.filter(str.strip), "train_split": TEXT}),
        "train": st.fixed_dictionaries({"steps": st.integers(1, 2**63 - 1)}),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "optim": st.fixed_dictionaries(
            {"name": st.sampled_from(["adam", "adamw", "sgd", "rmsprop"]), "lr": FLOATS},
            optional={"head_lr": st.none() | FLOATS, "weight_decay": st.integers(0, 9)},
        ),
        "loss": st.fixed_dictionaries(
            {
                "name": st.just("custom"),
                "target": st.just("a.b:c"),
                "options": st.dictionaries(TEXT, OPTIONS, max_size=3),
            }
        ),
        "validation": st.fixed_dictionaries(
            {"name": st.just("classes"), "classes": st.lists(TEXT, min_size=2, max_size=4)}
        ),
        "launch": st.fixed_dictionaries(
            {"address": st.none() | TEXT, "use_gpu": st.sampled_from(["auto", "yes", "no"])}
        ),
    },
)


@settings(COMMON, max_examples=80)
@given(mapping=VALID_CONFIGS)
def test_valid_configurations_round_trip(mapping: dict[str, Any], tmp_path_factory: Any) -> None:
    config = parse_config(mapping)
    text = dump_config(config)
    assert parse_config(yaml.safe_load(text)) == config
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(text, encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert differing_paths(again, config) == []
    assert dump_config(again) == text
