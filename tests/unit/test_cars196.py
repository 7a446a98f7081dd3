"""Cars196 with few images in its three layouts, which must give the same classes."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

from dml_dist.config.data import Cars196Config
from dml_dist.data.datasets.cars196 import Cars196Importer
from dml_dist.data.sample import Sample
from dml_dist.errors import DataError
from tests import official_layouts as layouts
from tests.unit.importer_suite import ImporterSuite


def name(number: int) -> str:
    return f"{number:03d}.{layouts.CAR_NAMES[number - 1]}"


EXPECTED = {
    ("train" if number <= 98 else "test", name(number)): count
    for number, count in Counter(layouts.CARS).items()
}


class TestAnnotationsAsImporter(ImporterSuite):
    def config(self, folder: Path) -> Cars196Config:
        return Cars196Config(source=str(layouts.cars_annotated(folder)), allow_partial=True)


class TestDevkitAsImporter(ImporterSuite):
    def config(self, folder: Path) -> Cars196Config:
        return Cars196Config(source=str(layouts.cars_devkit(folder)), allow_partial=True)


class TestClassFoldersAsImporter(ImporterSuite):
    def config(self, folder: Path) -> Cars196Config:
        return Cars196Config(source=str(layouts.cars_by_class(folder)), allow_partial=True)


def listed(source: Path, *, allow_partial: bool = True) -> list[Sample]:
    return Cars196Importer(Cars196Config(source=str(source), allow_partial=allow_partial)).samples()


def refusal(source: Path) -> str:
    with pytest.raises(DataError) as caught:
        listed(source, allow_partial=False)
    return str(caught.value)


def counts(samples: list[Sample]) -> dict[tuple[str, str], int]:
    return dict(Counter((sample.split, sample.class_name) for sample in samples))


@pytest.mark.parametrize(
    "write", [layouts.cars_annotated, layouts.cars_devkit, layouts.cars_by_class]
)
def test_all_layouts_give_the_same_classes(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    assert counts(listed(write(tmp_path))) == EXPECTED
    lines = [line.split() for line in refusal(tmp_path).splitlines()]
    assert ["train", "98", "3", "8,054", "6"] in lines
    assert ["test", "98", "2", "8,131", "4"] in lines


def test_the_md5_of_the_annotations_is_compared(tmp_path: Path) -> None:
    message = refusal(layouts.cars_annotated(tmp_path))
    assert "cars_annos.mat: md5 is " in message
    assert "published is b407c6086d669747186bd1d764ff9dbc" in message


def test_devkit_without_labels_or_in_nested_folders(tmp_path: Path) -> None:
    layouts.cars_devkit(tmp_path, nested=True)
    samples = listed(tmp_path)
    assert counts(samples) == EXPECTED
    assert samples[0].key == "cars_train/cars_train/00001"
    labels = tmp_path / "devkit/cars_test_annos_withlabels.mat"
    labels.rename(tmp_path / "cars_test_annos_withlabels.mat")
    assert counts(listed(tmp_path)) == EXPECTED
    (tmp_path / "cars_test_annos_withlabels.mat").rename(tmp_path / "devkit/cars_test_annos.mat")
    message = refusal(tmp_path)
    assert "cars_test_annos_withlabels.mat does not exist in" in message
    assert "cars_test_annos.mat exists but has no classes" in message
    assert len(listed(tmp_path)) == 5
    (tmp_path / "devkit/cars_train_annos.mat").write_bytes(b"no matlab file at all, but long" * 9)
    with pytest.raises(DataError, match=r"cars_train_annos.mat cannot be read as a MATLAB file"):
        listed(tmp_path)


def test_annotations_that_are_something_else(tmp_path: Path) -> None:
    layouts.annotations(tmp_path / "cars_annos.mat", "fname", ["1.jpg"], [1])
    with pytest.raises(
        DataError, match="must have annotations with relative_im_path and class, but has"
    ):
        listed(tmp_path)
    layouts.annotations(tmp_path / "cars_annos.mat", "relative_im_path", ["1.jpg"], [197])
    with pytest.raises(DataError, match="classes are 1 to 196, got 197"):
        listed(tmp_path)


def test_class_folders_are_numbered_by_what_there_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layouts.cars_by_class(tmp_path)
    (tmp_path / "anno_train.csv").unlink()
    (tmp_path / "anno_test.csv").unlink()
    assert counts(listed(tmp_path)) == EXPECTED  # by names.csv
    (tmp_path / "names.csv").write_text("Other\n")
    with pytest.raises(DataError, match=r"names.csv: every class folder must be named in it"):
        listed(tmp_path)
    (tmp_path / "names.csv").unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        samples = listed(tmp_path)
    assert "the numbers of the classes, so they follow the sorted folder names" in caplog.text
    assert sorted({int(s.class_name[:3]) for s in samples}) == [1, 2, 3, 4, 5]


def test_numbered_class_folders_without_train_and_test(tmp_path: Path) -> None:
    for at, number in enumerate(layouts.CARS):
        layouts.put(tmp_path / name(number) / f"{at}.jpg", layouts.jpeg(at))
    assert counts(listed(tmp_path)) == EXPECTED


def test_tables_that_contradict_the_folders(tmp_path: Path) -> None:
    layouts.cars_by_class(tmp_path)
    table = tmp_path / "anno_test.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(["fname,a,b,c,d,class", rows[0][:-1] + "5", *rows[1:-1]]) + "\n")
    message = refusal(tmp_path)
    assert "images of one folder have several classes: Make1 Model 1" in message
    rows = (tmp_path / "anno_train.csv").read_text().splitlines()
    (tmp_path / "anno_train.csv").write_text(rows[1] + "\n")
    assert "no image of these folders is in them, so they are not used: Make" in refusal(tmp_path)
    assert counts(listed(tmp_path)) == EXPECTED  # by names.csv
    table.write_text("a.jpg,1\nb.jpg,x\n")
    with pytest.raises(DataError, match="row 2: the last column must be the number of a class"):
        listed(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source must be the folder of Cars196 with cars_annos"):
        listed(tmp_path)
