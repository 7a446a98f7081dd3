from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dml_dist.config.data import FolderConfig, SplitConfig
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.sample import Sample, check_samples, make_keys
from dml_dist.errors import DataError
from tests.oracles_data import NoiseSource, write_images
from tests.unit.importer_suite import ImporterSuite

KINDS = ("png", "JPEG", "jpg", "bmp", "gif", "webp", "tif", "ppm")


class TestClassFoldersAsImporter(ImporterSuite):
    def config(self, folder: Path) -> FolderConfig:
        write_images(folder, [f"{i % 3}/image.{i}.{KINDS[i % len(KINDS)]}" for i in range(20)])
        return FolderConfig(source=str(folder))


class TestSplitFoldersAsImporter(ImporterSuite):
    def config(self, folder: Path) -> FolderConfig:
        write_images(folder, [f"{s}/c{i % 4}/{i}.png" for s in ("train", "val") for i in range(8)])
        write_images(folder, [f"test/d{i % 2}/{i}.png" for i in range(5)])
        return FolderConfig(source=str(folder))


def listed(source: Path, **split: Any) -> list[Sample]:
    config = FolderConfig(source=str(source), split=SplitConfig(**split))
    return FolderImporter(config).samples()


def classes_of(samples: list[Sample], split: str) -> list[str]:
    return sorted({sample.class_name for sample in samples if sample.split == split})


@pytest.fixture
def ten_classes(tmp_path: Path) -> Path:
    write_images(tmp_path / "raw", [f"c{i}/{j}.png" for i in range(10) for j in range(i + 1)])
    return tmp_path / "raw"


def test_split_by_class_sorted_and_seeded(ten_classes: Path) -> None:
    samples = listed(ten_classes)
    assert classes_of(samples, "train") == [f"c{i}" for i in range(5)]
    assert classes_of(samples, "test") == [f"c{i}" for i in range(5, 10)]
    draws = [classes_of(listed(ten_classes, order="seeded", seed=s), "train") for s in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3
    assert {len(draw) for draw in draws} == {5}
    assert len(classes_of(listed(ten_classes, train=0.25), "train")) == 3
    assert len(classes_of(listed(ten_classes, train=0.999), "train")) == 9


def test_split_by_class_orders_numbers_by_value(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{i}/a.png" for i in (1, 2, 10, 20)])
    assert classes_of(listed(tmp_path), "train") == ["1", "2"]


@pytest.mark.parametrize("order", ["sorted", "seeded"])
def test_split_by_image_divides_every_class(ten_classes: Path, order: str) -> None:
    samples = listed(ten_classes, by="image", train=0.5, order=order)
    counts = Counter((sample.class_name, sample.split) for sample in samples)
    for i in range(10):
        train, test = counts[f"c{i}", "train"], counts[f"c{i}", "test"]
        assert train + test == i + 1
        assert train >= 1
        assert test >= 1 or i == 0
        assert abs(train - test) <= 1
    nine = [sample.split for sample in samples if sample.class_name == "c9"]
    assert (nine == ["train"] * 5 + ["test"] * 5) == (order == "sorted")


def test_split_file_by_class_and_by_path(ten_classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    file.write_text("class,split\n" + "".join(f"c{i},{'ab'[i % 2]}\n" for i in range(10)))
    samples = listed(ten_classes, file=str(file))
    assert classes_of(samples, "a") == ["c0", "c2", "c4", "c6", "c8"]
    file.write_text(
        "path,split\n"
        + "".join(f"c{i}/{j}.png,{'ab'[j % 2]}\n" for i in range(10) for j in range(i + 1))
    )
    samples = listed(ten_classes, file=str(file))
    assert {sample.split for sample in samples if sample.key.endswith("/0")} == {"a"}
    assert {sample.split for sample in samples if sample.key.endswith("/3")} == {"b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class,part\nc0,a\n", "needs the columns `path,split` or `class,split`, got class, part"),
        (
            "class,split\nc0,a\n",
            "every class of the source must have a split.*c1, c2.*, and 4 more",
        ),
        ("class,split\nc0,\n", "row 1 must have a class and a split"),
        ("class,split\nc0,a\nc0,b\n", "class 'c0' is in two splits, the second time in row 2"),
        (
            "class,split\n" + "".join(f"c{i},a\n" for i in range(11)),
            "every class must be in the source, these are not: c10",
        ),
        ("class,split\n", "has a header and no rows"),
    ],
)
def test_split_file_that_does_not_fit(
    ten_classes: Path, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "split.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        listed(ten_classes, file=str(file))


def test_hidden_and_other_files_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a/1.png", "a/._1.png", "a/.hidden.png", "b/2.PNG", ".git/x.png", "__MACOSX/x.png"]
    write_images(tmp_path, names)
    (tmp_path / "a/Thumbs.db").write_bytes(b"x")
    (tmp_path / "README").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert [sample.key for sample in listed(tmp_path)] == ["a/1", "b/2"]
    assert "without an image extension are left out: none (1), .db (1)" in caplog.text


def test_class_in_train_and_test_is_allowed_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, ["train/a/1.png", "train/b/1.png", "test/b/2.png", "test/c/1.png"])
    with caplog.at_level(logging.WARNING):
        samples = listed(tmp_path)
    assert "1 of 3 classes are in more than one of test/, train/ (b)" in caplog.text
    assert sorted((sample.class_name, sample.split) for sample in samples) == [
        ("a", "train"),
        ("b", "test"),
        ("b", "train"),
        ("c", "test"),
    ]


def test_a_folder_that_nothing_uses_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, ["train/a/1.png", "test/b/2.png"])
    with caplog.at_level(logging.WARNING):
        listed(tmp_path)
        assert not caplog.records
        write_images(tmp_path, ["val/c/3.png"])
        listed(tmp_path)
    (record,) = caplog.records
    assert "val/ is imported as the split 'val', which is not used" in record.getMessage()


def test_unused_split_setting_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ["train/a/1.png", "test/b/2.png"])
    with caplog.at_level(logging.WARNING):
        listed(tmp_path, train=0.7)
    assert "the split setting is not used" in caplog.text


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/1.png", "test/1.png", "car/1.png"])
    assert {sample.class_name for sample in listed(tmp_path)} == {"train", "test", "car"}


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source must be a folder with images, .*does not exist"):
        listed(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        listed(tmp_path / "file")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="must hold one folder for each class"):
        listed(tmp_path / "bare")
    write_images(tmp_path / "gap", ["a/1.png"])
    (tmp_path / "gap/b").mkdir()
    (tmp_path / "gap/b/notes.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"gap/b must hold at least one image .* 1 other files"):
        listed(tmp_path / "gap")
    write_images(tmp_path / "deep", ["a/b/1.png"])
    with pytest.raises(DataError, match=r"holds the folder b; give .*deep/a as the source"):
        listed(tmp_path / "deep")
    write_images(tmp_path / "one", ["a/1.png"])
    with pytest.raises(DataError, match="needs at least 2 classes, got 1 \\('a'\\)"):
        listed(tmp_path / "one")


def test_keys_are_unique_without_dots_and_short() -> None:
    long = "x" * 300
    paths = ["a/1.png", "a/1.jpg", "a/i.1.png", "a/i_1.png", "a b/é.png", "/abs/x.png"]
    paths += [f"{long}/1.png", f"{long}/2.png", "bad\udc80/1.png"]
    keys = make_keys(paths)
    assert keys[:6] == ["a/1", "a/1-2", "a/i_1", "a/i_1-2", "a_b/é", "abs/x"]
    assert len(set(keys)) == len(paths)
    assert all("." not in key and len(key.encode()) <= 90 for key in keys)
    assert keys == make_keys(paths)


def test_undecodable_class_name_is_named() -> None:
    with pytest.raises(DataError, match="class name must be non-empty Unicode text"):
        check_samples([Sample("k", "bad\udc80", "train", NoiseSource(0))])


def test_real_images(real_images: Path) -> None:
    omniglot = real_images / "omniglot_small"
    nested = [folder for folder in omniglot.iterdir() if folder.is_dir()]
    source = nested[0] if len(nested) == 1 else omniglot
    samples = listed(source)
    assert len(samples) == 242 * 20
    assert len(classes_of(samples, "train")) == 121
