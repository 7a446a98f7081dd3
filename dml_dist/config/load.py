"""One YAML file to one RunConfig, and back; what differs between two of them."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dml_dist.config import shape
from dml_dist.config.base import Section
from dml_dist.config.overrides import Override, apply_overrides, parse_override
from dml_dist.config.plain import to_plain
from dml_dist.config.problems import config_error, from_pydantic
from dml_dist.config.schema import RunConfig
from dml_dist.config.yaml_text import KeyPath, dump_yaml, read_text, read_yaml
from dml_dist.errors import ConfigError
from dml_dist.urls import local_path

AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a run.

    Args:
        path: A YAML file.
        overrides: Changes of the form `path=value`, such as `optim.lr=1e-3`.

    Raises:
        ConfigError: If the file cannot be read or is no valid configuration; lists all problems.
    """
    path = Path(path)
    document = read_yaml(read_text(path), str(path))
    if document.value is None:
        raise ConfigError(f"{path} is an empty file; it needs the sections name, data, train")
    return parse_section(RunConfig, document.value, overrides, str(path), document.lines)


def parse_config(
    mapping: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the configuration"
) -> RunConfig:
    """Validate plain values (dicts, lists or tuples, strings, numbers, booleans, None).

    A section that is chosen by `name` takes the name of its default when it has none.

    Args:
        mapping: The configuration; it is not changed.
        overrides: Changes of the form `path=value`.
        source: What errors call the configuration.

    Raises:
        ConfigError: If it is not valid; lists all problems.
    """
    return parse_section(RunConfig, mapping, overrides, source)


def dump_config(config: RunConfig) -> str:
    """Return a configuration as YAML, every default written out; it reads back equal.

    Raises:
        ConfigError: If options of a custom member hold values that YAML cannot represent.
    """
    return dump_yaml(_plain_config(config))


@dataclass(frozen=True)
class Difference:
    """A field in which two configurations differ."""

    path: str
    """Dotted path, such as `optim.lr`."""

    old: Any
    """Plain value in the first one; ABSENT when its member of a family lacks the field."""

    new: Any
    """Plain value in the second one."""

    resumable: bool
    """Whether a run may be resumed with the new value."""

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.old)} -> {_shown(self.new)}"


class Absent(enum.Enum):
    """The type of ABSENT."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT
"""Stands for the value of a field that the other member of a family has."""


def differing_paths(old: RunConfig, new: RunConfig) -> list[Difference]:
    """Return every field in which two configurations differ, in the order of the schema.

    Another member of a family is a difference of its `name` and of all fields that only one of the
    two members has, or that have different values.
    """
    return list(_differences(old, new, "", False))


def _differences(
    old: Section | None, new: Section | None, prefix: str, resumable: bool
) -> Iterator[Difference]:
    old_keys = shape.keys_of(type(old)) if old is not None else []
    new_keys = shape.keys_of(type(new)) if new is not None else []
    for key in [*old_keys, *(key for key in new_keys if key not in old_keys)]:
        section = old if key in old_keys else new
        assert section is not None
        one = getattr(old, key) if key in old_keys else ABSENT
        two = getattr(new, key) if key in new_keys else ABSENT
        allowed = resumable or shape.is_resumable(type(section).model_fields[key])
        if isinstance(one, Section) or isinstance(two, Section):
            left = one if isinstance(one, Section) else None
            right = two if isinstance(two, Section) else None
            yield from _differences(left, right, f"{prefix}{key}.", allowed)
        elif _canonical(_plain(one)) != _canonical(_plain(two)):
            yield Difference(f"{prefix}{key}", _plain(one), _plain(two), allowed)


def _canonical(value: Any) -> str:
    """Return a text that is equal for equal values; in options 1 is neither true nor 1.0."""
    return json.dumps(value, sort_keys=True, default=repr)


def _plain(value: Any) -> Any:
    """Return a list for a tuple, and mappings for the sections in a tuple or mapping."""
    if isinstance(value, dict):
        return {
            key: _fields(item) if isinstance(item, Section) else item for key, item in value.items()
        }
    if not isinstance(value, tuple):
        return value
    return [_fields(item) if isinstance(item, Section) else item for item in value]


def _shown(value: Any) -> str:
    return "(absent)" if value is ABSENT else shape.shown(value)


def _plain_config(config: RunConfig) -> dict[str, Any]:
    plain, problems = to_plain(_fields(config))
    if problems:
        raise config_error(problems, f"the configuration of run {config.name}", lambda path: "")
    return plain


def _fields(section: Section) -> dict[str, Any]:
    """Return the fields of a section by key."""
    result = {}
    for key in shape.keys_of(type(section)):
        value = getattr(section, key)
        result[key] = _fields(value) if isinstance(value, Section) else _plain(value)
    return result


def parse_section(
    section: type[AnySection],
    value: Any,
    overrides: Sequence[str] = (),
    source: str = "the configuration",
    lines: Mapping[KeyPath, int] | None = None,
) -> AnySection:
    """Validate plain values as a section of any schema, such as the settings of a target of jobs.

    Args:
        section: The class.
        value: A mapping; it is not changed.
        overrides: Changes of the form `path=value`.
        source: What errors call the values.
        lines: Lines of the values in the source.

    Raises:
        ConfigError: If they are not valid; lists all problems.
    """
    changes = [parse_override(text) for text in overrides]
    plain, problems = to_plain(value)
    if not isinstance(plain, dict):
        fields = section.model_fields
        keys = [key for key in fields if fields[key].is_required()] or shape.keys_of(section)[:3]
        raise ConfigError(
            f"the top level must be a mapping of sections in {source} ({', '.join(keys)}, ...), "
            f"got {shape.shown(value)}"
        )
    apply_overrides(plain, changes, section)
    plain, more = to_plain(plain)  # again, for the values of the overrides
    problems = list(dict.fromkeys([*problems, *more]))
    _fill_names(plain, section)
    try:
        config = section.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        refused = {problem.path for problem in problems}
        found = from_pydantic(error.errors(include_url=False), section)
        problems += [problem for problem in found if not _is_below(problem.path, refused)]
    if problems:
        origins = _Origins(lines or {}, changes)
        problems.sort(key=lambda problem: origins.order(problem.path))
        raise config_error(problems, source, origins.where, section)
    return config


def _is_below(path: KeyPath, paths: set[KeyPath]) -> bool:
    return any(path[:length] in paths for length in range(len(path) + 1))


def _fill_names(plain: dict[str, Any], section: type[Section]) -> None:
    """Give sections without a name the one of their default, in place."""
    for key, field in section.model_fields.items():
        value = plain.get(key)
        if not isinstance(value, dict):
            continue
        choices = shape.tagged(field.annotation)
        if choices and "name" not in value and (name := shape.default_name(field)) is not None:
            value["name"] = name
        chosen = value.get("name")
        member = choices.get(chosen) if isinstance(chosen, str) else None
        if not choices and (found := shape.members(field.annotation)):
            member = found[0]
        if member is not None:
            _fill_names(value, member)


class _Origins:
    """Where the values of a configuration come from: lines of the file, or overrides."""

    def __init__(self, lines: Mapping[KeyPath, int], overrides: Sequence[Override]) -> None:
        self._overrides = {override.path: override.text for override in overrides}
        changed = set(self._overrides)
        self._lines = {path: line for path, line in lines.items() if not _is_below(path, changed)}

    def where(self, path: KeyPath) -> str:
        """Return the place of a value, or of the section in which it is missing."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._overrides:
                return f"--set {self._overrides[path[:length]]}"
            if path[:length] in self._lines:
                return f"line {self._lines[path[:length]]}"
        below = [text for other, text in self._overrides.items() if other[: len(path)] == path]
        return f"--set {below[0]}" if below and path else ""

    def order(self, path: KeyPath) -> int:
        """Return a sort key: problems with a line first, in the order of lines."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return 1 << 60


# ---------------- paths


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with the paths of data, data set and weights made absolute."""
    cache = config.data.cache
    data: dict[str, Any] = {
        "path": _absolute(config.data.path),
        "cache": cache.model_copy(update={"folder": _absolute(cache.folder)}),
    }
    if (source := getattr(config.data.dataset, "source", None)) is not None:
        assert config.data.dataset is not None
        data["dataset"] = config.data.dataset.model_copy(update={"source": _absolute(source)})
    model = config.model
    weights = getattr(model.backbone, "weights", "none")
    if Path(weights).expanduser().is_file():  # Otherwise the name of torchvision weights.
        backbone = model.backbone.model_copy(update={"weights": _absolute(weights)})
        model = model.model_copy(update={"backbone": backbone})
    return config.model_copy(update={"data": config.data.model_copy(update=data), "model": model})


def _absolute(path: str) -> str:
    """Return an absolute path; a URL stays as it is, unless it is that of a local path."""
    local = local_path(path)
    return path if local is None else str(local.absolute())
