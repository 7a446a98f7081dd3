"""Contents of run.json: identity, status and attempts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dml_dist.errors import DataError
from dml_dist.files import read_json
from dml_dist.runs.provenance import GitState

Ended = Literal["stopped", "failed"]
"""States in which a run ends before its last step."""


@dataclass(frozen=True)
class Attempt:
    """One start of the training processes.

    Attributes:
        attempt: Its number, from 1.
        started: UTC time, ISO 8601.
        world_size: Number of ranks.
        launcher: "ray", "torchrun" or "inprocess".
        device: Device of the ranks, as text.
        command: The command line.
        changes: Differences from the previous configuration, "path: old -> new" each.
        git: The source checkout.
        versions: Package or "python" -> version.
        platform: Operating system and processor.
        host: Name of rank 0's machine.
        nodes: Name of each rank's machine, in the order of ranks.
        reason: Why the processes were started again; empty for the first start.
        first_step: Updates of earlier attempts that this one builds on; None before its first step.
        began: UTC time of its first step, ISO 8601.
    """

    attempt: int
    started: str
    world_size: int
    launcher: str
    device: str
    command: str
    git: GitState
    versions: Mapping[str, str]
    platform: str
    host: str
    changes: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    reason: str = ""
    first_step: int | None = None
    began: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """Status of a run. Any run that is not finished can be continued.

    Attributes:
        state: "running" also holds for a run whose processes were killed.
        time: Time of entering this state, UTC, ISO 8601.
        reason: Why it stopped or failed.
        step: The step after which it stopped, if there is a checkpoint.
    """

    state: Literal["running", "finished"] | Ended
    time: str
    reason: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class RunInfo:
    """Contents of run.json.

    Attributes:
        name: Name of the run.
        created: UTC time, ISO 8601.
        seed: Seed of all random streams.
        status: Status of the run.
        facts: Label -> value, about the data and the plan.
        attempts: In order; empty before training starts.
    """

    name: str
    created: str
    seed: int
    status: RunStatus
    facts: Mapping[str, Any] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()

    @property
    def finished(self) -> str | None:
        """UTC time of the end, ISO 8601; None for a run that is not finished."""
        return self.status.time if self.status.state == "finished" else None


def read_run_info(path: Path) -> RunInfo:
    """Read a run.json.

    Raises:
        DataError: If it is damaged.
    """
    values = read_json(path)
    try:
        attempts = tuple(_attempt(attempt) for attempt in values["attempts"])
        if "finished" in values:  # Written by a version without `status`.
            ended = values.pop("finished")
            state = "finished" if ended else "running"
            values["status"] = {"state": state, "time": ended or values["created"]}
        status = RunStatus(**values["status"])
        return RunInfo(**{**values, "attempts": attempts, "status": status})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged, or of another version of dml-dist ({error!r}); "
            "restore it from a copy, or use that version"
        ) from None


def _attempt(values: Mapping[str, Any]) -> Attempt:
    lists = {key: tuple(values.get(key, ())) for key in ("changes", "nodes")}
    return Attempt(**{**values, **lists, "git": GitState(**values["git"])})


def now(timespec: str = "seconds") -> str:
    """Return the UTC time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec=timespec)
