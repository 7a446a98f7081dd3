"""Exact evaluation at the size of SOP's test set against pytorch-metric-learning, in one run.

60,502 rows of 11,316 classes in clusters. Ours: Recall@1, 10, 100, 1000, R-precision and MAP@R.
Theirs: AccuracyCalculator with precision_at_1, r_precision and mean_average_precision_at_r, which
ranks only as many neighbours as the largest class has rows. With --clusters, both measure NMI as
well, ours pairwise F1 too; its time is given apart. Each run is a process of its own; the time is
of the evaluation alone; CPU seconds are of all its threads, and vary less on a busy machine; peak
memory is of the whole process with all its libraries, and once more as the part beyond what was
resident before the evaluation. With --ranks, ours runs on so many gloo ranks of one thread each.

    python -m tests.benchmarks.bench_evaluation [--rows 60502] [--width 128] [--repeats 3]
    python -m tests.benchmarks.bench_evaluation --clusters
    python -m tests.benchmarks.bench_evaluation --ranks 1 2
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

_INCLUDED = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
_TIMES = ("seconds", "cpu_seconds", "stages")
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


def ours(
    x: np.ndarray, labels: np.ndarray, memory_mb: float, extra: tuple[str, ...], comm: Any = None
) -> dict[str, Any]:
    """Return our metrics and seconds; with `comm` this rank's part is evaluated."""
    from dml_dist.evaluation.retrieval import evaluate

    clock = time.perf_counter(), time.process_time()
    result = evaluate(
        x, labels, recall_at=(1, 10, 100, 1000), memory_mb=memory_mb, extra=extra, comm=comm
    )
    return {**_since(clock), "stages": result.seconds, **result.as_dict()}


def theirs(x: np.ndarray, labels: np.ndarray, include: tuple[str, ...]) -> dict[str, Any]:
    """Return pytorch-metric-learning's metrics and seconds."""
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=include, k="max_bin_count", device=torch.device("cpu"))
    clock = time.perf_counter(), time.process_time()
    result = calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels))
    return {**_since(clock), **{name: float(value) for name, value in result.items()}}


def _since(clock: tuple[float, float]) -> dict[str, float]:
    wall, cpu = clock
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _one_rank(topology: Any, folder: str, memory_mb: float) -> dict[str, Any]:
    from dml_dist.parallel.comm import Comm
    from dml_dist.partition import part_bounds

    x, labels = np.load(f"{folder}/x.npy"), np.load(f"{folder}/labels.npy")
    part = slice(*part_bounds(len(x), topology.world_size, topology.rank))
    comm = Comm.from_default_group()
    ours(x[:64], np.arange(64) // 2, memory_mb, (), comm)
    return ours(x[part], labels[part], memory_mb, ("nmi", "f1"), comm)


def compare_ranks(folder: str, numbers: list[int], memory_mb: float) -> None:
    """Print the seconds of each number of ranks, one thread each, and check that digits agree."""
    from tests.ranks import run_ranks

    digits = []
    for number in numbers:
        result = run_ranks(_one_rank, number, folder, memory_mb, timeout=3600.0)
        slowest = max(part["seconds"] for part in result)
        print(f"{number} ranks: {slowest:.2f} s", json.dumps(result[0]))
        digits.append({k: v for k, v in result[0].items() if k not in _TIMES})
    assert all(one == digits[0] for one in digits), digits


def status_mb(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def run_one(which: str, arguments: argparse.Namespace) -> None:
    """Measure one of the two in this process and print a line of JSON."""
    x, labels = np.load(arguments.data / "x.npy"), np.load(arguments.data / "labels.npy")
    measured: Any
    if which == "ours":
        extra = ("nmi", "f1") if arguments.clusters else ()
        measured = partial(ours, memory_mb=arguments.memory_mb, extra=extra)
    else:
        measured = partial(theirs, include=(*_INCLUDED, *(["NMI"] if arguments.clusters else [])))
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
    parser.add_argument("--clusters", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+")
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
        if arguments.ranks:
            compare_ranks(folder, arguments.ranks, arguments.memory_mb)
            return
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
    for key in ("seconds", "cpu_seconds", "peak_mb", "extra_mb"):
        a, b = (statistics.median(run[key] for run in results) for results in runs.values())
        print(f"{key}: ours {a:.2f}, pytorch-metric-learning {b:.2f}, ratio {a / b:.3f}")


if __name__ == "__main__":
    main()
