"""What this machine knows of the jobs that it sent: one JSON file each, in `runs/.jobs`.

Later commands find a job's target here. Its state is always asked from the target, until it has
ended: then the state is kept, since a cluster forgets its jobs when it goes down.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dml_dist.config.base import RUN_NAME
from dml_dist.config.shape import nearest
from dml_dist.errors import ConfigError, DataError
from dml_dist.files import lock_file, read_json, write_json_atomic
from dml_dist.jobs.target import JobRequest, JobStatus

_SECONDS_FOR_THE_LOCK = 30.0
_NAMED_JOBS = 12


@dataclass(frozen=True)
class JobRecord:
    """One job.

    Attributes:
        request: What was sent.
        target: The target's settings.
        submitted: UTC time, ISO 8601.
        job: The target's own identifier; None if the command was killed while it sent the job.
        ended: State of a job that has ended.
    """

    request: JobRequest
    target: dict[str, Any]
    submitted: str
    job: str | None = None
    ended: JobStatus | None = None


class JobRecords:
    """The records in a folder."""

    def __init__(self, folder: Path = Path("runs") / ".jobs") -> None:
        """Nothing is read or written."""
        self._folder = Path(folder).absolute()

    def next_id(self, name: str) -> str:
        """Return `NAME-1`, or the number after the highest one of this name."""
        found = (re.fullmatch(rf"{re.escape(name)}-(\d+)", known) for known in self.ids())
        return f"{name}-{max((int(match[1]) for match in found if match), default=0) + 1}"

    def require_new(self, id: str) -> None:
        """Check an identifier that the user gives.

        Raises:
            ConfigError: If it is no name, or a job has it.
        """
        if not re.fullmatch(RUN_NAME, id):
            raise ConfigError(
                f"--id {id!r} must be a name of letters, digits, '.', '_' and '-' that begins with "
                "a letter or digit"
            )
        if id in self.ids():
            raise ConfigError(f"there is a job {id} already; give another --id, or leave it out")

    def ids(self) -> list[str]:
        """Return the identifiers of all jobs, sorted: NAME-9 before NAME-10."""
        files = [path for path in self._folder.glob("*.json") if not path.name.startswith(".")]
        return sorted((path.stem for path in files), key=lambda id: (len(id), id))

    @contextmanager
    def sending(self, request: JobRequest, target: dict[str, Any]) -> Iterator[JobRecord]:
        """Keep the record of a job that is being sent; it is removed if that fails.

        Raises:
            ConfigError: If another command took the identifier.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with lock_file(self._folder / ".lock", wait_seconds=_SECONDS_FOR_THE_LOCK):
            self.require_new(request.id)
            record = JobRecord(request, target, datetime.now(UTC).isoformat(timespec="seconds"))
            self.write(record)
        try:
            yield record
        except BaseException:
            self._path(request.id).unlink()
            raise

    def write(self, record: JobRecord) -> JobRecord:
        """Write a record and return it."""
        write_json_atomic(self._path(record.request.id), asdict(record))
        return record

    def end(self, record: JobRecord, status: JobStatus) -> JobRecord:
        """Keep the last state of a job."""
        return self.write(replace(record, ended=status))

    def read(self, id: str) -> JobRecord:
        """Return a job's record.

        Raises:
            ConfigError: If there is none; the message names the known ones.
            DataError: If it is damaged.
        """
        known = self.ids()
        if id not in known:
            close = nearest(id, known)
            meant = f"; did you mean {close}?" if close else "."
            raise ConfigError(
                f"no job {id} was sent from here{meant} Jobs in {self._folder}: "
                f"{', '.join(known[-_NAMED_JOBS:]) or 'none'}"
            )
        values = read_json(self._path(id))
        try:
            request = values.pop("request")
            request["arguments"] = tuple(request["arguments"])
            request["run_dir"] = Path(request["run_dir"])
            if values["ended"] is not None:
                values["ended"] = JobStatus(**values["ended"])
            return JobRecord(request=JobRequest(**request), **values)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self._path(id)} is damaged, or of another version of dml-dist ({error!r}); "
                "restore it from a copy, or remove it"
            ) from None

    def _path(self, id: str) -> Path:
        return self._folder / f"{id}.json"
