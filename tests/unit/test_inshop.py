"""In-Shop with few images: queries and gallery, the format of the list, locations of images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dml_dist.config.data import InShopConfig
from dml_dist.data.datasets.inshop import InShopImporter
from dml_dist.data.sample import Sample
from dml_dist.errors import DataError
from tests import official_layouts as layouts
from tests.unit.importer_suite import ImporterSuite


class TestAsImporter(ImporterSuite):
    def config(self, folder: Path) -> InShopConfig:
        return InShopConfig(source=str(layouts.inshop(folder)), allow_partial=True)


def listed(source: Path, *, allow_partial: bool = True) -> list[Sample]:
    return InShopImporter(InShopConfig(source=str(source), allow_partial=allow_partial)).samples()


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, allow_partial=False)
    return str(caught.value)


def test_queries_and_gallery_are_separate(tmp_path: Path) -> None:
    samples = listed(layouts.inshop(tmp_path))
    assert Counter((s.split, s.role, s.class_name) for s in samples) == {
        ("train", "both", "id_00000002"): 3,
        ("train", "both", "id_00000007"): 1,
        ("test", "query", "id_00000001"): 2,
        ("test", "gallery", "id_00000001"): 3,
        ("test", "query", "id_00000010"): 1,
        ("test", "gallery", "id_00000010"): 1,
    }
    lines = [line.split() for line in refusal(tmp_path).splitlines()]
    assert ["train", "3,997", "2", "25,882", "4"] in lines
    assert ["test", "query", "3,985", "2", "14,218", "3"] in lines
    assert ["test", "gallery", "3,985", "2", "12,612", "4"] in lines


@pytest.mark.parametrize("images", [".", "Img", "img"])
def test_images_are_found_where_archives_unpack_them(tmp_path: Path, images: str) -> None:
    assert len(listed(layouts.inshop(tmp_path, images))) == 11


def test_images_unpacked_straight_into_img(tmp_path: Path) -> None:
    layouts.inshop(tmp_path, ".")
    (tmp_path / "img").rename(tmp_path / "Img")
    assert len(listed(tmp_path)) == 11


def test_items_on_the_wrong_side(tmp_path: Path) -> None:
    layouts.inshop(tmp_path)
    rows = layouts.inshop_rows()
    rows[0] = (rows[0][0], "id_00000010", "train")
    rows[-1] = (rows[-1][0], "id_00000099", "gallery")
    path = tmp_path / "Eval/list_eval_partition.txt"
    layouts.inshop_listing(path, rows)
    message = refusal(tmp_path)
    assert "1 items are in train and in query or gallery: id_00000010" in message
    assert "1 items are in query and not in gallery: id_00000010" in message
    assert "1 items are in gallery and not in query: id_00000099" in message
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]))
    assert "line 1 declares 11 images, but 9 follow" in refusal(tmp_path)
    path.write_text("\n".join(lines[1:]))
    assert "the first line must be the number of images" in refusal(tmp_path)
    path.write_text("\n".join(lines).replace("gallery", "probe"))
    with pytest.raises(DataError, match="must be one of train, query, gallery, got 'probe'"):
        listed(tmp_path)
