"""Exact evaluation at the size of SOP's test set against pytorch-metric-learning, in one run.

60,502 rows of 11,316 classes in clusters. Ours: Recall@1, 10, 100, 1000, R-precision and MAP@R.
Theirs: AccuracyCalculator with precision_at_1, r_precision and mean_average_precision_at_r, which
ranks only as many neighbours as the largest class has rows. Each run is a process of its own; the
time is of the evaluation alone; peak memory is of the whole process with all its libraries, and
once more as the part beyond what was resident before the evaluation.

    python -m tests.benchmarks.bench_evaluation [--rows 60502] [--width 128] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_SPREAD = 1.2  # Recall@1 of 0.73, as a trained network has on SOP


def clustered(rows: int, classes: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows around class centres, and labels; classes have 2 to 12 rows, as in SOP."""
    rng = np.random.default_rng(seed)
    spare = rng.integers(0, classes, rows - 2 * classes)
    labels = np.sort(np.concatenate([np.arange(classes), np.arange(classes), spare]))
    centers = rng.standard_normal((classes, width), dtype=np.float32)
    noise = rng.standard_normal((rows, width), dtype=np.float32)
    x = centers[labels] + _SPREAD * noise * np.sqrt(rng.uniform(0.2, 3.0, (rows, 1)))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    order = rng.permutation(rows)
    return x[order].astype(np.float32), labels[order]


def ours(x: np.ndarray, labels: np.ndarray, memory_mb: float) -> dict[str, Any]:
    """Return our metrics and seconds."""
    from dml_dist.evaluation.retrieval import evaluate

    start = time.perf_counter()
    result = evaluate(x, labels, recall_at=(1, 10, 100, 1000), memory_mb=memory_mb)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "stages": result.seconds, **result.as_dict()}


def theirs(x: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return pytorch-metric-learning's metrics and seconds."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    start = time.perf_counter()
    result = calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "recall_at_1": float(result["precision_at_1"]),
        "r_precision": float(result["r_precision"]),
        "map_at_r": float(result["mean_average_precision_at_r"]),
    }


def status_mb(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def run_one(which: str, arguments: argparse.Namespace) -> None:
    """Measure one of the two in this process and print a line of JSON."""
    x, labels = np.load(arguments.data / "x.npy"), np.load(arguments.data / "labels.npy")
    measured = partial(ours, memory_mb=arguments.memory_mb) if which == "ours" else theirs
    # The first call loads what is loaded late, so that it counts neither as time nor as memory.
    measured(x[:64], np.arange(64) // 2)
    before = status_mb("VmRSS")
    result = measured(x, labels)
    result["peak_mb"] = status_mb("VmHWM")
    result["extra_mb"] = result["peak_mb"] - before
    print(json.dumps(result))


def main() -> None:
    """Run both in turn and print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=60502)
    parser.add_argument("--classes", type=int, default=11316)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-mb", type=float, default=512.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=["ours", "theirs"])
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments)
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder:
        x, labels = clustered(arguments.rows, arguments.classes, arguments.width)
        np.save(Path(folder) / "x.npy", x)
        np.save(Path(folder) / "labels.npy", labels)
        command = [sys.executable, "-m", "tests.benchmarks.bench_evaluation", *sys.argv[1:]]
        for _ in range(arguments.repeats):
            for which, results in runs.items():
                output = subprocess.run(
                    [*command, "--data", folder, "--one", which],
                    check=True,
                    stdout=subprocess.PIPE,
                    env=environment,
                ).stdout
                results.append(json.loads(output.splitlines()[-1]))
    for which, results in runs.items():
        print(which, json.dumps(results[-1]))
    for key in ("seconds", "peak_mb", "extra_mb"):
        a, b = (statistics.median(run[key] for run in results) for results in runs.values())
        print(f"{key}: ours {a:.2f}, pytorch-metric-learning {b:.2f}, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
