"""What the official data sets share: facts without data, md5 sums, files found and not found."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from dml_dist.config.data import (
    Cars196Config,
    CUB200Config,
    InShopConfig,
    OfficialSection,
    SOPConfig,
)
from dml_dist.config.load import load_config
from dml_dist.data.datasets import build_importer, official, on_disk
from dml_dist.data.datasets.cars196 import Cars196Importer
from dml_dist.data.datasets.official import Counts, Official
from dml_dist.errors import DataError
from dml_dist.runtime.estimate import estimate_plan
from tests import official_layouts as layouts

# Section, classes and images of train, of test.
PUBLISHED: list[tuple[Any, tuple[int, int], tuple[int, int]]] = [
    (SOPConfig, (11_318, 59_551), (11_316, 60_502)),
    (CUB200Config, (100, 5_864), (100, 5_924)),
    (Cars196Config, (98, 8_054), (98, 8_131)),
    (InShopConfig, (3_997, 25_882), (3_985, 14_218 + 12_612)),
]


@pytest.mark.parametrize(("section", "train", "test"), PUBLISHED)
def test_counts_are_known_without_the_data(
    section: type[OfficialSection], train: tuple[int, int], test: tuple[int, int], tmp_path: Path
) -> None:
    facts = build_importer(section(source=str(tmp_path / "nowhere"))).facts()
    assert facts is not None
    assert not facts.exact
    for split, (classes, images) in (("train", train), ("test", test)):
        sizes = facts.class_sizes[split]
        assert (len(sizes), sum(sizes)) == (classes, images)
        assert max(sizes) - min(sizes) <= 1


def test_dry_run_without_data_uses_published_counts(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: dry\ndata:\n  path: {tmp_path}/shards\n"
        f"  dataset: {{name: sop, source: {tmp_path}/nowhere}}\n"
        "train: {global_batch_size: 90, epochs: 1}\n"
    )
    plan, origin = estimate_plan(load_config(path, ["validation.name=none"]), 2)
    assert (plan.num_classes, plan.num_images) == (11_318, 59_551)
    assert "estimated" in origin
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(DataError, match=r"nowhere holds nothing; correct the path"):
        estimate_plan(load_config(path, []), 2)


@pytest.mark.parametrize("section", [section for section, *_ in PUBLISHED])
def test_missing_sources_are_refused(section: type[OfficialSection], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; correct the path, or unpack"):
        build_importer(section(source=str(tmp_path / "nowhere"))).samples()
    layouts.put(tmp_path / "some.txt", b"x")
    layouts.put(tmp_path / "a/b/c.txt", b"x")
    with pytest.raises(DataError, match=r"source must be the folder of"):
        build_importer(section(source=str(tmp_path), allow_partial=True)).samples()


def test_archive_must_be_unpacked_or_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "CUB_200_2011.tgz"
    archive.write_bytes(b"half an archive")
    importer = build_importer(CUB200Config(source=str(archive), allow_partial=True))
    with pytest.raises(DataError) as caught:
        importer.samples()
    assert f"md5 is {hashlib.md5(b'half an archive').hexdigest()}" in str(caught.value)
    assert "published is 97eceeb196236b17998738112f37df78; download it again" in str(caught.value)
    monkeypatch.setattr(official, "md5_of", lambda path: "97eceeb196236b17998738112f37df78")
    with pytest.raises(DataError, match=r"\(its md5 is the published one\); unpack it and give"):
        importer.samples()
    other = archive.rename(tmp_path / "birds.tgz")
    with pytest.raises(DataError, match=r"birds.tgz is a file; unpack it"):
        build_importer(CUB200Config(source=str(other))).samples()


def small_cars(folder: Path, **changes: Any) -> Cars196Importer:
    """The small layout, as if its counts and md5 sums had been published."""
    md5 = hashlib.md5((folder / "cars_annos.mat").read_bytes()).hexdigest()

    class SmallCars(Cars196Importer):
        official = Official(
            "Cars196",
            {"train": Counts(3, 6), "test": Counts(2, 4), **changes},
            archives={"car_ims.tgz": hashlib.md5(b"whole").hexdigest()},
            metadata={"cars_annos.mat": md5},
        )

    return SmallCars(Cars196Config(source=str(folder)))


def test_published_counts_pass_without_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = layouts.cars_annotated(tmp_path / "cars")
    (tmp_path / "car_ims.tgz").write_bytes(b"whole")
    with caplog.at_level(logging.INFO):
        assert len(small_cars(folder).samples()) == 10
    assert not caplog.records
    for change in ({"train": Counts(3, 7)}, {"test": Counts(3, 4)}):
        with pytest.raises(DataError, match="differs from the published data set"):
            small_cars(folder, **change).samples()


@pytest.mark.parametrize("in_parent", [True, False])
def test_damaged_archive_next_to_the_data_is_named(
    tmp_path: Path, in_parent: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = layouts.cars_annotated(tmp_path / "cars")
    (tmp_path / ("." if in_parent else "cars") / "car_ims.tgz").write_bytes(b"who")
    with caplog.at_level(logging.WARNING):
        small_cars(folder).samples()
    (record,) = caplog.records
    assert "car_ims.tgz: md5 is " in record.getMessage()
    assert "the files unpacked from it may be damaged" in record.getMessage()


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    layouts.cars_annotated(tmp_path)
    (tmp_path / "car_ims").rename(tmp_path / "elsewhere")
    importer = build_importer(Cars196Config(source=str(tmp_path), allow_partial=True))
    with pytest.raises(DataError, match="no listed image exists; correct the path"):
        importer.samples()


def test_files_are_found_ignoring_letter_case(tmp_path: Path) -> None:
    for name in ("A/b.JPG", "A/c.jpg", "A/c.JPG", "A/._d.jpg", "e.png"):
        layouts.put(tmp_path / name, b"")
    listed = ["a/B.jpg", "A/c.jpg", "A/c.JPG", "A/C.Jpg", "A/d.jpg", "e.png", "e.png/x", "../e.png"]
    found = on_disk.find_listed(tmp_path, listed)
    names = ["A/b.JPG", "A/c.jpg", "A/c.JPG", "A/c.JPG", None, "e.png", None, None]
    assert found == [None if name is None else str(tmp_path / name) for name in names]
    assert on_disk.num_other_images([str(tmp_path / "A/b.JPG")]) == 2
