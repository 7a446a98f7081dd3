"""CUB-200-2011 with few images: the class rule, and inconsistent files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dml_dist.config.data import CUB200Config
from dml_dist.data.datasets.cub200 import CUB200Importer
from dml_dist.data.sample import Sample
from dml_dist.errors import DataError
from tests import official_layouts as layouts
from tests.unit.importer_suite import ImporterSuite


class TestAsImporter(ImporterSuite):
    def config(self, folder: Path) -> CUB200Config:
        return CUB200Config(source=str(layouts.cub200(folder)), allow_partial=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return layouts.cub200(tmp_path) / "CUB_200_2011"


def listed(source: Path, *, allow_partial: bool = True) -> list[Sample]:
    return CUB200Importer(CUB200Config(source=str(source), allow_partial=allow_partial)).samples()


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, allow_partial=False)
    return str(caught.value)


def drop_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: number - 1] + lines[number:]))


def test_the_first_hundred_classes_train(root: Path) -> None:
    samples = listed(root.parent)
    assert Counter((s.split, s.class_name) for s in samples) == {
        ("train", "001.Bird_1"): 3,
        ("train", "002.Bird_2"): 1,
        ("train", "100.Bird_100"): 2,
        ("test", "101.Bird_101"): 3,
        ("test", "200.Bird_200"): 2,
    }
    assert samples == listed(root)
    lines = [line.split() for line in refusal(root).splitlines()]
    assert ["train", "100", "3", "5,864", "6"] in lines
    assert ["test", "100", "2", "5,924", "5"] in lines


def test_files_that_do_not_fit_each_other(root: Path) -> None:
    drop_line(root / "image_class_labels.txt", 2)
    drop_line(root / "images.txt", 5)
    drop_line(root / "classes.txt", 100)
    message = refusal(root)
    assert "1 images of images.txt without a class in image_class_labels.txt: 001.Bird" in message
    assert (
        "1 classes in image_class_labels.txt of images missing from images.txt: image 5" in message
    )
    assert "1 classes without a name in classes.txt, named after their folders: 100" in message
    names = Counter(sample.class_name for sample in listed(root))
    assert names["001.Bird_1"] == 2
    assert names["100.Bird_100"] == 1


def test_labels_in_another_order_are_noticed(root: Path) -> None:
    lines = (root / "image_class_labels.txt").read_text().splitlines()
    lines[0], lines[-1] = f"1 {lines[-1].split()[1]}", f"11 {lines[0].split()[1]}"
    (root / "image_class_labels.txt").write_text("\n".join(lines))
    message = refusal(root)
    assert "2 images in the folder of another class: 001.Bird_1/Bird_1_0000.jpg (line 1)" in message


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "images.txt",
            "1 again.jpg",
            r"line 12: every image_id must occur once, but 1 is also in line 1",
        ),
        ("image_class_labels.txt", "11 201", r"every image_id must occur once"),
        ("image_class_labels.txt", "12 x", r"line 12: class_id must be a whole number, got 'x'"),
        ("images.txt", "12", r"line 12: '12' does not have the columns image_id path"),
    ],
)
def test_damaged_files(root: Path, name: str, line: str, message: str) -> None:
    with open(root / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        listed(root)


def test_unknown_classes_and_missing_files(root: Path) -> None:
    text = (root / "image_class_labels.txt").read_text()
    (root / "image_class_labels.txt").write_text(text.replace("11 200", "11 201"))
    with pytest.raises(DataError, match="classes are 1 to 200, image 11 has 201"):
        listed(root)
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"classes.txt does not exist in"):
        listed(root)
