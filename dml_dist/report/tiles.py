"""Gallery images of a page, as data URLs of a bounded total size."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from dml_dist.data.pixels import open_image
from dml_dist.report.formatting import format_metric
from dml_dist.report.gallery import Gallery, GalleryClass, GalleryNeighbor, GalleryQuery

_PIXELATED = 48  # pixels; images up to this side are enlarged without smoothing
MOST_BYTES = 2_500_000
"""Encoded images of a page; beyond this size all of them are reduced."""
_SMALLER = 112  # pixels of the longer side
_QUALITY = 70
_MOST_NAMED = 4  # classes that are named below a class's queries


@dataclass(frozen=True)
class Tile:
    """An image of the gallery: `source` is a data URL, empty when the image is missing."""

    source: str
    pixelated: bool
    class_name: str
    row: int
    distance: str = ""
    hit: bool | None = None


Row = tuple[Tile, list[Tile]]
"""A query and what it found."""


@dataclass(frozen=True)
class ClassTiles:
    """A class of the gallery; `mistaken_for` names the classes of the misses among its rows."""

    class_name: str
    recall: str
    num_queries: int
    mistaken_for: str
    rows: list[Row]


class TileMaker:
    """Makes the tiles of one page."""

    def __init__(self, gallery: Gallery) -> None:
        """Add up the image sizes of a gallery, to decide whether to reduce the images."""
        queries = [
            *gallery.queries,
            *(query for item in gallery.classes for query in item.queries),
        ]
        self._smaller = sum(map(_num_bytes, queries)) > MOST_BYTES
        self._sources: dict[int, tuple[str, bool]] = {}

    def by_outcome(self, queries: Sequence[GalleryQuery]) -> list[tuple[str, list[Row]]]:
        """Return queries in two groups, misses first, each query with its neighbors."""
        groups = []
        for title, hit in (
            ("Misses: the nearest image is of another class", False),
            ("Hits: the nearest image is of the same class", True),
        ):
            rows = [self._row(query) for query in queries if query.is_hit == hit]
            if rows:
                groups.append((title, rows))
        return groups

    def by_class(self, classes: Iterable[GalleryClass]) -> list[tuple[str, list[ClassTiles]]]:
        """Return classes in two groups, the worst first."""
        groups: dict[str, list[ClassTiles]] = {}
        for item in classes:
            title = f"{'Worst' if item.worst else 'Best'} classes"
            recall = format_metric("recall_at_1", item.recall_at_1)
            rows = [self._row(query) for query in item.queries]
            tiles = ClassTiles(item.class_name, recall, item.num_queries, _mistaken_for(item), rows)
            groups.setdefault(title, []).append(tiles)
        return list(groups.items())

    def _row(self, query: GalleryQuery) -> Row:
        return self._tile(query), [self._tile(neighbor) for neighbor in query.neighbors]

    def _tile(self, item: GalleryQuery | GalleryNeighbor) -> Tile:
        if item.row not in self._sources:
            image = item.image if isinstance(item.image, bytes) else b""
            self._sources[item.row] = _data_url(image, smaller=self._smaller)
        source, pixelated = self._sources[item.row]
        if isinstance(item, GalleryQuery):
            return Tile(source, pixelated, item.class_name, item.row)
        distance = f"{item.distance:.3f}"
        return Tile(source, pixelated, item.class_name, item.row, distance, item.hit)


def _mistaken_for(item: GalleryClass) -> str:
    """Return the classes of the misses shown, the most frequent first."""
    counts = Counter(
        neighbor.class_name
        for query in item.queries
        for neighbor in query.neighbors
        if not neighbor.hit
    )
    names = [
        f"{name} ({count})" if count > 1 else name
        for name, count in counts.most_common(_MOST_NAMED)
    ]
    more = len(counts) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _num_bytes(query: GalleryQuery) -> int:
    items: list[GalleryQuery | GalleryNeighbor] = [query, *query.neighbors]
    return sum(len(item.image) for item in items)


def _data_url(image: bytes, *, smaller: bool) -> tuple[str, bool]:
    """Return a thumbnail as a data URL, "" if it is missing or damaged; and whether it is small."""
    try:
        with open_image(image) as picture:
            picture.load()
            kind, pixelated = str(picture.format).lower(), max(picture.size) <= _PIXELATED
            if smaller and not pixelated:
                shrunk = picture.convert("RGB")
                shrunk.thumbnail((_SMALLER, _SMALLER), Image.Resampling.LANCZOS)
                file = io.BytesIO()
                shrunk.save(file, "JPEG", quality=_QUALITY)
                image, kind = file.getvalue(), "jpeg"
    # Decoders raise many classes on damaged data: OSError, SyntaxError, ValueError, struct.error.
    except Exception:
        return "", False
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}", pixelated
