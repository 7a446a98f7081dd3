"""Reads a run's folder for reports: records, metrics and attempts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dml_dist.config.yaml_text import read_text
from dml_dist.errors import ConfigError, DataError
from dml_dist.report.attempts import History, read_history
from dml_dist.report.formatting import ResultRow, group, is_metric, number, result_table
from dml_dist.runs.artifacts import read_metrics
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.info import RunInfo
from dml_dist.runs.records import latest_records, read_every_record, read_records


@dataclass(frozen=True)
class Series:
    """Values of one quantity by step.

    Attributes:
        steps: (n,) float64, rising.
        values: (n,) float64; what is not finite is NaN.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def num_non_finite(self) -> int:
        """Number of values that are not finite."""
        return int(np.count_nonzero(np.isnan(self.values)))


@dataclass(frozen=True)
class RunSummary:
    """The contents of a run's folder, finished or not.

    Attributes:
        folder: The run's folder.
        info: Its identity and attempts.
        config: Text of its configuration; None when missing.
        steps: Training records in order of steps.
        evaluations: Evaluation records in order of steps.
        history: When training was restarted, and what checkpoints cost.
        metrics: Content of metrics.json; empty when missing.
        damaged: What could not be read, one sentence each.
    """

    folder: Path
    info: RunInfo
    config: str | None
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    history: History
    metrics: Mapping[str, Any]
    damaged: tuple[str, ...]

    def training(self, key: str) -> Series:
        """Return a quantity of the training records against the step."""
        return _series(self.steps, key)

    def under(self, protocol: str) -> list[dict[str, Any]]:
        """Return the evaluations under a protocol; a record without one is named by its split.

        Protocols are "validation" (held-out training classes), and on the test split "features",
        "untrained", "final", and "literature" (evaluated during training, never selected on).
        """
        return [
            record
            for record in self.evaluations
            if record.get("protocol", record.get("split")) == protocol
        ]

    def evaluation(self, key: str, protocol: str) -> Series:
        """Return a metric of the evaluations under a protocol against the step."""
        return _series(self.under(protocol), key)

    def result(self, name: Literal["features", "untrained", "trained"]) -> dict[str, Any]:
        """Return the metrics on the test split: of metrics.json, else of the last such record."""
        records = self.under("final" if name == "trained" else name)
        recorded = records[-1] if records else {}
        return group(self.metrics, name) or {
            key: value for key, value in recorded.items() if is_metric(key)
        }

    @property
    def best_validation(self) -> dict[str, Any] | None:
        """The validation record with the highest MAP@R, the first of equals."""
        records = [
            record
            for record in self.under("validation")
            if math.isfinite(_value(record, "map_at_r"))
        ]
        return max(records, key=lambda record: _value(record, "map_at_r"), default=None)

    def table(self) -> list[ResultRow]:
        """Return the table of results."""
        results = {
            "features": self.result("features"),
            "untrained": self.result("untrained"),
            "trained": self.result("trained"),
        }
        return result_table(results, self.best_validation)

    @property
    def images_per_second(self) -> float | None:
        """Training speed: of metrics.json, else the median of the records."""
        speed = number(self.metrics.get("images_per_second"))
        if speed is not None:
            return speed
        speeds = self.training("images_per_second").values
        finite = speeds[np.isfinite(speeds)]
        return statistics.median(finite.tolist()) if len(finite) else None

    @property
    def total_seconds(self) -> float | None:
        """Duration of the run: seconds.total of metrics.json, else the sum of its parts."""
        seconds = group(self.metrics, "seconds")
        if not seconds:
            return None
        total = number(seconds.get("total"))
        return total if total is not None else sum(float(part) for part in seconds.values())


def read_summary(run_dir: Path) -> RunSummary:
    """Read a run's folder.

    Files that are missing or damaged leave their part empty; only run.json must be there.

    Raises:
        ConfigError: If the folder is no run.
        DataError: If run.json is damaged.
    """
    run = RunFolder.open(run_dir)
    damaged: list[str] = []
    metrics: Mapping[str, Any] = {}
    config = None
    try:
        metrics = read_metrics(run.metrics_path)
    except DataError as error:
        damaged.append(str(error))
    try:
        config = read_text(run.config_path) if run.config_path.is_file() else None
    except ConfigError as error:
        damaged.append(str(error))
    info = run.info()
    steps = read_every_record(run.records("steps"))
    saves = read_every_record(run.records("checkpoints"))
    return RunSummary(
        folder=run.path,
        info=info,
        config=config,
        steps=latest_records(steps),
        evaluations=read_records(run.records("evaluations")),
        history=read_history(info.attempts, steps, saves),
        metrics=metrics,
        damaged=tuple(damaged),
    )


def _value(record: Mapping[str, Any], key: str) -> float:
    """Return a number of a record, NaN when it is missing, no number or not finite."""
    value = number(record.get(key))
    return value if value is not None and math.isfinite(value) else math.nan


def _series(records: list[dict[str, Any]], key: str) -> Series:
    kept = [record for record in records if key in record]
    steps = np.array([record["step"] for record in kept], dtype=np.float64)
    return Series(steps, np.array([_value(record, key) for record in kept], dtype=np.float64))
