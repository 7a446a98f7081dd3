"""Runs whose nodes are lost, added and preempted: they go on with the same global batches."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import act, attempts, wait_for
from tests.nodes import ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 150.0


def records(run: Path) -> list[dict[str, Any]]:
    """All lines of the training records."""
    path = run / "records/steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def trains(run: Path, attempt: int, step: int = 0) -> bool:
    return any(r["attempt"] == attempt and r["step"] >= step for r in records(run))


def test_elastic(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = tmp_path / "quick"
    config = act(config_file, mark=quick, pause=0.04)
    sets = (
        *("--set", "launch.num_workers={min: 1, max: 3}", "--set", "train.steps=400"),
        *("--set", "train.log_every=1", "--set", "checkpoint.every_steps=50"),
        *("--set", "evaluation.every_steps=400", "--set", "validation={name: none}"),
    )
    with ray_nodes(3) as nodes:
        ray = ("--launcher", "ray", "--set", f"launch.address={nodes.address}")
        arguments = ("train", config, "--run-dir", run, *sets, *ray)
        with nodes.command(*arguments, cwd=tmp_path) as driver:
            wait_for(lambda: trains(run, 1, 60), seconds=PATIENCE, what="step 60 of attempt 1")
            start = time.time()
            nodes.nodes[2].kill()
            wait_for(lambda: trains(run, 2), seconds=PATIENCE, what="attempt 2")
            print(f"\nkilled: {time.time() - start:.1f} s", attempts(run)[-1])
            start = time.time()
            nodes.add()
            wait_for(lambda: trains(run, 3), seconds=PATIENCE, what="attempt 3")
            print(f"added: {time.time() - start:.1f} s", attempts(run)[-1])
            wait_for(
                lambda: trains(run, 3, attempts(run)[-1]["first_step"] + 30),
                seconds=PATIENCE,
                what="more",
            )
            start = time.time()
            os.kill(nodes.nodes[1].pid, signal.SIGTERM)
            wait_for(lambda: trains(run, 4), seconds=PATIENCE, what="attempt 4")
            print(f"preempted: {time.time() - start:.1f} s", attempts(run)[-1])
            driver.kill()
    print((tmp_path / "output").read_text())
    for a in attempts(run):
        print(a["attempt"], a["world_size"], a["nodes"], a["reason"], a["first_step"], a["began"])
