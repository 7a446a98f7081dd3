"""Queries of the schema: fields of a section, what they accept, paths of a key.

A *member* is one of the section classes that a field may hold. A field with tagged members (losses,
optimisers, ...) chooses by `name`, and a distribution, as in Optuna, by `type`; a plain section is
the single, untagged member of its field.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dml_dist.config.base import PATTERN_DESCRIPTIONS, Section
from dml_dist.config.schema import RunConfig
from dml_dist.urls import shown_url


def members(annotation: Any) -> tuple[type[Section], ...]:
    """Return the section classes that a field of this type may hold; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return (annotation,)
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in members(part))
    return ()


def tag_key(member: type[Section]) -> str:
    """Return the key by which a tagged member is chosen: `name`, or `type` of a distribution."""
    return "type" if "type" in member.model_fields else "name"


def tags(member: type[Section]) -> tuple[str, ...]:
    """Return the values of its key that choose this member; none for an untagged section."""
    field = member.model_fields.get(tag_key(member))
    return () if field is None else literals(field.annotation)


def tagged(annotation: Any) -> dict[str, type[Section]]:
    """Return the members of a tagged field by name; empty for other fields."""
    return {name: member for member in members(annotation) for name in tags(member)}


def chosen(section: Any) -> str | None:
    """Return the tag of a section that was chosen by it, else None."""
    if isinstance(section, Section) and tags(type(section)):
        return str(dict(section)[tag_key(type(section))])
    return None


def keys_of(section: type[Section]) -> list[str]:
    """Return the keys of a section, its tag first."""
    return sorted(section.model_fields, key=lambda key: key != tag_key(section))


def default_of(field: FieldInfo) -> Any:
    """Return the default of a field, or `PydanticUndefined` when it is required."""
    return field.get_default(call_default_factory=True)


def default_name(field: FieldInfo) -> str | None:
    """Return the name of the member that a tagged field has by default, if any."""
    return chosen(default_of(field))


def is_resumable(field: FieldInfo) -> bool:
    """Whether a field may differ between a run and its resumption."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("resumable") is True


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the most similar of some names, or None when none is similar."""
    lowered = {other.lower(): other for other in words}
    matches = difflib.get_close_matches(word.lower()[:100], lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def plain_types(annotation: Any) -> set[type]:
    """Return the plain types that a value of this type may have: int, tuple, NoneType, ..."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain_types(arguments[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(plain_types, arguments))
    return {origin or annotation} if isinstance(origin or annotation, type) else set()


def literals(annotation: Any) -> tuple[str, ...]:
    """Return the values that a Literal type allows; none for other types."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return tuple(map(str, arguments))
    if origin in (Union, types.UnionType):
        return tuple(word for part in arguments for word in literals(part))
    return ()


def one_of(words: tuple[str, ...]) -> Any:
    """Return the Literal type of some values."""
    return Literal[words]


def item_type(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type of the items of a list or mapping and its constraints; `Any` for others."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return item_type(arguments[0])
    if origin in (Union, types.UnionType):
        found = [item_type(part) for part in arguments]
        return next((item for item in found if item[0] is not Any), (Any, ()))
    if origin is dict:
        return (arguments[1], ())
    if origin is not tuple:
        return Any, ()
    return (arguments[0], ())  # the schema's lists have items of one type


@cache
def key_paths(root: type[Section] = RunConfig) -> dict[str, tuple[str, ...]]:
    """Return the dotted paths of every key of the schema `root` except `name`."""
    homes: dict[str, list[str]] = {}
    for path, key in _walk(root, ""):
        if key != "name" and path not in homes.setdefault(key, []):
            homes[key].append(path)
    return {key: tuple(paths) for key, paths in homes.items()}


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for key, field in section.model_fields.items():
        yield prefix + key, key
        for member in members(field.annotation) or members(item_type(field.annotation)[0]):
            yield from _walk(member, f"{prefix}{key}.")


# ---------------------------------------------------------------- descriptions


def requirement(field: FieldInfo) -> str:
    """Describe what a field accepts, such as "a number > 0, or null"."""
    return describe(field.annotation, tuple(field.metadata))


def describe(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """Describe what a type with constraints accepts."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(arguments[0], (*_constraints(arguments[1:]), *metadata))
    if found := members(annotation):
        names = list(tagged(annotation))
        keys = ", ".join(keys_of(found[0]))
        tag = f"a {tag_key(found[0])} of {', '.join(names)}"
        text = f"a section with {tag if names else f'keys {keys}'}"
        return f"{text}, or null" if types.NoneType in arguments else text
    if origin in (Union, types.UnionType):
        parts = [describe(part, metadata) for part in arguments if part is not types.NoneType]
        return ", or ".join(parts + ["null"] * (types.NoneType in arguments))
    if origin is Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(str, arguments))}"
    if origin is tuple:
        return _describe_tuple(arguments, metadata)
    if origin is dict:
        return "a mapping of names to values"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if annotation not in words:
        return "any value"
    for part in metadata:
        if getattr(part, "pattern", None) is not None:
            return PATTERN_DESCRIPTIONS.get(part.pattern, f"text that matches {part.pattern}")
    bounds = " and ".join(_bounds(metadata))
    return f"{words[annotation]} {bounds}" if bounds else words[annotation]


def _describe_tuple(arguments: tuple[Any, ...], metadata: tuple[Any, ...]) -> str:
    item = describe(arguments[0])
    if arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} items, each {item}"
    least = [limit for part in metadata if (limit := getattr(part, "min_length", None))]
    count = f" with at least {least[0]} item{'s' * (least[0] > 1)}" if least else ""
    return f"a list{count}, each {item}"


def _constraints(metadata: Iterable[Any]) -> tuple[Any, ...]:
    """Return the constraints of `Annotated`, directly or inside a `Field(...)`."""
    found: list[Any] = []
    for part in metadata:
        found += part.metadata if isinstance(part, FieldInfo) else [part]
    return tuple(found)


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for part in metadata:
        for name, sign in signs.items():
            if getattr(part, name, None) is not None:
                yield f"{sign} {getattr(part, name)}"
        if getattr(part, "multiple_of", None) is not None:
            yield f"a multiple of {part.multiple_of}"


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as YAML, cut to `limit` characters."""
    text = _text(value, depth=3)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(value: Any, depth: int) -> str:
    if value is PydanticUndefined:
        return "nothing"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(shown_url(value)[:1000])
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write long ones
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, Section):
        return chosen(value) or "the defaults of its fields"
    if not isinstance(value, list | tuple | dict):
        return f"an object of type {type(value).__name__}"
    if isinstance(value, dict):
        start, end = "{", "}"
        first = list(value.items())[:20] if depth else []
        items = [f"{str(key)[:60]}: {_text(item, depth - 1)}" for key, item in first]
    else:
        start, end = "[", "]"
        items = [_text(item, depth - 1) for item in value[:20]] if depth else []
    if len(items) < len(value):
        items.append("...")
    return start + ", ".join(items) + end
