"""The process on each node of a SLURM job: Ray, and on the first node the command.

The first node starts Ray's head and writes its address into a folder on shared storage; the others
join it. Once all have, the first node starts the command, and at its end it tells the others by a
file to end. Each process ends the children that it started, and nothing else.

SLURM sends SIGTERM to every process of a job, Ray's included, when it preempts or cancels it. All
of them inherit a mask that blocks it, so that only this process decides: the command gets SIGINT,
on which its ranks write a checkpoint while Ray still runs.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.errors import DmlDistError, RunError
from dml_dist.jobs.slurm_commands import call, job_info
from dml_dist.jobs.slurm_ray import RayProcess, Signals, kill_tree
from dml_dist.jobs.slurm_requeue import (
    Cause,
    Ending,
    ending,
    is_finished,
    require_progress,
    should_requeue,
)
from dml_dist.jobs.start_or_resume import with_resume

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_NODES_TO_END = 60.0
# Kept of the time before the job's end, for Ray's end and the request to queue the job again.
_SECONDS_TO_REQUEUE = 20.0
_CAUSES: dict[Cause, str] = {
    "time": "its time limit is near",
    "preempted": "it is preempted",
    "requeued": "it is queued again",
    "cancelled": "it is cancelled",
}
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "PYTHONUNBUFFERED": "1",
    # Idle worker processes, one a core, would compete with the ranks while they start.
    "RAY_prestart_worker_first_driver": "0",
}


@dataclass(frozen=True)
class Node:
    """This process within its job.

    Attributes:
        job: Number of the job.
        restarts: How often SLURM has queued the job again.
        name: Name of this node.
        number: Its number in the job; 0 is the first node.
        names: Names of all nodes.
    """

    job: str
    restarts: int
    name: str
    number: int
    names: tuple[str, ...]

    @classmethod
    def of_environment(cls) -> Node:
        """Return what srun's variables say.

        Raises:
            RunError: If srun has not started this process.
        """
        environment = os.environ
        if "SLURM_NODEID" not in environment:
            raise RunError(
                "dml_dist.jobs.slurm_node is started by srun, but SLURM_NODEID is not set; use "
                "`dml-dist submit --to slurm`"
            )
        return cls(
            environment["SLURM_JOB_ID"],
            int(environment.get("SLURM_RESTART_COUNT", "0")),
            environment["SLURMD_NODENAME"],
            int(environment["SLURM_NODEID"]),
            tuple(call("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()),
        )


class Meeting:
    """Files through which the nodes of one start of a job meet, on shared storage."""

    def __init__(self, log_dir: Path, node: Node) -> None:
        """Nothing is written yet."""
        self._node = node
        self._log_dir = log_dir
        self.folder = log_dir / f".{node.job}.{node.restarts}"
        self.counts = log_dir / f".{node.job}.progress"
        self.token = self.folder / "token"

    def open(self) -> None:
        """Make the folder and Ray's token, which only this user can read; the first node does."""
        for stale in self._log_dir.glob(f".{self._node.job}.[0-9]*"):
            shutil.rmtree(stale, ignore_errors=True)  # Of a start that was killed.
        self.folder.mkdir(mode=0o700)
        self._write(self.token, secrets.token_hex(32))

    def announce(self, address: str) -> None:
        """Tell the others the address of Ray's head."""
        self._write(self.folder / "head", address)

    def head(self) -> str | None:
        """Return the address of Ray's head; None before it has started."""
        path = self.folder / "head"
        return path.read_text() if path.is_file() else None

    def enter(self) -> None:
        """Say that Ray is being started on this node."""
        (self.folder / f"{self._node.name}.node").touch()

    def join(self) -> None:
        """Say that Ray runs on this node."""
        (self.folder / f"{self._node.name}.up").touch()

    def leave(self) -> None:
        """Say that nothing of the job runs on this node any more."""
        (self.folder / f"{self._node.name}.node").unlink(missing_ok=True)

    def joined(self) -> set[str]:
        """Return the names of the nodes on which Ray runs."""
        return {path.stem for path in self.folder.glob("*.up")}

    def is_over(self) -> bool:
        """Whether the first node has told the others to end."""
        return (self.folder / "over").exists()

    def dismiss(self) -> None:
        """Tell the others to end; the first node does."""
        (self.folder / "over").touch()

    def close(self) -> None:
        """Wait until the others have ended, and delete the files; the first node does."""
        deadline = time.monotonic() + _SECONDS_FOR_NODES_TO_END
        while any(self.folder.glob("*.node")) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, text: str) -> None:
        part = path.with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        part.rename(path)


def run_head(node: Node, options: argparse.Namespace, signals: Signals) -> int:
    """Start Ray's head, run the command once all nodes have joined, and return its exit code."""
    meeting = Meeting(options.log_dir, node)
    ray = RayProcess(node.job, node.number, options.gpus)
    code, again = 1, False
    meeting.open()
    try:
        require_progress(meeting.counts, options.run_dir, options.max_starts_without_progress)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(meeting.token)
        why: Ending | None = None
        if ray.start(signals.wait, options.start_seconds):
            meeting.announce(ray.address)
            meeting.join()
            if _all_join(meeting, node, signals, options.start_seconds):
                arguments = list(options.arguments)
                if node.restarts:  # A first start never resumes by itself.
                    arguments = with_resume(options.run_dir, arguments)
                arguments.append(f"--set=launch.address={ray.address}")
                code, why = _run_command(arguments, node, options, signals)
        if signals.received and options.requeue:
            # Before the end of Ray: SLURM leaves the processes time to end after the request.
            again = _requeue(node, options.run_dir, why or _ending(node, options), code)
    finally:
        meeting.dismiss()
        ray.end()
        meeting.close()
        if not again:
            meeting.counts.unlink(missing_ok=True)
    return code


def _all_join(meeting: Meeting, node: Node, signals: Signals, seconds: int) -> bool:
    """Wait until Ray runs on all nodes; False if SLURM asked to end before."""
    deadline = time.monotonic() + seconds
    while missing := sorted(set(node.names) - meeting.joined()):
        if time.monotonic() > deadline:
            raise RunError(
                f"Ray did not start within {seconds} s on {len(missing)} of {len(node.names)} "
                f"nodes: {', '.join(missing)}; see above what they printed, check that they reach "
                f"{meeting.head()} and share {meeting.folder.parent}, or raise start_seconds of "
                "the SLURM target"
            )
        if signals.wait(_SECONDS_BETWEEN_LOOKS):
            return False
    return not signals.received


def _run_command(
    arguments: Sequence[str], node: Node, options: argparse.Namespace, signals: Signals
) -> tuple[int, Ending | None]:
    """Run a dml-dist command; when SLURM asks to end, let it write a checkpoint.

    Returns:
        Its exit code, and why SLURM asked to end.
    """
    process = subprocess.Popen([sys.executable, "-m", "dml_dist", *arguments])
    why: Ending | None = None
    deadline = 0.0
    while process.poll() is None:
        if not signals.wait(_SECONDS_BETWEEN_LOOKS):
            continue
        if why is None:
            why = _ending(node, options)
            _say(f"SLURM ends the job ({_CAUSES[why.cause]}): the command stops with a checkpoint")
            process.send_signal(signal.SIGINT)
            deadline = time.monotonic() + max(why.seconds - _SECONDS_TO_REQUEUE, why.seconds / 2)
        elif why.cause in ("time", "preempted") and time.monotonic() > deadline:
            _say("the command did not stop in time and is killed; its last checkpoint is kept")
            kill_tree(process)
    code = process.returncode
    return code if code >= 0 else 128 - code, why


def _ending(node: Node, options: argparse.Namespace) -> Ending:
    return ending(job_info(node.job) or "", node.restarts, options.seconds_before_end)


def _requeue(node: Node, run_dir: Path, why: Ending, code: int) -> bool:
    """Queue the job again if its end was SLURM's wish, and return whether it is queued."""
    if why.cause == "requeued":
        return True
    if not should_requeue(why.cause, code, run_dir):
        return False
    _say("the job is queued again; its next start resumes the run")
    call("scontrol", "requeue", node.job)
    return True


def run_worker(node: Node, options: argparse.Namespace, signals: Signals) -> int:
    """Join Ray's head, and stay until the first node says that the command has ended."""
    meeting = Meeting(options.log_dir, node)
    # The first node ends at its own limit, with a better message.
    limit = options.start_seconds
    deadline = time.monotonic() + 2 * limit
    while (head := meeting.head()) is None:
        if meeting.is_over():
            return 0
        if time.monotonic() > deadline:
            raise RunError(
                f"node {node.name} found no address of Ray's head in {meeting.folder} within "
                f"{2 * limit} s; log_dir of the SLURM target must be on storage "
                f"that {node.names[0]} and {node.name} share"
            )
        signals.wait(_SECONDS_BETWEEN_LOOKS)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(meeting.token)
    ray = RayProcess(node.job, node.number, options.gpus, head)

    def give_up(seconds: float) -> bool:
        return signals.wait(seconds) or meeting.is_over()

    meeting.enter()
    try:
        while meeting.head() is not None and not meeting.is_over():
            # Ray Train goes on after a loss of ranks, once their node is back.
            if not ray.lives and not signals.received and ray.start(give_up, limit):
                meeting.join()
            signals.wait(_SECONDS_BETWEEN_LOOKS)
    finally:
        ray.end()
        meeting.leave()
    return 0


def run_node(node: Node, options: argparse.Namespace, signals: Signals) -> int:
    """Do this node's part of the job and return its exit code."""
    # Every node looks for itself: without a head the others would wait for one.
    if node.restarts and is_finished(options.arguments[0], options.run_dir):
        _say(f"the run in {options.run_dir} is finished: nothing to do on {node.name}")
        return 0
    return (run_worker if node.number else run_head)(node, options, signals)


def main(words: Sequence[str] | None = None) -> int:
    """Run this process, which srun has started, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dml_dist.jobs.slurm_node")
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--start-seconds", type=int, required=True)
    parser.add_argument("--seconds-before-end", type=int, required=True)
    parser.add_argument("--max-starts-without-progress", type=int, required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("arguments", nargs="+", help="Arguments of dml-dist.")
    options = parser.parse_args(words)
    signals = Signals()
    os.environ.update(_ENVIRONMENT)
    # A token or cluster of the shell that submitted the job would win over the job's own.
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    try:
        return run_node(Node.of_environment(), options, signals)
    except (DmlDistError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, DmlDistError) else 1


def _say(text: str) -> None:
    print(f"dml-dist: {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
