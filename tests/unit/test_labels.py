"""One label rule for every entrance: tar shards, tables, folders, split files, importers."""

from __future__ import annotations

import csv
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dml_dist.config.data import FolderConfig, SplitConfig, TableConfig
from dml_dist.data.build_index import build_index
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.datasets.table import TableImporter
from dml_dist.data.labels import class_text, joined_line
from dml_dist.data.sample import Sample
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import DataError
from tests.oracles_data import (
    ListImporter,
    NoiseSource,
    encoded_image,
    write_images,
    write_tar,
)

DECOMPOSED = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (3.0, "3"), ("3", "3"), ("3.0", "3"), ("3.", "3"), (" 3\t", "3"), (-0.0, "0"),
        ("-7.00", "-7"), (2**70, str(2**70)), ("007", "007"), ("007.0", "007.0"), (3.5, "3.5"),
        ("3.5", "3.5"), (True, "true"), ("1e3", "1e3"), ("+3", "+3"), ("٣", "٣"), ("a  b", "a  b"),
        (" cat\u00a0", "cat"), (DECOMPOSED, "café"), ("Infinity", "Infinity"), ("Nan", "Nan"),
    ],
)  # fmt: skip
def test_one_text_for_each_class(value: Any, text: str) -> None:
    assert class_text(value) == text
    assert class_text(text) == text


@pytest.mark.parametrize(
    "value",
    [None, float("nan"), float("inf"), -float("inf"), [], ["a"], {}, {"id": 3}, "", " \n", "nan",
     "NaN", "inf", b"3"],
)  # fmt: skip
def test_what_is_no_label_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"must be a number or a text|names no class"):
        class_text(value)


def test_what_was_joined_is_counted() -> None:
    pairs = [("cat", "cat"), (" cat", "cat"), ("3", "3"), ("3.0", "3"), ("3.", "3"), ("x ", "x")]
    line = joined_line(pairs)
    assert line is not None
    assert line.startswith("3 class names were joined")
    assert "'3.' is '3', '3.0' is '3', ' cat' is 'cat'" in line
    assert joined_line([("a", "a"), ("b ", "b")]) is None


def shards(root: Path, *labels: Any) -> Path:
    """Write a tar shard with one sample for each label: a dict as .json, bytes as .cls."""
    members: list[tuple[str, bytes]] = []
    for at, label in enumerate(labels):
        members.append((f"k{at}.png", encoded_image(at)))
        is_cls = isinstance(label, bytes)
        members.append(
            (f"k{at}.cls", label) if is_cls else (f"k{at}.json", json.dumps(label).encode())
        )
    write_tar(root / "a.tar", members)
    return root


def test_json_and_cls_of_tar_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"class": " caf\u00e9"}, {"class": DECOMPOSED}, b"caf\xc3\xa9\n"
    numbers = 3, 3.0, "3", b"3.0\r\n", {"label": 3.0}, {"cls": "3"}, {"class": "3"}, {"class": 3}
    with caplog.at_level(logging.WARNING):
        index = build_index(shards(tmp_path, *names, *numbers, "007", b"7"), processes=1)
    assert index.class_names == ("007", "3", "7", "café")
    assert [index.class_names[label] for label in index.label] == [
        *["café"] * 3, *["3"] * 8, "007", "7",
    ]  # fmt: skip
    assert "3 class names were joined with another one" in caplog.text


@pytest.mark.parametrize(
    "label",
    [float("nan"), {"label": float("inf")}, {"label": [1]}, [3], {"class": {"id": 1}}, b"NaN",
     {"label": None}, {"label": "3", "class": []}, {"label": 1, "super_class": ["a"]},
     {"label": 1, "split": {"a": 1}}],
)  # fmt: skip
def test_no_labels_in_tar_shards(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataError, match=r"a.tar: key 'k1': "):
        build_index(shards(tmp_path, "3", label), processes=1)


def table(root: Path, labels: list[Any], kind: str) -> TableImporter:
    paths = [f"{at}.png" for at in range(len(labels))]
    write_images(root, paths)
    columns = {"path": paths, "label": labels, "split": ["train"] * len(labels)}
    if kind == "parquet":
        pq.write_table(pa.table(columns), root / "t.parquet")
    else:
        with open(root / "t.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return TableImporter(TableConfig(source=str(root / f"t.{kind}")))


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        (["3", "3.0", " 3", "007", "7", DECOMPOSED, "café "], "csv", "3 3 3 007 7 café café"),
        ([3.0, 4.0, 3.0], "parquet", "3 4 3"),
        ([3, 4], "parquet", "3 4"),
        ([True, False], "parquet", "true false"),
        (["3.0", "3", " a"], "parquet", "3 3 a"),
    ],
)
def test_tables(tmp_path: Path, labels: list[Any], kind: str, expected: str) -> None:
    samples = table(tmp_path, labels, kind).samples()
    assert [sample.class_name for sample in samples] == expected.split()


@pytest.mark.parametrize(
    ("labels", "kind"),
    [(["1", "nan"], "csv"), ([1.0, float("nan")], "parquet"), ([1.0, float("inf")], "parquet"),
     ([1.0, None], "parquet"), ([[1], [2]], "parquet")],
)  # fmt: skip
def test_tables_without_labels(tmp_path: Path, labels: list[Any], kind: str) -> None:
    with pytest.raises(DataError, match=r"row 2|cannot be read|names no class"):
        table(tmp_path, labels, kind).samples()


def test_class_folders_and_split_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "photos"
    write_images(source, [f"{name}/1.png" for name in ("3", "3.0", "007", DECOMPOSED, "café ")])
    (tmp_path / "s.csv").write_text(f"class,split\n3.0,train\n007,test\n{DECOMPOSED},test\n")
    split = SplitConfig(file=str(tmp_path / "s.csv"))
    with caplog.at_level(logging.WARNING):
        samples = FolderImporter(FolderConfig(source=str(source), split=split)).samples()
    assert sorted((sample.class_name, sample.split) for sample in samples) == [
        ("007", "test"), ("3", "train"), ("3", "train"), ("café", "test"), ("café", "test"),
    ]  # fmt: skip
    assert "2 class names were joined" in caplog.text
    write_images(source, ["nan/1.png"])
    with pytest.raises(DataError, match="class folder 'nan' names no class"):
        FolderImporter(FolderConfig(source=str(source))).samples()


def test_every_other_importer(tmp_path: Path) -> None:
    names: list[Any] = ["a ", "a", 3, 3.0, "3"]
    samples = tuple(
        Sample(f"k{at}", name, "train", NoiseSource(at), super_class=" s")
        for at, name in enumerate(names)
    )
    index = import_dataset(ListImporter(samples), tmp_path / "out", processes=1)
    assert index.class_names == ("3", "a")
    assert set(index.super_class) == {"s"}
    for wrong in (None, float("nan"), ["a"], ""):
        bad: Any = Sample("k9", wrong, "train", NoiseSource(9))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="sample 'k9'"):
            import_dataset(ListImporter((*samples, bad)), tmp_path / "other", processes=1)
