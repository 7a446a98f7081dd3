"""The folder of a run, which holds everything that reports and later commands read.

    config.yaml                  the resolved configuration
    run.json                     name, seed, status, facts, and each attempt with its environment
    records/steps.jsonl          training records, one JSON line each
    records/evaluations.jsonl    validation and test records
    records/checkpoints.jsonl    when each checkpoint was saved, and how long it took
    checkpoints/                 written and read by training alone
    metrics.json                 final evaluation, or best validation if `evaluation.final` is none
    embeddings.npz               embeddings of the final evaluation (runs/artifacts.py)
    per_class.parquet            results per class of the final evaluation (runs/artifacts.py)
    metrics-SPLIT-CHECKPOINT.json, per_class-SPLIT-CHECKPOINT.parquet
                                 the same files from `dml-dist evaluate`
    loggers/                     files of experiment trackers, if the configuration names any
    report/                      the page, its figures, retrieval gallery and proxy statistics

An attempt is one start of the training processes: the first one, and one more for each
resumption or restart. Only rank 0 and its driver write; files are replaced atomically.
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from dml_dist.errors import ConfigError, RunError
from dml_dist.files import lock_file, sync_folder, write_config_atomic, write_json_atomic
from dml_dist.runs.artifacts import write_metrics
from dml_dist.runs.info import Attempt, Ended, RunInfo, RunStatus, now, read_run_info
from dml_dist.runs.provenance import git_revision, installed_versions
from dml_dist.urls import is_url, shown_url

# Ranks of a killed command end within seconds, when they detect missing peers or Ray's processes
# detect that their owner is dead.
_SECONDS_FOR_AN_EARLIER_RANK = 60.0


class RunFolder:
    """A run's folder: where its files are, and the only writer of run.json and metrics.json."""

    def __init__(self, path: Path) -> None:
        """Wrap a path; use `create` or `open` to get a folder that holds a run.

        Raises:
            ConfigError: If it is a URL.
        """
        if is_url(path):
            raise ConfigError(
                f"a run folder needs a POSIX file system shared by the nodes, got the URL {path}; "
                "give --run-dir a folder, such as one of a mounted network disk"
            )
        self.path = Path(path).absolute()

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def info_path(self) -> Path:
        """The run's identity and attempts."""
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The metrics that `finish` writes."""
        return self.path / "metrics.json"

    @property
    def embeddings(self) -> Path:
        """Embeddings of the final evaluation; missing if they were not kept."""
        return self.path / "embeddings.npz"

    @property
    def per_class(self) -> Path:
        """Results per class of the final evaluation."""
        return self.path / "per_class.parquet"

    def evaluation(self, split: str, checkpoint: str) -> tuple[Path, Path]:
        """Return the files of a later evaluation: its metrics and its results per class."""
        name = f"{split}-{Path(checkpoint).name}"
        return self.path / f"metrics-{name}.json", self.path / f"per_class-{name}.parquet"

    @property
    def loggers(self) -> Path:
        """The folder of experiment trackers that write to this disk."""
        return self.path / "loggers"

    @property
    def report_dir(self) -> Path:
        """The folder of the page and its figures."""
        return self.path / "report"

    def records(self, kind: Literal["steps", "evaluations", "checkpoints"]) -> Path:
        """The file of records of a kind."""
        return self.path / "records" / f"{kind}.jsonl"

    @classmethod
    def create(cls, path: Path, config: str, *, name: str, seed: int) -> RunFolder:
        """Make the folder of a new run.

        Args:
            path: Missing or empty folder.
            config: Text of the resolved configuration, YAML.
            name: Name of the run.
            seed: Seed of all random streams.

        Raises:
            ConfigError: If the folder holds a run or any other file; nothing is written.
        """
        (run := cls(path)).require_new()
        if run._never_began():
            shutil.rmtree(run.path)
        run.path.mkdir(parents=True, exist_ok=True)
        try:
            # If two commands start at once, only one of them creates this folder.
            run.records("steps").parent.mkdir()
        except FileExistsError:
            raise ConfigError(
                f"another command is starting a run in {run.path}; give another --run-dir or name"
            ) from None
        run.checkpoints.mkdir()
        run.write_config(config)
        # From here on it is a run.
        run._write(RunInfo(name, now(), seed, RunStatus("running", now())))
        sync_folder(run.path.parent)
        return run

    def write_config(self, config: str) -> None:
        """Write the resolved configuration, YAML."""
        write_config_atomic(self.config_path, config)

    def require_new(self) -> None:
        """Check that the folder is missing or empty; `create` also checks it.

        A run that failed before its first step, as by a wrong configuration, counts as none: the
        corrected command may use its folder.

        Raises:
            ConfigError: If it is not; the message says what it holds and what to do.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.info_path.is_file():
            what = "is not empty and holds no run" if self.path.is_dir() else "is a file"
            raise ConfigError(
                f"a run needs a new or empty folder, but {self.path} {what}; "
                "give another --run-dir or name, or remove it"
            )
        if self._never_began():
            return
        info = self.info()
        step = self.last_checkpoint_step()
        checkpoint = "no checkpoint yet" if step is None else f"last checkpoint at step {step}"
        raise ConfigError(
            f"{self.path} already holds the run {info.name!r} ({info.status.state} "
            f"since {info.status.time}, {checkpoint}); continue it with --resume, or give "
            "another --run-dir or another name"
        )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the run in an existing folder.

        Raises:
            ConfigError: If the folder is missing or not a run; the message lists runs near it.
        """
        run = cls(path)
        if run.info_path.is_file():
            return run
        found = "it does not exist"
        if run.path.exists():
            found = "it holds no run.json" if run.path.is_dir() else "it is a file"
        places = [run.path, run.path.parent] if run.path.is_dir() else [run.path.parent]
        runs = [str(info.parent) for place in places for info in sorted(place.glob("*/run.json"))]
        known = f"; runs near it: {', '.join(runs[:8])}" if runs else ""
        raise ConfigError(
            f"{run.path} is not the folder of a run: {found}{known}; "
            "give the folder that `dml-dist train` printed in its last line"
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other commands; the lock ends with this process.

        Raises:
            ConfigError: If another command is working on the run.
        """
        with self._hold(".lock", 0.0) as owner:
            if owner is not None:
                raise ConfigError(
                    f"another command is working on the run {self.path} now ({owner}); wait for "
                    "it or end it, or give another --run-dir"
                )
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the rank 0 that writes; waits for an earlier one to end.

        Ranks of a killed command may live for some seconds, on other machines or under Ray.

        Raises:
            RunError: If an earlier rank 0 does not end.
        """
        with self._hold(".writer", _SECONDS_FOR_AN_EARLIER_RANK) as owner:
            if owner is not None:
                raise RunError(
                    f"rank 0 of an earlier attempt still writes to {self.path} after "
                    f"{_SECONDS_FOR_AN_EARLIER_RANK:g} s ({owner}); end that process, then "
                    "continue with --resume"
                )
            yield

    @contextmanager
    def _hold(self, name: str, wait_seconds: float) -> Iterator[str | None]:
        """Hold a lock file of this run and yield None, or yield the other owner."""
        with ExitStack() as held:
            owner = None
            try:
                held.enter_context(lock_file(self.path / name, wait_seconds=wait_seconds))
            except BlockingIOError as error:
                owner = error.strerror
            yield owner

    def info(self) -> RunInfo:
        """Read run.json.

        Raises:
            DataError: If it is damaged.
        """
        return read_run_info(self.info_path)

    def begin_attempt(self, **facts: Any) -> int:
        """Record the start of the training processes; return the attempt's number, from 1.

        Only rank 0 calls this. The status becomes running, even for a finished run, whose
        metrics.json is kept until the next `finish`.

        Args:
            facts: What the caller knows of the `Attempt`: world_size, launcher, device, command,
                and what else is not its default.
        """
        info = self.info()
        attempt = Attempt(
            attempt=len(info.attempts) + 1,
            started=now(),
            git=git_revision(Path(__file__).parent),
            versions=installed_versions(),
            platform=platform.platform(),
            host=socket.gethostname(),
            **facts,
        )
        running = RunStatus("running", attempt.started)
        self._write(replace(info, attempts=(*info.attempts, attempt), status=running))
        return attempt.attempt

    def begin_training(self, step: int) -> None:
        """Record that the last attempt makes its first step now, after `step` updates."""
        info = self.info()
        last = replace(info.attempts[-1], first_step=step, began=now("milliseconds"))
        self._write(replace(info, attempts=(*info.attempts[:-1], last)))

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Keep facts about the data and the plan, label -> value, for the report."""
        info = self.info()
        self._write(replace(info, facts={**info.facts, **facts}))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json and mark the run finished, in this order."""
        write_metrics(self.metrics_path, metrics)
        self._write(replace(self.info(), status=RunStatus("finished", now())))

    def end(self, state: Ended, reason: str, step: int | None = None) -> None:
        """Mark the run stopped after a step, or failed."""
        self._write(replace(self.info(), status=RunStatus(state, now(), reason, step)))

    def last_checkpoint_step(self) -> int | None:
        """The highest step in a folder name of checkpoints/, complete or not."""
        if not self.checkpoints.is_dir():
            return None
        matches = (re.match(r"step[_-]?(\d+)", path.name) for path in self.checkpoints.iterdir())
        return max((int(match[1]) for match in matches if match), default=None)

    def _never_began(self) -> bool:
        """Whether the folder holds a run that failed before its first step."""
        if not self.info_path.is_file() or self.last_checkpoint_step() is not None:
            return False
        steps = self.records("steps")
        if steps.is_file() and steps.stat().st_size:
            return False
        info = self.info()
        return info.status.state == "failed" and not any(one.began for one in info.attempts)

    def _write(self, info: RunInfo) -> None:
        write_json_atomic(self.info_path, shown_url(asdict(info)))
