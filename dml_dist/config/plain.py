"""Values that both YAML and JSON can represent, and the errors for all others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dml_dist.config.problems import Problem
from dml_dist.config.shape import shown
from dml_dist.config.yaml_text import KeyPath

_MAX_DEPTH = 60  # JSON and YAML are read and written by recursion
_MAX_VALUES = 200_000


def to_plain(value: Any) -> tuple[Any, list[Problem]]:
    """Return a copy made of dicts, lists, strings, finite numbers, booleans and None.

    A value that cannot be copied becomes None in the copy and is reported as a problem.
    """
    copier = _Copier()
    return copier.copy(value, ()), copier.problems


class _Copier:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._open: set[int] = set()
        self._count = 0

    def _refuse(self, path: KeyPath, text: str) -> Any:
        """Report a problem; return what replaces the value in the copy."""
        self.problems.append(Problem(path, text))
        return None

    def copy(self, value: Any, path: KeyPath) -> Any:
        self._count += 1
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return self._number(value, path)
        if isinstance(value, str):
            return self._text(value, path)
        if not isinstance(value, Mapping | list | tuple):
            return self._refuse(
                path,
                "must be a plain value (mapping, list, text, number, true, false, null), "
                f"got an object of {type(value).__module__}.{type(value).__qualname__}",
            )
        if id(value) in self._open:
            return self._refuse(path, "contains itself; values must form a tree")
        if len(path) >= _MAX_DEPTH or self._count > _MAX_VALUES:
            limit = f"{_MAX_DEPTH} levels and {_MAX_VALUES:,} values"
            return self._refuse(path, f"too large: at most {limit} are allowed")
        self._open.add(id(value))
        if isinstance(value, Mapping):
            result: Any = self._mapping(value, path)
        else:
            result = [self.copy(item, (*path, index)) for index, item in enumerate(value)]
        self._open.discard(id(value))
        return result

    def _mapping(self, value: Mapping[Any, Any], path: KeyPath) -> dict[str, Any]:
        result = {}
        for key, item in value.items():
            if not isinstance(key, str):
                self._refuse((*path, shown(key)), f"a key must be text, got {shown(key)}")
            elif self._text(key, (*path, key)) is not None:
                result[key] = self.copy(item, (*path, key))
        return result

    def _number(self, value: int | float, path: KeyPath) -> int | float | None:
        if isinstance(value, float):
            if math.isfinite(value):
                return float(value)
            return self._refuse(path, f"must be a finite number, got {float(value)}")
        if -(2**63) <= value < 2**63:
            return int(value)
        size = f"an integer of {value.bit_length()} bits"
        return self._refuse(path, f"must be an integer of at most 64 bits, got {size}")

    def _text(self, value: str, path: KeyPath) -> str | None:
        if "\0" in value:
            return self._refuse(path, "must be text without the character NUL; remove it")
        try:
            value.encode()
        except UnicodeEncodeError:
            return self._refuse(path, "must be Unicode text, got half a surrogate pair; remove it")
        return str.__str__(value)
