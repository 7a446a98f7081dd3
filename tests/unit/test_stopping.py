"""When ranks ask whether to stop, and what they agree on, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.train.checkpoint_files import checkpoint_folders, read_manifest
from dml_dist.train.stopping import StopChecks, StopReason, first_reason
from tests.training_setup import small_config, small_run, snapshot


def never(step: int, metrics: Mapping[str, float] | None) -> str | None:
    return None


def checked_steps(seconds_of: Callable[[int], float], steps: int) -> list[int]:
    """Return the steps after which a run asks whose steps take these seconds."""
    now = 0.0
    checks = StopChecks(never, Comm.single(), clock=lambda: now)
    checks.restart(0)
    found = []
    for step in range(1, steps + 1):
        now += seconds_of(step)
        if checks.is_due(step):
            assert checks.check(step) is None
            found.append(step)
    return found


def test_checks_come_once_a_second() -> None:
    # Intervals double up to the 64 steps of a second.
    assert checked_steps(lambda step: 1 / 64, 400) == [1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]
    assert checked_steps(lambda step: 5.0, 6) == [1, 2, 3, 4, 5, 6]


def test_a_slow_first_step_and_steps_that_get_slower() -> None:
    assert checked_steps(lambda step: 20.0 if step == 1 else 0.3, 12) == [1, 2, 4, 7, 10]
    found = checked_steps(lambda step: 1 / 64 if step <= 319 else 2.0, 386)
    assert found[-5:] == [319, 383, 384, 385, 386]


def test_a_pause_neither_slows_the_checks_nor_puts_them_off() -> None:
    """With a checkpoint every 10 steps, and steps of which 64 fit into a second."""
    now, found = 0.0, []
    checks = StopChecks(never, Comm.single(), clock=lambda: now)
    checks.restart(0)
    for step in range(1, 400):
        now += 1 / 64
        if checks.is_due(step):
            checks.check(step)
            found.append(step)
        if step % 10 == 0:
            now += 60.0
            checks.restart(step)
    assert found == [1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]


def test_the_first_reason_counts_and_metrics_are_passed_on() -> None:
    def plateau(step: int, metrics: Mapping[str, float] | None) -> str | None:
        return None if metrics is None else f"MAP@R {metrics['map_at_r']} at step {step}"

    def signal(step: int, metrics: Mapping[str, float] | None) -> str | None:
        return "SIGTERM" if step >= 7 else None

    ask: StopReason = first_reason(plateau, signal)
    assert ask(6, None) is None
    assert ask(7, None) == "SIGTERM"
    assert ask(7, {"map_at_r": 0.5}) == "MAP@R 0.5 at step 7"
    assert first_reason()(7, {"map_at_r": 0.5}) is None
    checks = StopChecks(ask, Comm.single())
    checks.restart(6)
    assert checks.check(6, {"map_at_r": 0.25}) == "MAP@R 0.25 at step 6"


def test_checkpoints_by_time() -> None:
    """Every two minutes with steps of 15 s, counted from the last checkpoint, however it came."""
    now, due = 0.0, []
    checks = StopChecks(never, Comm.single(), every_minutes=2.0, clock=lambda: now)
    checks.restart(0)
    for step in range(1, 41):
        now += 15.0
        assert checks.is_due(step)
        checks.check(step)
        if checks.save_is_due:
            due.append(step)
        if checks.save_is_due or step == 20:
            checks.saved()
    assert due == [8, 16, 28, 36]


def test_a_run_saves_by_time_beside_by_steps(tmp_path: Path) -> None:
    plain = small_run(tmp_path / "plain", small_config(train__steps=8))
    by_time = {"checkpoint__every_minutes": 1e-9, "checkpoint__keep": 20}
    timed = small_run(tmp_path / "timed", small_config(train__steps=8, **by_time))
    one, two = snapshot(plain.train().state), snapshot(timed.train().state)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    steps = [
        [record["step"] for record in read_records(run.folder / "checkpoints.jsonl")]
        for run in (plain, timed)
    ]
    # The first check comes after step 1; each finds that the time has come.
    assert {*steps[0], 1} <= set(steps[1])
    assert 1 not in steps[0]
    folders = checkpoint_folders(timed.folder / "checkpoints")
    assert sorted(read_manifest(folder).step for folder in folders) == sorted(steps[1])
    records = read_records(timed.folder / "checkpoints.jsonl")
    assert all(0 < record["seconds"] < 60 for record in records)
    assert timed.begun == [0]


@pytest.mark.parametrize("step", [0, 4])
def test_a_check_without_steps_since_the_last_one(step: int) -> None:
    checks = StopChecks(never, Comm.single(), clock=lambda: 3.0)
    checks.restart(step)
    assert checks.check(step) is None
    assert not checks.is_due(step)
    assert checks.is_due(step + 1)
