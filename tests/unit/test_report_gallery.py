"""Tables of results and retrieval galleries: order, thumbnails, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dml_dist
from dml_dist.errors import DataError
from dml_dist.report import (
    GalleryNeighbor,
    GalleryQuery,
    choose_queries,
    read_gallery,
    result_table,
    write_gallery,
    write_report,
)
from dml_dist.report.formatting import format_metric, format_seconds, metric_label
from tests.report_runs import Page, encoded, new_run, picture, query

# ---------------------------------------------------------------- tables


def test_the_table_of_results_is_ordered_and_has_dashes() -> None:
    metrics = {
        "untrained": {"map_at_r": 0.1, "recall_at_1": 0.0507},
        "trained": {"recall_at_10": 1.0, "recall_at_2": 0.5, "map_at_r": "nan", "extra": 0.123456},
        "seconds": {"total": 3.0},
    }
    validation = {"step": 9, "time": 1e9, "split": "validation", "r_precision": 0.25}
    rows = result_table(metrics, validation)
    assert [(row.label, row.untrained, row.trained, row.validation) for row in rows] == [
        ("R@1", "5.07 %", "–", "–"),  # noqa: RUF001
        ("R@2", "–", "50.00 %", "–"),  # noqa: RUF001
        ("R@10", "–", "100.00 %", "–"),  # noqa: RUF001
        ("MAP@R", "10.00 %", "not a number", "–"),  # noqa: RUF001
        ("R-precision", "–", "–", "25.00 %"),  # noqa: RUF001
        ("Extra", "–", "0.1235", "–"),  # noqa: RUF001
    ]
    assert result_table({}) == []


def test_metric_formatting() -> None:
    assert format_metric("num_queries", 60502) == "60,502"
    assert format_metric("recall_at_1", True) == "–"  # noqa: RUF001
    assert format_metric("map_at_r", "inf") == "infinite"
    assert metric_label("recall_at_1000") == "R@1000"
    assert metric_label("num_lone_queries") == "Images alone in their class"
    times = {0.416: "0.42 s", 9.97: "10 s", 59.6: "1 min 00 s", 252: "4 min 12 s"}
    times |= {3599.7: "1 h 00 min", 7500: "2 h 05 min", float("nan"): "–"}  # noqa: RUF001
    assert {seconds: format_seconds(seconds) for seconds in times} == times


# ---------------------------------------------------------------- gallery


def test_thumbnails_are_small_and_small_images_are_kept(tmp_path: Path) -> None:
    png, jpeg = encoded(1, 150, "PNG"), encoded(2, 100, "JPEG")
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    neighbors = [
        GalleryNeighbor(2, "a", 0.5, True, jpeg),
        GalleryNeighbor(3, "b", np.float32(0.25), np.bool_(False), encoded(3, 400, "BMP")),
        GalleryNeighbor(4, "b", 0.75, False, picture(4, 200)[:100]),
        GalleryNeighbor(5, "b", 1.0, False, gray),
    ]
    write_gallery(tmp_path, [GalleryQuery(1, "a", png, tuple(neighbors))])
    names = sorted(path.name for path in (tmp_path / "report" / "images").iterdir())
    assert names == ["1.png", "2.jpg", "3.jpg", "4.jpg", "5.png"]
    loaded = read_gallery(tmp_path)
    assert loaded is not None
    (read,) = loaded.queries
    assert (read.row, read.class_name, read.image, read.is_hit) == (1, "a", png, True)
    assert read.neighbors[0].image == jpeg
    assert [(found.row, found.distance, found.hit) for found in read.neighbors] == [
        (2, 0.5, True), (3, 0.25, False), (4, 0.75, False), (5, 1.0, False)
    ]  # fmt: skip
    sizes = [Image.open(io.BytesIO(found.image)).size for found in read.neighbors]
    assert sizes == [(100, 100), (160, 160), (160, 80), (8, 8)]
    last = np.asarray(Image.open(io.BytesIO(read.neighbors[3].image)).convert("L"))
    np.testing.assert_array_equal(last, gray)


@pytest.mark.parametrize("side", [8, 300])
def test_thumbnails_look_as_training_sees_the_images(tmp_path: Path, side: int) -> None:
    deep = Image.fromarray(np.full((side, side), 100 * 256 + 7, dtype=np.uint16))
    clear = Image.new("RGBA", (side, side), (100, 100, 100, 0))
    for picture_ in (deep, clear):
        file = io.BytesIO()
        picture_.save(file, "PNG")
        write_gallery(tmp_path, [GalleryQuery(1, "a", file.getvalue(), ())])
        gallery = read_gallery(tmp_path)
        assert gallery is not None
        (read,) = gallery.queries
        assert isinstance(read.image, bytes)
        with Image.open(io.BytesIO(read.image)) as thumbnail:
            assert thumbnail.mode == "RGB"
            assert np.abs(np.asarray(thumbnail).astype(int) - 100).max() <= 1


def test_a_damaged_thumbnail_counts_as_missing(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    write_gallery(run.path, [query(1, "++")])
    whole = (run.report_dir / "images" / "1.png").read_bytes()
    (run.report_dir / "images" / "1.png").write_bytes(b"no image")
    (run.report_dir / "images" / "2.png").write_bytes(whole[: len(whole) // 2])
    page = Page(write_report(run.path))
    assert page.text.count("image missing") == 2
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1


def test_a_new_gallery_replaces_the_old_one(tmp_path: Path) -> None:
    assert read_gallery(tmp_path) is None
    write_gallery(tmp_path, [query(1, "+-")])
    write_gallery(tmp_path, [query(2, "+")])
    assert {path.name for path in (tmp_path / "report" / "images").iterdir()} == {"2.png", "3.png"}


def test_images_that_are_missing_or_elsewhere_stay_out(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    write_gallery(run.path, [query(1, "++")])
    (tmp_path / "secret.png").write_bytes(encoded(9, 8, "PNG"))
    (run.report_dir / "images" / "2.png").unlink()
    path = run.report_dir / "retrieval.json"
    path.write_text(path.read_text().replace("images/3.png", "../../../secret.png"))
    page = Page(write_report(run.path))
    assert page.text.count("image missing") == 2
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1


def test_images_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    for image in (picture(1).astype(np.float32), picture(1).transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"row 7.*\(H, W, 3\)"):
            write_gallery(tmp_path, [GalleryQuery(7, "a", image, ())])
    whole = encoded(1, 64, "PNG")
    for data in (b"no image", whole[: len(whole) // 2]):
        with pytest.raises(DataError, match="row 7"):
            write_gallery(tmp_path, [GalleryQuery(7, "a", data, ())])
    assert read_gallery(tmp_path) is None


@pytest.mark.parametrize(
    ("num_misses", "num_hits", "count", "expected"),
    [(50, 50, 12, 6), (2, 98, 12, 2), (98, 2, 12, 10), (0, 20, 12, 0), (3, 4, 12, 3), (5, 5, 3, 1)],
)
def test_queries_are_chosen_half_misses(
    num_misses: int, num_hits: int, count: int, expected: int
) -> None:
    first_hit = np.arange(num_misses + num_hits) >= num_misses
    first_hit = np.random.default_rng(1).permutation(first_hit)
    chosen = choose_queries(first_hit, count, seed=3)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, len(first_hit))
    assert chosen.dtype == np.int64
    assert not first_hit[chosen[:expected]].any()
    assert first_hit[chosen[expected:]].all()
    np.testing.assert_array_equal(choose_queries(first_hit, count, seed=3), chosen)


def test_the_report_imports_neither_torch_nor_matplotlib() -> None:
    program = "import sys, json, dml_dist.report; print(json.dumps(list(sys.modules)))"
    folder = Path(dml_dist.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert {"torch", "matplotlib", "ray"}.isdisjoint(json.loads(done.stdout))
