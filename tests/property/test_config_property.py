"""Whatever is given as a configuration: a valid one or a ConfigError, never another exception."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from dml_dist.config.load import differing_paths, dump_config, load_config, parse_config
from dml_dist.config.overrides import parse_override
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
    assert "required" in message
    assert needle in message
    assert len(message) < 20_000  # huge values are shown cut


def _check_any(error: ConfigError, needles: list[str]) -> None:
    assert any(needle in str(error) for needle in needles), str(error)


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
        assert isinstance(config, RunConfig)


NOISE = [" ", "\n", "\t", ": ", "- ", "[", "}", "&a ", "*a", "!!", "%", "'", '"', "<<: ", "\0", "#"]
NOISE += ["", "|\n", "? ", "---\n", "é", "!!python/name:os.system ", "."]


@settings(COMMON, max_examples=200)
@given(text=st.data())
def test_malformed_text(text: st.DataObject, tmp_path_factory: Any) -> None:
    source = yaml.safe_dump(VALID, sort_keys=False)
    for _ in range(text.draw(st.integers(1, 3))):
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
        assert isinstance(load_config(path), RunConfig)
    except ConfigError as error:
        _check(error, "property.yaml")


@settings(COMMON, max_examples=300)
@given(
    st.lists(
        st.tuples(
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
        assert isinstance(config, RunConfig)
        for override in overrides:
            parse_override(override)


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
        "data": st.fixed_dictionaries({"path": TEXT, "train_split": TEXT}),
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
