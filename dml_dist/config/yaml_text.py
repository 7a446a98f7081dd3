"""YAML text to plain values with the line of every key, and back.

Scalars follow the core schema of YAML 1.2 and not PyYAML's YAML 1.1: `1e-4` and `1e5` are numbers,
`yes`, `no`, `on` and `off` are text, `010` and `12:30` are text. Beyond the core schema integers
may have underscores between digits (`100_000`). Duplicate keys are refused; anchors, aliases and
merge keys (`<<`) work.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dml_dist.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a document to a value."""

_MAX_DEPTH = 40  # nested collections; the schema has 5, options of custom members add their own
_MAX_VALUES = 100_000  # after aliases are replaced: a few lines of aliases of aliases make billions

_RESOLVERS: list[tuple[str, str, list[str]]] = [  # tag, pattern, first characters ("": no text)
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (
        "int",
        r"^(?:[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0o[0-7]+|0x[0-9a-fA-F]+)$",
        list("-+0123456789"),
    ),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
]


@dataclass
class Document:
    """A value read from YAML, and the lines of its parts."""

    value: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line (from 1) of the key or list item of each path."""


def read_yaml(text: str, source: str) -> Document:
    """Read one YAML document into dicts, lists, strings, numbers, booleans and None.

    Args:
        text: The document; None is returned for an empty one.
        source: What errors call it, such as the name of the file.

    Raises:
        ConfigError: If it is not valid YAML, too large or too deep, or has several documents,
            duplicate keys, keys that are not text, an alias of itself, or language-specific tags.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"YAML syntax error in {where}: {what}{_syntax_hint(what)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line}: YAML forbids the character U+{error.character:04X}; remove it"
        ) from None
    except (ValueError, OverflowError) as error:  # PyYAML of "\U99999999" or of %YAML 1.<digits>
        raise ConfigError(f"YAML syntax error in {source}: {error}") from None
    return _Reader(source).read(node)


def _syntax_hint(what: str) -> str:
    if "cannot start any token" in what and "\\t" in what:
        return "; use spaces, not tabs"
    if "mapping values are not allowed" in what:
        return "; put text that holds ': ' in quotes, or check the indentation"
    if "found undefined alias" in what or "while scanning an alias" in what:
        return "; put text that begins with * in quotes"
    if "expected a single document" in what:
        return "; give one document, without a second ---"
    return ""


def dump_yaml(value: Any, *, blocks: bool = False) -> str:
    """Write plain values as YAML that this module and any YAML 1.1 reader read back equal.

    Args:
        value: Dicts, lists, strings, numbers, booleans, None.
        blocks: Whether text of several lines is written as such, where YAML allows it.
    """
    dumper = _BlockDumper if blocks else _Dumper
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with the scalars of YAML 1.2 and a bound on nesting."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (PyYAML's form)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"collections nested more than {_MAX_DEPTH} levels deep",
                problem_mark=self.peek_event().start_mark,
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.SequenceNode:
    """Write lists of plain values on one line."""
    plain = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Write unprintable characters as escapes: PyYAML's single quotes lose U+0085 and U+2028."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _BlockDumper(_Dumper):
    """Writes text of several lines as a literal block."""


def _represent_lines(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    lines = text.split("\n")
    if len(lines) == 1 or not all(line.isprintable() for line in lines):
        return _represent_str(dumper, text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_str)
_BlockDumper.add_representer(str, _represent_lines)
for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


class _Reader:
    """Converts PyYAML's nodes to values; counts them and records lines."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: dict[KeyPath, int] = {}
        self._open: set[int] = set()  # nodes being read; an alias of one is a cycle
        self._count = 0

    def read(self, node: yaml.Node | None) -> Document:
        value = None if node is None else self._value(node, ())
        return Document(value, self._lines)

    def _fail(self, node: yaml.Node, problem: str) -> ConfigError:
        line = node.start_mark.line + 1
        return ConfigError(f"{self._source}, line {line}: {problem}")

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES:
            raise self._fail(
                node, f"more than {_MAX_VALUES:,} values; aliases multiply them, so use fewer"
            )
        if id(node) in self._open:
            raise self._fail(node, "this alias contains itself; remove it")
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise self._fail(node, f"the tag {node.tag} is not supported; remove it")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
                for index, item in enumerate(node.value):
                    self._lines.setdefault((*path, index), item.start_mark.line + 1)
                return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node)
        finally:
            self._open.discard(id(node))
        raise self._fail(node, f"the tag !!{node.tag.split(':')[-1]} is not supported; remove it")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag.endswith(":merge"):
                is_list = isinstance(value_node, yaml.SequenceNode)
                merged += value_node.value if is_list else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a collection"
                raise self._fail(key_node, f"a key must be text, got {shown}; put it in quotes")
            key = key_node.value
            if key in first:
                where = ".".join(map(str, (*path, key)))
                raise ConfigError(
                    f"{self._source}: duplicate key {where} on line {first[key]} and again on "
                    f"line {line}; remove one of them"
                )
            first[key] = line
            self._lines[(*path, key)] = line
            own[key] = self._value(value_node, (*path, key))
        result: dict[str, Any] = {}
        for item in reversed(merged):  # of several merged mappings the first one wins
            value = self._value(item, path) if isinstance(item, yaml.MappingNode) else None
            if not isinstance(value, dict):
                raise self._fail(item, "<< must be followed by a mapping or a list of mappings")
            result.update(value)
        for key, line in first.items():  # reading merged mappings has overwritten these
            self._lines[(*path, key)] = line
        return {**result, **own}

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, text = node.tag.split(":")[-1], node.value
        try:
            if kind in ("str", "merge"):
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return int(text.replace("_", ""), 0 if text[:2] in ("0o", "0x") else 10)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (KeyError, ValueError):  # !!int of text, or of more digits than Python converts
            raise self._fail(node, f"must be a value of kind {kind}, got {text[:40]!r}") from None
        raise self._fail(node, f"the tag !!{kind} is not supported; remove it")


# ---------------- the file

_MAX_BYTES = 1 << 20


def read_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigError: If it does not exist (with the YAML files nearby), is a folder, not readable,
            too large or not UTF-8.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, not a YAML file{_yaml_files(path, path.name)}")
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        hint = _yaml_files(path.parent, path.name)
        raise ConfigError(f"the file {path} does not exist{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"cannot read {path}: {error}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{path} is too large for a configuration, which has at most {_MAX_BYTES >> 20} MiB; "
            "check the file name"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not UTF-8 text: line {line} has the byte 0x{data[error.start]:02x}; save "
            "the file as UTF-8"
        ) from None


def _yaml_files(folder: Path, name: str) -> str:
    """List the YAML files of a folder, most similar to `name` first."""
    try:
        found = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return f"; there is no folder {folder} either"
    if not found:
        return f"; there is no .yaml file in {folder.resolve()}"
    close = difflib.get_close_matches(name, found, n=3, cutoff=0.5) or found[:5]
    return f"; in {folder} there {'is' if len(close) == 1 else 'are'} {', '.join(close)}"
