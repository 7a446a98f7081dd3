"""What a search of values is on disk: its trials' runs, its storage, the best configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_dist.config.schema import FoldsValidationConfig, NoValidationConfig, RunConfig
from dml_dist.config.study import METHOD_KEY, TuneConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.study import (
    FREE,
    METHOD,
    StudyFolder,
    StudyKind,
    check_identity,
    is_below,
    own_values_in,
    with_changes,
    with_values,
)

SEARCHABLE = (
    *(path for path in METHOD if path not in ("checkpoint", "train.log_every")),
    "train.global_batch_size",
)
"""Fields that can be searched: none that says where, how fast or how long, or what is measured.

A value that is found on some ranks holds on any other number: batches and rates are global.
"""

# The storage's file in the folder decides on its kind, not the configuration.
_FREE_KEYS = ("trials", "parallel", "hours", "storage", "final_seeds")

TUNE = StudyKind(
    name="tune",
    identity=("name", "seed", *SEARCHABLE),
    free=(*FREE, *(f"tune.{key}" for key in _FREE_KEYS)),
)


@dataclass(frozen=True)
class TuningFolder(StudyFolder):
    """Where the parts of a search of values are.

    optuna.db or optuna.journal   Optuna's storage: every trial, its values and state
    runs/trial-N                  the run of a trial; with folds runs/trial-N-fold-K
    runs/VARIANT-seed-S           the runs of --final; VARIANT is tuned or untuned
    best.yaml                     the best configuration, for `dml-dist train`
    final.json                    the values that --final has evaluated on test classes
    """

    kind: StudyKind = TUNE

    @property
    def sqlite_path(self) -> Path:
        """Optuna's storage on a local disk."""
        return self.path / "optuna.db"

    @property
    def journal_path(self) -> Path:
        """Optuna's storage on a shared file system."""
        return self.path / "optuna.journal"

    @property
    def best_path(self) -> Path:
        """The best configuration."""
        return self.path / "best.yaml"

    @property
    def final_path(self) -> Path:
        """The values that --final has evaluated on test classes."""
        return self.path / "final.json"


def tune_section(config: RunConfig) -> TuneConfig:
    """Return the section `tune` of a configuration.

    Raises:
        ConfigError: If there is none.
    """
    if config.tune is None:
        raise ConfigError(
            f"the configuration {config.name} has no section tune, with a search space; "
            "`dml-dist config --explain tune` describes it, `dml-dist train` makes a single run"
        )
    return config.tune


def searched_paths(config: RunConfig, method: str | None) -> list[str]:
    """Return the paths that are searched for a method; None if the search has no methods."""
    return tune_section(config).paths_of(method)


def check_searchable(paths: Sequence[str]) -> None:
    """Check that trials may differ in some fields.

    Raises:
        ConfigError: If all trials share one of them.
    """
    if refused := [path for path in paths if not is_below(path, SEARCHABLE)]:
        raise ConfigError(
            f"tune.space cannot search {', '.join(refused)}: all trials share data, validation, "
            "evaluation, length and launch, so that their values can be compared and hold on any "
            f"number of ranks; search fields below {', '.join(SEARCHABLE)}"
        )


def tuned_config(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration of a run with searched values, without the section `tune`.

    Args:
        config: The search's.
        values: Path -> value; `method` names the method, if the search has methods.

    Raises:
        ConfigError: If the method's changes or the values are not valid, or change what all trials
            share.
    """
    found = plain = config.model_copy(update={"tune": None})
    method = values.get(METHOD_KEY)
    if method is not None:
        changes = tune_section(config).methods[method]
        found = with_changes(plain, changes, f"method {method} of {config.name}")
        check_identity(plain, found, SEARCHABLE, f"tune.methods.{method}")
    paths = {path: value for path, value in values.items() if path != METHOD_KEY}
    check_searchable(list(paths))
    return with_values(found, paths, f"{config.name}") if paths else found


def trial_configs(config: RunConfig, label: str, values: Mapping[str, Any]) -> list[RunConfig]:
    """Return the configurations of a trial's runs, one for each fold.

    Their test split is `validation`, so no test class is ever read, and they evaluate nothing at
    their end: a trial's value is that of its best validation.

    Args:
        config: The search's.
        label: Name of the trial, such as trial-3.
        values: Path -> value, as in `tuned_config`.
    """
    section = tune_section(config)
    found = tuned_config(config, values)
    evaluation = {"evaluate_test_every": None, "final": "none"}
    found = found.model_copy(
        update={
            "name": label,
            "data": found.data.model_copy(update={"test_split": "validation"}),
            "evaluation": found.evaluation.model_copy(update=evaluation),
            "checkpoint": found.checkpoint.model_copy(update={"keep": 1}),
            "loggers": (),
        }
    )
    if section.folds == 1:
        return [found]
    return [
        found.model_copy(
            update={
                "name": f"{label}-fold-{fold}",
                "validation": FoldsValidationConfig(num_folds=section.folds, fold=fold),
            }
        )
        for fold in range(section.folds)
    ]


def final_config(
    config: RunConfig, variant: str, seed: int, values: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of a run of --final: on all training classes, with test classes.

    Args:
        config: The search's.
        variant: Tuned or untuned.
        seed: The run's seed.
        values: Path -> value, as in `tuned_config`.
    """
    return tuned_config(config, values).model_copy(
        update={
            "name": f"{variant}-seed-{seed}",
            "seed": seed,
            "validation": NoValidationConfig(),
            "loggers": (),
        }
    )


def own_values(config: RunConfig, method: str | None) -> dict[str, Any]:
    """Return the configuration's own values of the searched paths, where the space has them."""
    chosen = {} if method is None else {METHOD_KEY: method}
    space = tune_section(config).space
    paths = searched_paths(config, method)
    return {**chosen, **own_values_in(space, paths, tuned_config(config, chosen))}
