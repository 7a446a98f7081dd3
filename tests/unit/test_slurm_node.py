"""The processes on a SLURM job's nodes, with fakes of Ray and SLURM, and the choice to requeue."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from dml_dist.errors import RunError
from dml_dist.jobs import slurm_node
from dml_dist.jobs.slurm_node import Node, run_head, run_node, run_worker
from dml_dist.jobs.slurm_ray import free_ports, kill_tree
from dml_dist.jobs.slurm_requeue import (
    Ending,
    ending,
    require_progress,
    should_requeue,
)
from dml_dist.runs.folder import RunFolder


class FakeRay:
    def __init__(self, job: str, node_id: int, gpus: int, head: str | None = None) -> None:
        self.address = head or "10.0.0.1:20001"
        self.lives = False

    def start(self, wait: object, seconds: float) -> bool:
        self.lives = True
        return True

    def end(self) -> None:
        self.lives = False


class FakeSignals:
    """SIGTERM comes once `condition` holds."""

    def __init__(self, condition: Callable[[], bool] = lambda: False) -> None:
        self._condition = condition
        self.received = False

    def wait(self, seconds: float) -> bool:
        time.sleep(0.01)
        self.received = self.received or self._condition()
        return self.received


def job(state: str = "RUNNING", *, minutes: float = 20, preempt: str = "None", restarts: int = 0):
    """What `scontrol show job` of SLURM 22.05 prints of these things."""
    end = datetime.now() + timedelta(minutes=minutes)
    return (
        f"JobId=7 JobName=a\n   JobState={state} Reason=None Dependency=(null)\n"
        f"   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0\n"
        f"   StartTime=2026-11-29T10:00:00 EndTime={end.isoformat(timespec='seconds')} "
        f"Deadline=N/A\n   PreemptEligibleTime=2026-11-29T10:00:00 PreemptTime={preempt}\n"
    )


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        log_dir=tmp_path,
        run_dir=tmp_path / "run",
        gpus=0,
        start_seconds=20,
        seconds_before_end=300,
        max_starts_without_progress=1,
        requeue=True,
        arguments=["train", "a b.yaml"],
    )


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fakes of all that is slow; gives the jobs that were queued again."""
    found: list[str] = []
    monkeypatch.setattr(slurm_node, "RayProcess", FakeRay)
    monkeypatch.setattr(slurm_node, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(slurm_node, "call", lambda *words: found.append(" ".join(words)))
    monkeypatch.setattr(slurm_node, "job_info", lambda job_id: job())
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # Restored at the end.
    return found


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Replace `python -m dml_dist` by a script of bash; give the file where it can tell things."""
    script, told = folder / "python", folder / "told"
    script.write_text(f"#!/bin/bash\ntold={told}\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return told


def node(number: int = 0, nodes: int = 1, restarts: int = 0) -> Node:
    names = tuple(f"n{i + 1}" for i in range(nodes))
    return Node("7", restarts, names[number], number, names)


@pytest.mark.parametrize("code", [0, 3])
def test_two_nodes_meet_and_end(
    options: argparse.Namespace,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    body = f'stat -c %a "$RAY_AUTH_TOKEN_PATH" > $told; printf "%s\\n" "$@" >> $told; exit {code}'
    told = command(tmp_path, monkeypatch, body)
    ends: list[str] = []

    def work() -> None:
        ends.append(f"worker {run_worker(node(1, 2), options, FakeSignals())}")

    worker = threading.Thread(target=work)
    worker.start()
    ends.append(f"head {run_head(node(0, 2), options, FakeSignals())}")
    worker.join(5)
    # srun gives the exit code of the head only if the others have ended with 0 before.
    assert ends == ["worker 0", f"head {code}"]
    assert told.read_text().splitlines() == [
        *("600", "-m", "dml_dist", "train", "a b.yaml", "--set=launch.address=10.0.0.1:20001"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["python", "told"]
    assert requeued == []


def test_missing_nodes_are_named(
    options: argparse.Namespace,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = command(tmp_path, monkeypatch, "touch $told")
    options.start_seconds = 0
    with pytest.raises(RunError, match="within 0 s on 2 of 3 nodes: n2, n3;"):
        run_head(node(0, 3), options, FakeSignals())
    assert not told.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("info", "again"),
    [
        (lambda: job(preempt="2026-11-29T10:10:00"), True),
        (lambda: job(minutes=5), True),
        (lambda: job(), False),  # `scancel --signal=TERM`.
        (lambda: job("COMPLETING", minutes=0), False),  # `scancel`.
        (lambda: job("COMPLETING", restarts=1), False),  # SLURM has queued it again already.
    ],
)
def test_a_stopped_command_is_queued_again(
    options: argparse.Namespace,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    info: Callable[[], str],
    again: bool,
) -> None:
    """The command gets SIGINT, once, and ends like a training with a checkpoint."""
    body = (
        "trap 'echo stopped >> $told; exit 1' INT\necho started > $told\n"
        "for i in {1..500}; do sleep 0.02; done"
    )
    told = command(tmp_path, monkeypatch, body)
    monkeypatch.setattr(slurm_node, "job_info", lambda job_id: info())
    assert run_head(node(), options, FakeSignals(told.exists)) == 1
    assert told.read_text() == "started\nstopped\n"
    assert requeued == (["scontrol requeue 7"] if again else [])


def test_a_command_that_does_not_stop_is_killed_in_time(
    options: argparse.Namespace,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = command(tmp_path, monkeypatch, "trap '' INT\ntouch $told\nsleep 30\n")
    monkeypatch.setattr(slurm_node, "job_info", lambda job_id: job(minutes=0.02))
    start = time.monotonic()
    assert run_head(node(), options, FakeSignals(told.exists)) == 137
    assert time.monotonic() - start < 5
    assert requeued == ["scontrol requeue 7"]


def test_what_sigterm_means() -> None:
    def cause(info: str) -> str:
        return ending(info, 0, 300).cause

    assert cause(job(preempt="2026-11-29T10:10:00")) == "preempted"
    # The signal of `--signal` may come a minute early.
    assert cause(job(minutes=6)) == "time"
    assert cause(job("SIGNALING", minutes=5)) == "time"  # For some milliseconds.
    assert cause(job(minutes=8)) == "cancelled"
    assert cause(job("COMPLETING", minutes=0)) == "cancelled"
    assert cause(job("COMPLETING", restarts=1)) == "requeued"
    assert cause("") == "cancelled"
    assert ending(job(minutes=5), 0, 300).seconds == pytest.approx(300, abs=2)


def test_what_is_queued_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert should_requeue("time", 1, run)  # Asked to end before the command was started.
    assert should_requeue("preempted", 130, run)
    assert not should_requeue("cancelled", 1, run)
    assert not should_requeue("time", 0, run)
    assert not should_requeue("time", 2, run)  # A wrong configuration.
    folder = RunFolder.create(run, "name: a\n", name="a", seed=0)
    assert should_requeue("time", 137, run)
    folder.end("stopped", "SIGINT", 3)
    assert should_requeue("time", 1, run)
    folder.end("failed", "loss is NaN")
    assert not should_requeue("time", 1, run)


def test_starts_without_progress_end(tmp_path: Path) -> None:
    counts, run = tmp_path / "counts", tmp_path / "run"
    require_progress(counts, run, 1)
    require_progress(counts, run, 1)
    RunFolder.create(run, "name: a\n", name="a", seed=0)
    (run / "checkpoints/step-4").mkdir()
    require_progress(counts, run, 1)
    require_progress(counts, run, 1)
    with pytest.raises(RunError, match="was started 3 times without a new checkpoint"):
        require_progress(counts, run, 1)
    (run / "checkpoints/step-5").mkdir()
    require_progress(counts, run, 1)
    assert json.loads(counts.read_text())["count"] == 0


def test_a_finished_run_is_not_started_again(
    options: argparse.Namespace,
    requeued: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = command(tmp_path, monkeypatch, "touch $told")
    RunFolder.create(options.run_dir, "name: a\n", name="a", seed=0).finish({})
    for number in range(2):
        assert run_node(node(number, 2, restarts=1), options, FakeSignals()) == 0
    assert not told.exists()


# ---------------------------------------------------------------- processes and ports


def test_sigterm_ends_neither_a_process_nor_its_children() -> None:
    """In a process of its own: threads of this one could take the signal."""
    script = """
import os, signal, subprocess
from dml_dist.jobs.slurm_ray import Signals

signals = Signals()
child = subprocess.Popen(["sleep", "20"])
child.terminate()
try:
    child.wait(0.2)
except subprocess.TimeoutExpired:
    print("the child lives")
print(signals.wait(0.01))
os.kill(os.getpid(), signal.SIGTERM)
print(signals.wait(5.0))
child.send_signal(signal.SIGINT)
print(child.wait(5.0))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["the child lives", "False", "True", f"{-signal.SIGINT}"]


def test_a_process_is_killed_with_all_its_descendants() -> None:
    words = ["bash", "-c", "bash -c 'sleep 30 & echo $!; wait' & wait"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    kill_tree(process)
    process.stdout.close()
    state = Path(f"/proc/{grandchild}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_ports_in_use_are_left_out() -> None:
    first = free_ports(3, seed=4567)
    assert len(set(first)) == 3
    assert all(20000 <= port < 32000 for port in first)
    with socket.socket() as taken:
        taken.bind(("", first[1]))
        taken.listen()
        found = free_ports(3, seed=4567)
    assert found[:2] == [first[0], first[2]]


def test_the_ending_of_a_requeued_job_needs_no_request() -> None:
    assert not slurm_node._requeue(node(), Path("/nowhere"), Ending("cancelled", 0.0), 1)
    assert slurm_node._requeue(node(), Path("/nowhere"), Ending("requeued", 0.0), 1)
