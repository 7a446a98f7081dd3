"""One trial of a search, in a process of the cluster: its runs, fold by fold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dml_dist.config.schema import RunConfig
from dml_dist.config.study import TRAIN_SECONDS
from dml_dist.errors import DivergedError, DmlDistError, RunError, RunStopped
from dml_dist.files import lock_file
from dml_dist.orchestration.ray_tune import Outcome, Payload, Report
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from dml_dist.runs.tuning import TUNE
from dml_dist.runtime.signals import StopRequest, polling
from dml_dist.studies.pool import execute_run, finished_metrics

_SECONDS_BETWEEN_READS = 0.5
# Processes of a driver that was killed end within seconds.
_SECONDS_FOR_AN_EARLIER_PROCESS = 60.0


def trial_payload(
    configs: Sequence[RunConfig], folders: Sequence[Path], metrics: Sequence[str], steps: int
) -> dict[str, Any]:
    """Return the task of a trial as JSON values, for `execute_trial`.

    Args:
        configs: Configuration of each of its runs.
        folders: Their folders, absolute.
        metrics: The objectives.
        steps: Optimiser updates of each run.
    """
    return {
        "runs": [
            {"config": config.model_dump_json(), "folder": str(folder)}
            for config, folder in zip(configs, folders, strict=True)
        ],
        "metrics": list(metrics),
        "steps": steps,
    }


def execute_trial(payload: Payload, report: Report, stop: StopRequest) -> Outcome:
    """Execute a trial's runs, or continue them.

    Args:
        payload: Of `trial_payload`.
        report: Takes intermediate values of the first objective at a step of the trial.
        stop: Request to stop.

    Returns:
        `state` is complete with `values`, one of each objective; stopped with `reason`; diverged or
        failed with `problem`. `seconds` is this attempt's time, `steps` are all updates made.
    """
    start = time.monotonic()
    outcome: Outcome = {"state": "complete"}
    finals: list[dict[str, float]] = []
    try:
        for fold in range(len(payload["runs"])):
            finals.append(_execute_fold(payload, fold, finals, report, stop))
        outcome["values"] = [
            statistics.fmean(final[metric] for final in finals) for metric in payload["metrics"]
        ]
    except RunStopped:
        outcome = {"state": "stopped", "reason": stop.reason}
    except DmlDistError as error:
        state = "diverged" if isinstance(error, DivergedError) else "failed"
        outcome = {"state": state, "problem": str(error)}
    return {**outcome, "seconds": time.monotonic() - start, "steps": _steps_made(payload)}


def _execute_fold(
    payload: Payload,
    fold: int,
    finals: Sequence[Mapping[str, float]],
    report: Report,
    stop: StopRequest,
) -> dict[str, float]:
    """Execute the run of a fold and return its objectives."""
    run = payload["runs"][fold]
    config = RunConfig.model_validate_json(run["config"])
    folder = Path(run["folder"])
    metric, steps = payload["metrics"][0], payload["steps"]
    before = [final[metric] for final in finals]

    def pass_on(record: Mapping[str, Any]) -> None:
        if metric in record:
            value = statistics.fmean([*before, float(record[metric])])
            report(fold * steps + int(record["step"]), value)

    _wait_for_an_earlier_process(folder)
    metrics = finished_metrics(config, folder, TUNE)
    with _validations(folder, pass_on):
        if metrics is None:
            metrics = execute_run(config, folder, stop=stop)
    found = {**metrics.get("validation", {}), TRAIN_SECONDS: _train_seconds(folder, metrics)}
    if missing := [name for name in payload["metrics"] if name not in found]:
        raise RunError(
            f"{config.name} recorded no {', '.join(missing)} at its validations, but "
            f"{', '.join(metrics.get('validation', {}))}; correct tune.objectives"
        )
    return {name: float(found[name]) for name in payload["metrics"]}


def _train_seconds(folder: Path, metrics: Mapping[str, Any]) -> float:
    """Return the training time of a run; after a resumption its speed times all images."""
    last = float(metrics["seconds"]["train"])
    records = read_records(RunFolder(folder).records("steps"))
    attempts = {record["attempt"] for record in records}
    if len(attempts) < 2:
        return last
    made = sum(record["attempt"] == max(attempts) for record in records)
    return last * len(records) / made


@contextmanager
def _validations(folder: Path, take: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Pass the records of a run's validations on, from a thread, each of them once."""
    path = RunFolder(folder).records("evaluations")
    seen: set[int] = set()
    size = -1

    def read() -> None:
        for record in read_records(path):
            if record.get("protocol") == "validation" and record["step"] not in seen:
                seen.add(record["step"])
                take(record)

    def look() -> bool:
        nonlocal size
        now = path.stat().st_size if path.is_file() else -1
        if now != size:
            size = now
            read()
        return False

    try:
        with polling(look, _SECONDS_BETWEEN_READS):
            yield
    finally:
        read()


def _wait_for_an_earlier_process(folder: Path) -> None:
    """Wait until no process works on a run: those of a killed driver end within seconds."""
    if not RunFolder(folder).info_path.is_file():
        return
    try:
        with lock_file(folder / ".lock", wait_seconds=_SECONDS_FOR_AN_EARLIER_PROCESS):
            pass
    except BlockingIOError as error:
        raise RunError(
            f"another process still works on the run {folder} after "
            f"{_SECONDS_FOR_AN_EARLIER_PROCESS:g} s ({error.strerror}); end it, then repeat the "
            "command"
        ) from None


def _steps_made(payload: Payload) -> int:
    """Return the optimiser updates of all runs of a trial."""
    made = 0
    for run in payload["runs"]:
        folder = RunFolder(Path(run["folder"]))
        if not folder.info_path.is_file():
            break
        info = folder.info()
        made += payload["steps"] if info.finished else info.status.step or _recorded(folder)
    return made


def _recorded(folder: RunFolder) -> int:
    records = read_records(folder.records("steps"))
    finite = [r["step"] for r in records if math.isfinite(r.get("loss", math.nan))]
    return max(finite, default=0)
