"""Whether a SLURM job is queued again when its command was stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from dml_dist.errors import RunError
from dml_dist.files import read_json, write_json_atomic
from dml_dist.jobs.slurm_commands import field
from dml_dist.runs.folder import RunFolder

Cause = Literal["time", "preempted", "requeued", "cancelled"]
"""Why SLURM sent SIGTERM; requeued: SLURM queues the job again by itself."""

# `--signal=TERM@N` may come up to 60 s before its time, and looking takes seconds.
_EARLY_SECONDS = 90.0


@dataclass(frozen=True)
class Ending:
    """What SLURM's SIGTERM means.

    Attributes:
        cause: Why it came.
        seconds: Time until SLURM kills the job, as far as SLURM tells it.
    """

    cause: Cause
    seconds: float


def ending(info: str, restarts: int, seconds_before_end: int) -> Ending:
    """Return what SLURM's SIGTERM means.

    Args:
        info: What `scontrol show job` prints at the signal.
        restarts: How often SLURM had queued the job again when this start began.
        seconds_before_end: N of `--signal=TERM@N`.
    """
    end = field(info, "EndTime")
    seconds = datetime.fromisoformat(end).timestamp() - time.time() if end else 0.0
    if int(field(info, "Restarts") or 0) > restarts:
        return Ending("requeued", seconds)
    if field(info, "JobState") not in ("RUNNING", "SIGNALING"):
        # It is being cancelled, or runs over its limit, of which `--signal` has warned before.
        return Ending("cancelled", 0.0)
    if field(info, "PreemptTime") is not None:
        return Ending("preempted", seconds)
    # A signal of its own: from `--signal`, or from a user's `scancel --signal=TERM`.
    is_near = seconds <= seconds_before_end + _EARLY_SECONDS
    return Ending("time" if end and is_near else "cancelled", seconds)


def should_requeue(cause: Cause, exit_code: int, run_dir: Path) -> bool:
    """Whether to queue a job again that SLURM asked to end.

    Args:
        cause: Why it asked.
        exit_code: Of the command; 1 if it was not started.
        run_dir: Folder of the run.
    """
    if cause not in ("time", "preempted") or exit_code in (0, 2):
        return False
    folder = RunFolder(run_dir)
    return not folder.info_path.is_file() or folder.info().status.state in ("running", "stopped")


def is_finished(command: str, run_dir: Path) -> bool:
    """Whether a training has nothing left to do."""
    folder = RunFolder(run_dir)
    return command == "train" and folder.info_path.is_file() and folder.info().finished is not None


def require_progress(path: Path, run_dir: Path, limit: int) -> None:
    """Count the starts that found no new checkpoint; each start of a job calls this once.

    Args:
        path: File of the job that keeps the count.
        run_dir: Folder of the run.
        limit: Most starts in a row without progress.

    Raises:
        RunError: If there were more.
    """
    progress, count = _progress(run_dir), 0
    if path.is_file() and (before := read_json(path))["progress"] == progress:
        count = before["count"] + 1
    write_json_atomic(path, {"progress": progress, "count": count})
    if count > limit:
        raise RunError(
            f"the job was started {count + 1} times without a new checkpoint in {run_dir}, more "
            f"often than max_starts_without_progress ({limit}) of the SLURM target allows; save "
            "more often (checkpoint.every_steps) or raise its time limit, and submit it again "
            "with --resume"
        )


def _progress(run_dir: Path) -> list[int]:
    """Return numbers that change with every checkpoint and every run that ends."""
    folders = [RunFolder(path.parent) for path in run_dir.rglob("run.json")]
    steps = sum(folder.last_checkpoint_step() or 0 for folder in folders)
    return [len(folders), steps, sum(folder.metrics_path.is_file() for folder in folders)]
