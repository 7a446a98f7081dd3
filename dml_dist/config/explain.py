"""The documentation of the configuration, read from the schema: `dml-dist config --explain`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dml_dist.config import shape
from dml_dist.config.base import Section
from dml_dist.config.problems import dotted
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

_WIDTH = 100
_RESUMABLE = "may change when a run is resumed"


@dataclass
class _Entry:
    """A key as documented in one or several members of a family."""

    key: str
    field: FieldInfo
    names: list[str]
    """Names of the members that have it in this form; empty in an untagged section."""

    tag: str
    """The key by which these members are chosen."""


def explain(path: str) -> str:
    """Return what a field or a section means, requires and is by default.

    Args:
        path: Dotted path such as `optim.lr`; in a family a member's name may be part of it
            (`optim.sgd.momentum`); the empty path lists the sections of a run.

    Raises:
        ConfigError: If there is no such path; names the most similar one.
    """
    parts = [part for part in path.strip().split(".") if part]
    sections: dict[str, type[Section]] = {"": RunConfig}
    entries: list[_Entry] = []
    done: list[str] = []
    for part in parts:
        found = [entry for entry in _entries(sections) if entry.key == part]
        # The choice of a member.
        if any(sections) and part == _tag_key(sections) and part is parts[-1]:
            return "\n".join([path.strip(), *_choices(sections, entries)])
        if found:
            for entry in found:  # no need to name the members when all of them have the key
                entry.names = entry.names if len(entry.names) < len(sections) else []
            entries, sections = found, _below(found)
        elif part in sections:  # the name of a member
            sections, entries = {part: sections[part]}, []
        else:
            raise _unknown(path, done, part, sections)
        done.append(part)
    if entries and not sections:
        return "\n".join(line for entry in entries for line in _field(".".join(done), entry))
    return "\n".join(_sections(".".join(done), sections, entries))


def _below(entries: list[_Entry]) -> dict[str, type[Section]]:
    """Return the members that a key may hold, by name; an untagged one by the empty name."""
    found = {}
    for entry in entries:
        item, _ = shape.item_type(entry.field.annotation)
        for member in shape.members(entry.field.annotation) or shape.members(item):
            found.update(dict.fromkeys(shape.tags(member) or ("",), member))
    return found


def _tag_key(sections: dict[str, type[Section]]) -> str:
    return shape.tag_key(next(iter(sections.values())))


def _entries(sections: dict[str, type[Section]]) -> list[_Entry]:
    """Return the keys of some members, each form of a key once."""
    result: list[_Entry] = []
    for name, section in sections.items():
        tag = shape.tag_key(section)
        for key in shape.keys_of(section):
            field = section.model_fields[key]
            same = [entry for entry in result if entry.key == key and _same(entry.field, field)]
            if same:
                same[0].names.append(name)
            elif key != tag or not name:  # the choice of a member is shown with the members
                result.append(_Entry(key, field, [name] if name else [], tag))
    return result


def _same(one: FieldInfo, two: FieldInfo) -> bool:
    texts = [
        (field.description, shape.requirement(field), shape.default_of(field))
        for field in (one, two)
    ]
    return texts[0] == texts[1]


def _field(path: str, entry: _Entry) -> Iterator[str]:
    field = entry.field
    yield from _wrapped(
        path + (f" (with {entry.tag}: {', '.join(entry.names)})" if entry.names else ""), ""
    )
    yield from _wrapped(field.description or "", "  ")
    yield from _wrapped(f"requires: {shape.requirement(field)}", "  ")
    default = shape.default_of(field)
    given = default is not PydanticUndefined
    yield f"  default: {shape.shown(default, 200) if given else 'none, it must be given'}"
    if shape.is_resumable(field):
        yield f"  {_RESUMABLE}"


def _sections(
    path: str, sections: dict[str, type[Section]], entries: list[_Entry]
) -> Iterator[str]:
    yield path or "The configuration of a run"
    for entry in entries:
        yield from _wrapped(entry.field.description or "", "  ")
    if "" in sections:
        yield from _wrapped(inspect.getdoc(sections[""]) or "", "  ")
    else:
        yield from _choices(sections, entries)
    for entry in _entries(sections):
        yield ""
        yield from _summary(entry, sections)


def _choices(sections: dict[str, type[Section]], entries: list[_Entry]) -> Iterator[str]:
    if len(sections) > 1:
        default = shape.default_name(entries[0].field) if entries else None
        required = f"default {default}" if default else "required"
        yield f"  {_tag_key(sections)}: one of these; {required}"
    for section in dict.fromkeys(sections.values()):
        names = ", ".join(name for name in sections if sections[name] is section)
        indent, head = ("    ", names)
        if len(sections) == 1:
            indent, head = "  ", f"{_tag_key(sections)}: {names}"
        yield from _wrapped(f"{head}: {inspect.getdoc(section) or ''}", indent)


def _summary(entry: _Entry, sections: dict[str, type[Section]]) -> Iterator[str]:
    only = f" [{', '.join(entry.names)}]" if 0 < len(entry.names) < len(sections) else ""
    found = shape.members(entry.field.annotation)
    default = shape.default_of(entry.field)
    names = list(shape.tagged(entry.field.annotation))
    if found and not names:
        yield from _wrapped(f"{entry.key}:{only} {inspect.getdoc(found[0]) or ''}", "  ")
        return
    required = f"one of {', '.join(names)}" if names else shape.requirement(entry.field)
    shown = "required" if default is PydanticUndefined else f"default {shape.shown(default, 200)}"
    text = f"{entry.key}:{only} {required}; {shown}"
    text += f"; {_RESUMABLE}" if shape.is_resumable(entry.field) else ""
    yield from _wrapped(text, "  ")
    if entry.field.description:
        yield from _wrapped(entry.field.description, "    ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )


def _unknown(
    path: str, done: list[str], part: str, sections: dict[str, type[Section]]
) -> ConfigError:
    above = ".".join(done)
    shown = shape.shown(path)
    if not sections:
        return ConfigError(
            f"there is no field or section {shown}: {above} is a plain value without fields; give "
            "the path of a field or section"
        )
    known = list(dict.fromkeys(entry.key for entry in _entries(sections)))
    known += [name for name in sections if name]
    close = shape.nearest(part, known)
    meant = [dotted((*done, close))] if close else []
    meant += [home for home in shape.key_paths().get(part, ()) if home not in meant][:3]
    return ConfigError(
        f"there is no field or section {shown}"
        + (f"; did you mean {' or '.join(meant)}?" if meant else ";")
        + f" {above or 'the top level'} has {', '.join(known)}"
    )
