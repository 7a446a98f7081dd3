"""Thumbnails of a bundle."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dml_dist.data.index import read_index
from dml_dist.data.reader import ShardReader
from dml_dist.export import search_figure as search_picture
from dml_dist.export.export import thumbnail, thumbnails
from dml_dist.export.search_figure import Tile
from dml_dist.runtime.progress import Event


def test_thumbnails_have_a_bound(glyphs: Path, tmp_path: Path) -> None:
    index = read_index(glyphs)
    events: list[Event] = []
    found = thumbnails(ShardReader(index), np.arange(40), 3000, events.append)
    kept = [data for data in found if data is not None]
    assert len(found) == 40
    assert found[: len(kept)] == kept
    assert 1 < len(kept) < 40
    assert sum(map(len, kept[:-1])) < 3000 <= sum(map(len, kept))
    assert f"thumbnails of the first {len(kept)} images only" in events[-1]["text"]
    assert thumbnails(ShardReader(index), np.arange(3), 0, events.append) == [None] * 3
    for data, row in zip(kept, range(40), strict=False):
        with Image.open(io.BytesIO(data)) as small:
            assert small.size == (index.width[row], index.height[row])
    large = io.BytesIO()
    Image.new("L", (400, 100)).save(large, "PNG")
    with Image.open(io.BytesIO(thumbnail(large.getvalue()))) as small:
        assert small.size == (96, 24)
    # A neighbour without a thumbnail has its place in the picture.
    tiles = [Tile(kept[0], "a query", "query"), Tile(None, "$wrong_{math", "0.1")]
    assert search_picture.write_picture(tmp_path / "a.png", [tiles], "title")
