"""Following a job that was submitted, and its state, for `submit` and every command of `job`."""

from __future__ import annotations

import signal
import sys
import time

from rich.console import Console

from dml_dist.errors import ConfigError, RunStopped
from dml_dist.jobs.records import JobRecord, JobRecords
from dml_dist.jobs.target import FINISHED, JobStatus, Target

_SECONDS_BETWEEN_LOOKS = 1.0


def follow(record: JobRecord, target: Target, records: JobRecords, console: Console) -> int:
    """Print a job's output until it ends, and return the exit code of its command.

    Raises:
        RunStopped: At Ctrl-C; the job goes on.
    """
    id, job = record.request.id, job_of(record)
    try:
        detail = ""
        while (status := target.status(job)).state == "queued":
            if status.detail != detail:
                _say(console, f"{id} is queued: {status.detail}")
                detail = status.detail
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        anything = False
        for text in target.logs(job, follow=True):
            anything = True
            sys.stdout.write(text)
            sys.stdout.flush()
        status = target.status(job)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # A second one would cut off what is said.
            signal.signal(number, signal.SIG_IGN)
        raise RunStopped(f"{id} goes on in the cluster\n{hints(id)}") from None
    if status.state in FINISHED:
        records.end(record, status)
    # A target may say at length why a command failed that has said so itself.
    said = "" if anything or not status.detail else f": {status.detail}"
    _say(console, f"{id} {status.state}{said}")
    return exit_code(status)


def exit_code(status: JobStatus) -> int:
    """Return the exit code of the command that follows a job: that of the job's own."""
    if status.state == "succeeded":
        return 0
    return status.exit_code or 1


def status_of(record: JobRecord, target: Target, records: JobRecords) -> JobStatus:
    """Return the state of a job, from the target or, once it has ended, from its record."""
    if record.ended is not None:
        return record.ended
    status = target.status(job_of(record))
    if status.state in FINISHED:
        records.end(record, status)
    return status


def job_of(record: JobRecord) -> str:
    """Return the target's own identifier of a job.

    Raises:
        ConfigError: If the command that sent it was killed before it knew.
    """
    if record.job is None:
        raise ConfigError(
            f"the command that sent {record.request.id} was killed before the target had answered; "
            f"look for {record.request.id} on the {record.target['target']} cluster itself"
        )
    return record.job


def hints(id: str) -> str:
    """Return the lines that say how to follow and stop a job."""
    return f"follow: dml-dist job logs {id} --follow\nstop:   dml-dist job stop {id}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
