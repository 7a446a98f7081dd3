"""Changes to a configuration from the command line: `--set path=value`.

Overrides are applied from the outside in (a section before its fields, `name` before the other
fields of its section), so that their order on the command line does not matter; of two for one
path the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from dml_dist.config import shape
from dml_dist.config.base import Section
from dml_dist.config.schema import RunConfig
from dml_dist.config.yaml_text import KeyPath, read_yaml
from dml_dist.errors import ConfigError


@dataclass(frozen=True)
class Override:
    """One change: the value at `path` becomes `value`."""

    path: KeyPath
    value: Any
    text: str
    """As it was given, for messages."""


def parse_override(text: str) -> Override:
    """Read `path=value`; the value is YAML, so `1e-4` is a number and `[1, 2]` a list.

    Raises:
        ConfigError: If there is no `=`, no path, or the value is not valid YAML.
    """
    dotted, equals, value = text.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(part and part == part.strip() for part in parts):
        raise ConfigError(f"--set needs path=value, such as optim.lr=1e-3, got {shape.shown(text)}")
    path = tuple(int(part) if part.isdecimal() and part.isascii() else part for part in parts)
    return Override(path, read_yaml(value, f"--set {text}").value, text)


def apply_overrides(
    mapping: dict[str, Any], overrides: Sequence[Override], root: type[Section] = RunConfig
) -> None:
    """Change a configuration of plain values, with the schema `root`, in place.

    A section that is not there yet begins with the `name` it has by default; a list that is not
    there begins as its default. Another `name` clears the keys that its section had.

    Raises:
        ConfigError: If a path goes below a plain value or beyond the end of a list.
    """
    for override in sorted(overrides, key=lambda one: (len(one.path), one.path[-1] != "name")):
        _apply(mapping, override, root)


def _apply(mapping: dict[str, Any], override: Override, root: type[Section]) -> None:
    container: Any = mapping
    position = _Position((root,))
    for depth, key in enumerate(override.path[:-1]):
        position = position.below(key, container)
        _require_place(container, key, override, depth)
        if isinstance(container, dict):
            if container.get(key) is None:
                container[key] = position.beginning()
            elif isinstance(container[key], dict) and position.choices:
                _fill_name(container[key], position)
        container = container[key]
    key = override.path[-1]
    _require_place(container, key, override, len(override.path) - 1)
    if key == "name" and position.choices and container.get("name") != override.value:
        container.clear()
    container[key] = override.value


def _fill_name(section: dict[str, Any], position: _Position) -> None:
    if "name" not in section and position.name is not None:
        section["name"] = position.name


def _require_place(container: Any, key: str | int, override: Override, depth: int) -> None:
    """Refuse a key below something that has no keys, and an index that a list does not have."""
    if isinstance(container, dict) and isinstance(key, str):
        return
    above = ".".join(map(str, override.path[:depth])) or "the configuration"
    if isinstance(container, list):
        if isinstance(key, int) and key < len(container):
            return
        wanted = f"an index from 0 to {len(container) - 1}" if container else "the whole list"
        problem = f"give {wanted} below {above} = {shape.shown(container)}, not {key}"
    elif isinstance(container, dict):
        problem = f"{above} is not a list; give a key of it, not the index {key}"
    else:
        value = "a plain value" if container is None else f"the value {shape.shown(container)}"
        problem = f"{above} is {value} without fields; give the path of a field"
    raise ConfigError(f"--set {override.text}: {problem}")


class _Position:
    """What the schema knows about a place: the sections it may hold, or the field's default."""

    def __init__(self, sections: tuple[type[Section], ...], field: FieldInfo | None = None) -> None:
        self._sections = sections
        self._field = field
        self.choices = shape.tagged(field.annotation) if field else {}
        self.name = shape.default_name(field) if field else None

    def below(self, key: str | int, container: Any) -> _Position:
        """Return the place of `key`, in the member that `container` names."""
        chosen = container.get("name", self.name) if isinstance(container, dict) else None
        section = self.choices.get(chosen) if isinstance(chosen, str) else None
        candidates = (section,) if section else self._sections
        for candidate in candidates:
            field = candidate.model_fields.get(str(key))
            if field is not None:
                return _Position(shape.members(field.annotation), field)
        return _Position(())

    def beginning(self) -> Any:
        """Return what a path goes below when there is nothing yet."""
        if self._sections:
            return {"name": self.name} if self.name is not None else {}
        if self._field is None:
            return {}  # an unknown key: validation reports it with the known ones
        default = shape.default_of(self._field)
        return list(default) if isinstance(default, tuple) else {} if default == {} else None
