"""Error messages for configurations: what is wrong, where, and how to fix it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dml_dist.config import shape
from dml_dist.config.base import Section
from dml_dist.config.schema import RunConfig
from dml_dist.config.yaml_text import KeyPath
from dml_dist.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One error: where it is, and what must be and is given there."""

    path: KeyPath
    text: str


def dotted(path: KeyPath) -> str:
    """Return a path as it is written in messages and on the command line."""
    plain = re.compile(r"[\w-]{1,60}")
    parts = [str(part) for part in path]
    return ".".join(part if plain.fullmatch(part) else shape.shown(part) for part in parts)


def config_error(
    problems: Iterable[Problem],
    source: str,
    where: Callable[[KeyPath], str],
    root: type[Section] = RunConfig,
) -> ConfigError:
    """Return one error that lists all problems.

    Args:
        problems: At least one.
        source: What was read, such as the name of the file.
        where: Place of a path in the source, such as "line 3"; empty when unknown.
        root: The schema.
    """
    lines = []
    for problem in problems:
        place = where(problem.path)
        head = dotted(problem.path) or "fields that do not fit together"
        lines.append(f"  {head}{f' ({place})' if place else ''}: {problem.text}")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    if root is RunConfig:
        lines.append("`dml-dist config --explain PATH` describes a field or a section.")
    return ConfigError("\n".join([f"{count} in {source}:", *lines]))


def from_pydantic(errors: list[ErrorDetails], root: type[Section] = RunConfig) -> list[Problem]:
    """Convert pydantic's errors about a section of the class `root`."""
    problems = []
    for error in errors:
        place = error["loc"]
        # pydantic also calls a list too short when its items are wrong; those errors are enough.
        items = [other for other in errors if other["loc"][:-1] == place and other is not error]
        if error["type"] not in ("too_short", "too_long") or not items:
            problems.append(_problem(error, root))
    return list(dict.fromkeys(problems))


def _problem(error: ErrorDetails, root: type[Section]) -> Problem:
    kind, location, given = error["type"], error["loc"], error["input"]
    if kind == "missing" and isinstance(location[-1], int):  # a list that is too short
        kind, location = "too_short", location[:-1]
    place = _locate(location, root)
    if kind == "value_error":
        return Problem(place.path, str(error["ctx"]["error"]))
    if kind == "extra_forbidden":
        return Problem(place.path, _unknown_key(place, root))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        place = _tag_of(place)
        given = given.get(place.path[-1])
    wanted = shape.describe(place.annotation, place.metadata)
    if kind in ("missing", "union_tag_not_found"):
        return Problem(place.path, f"missing; give {wanted}")
    advice = _advice(place, given)
    return Problem(place.path, f"must be {wanted}, got {shape.shown(given)}{advice}")


@dataclass(frozen=True)
class _Place:
    """A location in a configuration, read along the schema."""

    path: KeyPath = ()
    section: type[Section] = Section
    """The section that holds the last key of the path."""

    siblings: dict[str, type[Section]] | None = None
    """That section and its alternatives by name, when a tagged field chose it."""

    field: FieldInfo | None = None
    """The field of the last key, or of the list or mapping above it; None for an unknown key."""

    annotation: Any = Any
    """The type required at the path."""

    metadata: tuple[Any, ...] = ()
    """Its constraints."""

    name: str | None = None
    """The `name` by which the section was chosen."""


def _locate(location: tuple[int | str, ...], root: type[Section]) -> _Place:
    """Convert a location of pydantic, which names the chosen member after each tagged field."""
    place = _Place(section=root, annotation=root)
    inside: type[Section] | None = root  # the section whose key comes next
    choices: dict[str, type[Section]] = {}  # members of a tagged field, whose tag comes next
    siblings: dict[str, type[Section]] | None = None
    name: str | None = None
    for part in location:
        # pydantic adds this to the path of an invalid key of a mapping; in a section it is a key.
        if part == "[key]" and inside is None:
            return replace(place, annotation=str)
        if choices:
            name = str(part)
            inside, siblings, choices = choices[name], choices, {}
            continue
        path = (*place.path, part)
        if inside is None:  # an item of a list, or an option
            annotation, metadata = shape.item_type(place.annotation)
            place = replace(place, path=path, annotation=annotation, metadata=metadata)
            choices = shape.tagged(annotation)
            found = shape.members(annotation)
            inside = found[0] if found and not choices else None
            continue
        field = inside.model_fields.get(str(part))
        if field is None:
            return _Place(path, inside, siblings, None, name=name)
        metadata = tuple(field.metadata)
        place = _Place(path, inside, siblings, field, field.annotation, metadata, name)
        choices = shape.tagged(field.annotation)
        found = shape.members(field.annotation)
        inside, siblings, name = (found[0] if found and not choices else None), None, None
    return place


def _tag_of(place: _Place) -> _Place:
    """Return the place of `name`, or `type`, in the tagged section at a place."""
    choices = shape.tagged(place.annotation)
    key = shape.tag_key(next(iter(choices.values())))
    return _Place((*place.path, key), annotation=shape.one_of(tuple(choices)))


def _unknown_key(place: _Place, root: type[Section]) -> str:
    """Describe a key that its section does not have, and suggest similar ones."""
    key, above = str(place.path[-1]), dotted(place.path[:-1])
    name, known = place.name, shape.keys_of(place.section)
    siblings = place.siblings or {}
    others = [other for other in siblings if key in siblings[other].model_fields]
    if others:
        tag = shape.tag_key(place.section)
        return f"unknown key with {tag}: {name}; it is a key with {tag}: {' or '.join(others)}"
    if "." in key and key.split(".")[0] in known:
        return "unknown key; write what follows each dot indented below what precedes it"
    close = shape.nearest(key, known)
    meant = [f"{above}.{close}" if above else close] if close else []
    meant += shape.key_paths(root).get(key, ())[:3]
    if not meant and (far := shape.nearest(key, shape.key_paths(root))):
        meant += shape.key_paths(root)[far][:3]
    text = "unknown key" + (f"; did you mean {' or '.join(meant)}?" if meant else ";")
    section = above or "the top level"
    if name:
        section += f" ({shape.tag_key(place.section)}: {name})"
    return f"{text} keys of {section}: {', '.join(known)}"


def _advice(place: _Place, given: Any) -> str:
    """Suggest what to write instead, beginning with "; "; empty if unknown."""
    kinds = shape.plain_types(place.annotation)
    choices = shape.literals(place.annotation)
    if isinstance(given, bool):
        word = "yes" if given else "no"
        return f"; write {word}" if word in choices else ""
    if isinstance(given, str):
        if given in shape.tagged(place.annotation):
            tag = shape.tag_key(shape.tagged(place.annotation)[given])
            return f"; write {{{tag}: {given}}}"
        if choices:
            close = shape.nearest(given, choices)
            return f"; did you mean {close}?" if close and close != given else ""
        if given.lower() == "none" and type(None) in kinds:
            return "; write null"
        if kinds & {int, float} and _is_number(given):
            return "; remove the quotes"
    elif isinstance(given, int | float):
        if isinstance(given, float) and int in kinds and given.is_integer() and abs(given) < 1e15:
            return f"; write {int(given)}"
        if str in kinds:
            return "; put it in quotes"
        if tuple in kinds:
            return f"; write [{given}]"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
