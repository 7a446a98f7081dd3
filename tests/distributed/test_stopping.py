"""Ranks that are asked to stop at different times end at the same step, and can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.checkpoint_files import checkpoint_folders
from dml_dist.train.stopping import StopChecks
from tests.ranks import run_ranks
from tests.training_setup import SmallRun, small_config, snapshot


def agree(topology: Topology) -> list[tuple[int, str | None]]:
    """Ask at steps of unequal length; rank 2 has a reason from step 40 on, rank 1 from 41 on."""
    now = 0.0
    since = {1: 41, 2: 40}.get(topology.rank)

    def ask(step: int, metrics: Mapping[str, float] | None) -> str | None:
        return f"rank {topology.rank}" if since is not None and step >= since else None

    checks = StopChecks(ask, Comm.from_default_group(), clock=lambda: now)
    checks.restart(0)
    found: list[tuple[int, str | None]] = []
    for step in range(1, 100):
        now += 0.05 * (1 + topology.rank)
        if checks.is_due(step):
            found.append((step, checks.check(step)))
            if found[-1][1] is not None:
                break
    return found


def test_all_ranks_ask_at_the_pace_of_the_slowest_and_agree() -> None:
    # A step of rank 2 takes 0.15 s, so 6 of them fit into a second; 43 is the first after 40.
    steps = [1, 3, 7, 13, 19, 25, 31, 37]
    expected = [*((step, None) for step in steps), (43, "rank 1")]
    assert run_ranks(agree, 3) == [expected] * 3


def agree_to_save(topology: Topology) -> list[int]:
    """Steps of 1 s, by the clock of rank 1 of 4 s; a checkpoint is due every minute."""
    now = 0.0

    def never(step: int, metrics: Mapping[str, float] | None) -> None:
        return None

    comm = Comm.from_default_group()
    checks = StopChecks(never, comm, every_minutes=1.0, clock=lambda: now)
    checks.restart(0)
    found = []
    for step in range(1, 50):
        now += 4.0 if topology.rank == 1 else 1.0
        if checks.is_due(step):
            checks.check(step)
            if checks.save_is_due:
                found.append(step)
                checks.saved()
    return found


def test_all_ranks_save_when_one_clock_says_so() -> None:
    assert run_ranks(agree_to_save, 3) == [[15, 30, 45]] * 3


class StoppedRun(SmallRun):
    """A small run in which this rank asks to stop from a step on, or at a validation."""

    stop_from: int | None = None
    stop_below: float = -1.0

    def stop_reason(self, step: int, metrics: Mapping[str, float] | None) -> str | None:
        if metrics is not None and metrics["map_at_r"] < self.stop_below:
            return "plateau"
        return "asked" if self.stop_from is not None and step >= self.stop_from else None


def stop_and_resume(topology: Topology, root: str) -> dict[str, Any]:
    """Train without a stop, with one, and on; rank 0 asks after step 5, the last rank after 4."""
    comm = Comm.from_default_group()
    config = small_config(train__steps=8)
    whole = SmallRun(topology, comm, config, Path(root) / "whole").train()
    run = StoppedRun(topology, comm, config, Path(root) / "cut")
    run.stop_from = {0: 5, topology.world_size - 1: 4}.get(topology.rank)
    first = run.train()
    folders = [path.name for path in checkpoint_folders(run.folder / "checkpoints")]
    comm.barrier()
    again = SmallRun(topology, comm, config, run.folder, attempt=2)
    last = again.train(resume=True)
    one, two = snapshot(whole.state), snapshot(last.state)
    assert one.keys() == two.keys()
    return {
        "stopped": (whole.stopped, first.stopped, last.stopped),
        "step": first.state.step,
        "checkpoint": folders[0],
        "start": last.start_step,
        "different": [name for name in one if not torch.equal(one[name], two[name])],
        "evaluated": run.evaluated + again.evaluated,
        "records": [r["step"] for r in read_records(run.folder / "steps.jsonl")],
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    found = run_ranks(stop_and_resume, world_size, str(tmp_path))
    assert all(one == found[0] for one in found)
    (one, *_) = found
    assert one["stopped"] == (None, "asked", None)
    # Steps of some milliseconds: ranks ask after steps 1, 3 and 7, on a busy machine more often.
    assert 4 <= one["step"] <= 7
    assert one["checkpoint"] == f"step_{one['step']:08d}-a1"
    assert one["start"] == one["step"]
    assert one["different"] == []
    assert one["evaluated"] == [("validation", 3), ("validation", 6), ("validation", 8)]
    assert one["step"] in one["records"]


def test_a_validation_can_stop_a_run(tmp_path: Path) -> None:
    config = small_config(train__steps=8, checkpoint__every_steps=8)
    run = StoppedRun(Topology(), Comm.single(), config, tmp_path, scores={3: 0.2, 6: 0.1})
    run.stop_below = 0.15
    result = run.train()
    assert (result.stopped, result.state.step) == ("plateau", 6)
    assert result.last.name == "step_00000006-a1"
    assert result.best is not None
    assert result.best.step == 3


def test_a_request_after_the_last_step_stops_the_run_too(tmp_path: Path) -> None:
    config = small_config(train__steps=6)
    run = StoppedRun(Topology(), Comm.single(), config, tmp_path)
    run.stop_from = 6
    result = run.train()
    assert (result.stopped, result.state.step, result.last.name) == (
        "asked",
        6,
        "step_00000006-a1",
    )
    run.attempt = 2
    again = run.train(resume=True)  # Nothing is left to train, and a request still counts.
    assert (again.stopped, again.start_step) == ("asked", 6)
