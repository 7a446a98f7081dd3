"""One trial of a search, without Ray: its folds, and how it can end."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from dml_dist.config.load import load_config
from dml_dist.config.schema import RunConfig
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter, read_records
from dml_dist.runs.tuning import trial_configs
from dml_dist.runtime.signals import StopRequest
from dml_dist.studies.tune_trial import _train_seconds, execute_trial, trial_payload

STEPS = 12


def search(config_file: Path, **tune: Any) -> RunConfig:
    plain = yaml.safe_load(config_file.read_text())
    plain["evaluation"]["metrics"] = []
    space = {"optim.lr": {"type": "float", "low": 1e-4, "high": 1e30, "log": True}}
    plain["tune"] = {"space": space, **tune}
    config_file.write_text(yaml.safe_dump(plain))
    return load_config(config_file)


def payload_of(
    config: RunConfig, tmp_path: Path, rate: float = 1e-2, *metrics: str
) -> dict[str, Any]:
    configs = trial_configs(config, "trial-0", {"optim.lr": rate})
    folders = [tmp_path / "runs" / one.name for one in configs]
    payload = trial_payload(configs, folders, metrics or ("map_at_r",), STEPS)
    return dict(json.loads(json.dumps(payload)))  # As it goes to another process.


class Reports:
    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def __call__(self, step: int, value: float) -> None:
        assert step not in self.values
        self.values[step] = value


def validations(folder: Path) -> dict[int, float]:
    records = read_records(RunFolder(folder).records("evaluations"))
    return {record["step"]: record["map_at_r"] for record in records}


def test_value_of_folds_is_their_mean(config_file: Path, tmp_path: Path) -> None:
    config = search(config_file, folds=3)
    payload = payload_of(config, tmp_path, 1e-2, "map_at_r", "recall_at_1")
    reports = Reports()
    outcome = execute_trial(payload, reports, StopRequest())
    assert outcome["state"] == "complete"
    assert outcome["steps"] == 3 * STEPS

    folders = [tmp_path / f"runs/trial-0-fold-{fold}" for fold in range(3)]
    curves = [validations(folder) for folder in folders]
    best = [max(curve.values()) for curve in curves]
    assert len(set(best)) == 3  # Each fold has its own classes.
    assert outcome["values"][0] == pytest.approx(statistics.fmean(best), abs=1e-15)
    recalls = [
        json.loads((folder / "metrics.json").read_text())["validation"]["recall_at_1"]
        for folder in folders
    ]
    assert outcome["values"][1] == pytest.approx(statistics.fmean(recalls), abs=1e-15)
    expected = {
        fold * STEPS + step: statistics.fmean([*best[:fold], value])
        for fold, curve in enumerate(curves)
        for step, value in curve.items()
    }
    assert reports.values == pytest.approx(expected, abs=1e-15)

    # A trial whose end was not told is not trained again.
    again = execute_trial(payload, Reports(), StopRequest())
    assert again["values"] == outcome["values"]
    for folder in folders:
        assert len(RunFolder(folder).info().attempts) == 1


def test_a_loss_that_is_not_finite_is_told_apart_from_an_error(
    config_file: Path, tmp_path: Path
) -> None:
    config = search(config_file)
    diverged = execute_trial(payload_of(config, tmp_path / "a", 1e30), Reports(), StopRequest())
    assert diverged["state"] == "diverged"
    assert "finite" in diverged["problem"]

    away = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(tmp_path / "nowhere")})}
    )
    failed = execute_trial(payload_of(away, tmp_path / "b"), Reports(), StopRequest())
    assert failed["state"] == "failed"
    assert "nowhere" in failed["problem"]


def test_a_metric_that_was_not_recorded(config_file: Path, tmp_path: Path) -> None:
    payload = payload_of(search(config_file), tmp_path, 1e-2, "density")
    outcome = execute_trial(payload, Reports(), StopRequest())
    assert outcome["state"] == "failed"
    assert "recorded no density" in outcome["problem"]


def test_a_stopped_trial_continues(config_file: Path, tmp_path: Path) -> None:
    payload = payload_of(search(config_file), tmp_path)
    whole = execute_trial(
        payload_of(search(config_file), tmp_path / "whole"), Reports(), StopRequest()
    )
    stop = StopRequest()
    stop.reason = "pruned"
    stopped = execute_trial(payload, Reports(), stop)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "pruned")
    assert 0 < stopped["steps"] < STEPS
    reports = Reports()
    outcome = execute_trial(payload, reports, StopRequest())
    assert outcome["values"] == whole["values"]
    assert reports.values == validations(tmp_path / "runs/trial-0")


def test_training_time_after_a_resumption(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder.records("steps")
    path.parent.mkdir(parents=True)
    with RecordWriter(path, 1) as records:
        for step in range(10, 70, 10):
            records.write(step, loss=1.0)
    metrics = {"seconds": {"train": 30.0}}
    assert _train_seconds(tmp_path, metrics) == 30.0
    with RecordWriter(path, 2) as records:  # Resumed at step 40, of 120.
        for step in range(50, 130, 10):
            records.write(step, loss=1.0)
    assert _train_seconds(tmp_path, metrics) == pytest.approx(30.0 * 12 / 8)
