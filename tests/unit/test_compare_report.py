"""The tables of a comparison whose methods have different finished seeds, worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.report.study import comparison as compare_page
from dml_dist.report.study import plots
from dml_dist.report.study.comparison import write_comparison
from dml_dist.report.study.comparison_tables import comparison_rows, plain_results
from dml_dist.report.study.read import Comparison, MethodResult, read_comparison
from dml_dist.runs.comparison import ComparisonFolder, run_name
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter
from dml_dist.studies.compare import print_comparison
from tests.report_runs import Page, begin

# Method and seed of each finished run -> R@1, MAP@R, step of its checkpoint, seconds of training.
FINISHED = {
    ("triplet", 3): (0.50, 0.20, 11, 101.0),
    ("triplet", 5): (0.60, 0.31, 12, 102.0),
    ("triplet", 7): (0.55, 0.27, 13, 103.0),
    ("nca", 5): (0.64, 0.30, 14, 104.0),
    ("nca", 7): (0.57, 0.29, 15, 105.0),
    ("nca", 9): (0.89, 0.70, 16, 106.0),
    ("nir", 3): (0.66, 0.40, 17, 107.0),
}
# R@1 on test classes at steps 10 and 20, watched during training.
CURVES = {
    ("triplet", 3): (0.2, 0.5),
    ("triplet", 5): (0.3, 0.6),
    ("triplet", 7): (0.1, 0.4),
    ("nca", 5): (0.6, 0.7),
    ("nca", 7): (0.65, 0.5),
    ("nca", 9): (0.4, 0.6),
    ("nir", 3): (0.15, 0.35),
}
T_1, T_2 = 12.706205, 4.302653
"""97.5 % quantiles of Student's t with 1 and 2 degrees of freedom, from a printed table."""
DASH = "–"  # noqa: RUF001


def config_of(**changes: Any) -> RunConfig:
    section = {
        "methods": {
            "triplet": ["loss={name: triplet, margin: 0.2}"],
            "nca": ["optim.lr=0.02"],
            "nir": ["optim.lr=0.03"],
        },
        "seeds": [3, 5, 7, 9],
        "bases": {"nca": "triplet", "nir": "nca"},
        "axis": {"path": "optim.lr", "lines": {"rates": ["nir", "nca"], "all": ["nir", "triplet"]}},
    }
    plain = {
        "name": "demo",
        "data": {"path": "/nowhere/shards"},
        "optim": {"lr": 0.01},
        "train": {"global_batch_size": 16, "steps": 20},
        "validation": {"name": "none"},
        "evaluation": {"evaluate_test_every": 10},
        "compare": section,
    }
    return parse_config({**plain, **changes, "compare": section | changes.get("compare", {})})


def write_folder(path: Path, config: RunConfig) -> Path:
    """Write a comparison's folder as its command leaves it, with the runs of FINISHED."""
    folder = ComparisonFolder(path)
    path.mkdir()
    folder.config_path.write_text(dump_config(config))
    for (method, seed), (recall, map_at_r, step, seconds) in FINISHED.items():
        text = dump_config(config.model_copy(update={"compare": None}))
        run = RunFolder.create(folder.run(run_name(method, seed)), text, name="x", seed=seed)
        begin(run)
        with RecordWriter(run.records("steps"), 1) as steps:
            for at in (10, 20):
                steps.write(at, loss=1.0, images_per_second=8.0)  # 2 s for a step
        with RecordWriter(run.records("evaluations"), 1) as evaluations:
            for at, value in zip((10, 20), CURVES[method, seed], strict=True):
                evaluations.write(at, split="test", protocol="literature", recall_at_1=value)
        run.finish(
            {
                "untrained": {"recall_at_1": 0.02, "map_at_r": 0.01},
                "trained": {"recall_at_1": recall, "map_at_r": map_at_r},
                "checkpoint": {"step": step},
                "seconds": {"train": seconds, "total": 500.0},
            }
        )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_folder(tmp_path_factory.mktemp("compared") / "demo", config_of())
    write_comparison(path)
    return path


@pytest.fixture(scope="module")
def comparison(folder: Path) -> Comparison:
    return read_comparison(folder)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report/index.html")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the curves, which take a second to draw."""
    monkeypatch.setattr(compare_page, "draw_convergence", lambda comparison: [])
    monkeypatch.setattr(compare_page, "draw_axis", lambda comparison: [])


def method_of(comparison: Comparison, name: str) -> MethodResult:
    (found,) = (method for method in comparison.methods if method.name == name)
    return found


def table_of(folder: Path, name: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO((folder / "report" / name).read_text())))


def numbers(row: list[str]) -> list[float]:
    return [float(text) for text in row]


def test_finished_and_missing_seeds(comparison: Comparison) -> None:
    found = {
        method.name: ([run.seed for run in method.runs], list(method.missing))
        for method in comparison.methods
    }
    assert found == {"triplet": ([3, 5, 7], [9]), "nca": ([5, 7, 9], [3]), "nir": ([3], [5, 7, 9])}
    assert (comparison.num_missing, len(comparison.runs)) == (5, 7)


def test_gains_are_those_of_runs_with_the_same_seed(comparison: Comparison) -> None:
    triplet, nca, nir = (method_of(comparison, name) for name in ("triplet", "nca", "nir"))
    # Seeds 5 and 7: R@1 0.64 - 0.60 and 0.57 - 0.55, MAP@R 0.30 - 0.31 and 0.29 - 0.27.
    for key, mean, half in (("recall_at_1", 0.03, 0.01 * T_1), ("map_at_r", 0.005, 0.015 * T_1)):
        gain = nca.difference(triplet, key)
        assert gain.count == 2
        assert (gain.mean, gain.half) == pytest.approx((mean, half), rel=1e-6)
        assert triplet.difference(nca, key).mean == pytest.approx(-mean, rel=1e-6)
    # Seed 3 is the only one of nir; nca has not finished it, triplet has.
    alone = nir.difference(nca, "recall_at_1")
    assert (alone.count, math.isnan(alone.mean)) == (0, True)
    one = nir.difference(triplet, "recall_at_1")
    assert (one.count, one.mean) == (1, pytest.approx(0.16))


def test_the_table_of_gains(folder: Path, page: Page) -> None:
    expected = [
        ["method", "against", "R@1", "MAP@R"],
        ["nca", "triplet", "+3.00 ± 12.71 %", "+0.50 ± 19.06 %"],
        ["nir", "nca", DASH, DASH],
    ]
    assert page.table("differences") == expected
    header, nca, nir = table_of(folder, "differences.csv")
    assert header == [
        *("method", "base", "seeds", "recall_at_1", "recall_at_1_low", "recall_at_1_high"),
        *("map_at_r", "map_at_r_low", "map_at_r_high"),
    ]
    assert nca[:3] == ["nca", "triplet", "2"]
    recall = [0.03, 0.03 - 0.01 * T_1, 0.03 + 0.01 * T_1]
    map_at_r = [0.005, 0.005 - 0.015 * T_1, 0.005 + 0.015 * T_1]
    assert numbers(nca[3:]) == pytest.approx([*recall, *map_at_r], rel=1e-5)
    assert nir == ["nir", "nca", "0", *[""] * 6]


def test_the_table_of_runs(folder: Path) -> None:
    rows = table_of(folder, "runs.csv")
    assert rows == [
        [
            "method",
            "seed",
            "recall_at_1",
            "map_at_r",
            "checkpoint_step",
            "seconds_with_evaluations",
        ],
        ["triplet", "3", "0.5", "0.2", "11", "101.0"],
        ["triplet", "5", "0.6", "0.31", "12", "102.0"],
        ["triplet", "7", "0.55", "0.27", "13", "103.0"],
        ["nca", "5", "0.64", "0.3", "14", "104.0"],
        ["nca", "7", "0.57", "0.29", "15", "105.0"],
        ["nca", "9", "0.89", "0.7", "16", "106.0"],
        ["nir", "3", "0.66", "0.4", "17", "107.0"],
    ]


# The curves' means: triplet 0.2, 0.5; nca 0.55, 0.6; nir 0.15, 0.35. The target is 0.5.


def test_the_table_of_results_as_numbers(folder: Path) -> None:
    header, triplet, nca, nir = table_of(folder, "comparison.csv")
    assert header == [
        *("method", "seeds", "recall_at_1", "recall_at_1_low", "recall_at_1_high"),
        *("map_at_r", "map_at_r_low", "map_at_r_high"),
        *("target_recall", "steps_to_target", "seconds_to_target", "runs_reaching_target"),
    ]
    assert (triplet[:2], nca[:2]) == (["triplet", "3"], ["nca", "3"])
    half = 0.05 * T_2 / math.sqrt(3)  # 0.50, 0.60 and 0.55 deviate by 0.05
    assert numbers(triplet[2:5]) == pytest.approx([0.55, 0.55 - half, 0.55 + half], rel=1e-6)
    # 0.64, 0.57 and 0.89: mean 0.70, squared deviations 0.0036, 0.0169 and 0.0361 over 2.
    half = math.sqrt(0.0283) * T_2 / math.sqrt(3)
    assert numbers(nca[2:5]) == pytest.approx([0.70, 0.70 - half, 0.70 + half], rel=1e-6)
    # 0.20, 0.31 and 0.27: mean 0.26, squared deviations 0.0036, 0.0025 and 0.0001 over 2.
    half = math.sqrt(0.0031) * T_2 / math.sqrt(3)
    assert numbers(triplet[5:8]) == pytest.approx([0.26, 0.26 - half, 0.26 + half], rel=1e-6)
    assert numbers(triplet[8:]) == pytest.approx([0.5, 20, 40, 2])
    assert numbers(nca[8:]) == pytest.approx([0.5, 10, 20, 3])
    assert nir[:8] == ["nir", "1", "0.66", "", "", "0.4", "", ""]
    assert nir[9:] == ["", "", "0"]  # never reached, by none of its runs


def test_formatted_table_of_results(folder: Path, page: Page) -> None:
    expected = [
        ["method", "seeds", "R@1", "MAP@R", "steps to 50.00 %", "of single runs", "time to it"],
        ["triplet", "3", "55.00 ± 12.42 %", "26.00 ± 13.83 %", "20", "20 (2 of 3)", "40 s"],
        ["nca", "3", "70.00 ± 41.79 %", "43.00 ± 58.10 %", "10", "10 to 20", "20 s"],
        ["nir", "1", "66.00 %", "40.00 %", "not reached", "0 of 1", DASH],
    ]
    assert page.table("results") == expected
    terminal = io.StringIO()
    print_comparison(folder, Console(file=terminal, width=120))
    lines = [re.sub(r"\s+", " ", line).strip() for line in terminal.getvalue().splitlines()]
    for row in expected[1:]:
        assert " ".join(row[:5]) in lines  # the terminal leaves out the last two columns
    titles = [line for line in lines if line.startswith("method")]
    assert titles == ["method seeds R@1 MAP@R 50.00 %", "method against R@1 MAP@R"]
    assert "nca triplet +3.00 ± 12.71 % +0.50 ± 19.06 %" in lines


def test_points_of_the_figure_against_a_field(comparison: Comparison) -> None:
    """Value of the field, mean and half of the interval, in percent; by rising value."""
    half = 100 * math.sqrt(0.0283) * T_2 / math.sqrt(3)
    lines = plots._lines(comparison, "recall_at_1")
    assert list(lines) == ["rates", "all"]
    np.testing.assert_allclose(
        lines["rates"], [[0.02, 0.03], [70.0, 66.0], [half, math.nan]], rtol=1e-6
    )
    np.testing.assert_allclose(lines["all"][:2], [[0.01, 0.03], [55.0, 66.0]], rtol=1e-6)
    lines = plots._lines(comparison, "map_at_r")
    np.testing.assert_allclose(lines["rates"][1], [43.0, 40.0], rtol=1e-6)


def test_curves_begin_with_the_untrained_network(comparison: Comparison) -> None:
    curve = method_of(comparison, "nca").runs[1].curve
    assert curve.steps.tolist() == [0, 10, 20]
    assert curve.seconds.tolist() == [0, 20, 40]
    assert curve.recall.tolist() == [0.02, 0.65, 0.5]


@pytest.mark.usefixtures("no_figures")
def test_trials_and_the_values_that_they_found(tmp_path: Path) -> None:
    """Trials come in the order of their numbers, not of their names."""
    space = {
        "optim.lr": {"type": "float", "low": 1e-4, "high": 1e-1},
        "optim.eps": {"type": "float", "low": 1e-9, "high": 1e-3},
    }
    search = {"trials": 12, "steps": 5, "space": space, "without": {"nir": ["optim.eps"]}}
    config = config_of(compare={"search": search, "axis": None}, validation={"name": "fraction"})
    path = write_folder(tmp_path / "searched", config)
    folder = ComparisonFolder(path)
    for number in range(12):
        file = folder.trial("nca", number).with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        score = None if number in (3, 11) else 0.1 + 0.01 * number
        file.write_text(json.dumps({"values": {"optim.lr": number}, "map_at_r": score}))
    nca = method_of(read_comparison(path), "nca")
    assert [trial["values"]["optim.lr"] for trial in nca.trials] == list(range(12))
    write_comparison(path)
    assert Page(path / "report/index.html").table("values") == [
        ["method", "optim.lr", "optim.eps", "trials", "best validation MAP@R"],
        ["triplet", "0.01", "1e-08", "0", DASH],
        ["nca", "0.01", "1e-08", "12, 2 not finite", "20.00 %"],
        ["nir", "0.01", "not used", "0", DASH],
    ]


@pytest.mark.usefixtures("no_figures")
def test_published_rows_match_the_protocol(tmp_path: Path) -> None:
    dataset = {"name": "cub200", "source": "/nowhere"}
    path = tmp_path / "published"
    write_folder(path, config_of(data={"path": "/nowhere/shards", "dataset": dataset}))
    row: dict[str, Any] = {
        "dataset": "cub200",
        "backbone": "conv4",
        "embedding_size": 128,
        "verified": True,
    }
    rows: list[dict[str, Any]] = [
        {"method": "nca", "protocol": "best_on_test", "recall": {"1": 61.5}, "source": "A"},
        {"method": "nca", "protocol": "fixed_epochs", "recall": {"1": 62.5}, "source": "B"},
        {"method": "softmax", "protocol": "fixed_epochs", "recall": {"2": 63.5}, "source": "C"},
    ]
    rows = [row | one for one in rows]
    rows[2]["verified"] = False
    protocols = {"best_on_test": "The best.", "fixed_epochs": "The last."}
    ComparisonFolder(path).references_path.write_text(
        json.dumps({"protocols": protocols, "rows": rows})
    )
    write_comparison(path)
    assert Page(path / "report/index.html").table("published") == [
        ["method", "published R@1", "here", "protocol", "source"],
        # The highest point of the mean curve, and the mean of the final evaluations.
        ["nca", "61.5 %", "60.00 %", "best_on_test", "A"],
        ["nca", "62.5 %", "70.00 ± 41.79 %", "fixed_epochs", "B"],
        ["softmax", DASH, DASH, "fixed_epochs", "C (not verified)"],
    ]


def test_features_of_given_networks_are_rows_of_their_own(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "demo", config_of())
    given = {"recall_at_1": 0.213, "map_at_r": 0.02}
    for method, seed in FINISHED:
        run = RunFolder(ComparisonFolder(path).run(run_name(method, seed)))
        values = given if method != "nir" else {"recall_at_1": 0.31, "map_at_r": 0.04}
        metrics = json.loads(run.metrics_path.read_text())
        run.metrics_path.write_text(json.dumps({**metrics, "features": values}))
    comparison = read_comparison(path)
    assert comparison.features == {
        "features of triplet, nca, not trained": given,
        "features of nir, not trained": {"recall_at_1": 0.31, "map_at_r": 0.04},
    }
    header, rows = comparison_rows(comparison)
    assert [row[2:4] for row in rows[3:]] == [["21.30 %", "2.00 %"], ["31.00 %", "4.00 %"]]
    assert {len(row) for row in rows} == {len(header)}
    header, plain = plain_results(comparison)
    assert plain[3][2] == 0.213
    assert {len(row) for row in plain} == {len(header)}
