"""Lines of a scaling study: points that differ in one size alone, and what tells lines apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dml_dist.report.formatting import format_count
from dml_dist.studies.scale.points import ScalePoint

Batch = Literal["global", "per rank"]

SIZES = {
    "world_size": "ranks W",
    "num_classes": "classes C",
    "embedding_size": "embedding size D",
    "global_batch_size": "global batch B",
    "backbone": "backbone",
    "image_size": "image size",
    "proxies": "proxies",
    "loader_workers": "loader workers of a rank",
    "tar_shards": "tar shards",
    "remote": "shards read from",
}
"""Sizes of a point and their names."""

_SYMBOLS = {
    "world_size": "W",
    "num_classes": "C",
    "embedding_size": "D",
    "global_batch_size": "B",
    "rows": "B / W",
}


@dataclass(frozen=True)
class Line:
    """Points that differ in one size, by that size.

    Attributes:
        label: What tells it from the other lines of the figure.
        group: The same without the form of the proxies; its lines share a color.
        points: At least two with different sizes, of any status.
    """

    label: str
    group: str
    points: tuple[ScalePoint, ...]

    @property
    def replicated(self) -> bool:
        """Whether each rank owns all proxies."""
        return self.points[0].proxies == "replicated"


def lines_over(points: Sequence[ScalePoint], size: str, batch: Batch = "global") -> list[Line]:
    """Return the lines over a size.

    Args:
        points: Of any status.
        size: A key of SIZES.
        batch: What is equal along a line: the global batch, or the rows of a rank.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[ScalePoint]] = defaultdict(list)
    for point in points:
        groups[_others(point, size, batch)].append(point)
    found = {
        others: sorted(members, key=lambda point: getattr(point, size))
        for others, members in groups.items()
        if len({getattr(point, size) for point in members}) > 1
    }
    values: dict[str, set[Any]] = defaultdict(set)
    for name, value in (pair for others in found for pair in others):
        values[name].add(value)
    lines = []
    for others, members in found.items():
        texts = {name: _text(name, value) for name, value in others if len(values[name]) > 1}
        group = ", ".join(text for name, text in texts.items() if name != "proxies")
        lines.append(Line(", ".join(texts.values()), group, tuple(members)))
    return lines


def _others(point: ScalePoint, size: str, batch: Batch) -> tuple[tuple[str, Any], ...]:
    """Return what is equal along a line through a point."""
    others = {name: getattr(point, name) for name in SIZES if name != size}
    if batch == "per rank":
        del others["global_batch_size"]
        others["rows"] = point.global_batch_size / point.world_size
    return tuple(others.items())


def varied_sizes(points: Sequence[ScalePoint]) -> list[str]:
    """Return the sizes in which points differ."""
    return [name for name in SIZES if len({getattr(point, name) for point in points}) > 1]


def sizes_text(point: ScalePoint, names: Sequence[str]) -> str:
    """Return sizes of a point as text: W 2, C 1,000, replicated."""
    return ", ".join(_text(name, getattr(point, name)) for name in names)


def _text(name: str, value: Any) -> str:
    match name:
        case "remote":
            return "remote" if value else "local"
        case "image_size":
            return f"{value} px"
        case "loader_workers":
            return f"{value} {'worker' if value == 1 else 'workers'}"
        case "tar_shards":
            return f"{value:,} tar {'shard' if value == 1 else 'shards'}"
        case _ if name in _SYMBOLS:
            return f"{_SYMBOLS[name]} {format_count(value)}"
        case _:
            return str(value)
