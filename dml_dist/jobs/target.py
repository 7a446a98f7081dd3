"""What every target offers to `submit` and `job`: render, submit, status, logs, stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

State = Literal["queued", "running", "succeeded", "failed", "stopped", "lost"]
"""Lost: the target does not know the job any more."""

FINISHED: tuple[State, ...] = ("succeeded", "failed", "stopped", "lost")


@dataclass(frozen=True)
class JobRequest:
    """A command for a cluster.

    Attributes:
        id: Identifier of the job, the run's name and a number; unique among the job records.
        arguments: Arguments of `dml-dist` on the cluster, such as `("train", "config.yaml")`.
        run_dir: Folder of the run or study, absolute; the cluster has it at the same path.
        min_workers: Fewest ranks that the command starts with.
        max_workers: Most ranks that it uses.
        cpus_per_rank: CPUs of a rank.
        uses_gpu: Whether each rank gets a GPU.
    """

    id: str
    arguments: tuple[str, ...]
    run_dir: Path
    min_workers: int
    max_workers: int
    cpus_per_rank: float
    uses_gpu: bool


@dataclass(frozen=True)
class JobStatus:
    """State of a job.

    Attributes:
        state: One of our words.
        detail: The target's own word, and what it says beside it.
        exit_code: Exit code of the command, once it has ended and the target tells it.
    """

    state: State
    detail: str
    exit_code: int | None = None


class Target(Protocol):
    """A place that runs jobs. Every method raises a DmlDistError within 30 s if it cannot."""

    def check(self, request: JobRequest) -> None:
        """Raise if the target cannot be reached, or has not what the request needs."""

    def render(self, request: JobRequest) -> str:
        """Return what `submit` sends, as text that a user can keep and send by hand."""

    def submit(self, request: JobRequest) -> str:
        """Send the job and return the target's own identifier of it."""

    def status(self, job: str) -> JobStatus:
        """Return the state of the job with the target's identifier `job`."""

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """Give the job's output in pieces, whole or until the job ends."""

    def stop(self, job: str) -> str:
        """Ask the job to stop and return a sentence that says what happens now."""
