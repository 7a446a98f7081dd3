"""Searches of values without runs, for tests of their storage."""

from __future__ import annotations

from typing import Any

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.runs.tuning import TuningFolder
from dml_dist.studies.storage import check_tuning, open_trials
from dml_dist.studies.trials import Trials

LR = {"type": "float", "low": 1e-4, "high": 0.1, "log": True}


def configuration(*changes: str, **tune: Any) -> RunConfig:
    """With a journal, which is opened faster than sqlite; the own rate is outside the ranges."""
    section = {"space": {"optim.lr": LR}, "storage": "journal", **tune}
    return parse_config(
        {
            "name": "demo",
            "data": {"path": "nowhere/shards"},
            "train": {"global_batch_size": 16, "steps": 20},
            "optim": {"lr": 7.0},
            "launch": {"launcher": "ray"},
            "tune": section,
        },
        list(changes),
    )


def begin(config: RunConfig, folder: TuningFolder, **options: Any) -> tuple[Trials, list[str]]:
    """Open a study as the command does."""
    check_tuning(config, folder, options.get("source"))
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_config(config)
    return open_trials(config, folder, 20, **options)


def add(trials: Trials, value: float | None = None, **values: Any) -> int:
    """Suggest a trial with these values and complete it, if it has a final value."""
    trials.enqueue([{f"optim.{key}": one for key, one in values.items()}])
    one = trials.suggest()
    if value is not None:
        trials.complete(one.number, [value])
    return one.number
