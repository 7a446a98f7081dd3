"""The search of a method's values: Optuna's sampler, asked and told; nothing but files is kept.

A search that is continued asks the sampler for all trials again: with the same seed and the same
answers it draws the same values, and what is finished is read from its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_dist.config.schema import RunConfig
from dml_dist.config.study import SearchConfig
from dml_dist.errors import ConfigError, RunError
from dml_dist.files import read_json, write_json_atomic
from dml_dist.orchestration.ray_tasks import Execute
from dml_dist.runs.study import (
    ComparisonFolder,
    compare_section,
    digest,
    method_config,
    searched_paths,
    trial_config,
    value_at,
)
from dml_dist.studies.pool import is_diverged

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

MOST_STARTUP_TRIALS = 10
"""Trials, of many, whose values are drawn at random before the sampler learns from them."""

TrialCallback = Callable[[str, int, Mapping[str, Any]], None]
"""Takes method, number of the trial and its outcome."""


def search_method(
    config: RunConfig,
    method: str,
    folder: ComparisonFolder,
    execute: Execute,
    callback: TrialCallback,
) -> dict[str, float]:
    """Return the best values of a method among its trials; empty when none are searched.

    Args:
        config: The comparison's configuration, paths absolute.
        method: One of its methods.
        folder: Where the comparison is.
        execute: Carries out a run.
        callback: Called after every trial.

    Raises:
        RunError: If no trial of the method had a finite loss.
    """
    import optuna

    section = compare_section(config).search
    paths = searched_paths(config, method)
    if section is None or not paths:
        return {}
    space: dict[str, BaseDistribution] = {
        path: optuna.distributions.FloatDistribution(
            section.space[path].low, section.space[path].high, log=section.space[path].log
        )
        for path in paths
    }
    study = _study(section)
    study.enqueue_trial(own_values(config, method))
    found: list[tuple[float, dict[str, float]]] = []
    for number in range(section.trials):
        trial = study.ask(space)
        outcome = _outcome(config, method, number, trial.params, folder, execute)
        callback(method, number, outcome)
        if outcome["map_at_r"] is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, outcome["map_at_r"])
            found.append((outcome["map_at_r"], dict(trial.params)))
    if not found:
        raise RunError(
            f"required a trial of {method} with a finite loss, got none of {section.trials}; see "
            f"{folder.trial(method, 0).parent}, and lower the ranges of compare.search.space"
        )
    return max(found, key=lambda one: one[0])[1]  # The first of equals.


def own_values(config: RunConfig, method: str) -> dict[str, float]:
    """Return the method's own values of the searched paths, as far as they lie in the ranges."""
    section = compare_section(config).search
    assert section is not None
    own = method_config(config, method)
    values = {path: value_at(own, path) for path in searched_paths(config, method)}
    return {
        path: float(value)
        for path, value in values.items()
        if value is not None and section.space[path].low <= value <= section.space[path].high
    }


def _study(section: SearchConfig) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=section.seed,
        n_startup_trials=max(1, min(MOST_STARTUP_TRIALS, section.trials // 2)),
    )
    return optuna.create_study(direction="maximize", sampler=sampler)


def _outcome(
    config: RunConfig,
    method: str,
    number: int,
    values: Mapping[str, float],
    folder: ComparisonFolder,
    execute: Execute,
) -> dict[str, Any]:
    """Return what a trial gave, of its file if it was finished before."""
    path = folder.trial(method, number)
    file = path.with_name(f"{path.name}.json")
    trial = trial_config(config, method, number, values)
    if file.is_file():
        outcome = read_json(file)
        if outcome["digest"] != digest(trial):
            raise ConfigError(
                f"required trial {number} of {method} in {file}, got one of another configuration "
                f"or of another version of Optuna, with {outcome['values']}; give another --run-dir"
            )
        return dict(outcome)
    outcome = {"digest": digest(trial), "values": dict(values), "map_at_r": None, "problem": None}
    try:
        outcome["map_at_r"] = float(execute(trial, path)["trained"]["map_at_r"])
    except RunError as error:
        if not is_diverged(path):
            raise
        outcome["problem"] = str(error)
    _write(file, outcome)
    return outcome


def _write(file: Path, outcome: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(file, outcome)
