"""Stanford Online Products with few images: listings, missing files, errors and warnings."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from dml_dist.config.data import SOPConfig
from dml_dist.data.datasets import on_disk
from dml_dist.data.datasets.sop import SOPImporter
from dml_dist.data.sample import Sample
from dml_dist.errors import DataError
from tests import official_layouts as layouts
from tests.unit.importer_suite import ImporterSuite


class TestAsImporter(ImporterSuite):
    def config(self, folder: Path) -> SOPConfig:
        return SOPConfig(source=str(layouts.sop(folder)), allow_partial=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return layouts.sop(tmp_path)


@pytest.fixture
def root(source: Path) -> Path:
    return source / "Stanford_Online_Products"


def listed(source: Path, *, allow_partial: bool = True) -> list[Sample]:
    return SOPImporter(SOPConfig(source=str(source), allow_partial=allow_partial)).samples()


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, allow_partial=False)
    return str(caught.value)


def test_the_listings_decide(source: Path) -> None:
    samples = listed(source)
    assert Counter((s.split, s.class_name, s.super_class) for s in samples) == {
        ("train", "1", "bicycle"): 4,
        ("train", "2", "bicycle"): 1,
        ("train", "10", "chair"): 3,
        ("test", "11319", "bicycle"): 3,
        ("test", "22634", "toaster"): 2,
    }
    assert samples[0].key == "bicycle_final/000000000001_0"
    assert {sample.role for sample in samples} == {"both"}
    assert listed(source / "Stanford_Online_Products") == samples


def test_other_letter_case_and_unlisted_images_are_reported(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        samples = listed(source)
    (odd,) = [sample for sample in samples if str(sample.source).endswith(".jpg")]
    assert odd.source.name == "bicycle_final/000000000001_1.JPG"
    assert "the names of 1 images differ in letter case" in caplog.text
    assert "1 images are not in the listing and are left out" in caplog.text


def test_differences_are_an_error_with_a_table_or_a_warning(
    source: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "chair_final/000000000010_1.JPG").unlink()
    message = refusal(source)
    lines = [line.split() for line in message.splitlines()]
    assert ["train", "11,318", "3", "59,551", "7"] in lines
    assert ["test", "11,316", "2", "60,502", "5"] in lines
    assert "1 of 13 listed images do not exist below" in message
    assert message.count("chair_final/000000000010_1.JPG") == 1
    assert "super-classes: 12 published, 3 found" in message
    assert "--allow-partial (allow_partial: true)" in message
    with caplog.at_level(logging.WARNING):
        assert len(listed(source)) == 12
    assert "59,551" in caplog.text
    assert "importing the existing images because allow_partial is set" in caplog.text


def test_class_rule_missing_lines_and_missing_listing(source: Path, root: Path) -> None:
    test = layouts.sop_rows(layouts.SOP_TEST)
    layouts.sop_listing(root / "Ebay_test.txt", [*test[1:], "9 7 1 bicycle_final/7.JPG"])
    message = refusal(source)
    assert "classes of test are 11319 to 22634, 1 lines have others: 7 in line 6" in message
    assert len([s for s in listed(source) if s.split == "test"]) == 4
    layouts.sop_listing(root / "Ebay_test.txt", [test[0].replace(" 1 bicycle", " 3 bicycle")])
    assert "super-class 3 is chair elsewhere and bicycle here" in refusal(source)
    (root / "Ebay_test.txt").unlink()
    assert "Ebay_test.txt does not exist" in refusal(source)
    assert {sample.split for sample in listed(source)} == {"train"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5 1 1", r"Ebay_train.txt, line 2: '5 1 1' does not have the columns image_id class_id"),
        ("5 x 1 a.JPG", r"Ebay_train.txt, line 2: class_id must be a whole number, got 'x'"),
        ("5 1 1 a.JPG\n6 1 1 a.JPG", r"listed once, but 'a.JPG' is listed twice"),
    ],
)
def test_damaged_listings_are_never_accepted(
    source: Path, root: Path, row: str, message: str
) -> None:
    layouts.sop_listing(root / "Ebay_train.txt", [row])
    with pytest.raises(DataError, match=message):
        listed(source)


def test_the_official_counts_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings of the official size: 120,053 lines, 22,634 classes, 12 super-classes."""
    for name, first, num_classes, num_images in (
        ("Ebay_train.txt", 1, 11_318, 59_551),
        ("Ebay_test.txt", 11_319, 11_316, 60_502),
    ):
        each, rest = divmod(num_images, num_classes)
        classes = [
            (first + at, at % 12 + 1, f"kind{at % 12}", each + (at < rest))
            for at in range(num_classes)
        ]
        layouts.sop_listing(tmp_path / name, layouts.sop_rows(classes))
    # No image is there: the one place that looks for files says that all are.
    monkeypatch.setattr(
        on_disk, "find_listed", lambda base, names: [f"{base}/{name}" for name in names]
    )
    monkeypatch.setattr(on_disk, "num_other_images", lambda files: 0)
    importer = SOPImporter(SOPConfig(source=str(tmp_path)))
    samples = importer.samples()
    assert len(samples) == 120_053
    facts = importer.facts()
    assert facts.exact
    assert {split: len(sizes) for split, sizes in facts.class_sizes.items()} == {
        "train": 11_318,
        "test": 11_316,
    }
