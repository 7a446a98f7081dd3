"""Runs whose nodes are lost, added and preempted: they go on with the same global batches."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import command, forked
from tests.faults.runs import act, assert_nothing_left, attempts, samples, wait_for
from tests.nodes import ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 200.0
STEPS = 220


def lines_of(run: Path, attempt: int) -> list[dict[str, Any]]:
    """Training records that an attempt wrote."""
    path = run / "records/steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["attempt"] == attempt]


def wait_for_steps(run: Path, attempt: int, number: int = 1) -> None:
    wait_for(
        lambda: len(lines_of(run, attempt)) >= number,
        seconds=PATIENCE,
        what=f"{number} steps of attempt {attempt}",
    )


def test_nodes_are_lost_added_and_preempted_and_the_driver_is_killed(
    config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = act(config_file, mark=tmp_path / "quick", pause=0.03)
    sets = (f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every_steps=50")
    sets += ("validation={name: none}", "evaluation.final=metrics")
    options = [word for one in sets for word in ("--set", one)]
    seconds: dict[str, float] = {}

    def trains_again(what: str, attempt: int, since: float) -> None:
        wait_for_steps(run, attempt)
        seconds[what] = lines_of(run, attempt)[0]["time"] - since

    with ray_nodes(3) as nodes:
        ray = ("--launcher", "ray", "--set", f"launch.address={nodes.address}")
        too_many = ("--set", "launch.num_workers={min: 4, max: 6}")
        with nodes.command("train", config, *ray, *too_many, cwd=tmp_path, name="many") as driver:
            start = time.monotonic()
            assert driver.wait(60) == 2
            assert time.monotonic() - start < 30
        text = (tmp_path / "many").read_text()
        assert "launch.min_workers 4 x cpus_per_rank 1.0 = 4 CPUs" in text

        elastic = ("--set", "launch.num_workers={min: 1, max: 3}")
        arguments = ("train", config, "--run-dir", run, *options, *ray, *elastic)
        with nodes.command(*arguments, cwd=tmp_path) as driver:
            wait_for_steps(run, 1, 60)
            start = time.time()
            nodes.nodes[2].kill()
            trains_again("lost", 2, start)
            nodes.add()
            wait_for_steps(run, 3)
            seconds["added"] = lines_of(run, 3)[0]["time"] - lines_of(run, 2)[-1]["time"]
            wait_for_steps(run, 3, 20)
            start = time.time()
            os.kill(nodes.nodes[1].pid, signal.SIGTERM)
            trains_again("preempted", 4, start)
            wait_for_steps(run, 4, 10)
            start = time.time()
            driver.kill()
            driver.wait()
        (tmp_path / "quick").touch()  # No pauses from here on.
        with nodes.command(*arguments, "--resume", cwd=tmp_path, name="again") as driver:
            trains_again("driver killed", 5, start)
            assert driver.wait(PATIENCE) == 0, (tmp_path / "again").read_text()
        names = [f"{node.name} ({node.address})" for node in nodes.nodes]

    print("\nseconds until training goes on:", {k: round(v, 1) for k, v in seconds.items()})
    found = attempts(run)
    assert [attempt["world_size"] for attempt in found] == [3, 2, 3, 2, 2]
    assert [attempt["reason"] for attempt in found] == [
        "",
        f"lost the node {names[2]}",
        "room for more: from 2 to 3 ranks",
        f"the node {names[1]} is preempted",
        "continued by --resume",
    ]
    assert sorted(found[1]["nodes"]) == sorted(names[:2])
    assert sorted(found[3]["nodes"]) == sorted([names[0], names[3]])
    # A lost node and a killed driver cost the steps since the last checkpoint, others none.
    repeated = [
        lines_of(run, after - 1)[-1]["step"] - found[after - 1]["first_step"]
        for after in range(2, 6)
    ]
    print("steps repeated:", repeated)
    assert found[1]["first_step"] == 50
    assert 0 < repeated[0] < 50
    assert repeated[1:3] == [0, 0]
    assert 0 < repeated[3] <= 50
    assert_nothing_left(run)

    # No image is lost or seen twice: the same batches as those of one process.
    whole = ("train", str(config), "--run-dir", "whole", *options)
    done = forked(command, *whole, folder=tmp_path, world_size=1)
    assert not any(done.codes), done.output
    one, two = samples(run), samples(tmp_path / "whole")
    assert [row[:2] for row in one] == [row[:2] for row in two]
    # Sums in another order alone make a difference, which grows with the steps.
    assert all(abs(a[2] - b[2]) < 0.02 * b[2] for a, b in zip(one[:100], two, strict=False))
