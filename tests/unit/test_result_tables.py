"""Columns of the results of a run, on its page and in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dml_dist.files import read_json
from dml_dist.orchestration.tables import print_metrics, print_results
from dml_dist.report import write_report
from dml_dist.report.formatting import MISSING, ResultRow, filled_columns
from dml_dist.report.summary import read_summary
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter
from tests.report_runs import EVIL, Page, begin, make_run, new_run, scores

HEADER = ["metric", "untrained", "trained", "best validation"]
# `scores` of 0.05 before and 0.8734 after training, and of 0.9 on 60 validation images.
ROWS = [
    ["R@1", "5.00 %", "87.34 %", "90.00 %"],
    ["R@10", "15.00 %", "97.34 %", "100.00 %"],
    ["MAP@R", "2.50 %", "43.67 %", "45.00 %"],
    ["R-precision", "3.33 %", "58.23 %", "60.00 %"],
    ["Queries", "600", "600", "60"],
    ["Images alone in their class", "3", "3", "3"],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def cells(text: str) -> list[list[str]]:
    """Return the cells of a table on the terminal, row by row, lines and empty rows left out."""
    rows = [line.replace("┃", "│").split("│")[1:-1] for line in text.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if row]


def test_the_summary_keeps_untrained_and_trained_apart(run: RunFolder) -> None:
    summary = read_summary(run.path)
    assert summary.result("untrained") == scores(0.05)
    assert summary.result("trained") == scores(0.8734)
    assert summary.table()[0] == ResultRow(
        "recall_at_1", "R@1", MISSING, untrained="5.00 %", trained="87.34 %", validation="90.00 %"
    )


def test_records_are_told_apart_without_metrics(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    with RecordWriter(run.records("evaluations"), 1) as evaluations:
        evaluations.write(0, split="test", protocol="untrained", recall_at_1=0.1)
        evaluations.write(5, split="test", protocol="literature", recall_at_1=0.2)
        evaluations.write(9, split="validation", protocol="validation", recall_at_1=0.3)
        evaluations.write(9, split="test", protocol="final", recall_at_1=0.4)
    summary = read_summary(run.path)
    assert summary.result("untrained") == {"recall_at_1": 0.1}
    assert summary.result("trained") == {"recall_at_1": 0.4}
    assert [record["recall_at_1"] for record in summary.under("validation")] == [0.3]
    assert summary.evaluation("recall_at_1", "literature").values.tolist() == [0.2]


def test_columns_of_the_page(run: RunFolder) -> None:
    page = Page(write_report(run.path))
    assert page.table("results") == [HEADER, *ROWS]
    assert "87.34 % R@1 on test classes 5.00 % untrained" in page.text
    # The weakest classes: images, R@1, and a third of it as MAP@R.
    assert page.table("classes")[:3] == [
        ["class", "images", "R@1", "MAP@R"],
        ["class 0", "4", "0.00 %", "0.00 %"],
        [EVIL, "4", "25.00 %", "8.33 %"],
    ]


def test_columns_of_the_terminal(run: RunFolder) -> None:
    output = io.StringIO()
    print_results(run, Console(file=output, width=100))
    header, *rows = cells(output.getvalue())
    assert header == ["test classes", "untrained", "trained", "best validation"]
    assert rows[:6] == ROWS
    assert rows[6] == ["training speed", "", "2,093 images/s", ""]
    assert ["time, whole run", "", "1 min 42 s", ""] in rows


def test_the_terminal_shows_the_evaluated_checkpoint() -> None:
    metrics = {
        "split": "test",
        "checkpoint": {"folder": "step_00000020"},
        "untrained": scores(0.05),
        "trained": scores(0.8734),
        "seconds": {"evaluate": 2.3},
    }
    output = io.StringIO()
    print_metrics(metrics, Console(file=output, width=100))
    header, *rows = cells(output.getvalue())
    assert header == ["split test", "step_00000020"]
    assert rows == [*([row[0], row[2]] for row in ROWS), ["time, evaluation", "2.3 s"]]


def test_features_of_the_given_network_are_a_column_of_their_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "demo")
    metrics = {**read_json(folder.metrics_path), "features": scores(0.213)}
    folder.metrics_path.write_text(json.dumps(metrics))
    table = read_summary(folder.path).table()
    assert table[0].features == "21.30 %"
    assert [heading for heading, _ in filled_columns(table)][:2] == ["features", "untrained"]
    page = Page(write_report(folder.path))
    assert "21.30 %" in page.table("results")[1]
    assert "87.34 % R@1 on test classes 21.30 % features, 5.00 % untrained" in page.text
