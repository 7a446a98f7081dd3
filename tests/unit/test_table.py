from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dml_dist.config.data import TableConfig
from dml_dist.data.datasets.table import TableImporter
from dml_dist.data.sample import DatasetFacts, Sample
from dml_dist.errors import DataError
from tests.oracles_data import write_images
from tests.unit.importer_suite import ImporterSuite

ROWS = [
    ("x/1.png", "007", "train", "birds", ""),
    ("x/2.png", "007", "train", "birds", "both"),
    ("y.1.jpg", "10", "query_set", "", "query"),
    ("y.2.jpg", "10", "query_set", "", "gallery"),
]
NAMES = ("path", "label", "split", "super_class", "role")


def write_csv(path: Path, rows: list[tuple[str, ...]], names: tuple[str, ...] = NAMES) -> Path:
    path.write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")
    return path


def listed(table: Path) -> list[Sample]:
    return TableImporter(TableConfig(source=str(table))).samples()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path, [row[0] for row in ROWS])
    return tmp_path


class TestCsvAsImporter(ImporterSuite):
    def config(self, folder: Path) -> Any:
        write_images(folder, [row[0] for row in ROWS])
        return TableConfig(source=str(write_csv(folder / "table.csv", ROWS)))


class TestParquetAsImporter(ImporterSuite):
    def config(self, folder: Path) -> Any:
        write_images(folder, [row[0] for row in ROWS])
        table = pa.table(
            {
                "path": [str(folder / row[0]) for row in ROWS],
                "label": [7, 7, 10, 10],
                "split": pa.array([row[2] for row in ROWS]).dictionary_encode(),
                "super_class": ["birds", "birds", None, None],
            }
        )
        pq.write_table(table, folder / "table.parquet")
        return TableConfig(source=str(folder / "table.parquet"))


def test_values_are_kept_as_written(folder: Path) -> None:
    samples = listed(write_csv(folder / "t.csv", ROWS))
    assert [sample.class_name for sample in samples] == ["007", "007", "10", "10"]
    assert [sample.super_class for sample in samples] == ["birds", "birds", None, None]
    assert [sample.role for sample in samples] == ["both", "both", "query", "gallery"]
    assert [sample.key for sample in samples] == ["x/1", "x/2", "y_1", "y_2"]
    facts = TableImporter(TableConfig(source=str(folder / "t.csv"))).facts()
    assert facts == DatasetFacts({"query_set": (2,), "train": (2,)}, exact=True)


def test_other_columns_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(*row[:3], "1") for row in ROWS]
    with caplog.at_level(logging.WARNING):
        listed(write_csv(folder / "t.csv", rows, ("path", "label", "split", "supper_class")))
    assert "the columns supper_class are not used" in caplog.text


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (ROWS, ("path", "class", "split", "a", "b"), "got path, class, split, a, b; add label"),
        ([("x/1.png", " ", "train")], NAMES[:3], "needs a label, .*: row 1: 'x/1.png'"),
        ([("x/1.png", "1", "")], NAMES[:3], "every row needs a split, .*row 1: 'x/1.png'"),
        (
            [("x/1.png", "1", "train"), *[(f"no{i}.png", "1", "test") for i in range(7)]],
            NAMES[:3],
            r"every path .*: row 2: '.*no0.png'; row 3: .*row 6: '.*no4.png'; and 2 more",
        ),
        ([(*ROWS[0][:4], "probe")], NAMES, "one of both, query, gallery: row 1: 'probe'"),
        ([ROWS[0], ROWS[1], ROWS[0]], NAMES, "'x/1.png' is in rows 1 and 3"),
        ([], NAMES, "has a header and no rows"),
        (ROWS, ("path", "label", "split", "a", "a "), "one column of each name, .*of 'a'; rename"),
        (ROWS, ("path", "path", "label", "split", "role"), "more than one of 'path'"),
    ],
)
def test_wrong_tables(
    folder: Path, rows: list[tuple[str, ...]], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        listed(write_csv(folder / "t.csv", rows, names))


def test_tables_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv does not exist"):
        listed(folder / "none.csv")
    (folder / "t.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"must be a .csv or .parquet file, got .*t.xlsx"):
        listed(folder / "t.xlsx")
    (folder / "t.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"t.parquet cannot be read as parquet"):
        listed(folder / "t.parquet")
    (folder / "t.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"t.csv cannot be read as csv"):
        listed(folder / "t.csv")
    (folder / "t.csv").write_bytes(b"path,label,split\na,b\n")
    with pytest.raises(DataError, match=r"t.csv cannot be read as csv"):
        listed(folder / "t.csv")
