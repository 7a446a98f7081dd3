"""The picture of a search: one row per query, with its neighbors to the right."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dml_dist.config.data import ExifRule
from dml_dist.data.pixels import open_image, rgb_image
from dml_dist.files import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = 1.25  # side of a tile
_CAPTION_INCHES = 0.42
_DPI = 160
_COLUMNS = 11  # tiles of a row; longer lists are wrapped
_MOST_LINES = 50  # a taller picture is hard to read and to draw
_LONGEST_TEXT = 18
_QUERY_COLOR = "#b3261e"
_SIDE = 320  # pixels of a query's longer side, sharp enough for a tile


@dataclass(frozen=True)
class Tile:
    """One image of the picture.

    Attributes:
        image: Encoded image, None where there is none to show.
        title: First line below it.
        text: Second line.
        exif: Whether it is turned by its EXIF orientation, as for the network.
    """

    image: bytes | None
    title: str
    text: str
    exif: ExifRule = "ignore"


def write_picture(path: Path, lines: Sequence[Sequence[Tile]], title: str) -> bool:
    """Write the picture as PNG, completely or not at all.

    Args:
        path: The file.
        lines: For each query its tile and those of its neighbors.
        title: Heading of the picture.

    Returns:
        Whether it is complete; it ends after 50 rows.
    """
    from matplotlib.figure import Figure

    every = [row for line in lines for row in _wrapped(line)]
    rows = every[:_MOST_LINES]
    columns = max(map(len, rows))
    width = max(columns * _INCHES, 4.0)
    height = len(rows) * (_INCHES + _CAPTION_INCHES) + 0.4
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    figure.text(0.08 / width, 1 - 0.12 / height, _cut(title, 80), fontsize=10, va="top")
    for number, row in enumerate(rows):
        top = height - 0.4 - number * (_INCHES + _CAPTION_INCHES)
        for column, tile in enumerate(row):
            if tile is not None:
                side = (_INCHES - 0.12) / width, (_INCHES - 0.12) / height
                place = (column * _INCHES + 0.06) / width, (top - _INCHES + 0.06) / height
                axes = figure.add_axes((*place, *side))
                _draw(axes, tile, is_query=column == 0)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # class names in any script
        figure.savefig(file, format="png")
    write_bytes_atomic(path, file.getvalue())
    return len(rows) == len(every)


def _wrapped(line: Sequence[Tile]) -> list[list[Tile | None]]:
    """Wrap a long line of tiles; the query's column stays empty in further rows."""
    query, *others = line
    room = _COLUMNS - 1
    count = max(1, math.ceil(len(others) / room))
    return [
        [query if number == 0 else None, *others[number * room : (number + 1) * room]]
        for number in range(count)
    ]


def _draw(axes: Axes, tile: Tile, *, is_query: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_QUERY_COLOR if is_query else "#bbbbbb")
        spine.set_linewidth(2.0 if is_query else 0.6)
    if tile.image is None:
        axes.set_facecolor("#eeeeee")
        axes.text(0.5, 0.5, "no\nthumbnail", ha="center", va="center", fontsize=7)
    else:
        axes.imshow(_pixels(tile.image, tile.exif), interpolation="nearest")
    axes.set_xlabel(
        f"{_cut(tile.title, _LONGEST_TEXT)}\n{tile.text}", fontsize=7, labelpad=2, parse_math=False
    )


def _pixels(data: bytes, exif: ExifRule) -> np.ndarray:
    """Return an image padded with white to a square, uint8 (S, S, 3)."""
    with open_image(data) as opened:
        picture = rgb_image(opened, exif)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square)


def _cut(text: str, longest: int) -> str:
    """Cut out the middle of a long text: class names often differ at their end."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[: longest - 1 - half]}…{text[-half:]}"
