"""What a run evaluates at its end: everything, test metrics alone, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dml_dist.runs.records import read_records
from dml_dist.runtime import rank

pytestmark = pytest.mark.usefixtures("blank_figures")
Cli = Callable[..., tuple[int, str]]
EXTRAS = ("embeddings.npz", "per_class.parquet", "report/retrieval.json", "report/proxies.npz")


def metrics_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def test_full_metrics_none_and_full_again(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    for final in ("full", "metrics"):
        options = ("--set", f"evaluation.final={final}", "--run-dir", final)
        code, output = cli("train", config_file, *options)
        assert code == 0, output
        runs[final] = metrics_of(tmp_path / final)
    extras = [path for path in EXTRAS if (tmp_path / "full" / path).exists()]
    assert len(extras) == len(EXTRAS)
    assert not [path for path in EXTRAS if (tmp_path / "metrics" / path).exists()]
    assert set(runs["full"]) - set(runs["metrics"]) == {"untrained"}
    assert runs["metrics"]["trained"] == runs["full"]["trained"]

    # Nothing is embedded at the end: neither of these is called.
    with monkeypatch.context() as patch:
        patch.delattr(rank, "measure_checkpoint")
        patch.delattr(rank, "_measure_untrained")
        code, output = cli(
            "train", config_file, "--set", "evaluation.final=none", "--run-dir", "none"
        )
    assert code == 0, output
    none = metrics_of(tmp_path / "none")
    assert set(none) == {"validation", "checkpoint", "seconds"}
    assert not [path for path in EXTRAS if (tmp_path / "none" / path).exists()]
    records = read_records(tmp_path / "none/records/evaluations.jsonl")
    assert {record["split"] for record in records} == {"validation"}
    code, output = cli("evaluate", "none", "--split", "validation")
    assert code == 0, output
    again = json.loads((tmp_path / "none/metrics-validation-best.json").read_text())["trained"]
    assert none["validation"] == {key: again[key] for key in none["validation"]}
    assert {"map_at_r", "recall_at_1"} <= set(none["validation"])

    # The run can be continued for a full evaluation.
    code, output = cli(
        *("train", config_file, "--set", "evaluation.final=full"),
        *("--run-dir", "none", "--resume"),
    )
    assert code == 0, output
    full = metrics_of(tmp_path / "none")
    for name in ("untrained", "trained"):
        assert full[name] == runs["full"][name]


def test_none_without_validation_has_no_metrics(
    config_file: Path, cli: Cli, tmp_path: Path
) -> None:
    code, output = cli(
        *("train", config_file, "--run-dir", "run", "--set", "evaluation.final=none"),
        *("--set", "validation={name: none}", "--set", "train.steps=2"),
    )
    assert code == 0, output
    assert set(metrics_of(tmp_path / "run")) == {"checkpoint", "seconds"}


def test_a_missing_record_of_the_best_validation_is_an_error(
    config_file: Path, cli: Cli, tmp_path: Path
) -> None:
    options = ("--set", "evaluation.final=none", "--run-dir", "run")
    assert cli("train", config_file, *options)[0] == 0
    (tmp_path / "run/records/evaluations.jsonl").unlink()
    code, output = cli("train", config_file, *options, "--resume")
    assert code == 1
    assert "has no record of the best validation" in output
