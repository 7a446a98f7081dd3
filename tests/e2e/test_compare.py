"""A comparison from its command to its page: interrupted, continued, refused, under Ray."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from scipy import stats

from dml_dist.config.load import load_config, with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.orchestration.train import run_training
from dml_dist.report.study.read import read_comparison
from dml_dist.runs.comparison import run_config
from dml_dist.runs.records import read_records
from dml_dist.runtime import rank
from dml_dist.topology import Topology
from tests.report_runs import Page

Cli = Callable[..., tuple[int, str]]
STEPS, TRIAL_STEPS = 8, 4


@pytest.fixture
def compare_file(config_file: Path) -> Path:
    """Two methods x two seeds of 8 steps, two trials of 4 steps for each."""
    plain = yaml.safe_load(config_file.read_text())
    plain["train"]["steps"] = STEPS
    plain["data"]["batches"]["window"] = 1
    plain["evaluation"] |= {"evaluate_test_every": 4, "metrics": []}
    plain["compare"] = {
        "methods": {"triplet": ["loss.name=triplet"], "nca": ["optim.proxy_lr=0.1"]},
        "seeds": [0, 1],
        "search": {
            "trials": 2,
            "steps": TRIAL_STEPS,
            "space": {
                "optim.lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
                "optim.proxy_lr": {"type": "float", "low": 1e-3, "high": 1.0, "log": True},
            },
            "without": {"triplet": ["optim.proxy_lr"]},
        },
    }
    config_file.write_text(yaml.safe_dump(plain, sort_keys=False))
    return config_file


class Batches:
    """Counts the batches of all runs, and ends the command at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.end_at: int | None = None
        self._real = rank.train_loader
        monkeypatch.setattr(rank, "train_loader", self._load)

    def _load(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in self._real(*arguments, **options):
            if self.count == self.end_at:
                raise KeyboardInterrupt
            self.count += 1
            yield batch


class Untrained:
    """Counts the untrained networks that are made to be evaluated, by seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        self._real = rank._untrained
        monkeypatch.setattr(rank, "_untrained", self._make)

    def _make(self, config: RunConfig, topology: Topology) -> EmbeddingModel:
        self.seeds.append(config.seed)
        return self._real(config, topology)


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / "report" / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What only the page shows may change when nothing is left to do.
MORE = (
    *("--set", "compare.bases={nca: triplet}"),
    *("--set", "compare.axis={path: seed, lines: {both: [triplet, nca]}}"),
)


def test_interrupted_continued_and_refused(
    compare_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches(monkeypatch)
    untrained = Untrained(monkeypatch)
    trials = 2 * 2 * TRIAL_STEPS
    batches.end_at = trials + 2 * STEPS + 6  # in the third run, after its checkpoint at step 4
    code, output = cli("compare", compare_file)
    assert code == 130, output
    assert "--resume" in output
    folder = tmp_path / "runs/small"

    code, output = cli("compare", compare_file)
    assert code == 2
    assert "continue it with --resume" in output
    code, output = cli("compare", compare_file, "--resume", "--set", "optim.lr=0.02")
    assert code == 2
    assert "optim.lr: 0.001 -> 0.02" in output

    # What is finished is not made again: two steps of the third run, and the fourth one.
    batches.end_at, before = None, batches.count
    code, output = cli("compare", compare_file, "--resume")
    assert code == 0, output
    assert batches.count - before == (STEPS - 4) + STEPS
    assert output.strip().splitlines()[-1] == f"results: {folder}"
    assert len(rows_of(folder, "runs.csv")) == 4
    check_untrained(folder, untrained)

    check_trials(folder)
    check_value_of_a_trial(folder, cli)
    check_page(folder, cli)
    # A run of a comparison is a run like any other, also when it was interrupted.
    config = with_absolute_paths(load_config(folder / "compare.yaml"))
    values = best(folder, "triplet")["values"]
    alone = run_training(
        run_config(config, "triplet", 1, values),
        Console(quiet=True),
        run_dir=tmp_path / "alone",
        report=False,
    )
    row = next(
        one
        for one in rows_of(folder, "runs.csv")
        if one["method"] == "triplet" and one["seed"] == "1"
    )
    assert float(row["recall_at_1"]) == alone["trained"]["recall_at_1"]
    assert float(row["map_at_r"]) == alone["trained"]["map_at_r"]

    batches.count = 0
    code, output = cli("compare", compare_file, "--resume", *MORE)
    assert (code, batches.count) == (0, 0), output
    check_gains(folder, output)
    attempts = {
        path.parent.name: len(json.loads(path.read_text())["attempts"])
        for path in (folder / "runs").glob("*/run.json")
    }
    assert attempts == {"triplet-seed-0": 1, "nca-seed-0": 1, "triplet-seed-1": 2, "nca-seed-1": 1}


def best(folder: Path, method: str) -> dict[str, Any]:
    files = sorted((folder / "search" / method).glob("trial-*.json"))
    return max((json.loads(file.read_text()) for file in files), key=lambda one: one["map_at_r"])


def check_trials(folder: Path) -> None:
    """No trial evaluated a test class; every run has its method's best values."""
    for method in ("triplet", "nca"):
        for number in range(2):
            trial = folder / "search" / method / f"trial-{number}"
            records = read_records(trial / "records/evaluations.jsonl")
            assert {record["split"] for record in records} == {"validation"}
            score = json.loads(trial.with_suffix(".json").read_text())["map_at_r"]
            watched = [r["map_at_r"] for r in records if r["protocol"] == "validation"]
            assert score == max(watched)
        for seed in (0, 1):
            config = load_config(folder / "runs" / f"{method}-seed-{seed}" / "config.yaml")
            values = best(folder, method)["values"]
            assert config.optim.lr == values["optim.lr"]
            assert config.optim.proxy_lr == values.get("optim.proxy_lr")
            assert (config.seed, config.train.steps, config.data.test_split) == (
                seed,
                STEPS,
                "test",
            )


def check_untrained(folder: Path, untrained: Untrained) -> None:
    """It was evaluated once for each seed, by no trial, and all runs of a seed show it."""
    assert untrained.seeds == [0, 1]
    kept = [json.loads(path.read_text()) for path in (folder / "untrained").glob("*.json")]
    assert len(kept) == 2
    shown = {}
    for path in (folder / "runs").glob("*/metrics.json"):
        metrics = json.loads(path.read_text())["untrained"]
        assert metrics in kept
        assert shown.setdefault(path.parent.name[-1], metrics) == metrics
    assert shown["0"] != shown["1"]


def check_value_of_a_trial(folder: Path, cli: Cli) -> None:
    """It is what an evaluation of the best checkpoint on validation classes gives."""
    trial = folder / "search/nca/trial-1"
    score = json.loads(trial.with_suffix(".json").read_text())["map_at_r"]
    code, output = cli("evaluate", trial, "--split", "validation")
    assert code == 0, output
    assert (
        json.loads((trial / "metrics-validation-best.json").read_text())["trained"]["map_at_r"]
        == score
    )
    extras = ("embeddings.npz", "per_class.parquet", "report")
    assert not [name for name in extras if (trial / name).exists()]


def check_page(folder: Path, cli: Cli) -> None:
    comparison = read_comparison(folder)
    page = Page(folder / "report/index.html")
    assert not page.open
    assert "://" not in page.raw.replace("http://www.w3.org", "")  # stands alone
    search = ("2 trials of 4 steps", "the sampler tpe gives the others")
    for text in ("literature protocol", "not used", *search, "no published results"):
        assert text in page.text, text
    for method in comparison.methods:
        interval = method.interval("recall_at_1")
        assert f"{100 * interval.mean:.2f} ± {100 * interval.half:.2f} %" in page.text
    assert comparison.target_recall is not None
    curve = comparison.methods[0].runs[0].curve
    assert curve.steps.tolist() == [0, 4, 8]
    assert (curve.seconds[1:] > curve.seconds[:-1]).all()
    rows = rows_of(folder, "comparison.csv")
    assert [row["method"] for row in rows] == ["triplet", "nca"]
    assert float(rows[0]["target_recall"]) == comparison.target_recall
    assert rows[0]["steps_to_target"] in ("0.0", "4.0", "8.0")
    before = page.raw
    (folder / "report/index.html").unlink()
    code, output = cli("report", folder)
    assert code == 0, output
    assert (folder / "report/index.html").read_text() == before


def check_gains(folder: Path, output: str) -> None:
    """The differences are those of the runs with the same seed; the figure has all runs."""
    scores = {
        (row["method"], row["seed"]): float(row["recall_at_1"])
        for row in rows_of(folder, "runs.csv")
    }
    gains = [scores["nca", seed] - scores["triplet", seed] for seed in ("0", "1")]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(gains), scale=stats.sem(gains))
    (row,) = rows_of(folder, "differences.csv")
    assert (row["method"], row["base"], row["seeds"]) == ("nca", "triplet", "2")
    found = [float(row[key]) for key in ("recall_at_1", "recall_at_1_low", "recall_at_1_high")]
    assert found == pytest.approx([np.mean(gains), low, high])
    page = Page(folder / "report/index.html")
    text = f"{100 * np.mean(gains):+.2f} ± {50 * (high - low):.2f} %"
    assert text in page.text
    assert text in output
    assert "R@1 on test classes against seed" in page.text
    assert (folder / "report/axis-map.png").stat().st_size > 1000


def test_dry_run_and_folders_of_others(compare_file: Path, cli: Cli, tmp_path: Path) -> None:
    code, output = cli("compare", compare_file, "--dry-run", "--run-dir", "x")
    assert code == 0, output
    # A run of 8 steps is one epoch of 192 images, whose last batch is small.
    images = 4 * 192 + 4 * TRIAL_STEPS * 26
    for text in ("triplet-seed-0, triplet-seed-1", "48", f"{images:,} training images"):
        assert text in output, text
    assert not (tmp_path / "x").exists()
    code, output = cli("train", compare_file, "--dry-run")
    assert code == 0, output
    code, output = cli("compare", compare_file, "--resume")
    assert (code, "--resume found no compare.yaml" in output) == (2, True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine.txt").write_text("mine")
    code, output = cli("compare", compare_file, "--run-dir", "x")
    assert (code, "is not empty and holds no compare.yaml" in output) == (2, True)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine.txt"]
    code, output = cli("compare", compare_file, "--set", "compare=null")
    assert (code, "has no section compare" in output) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_side_by_side_as_ray_tasks(compare_file: Path, cli: Cli, tmp_path: Path) -> None:
    """Two runs at a time, and distributed ones, give the numbers of one at a time."""
    results = {}
    for name, options in {"alone": (), "tasks": ("--parallel", 2)}.items():
        code, output = cli("compare", compare_file, "--run-dir", name, *options)
        assert code == 0, output
        keys = ("method", "seed", "recall_at_1", "map_at_r", "checkpoint_step")
        results[name] = [
            {key: row[key] for key in keys} for row in rows_of(tmp_path / name, "runs.csv")
        ]
        check_trials(tmp_path / name)
    assert results["tasks"] == results["alone"]
    code, output = cli(
        *("compare", compare_file, "--run-dir", "ranks", "--launcher", "ray", "--workers", 2),
        *("--set", "compare.seeds=[0]"),
    )
    assert code == 0, output
    info = json.loads((tmp_path / "ranks/runs/nca-seed-0/run.json").read_text())
    assert info["attempts"][0]["world_size"] == 2
