"""The search of a method's values; the files of its trials alone are kept.

A search that is continued asks the sampler for all trials again: with the same seed and the same
results it suggests the same values, and finished trials are read from their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import DistributionConfig, GridSamplerConfig, format_value
from dml_dist.config.study import NoPrunerConfig, ObjectiveConfig, SearchConfig
from dml_dist.errors import ConfigError, DivergedError, RunError
from dml_dist.orchestration.ray_tasks import Execute
from dml_dist.runs.comparison import (
    COMPARE,
    ComparisonFolder,
    compare_section,
    method_config,
    searched_paths,
    trial_config,
)
from dml_dist.runs.study import digest, own_values_in
from dml_dist.studies.samplers import create_study, grid_points, grid_size
from dml_dist.studies.trials import Trials

if TYPE_CHECKING:
    import optuna

TrialCallback = Callable[[str, int, Mapping[str, Any]], None]
"""Takes method, number of the trial and its outcome."""


def search_method(
    config: RunConfig,
    method: str,
    folder: ComparisonFolder,
    execute: Execute,
    callback: TrialCallback,
) -> dict[str, Any]:
    """Return the best values of a method among its trials; empty when none are searched.

    Args:
        config: The comparison's configuration, paths absolute.
        method: One of its methods.
        folder: Where the comparison is.
        execute: Executes a run.
        callback: Called after every trial.

    Raises:
        RunError: If no trial of the method had a finite loss.
    """
    section = compare_section(config).search
    paths = searched_paths(config, method)
    if section is None or not paths:
        return {}
    trials = Trials(open_study(section), section.space, lambda _: paths)
    trials.enqueue(starting_points(config, method))
    for _ in range(num_trials(config, method)):
        suggestion = trials.suggest()
        number = suggestion.number
        outcome = _outcome(config, method, number, suggestion.values, folder, execute)
        callback(method, number, outcome)
        if outcome["map_at_r"] is None:
            trials.diverged(number, outcome["problem"])
        else:
            trials.complete(number, [outcome["map_at_r"]])
    best = trials.best()
    if best is None:
        raise RunError(
            f"none of the {trials.count()} trials of {method} had a finite loss; see "
            f"{folder.trial(method, 0).parent}, and lower the values in compare.search.space"
        )
    return best.params


def open_study(section: SearchConfig) -> optuna.Study:
    """Return a new study in memory: only the sampler's seed and the results decide on its values.

    Raises:
        ConfigError: If the sampler needs a package that is not installed.
    """
    return create_study(section, [ObjectiveConfig()], NoPrunerConfig(), steps=section.steps)


def num_trials(config: RunConfig, method: str) -> int:
    """Return the number of a method's trials: of a grid at most the number of its points."""
    section = compare_section(config).search
    paths = searched_paths(config, method)
    if section is None or not paths:
        return 0
    if isinstance(section.sampler, GridSamplerConfig):
        return min(section.trials, grid_size(section.space, paths))
    return section.trials


def starting_points(config: RunConfig, method: str) -> list[dict[str, Any]]:
    """Return the values of a method's first trials: its own, then the points of a grid."""
    section = compare_section(config).search
    assert section is not None
    paths = searched_paths(config, method)
    own = own_values_in(section.space, paths, method_config(config, method))
    if not isinstance(section.sampler, GridSamplerConfig):
        return [own]
    points = grid_points(section.space, lambda _: paths)
    # The rest of incomplete values would be random, and not on the grid.
    return [*([own] if len(own) == len(paths) else []), *points]


def check_space(
    space: Mapping[str, DistributionConfig],
    paths: Sequence[str],
    build: Callable[[Mapping[str, Any]], RunConfig],
    where: str,
    hint: str,
) -> None:
    """Check that a configuration takes the ends of every range, and every choice.

    Args:
        space: Path -> distribution.
        paths: The paths to check.
        build: Makes the configuration of a trial with one value, the others its own.
        where: What errors name: section, and method or configuration.
        hint: What errors recommend besides correcting the space.

    Raises:
        ConfigError: If it does not take one of them.
    """
    for path in paths:
        for value in space[path].extremes:
            try:
                build({path: value})
            except ConfigError as error:
                raise ConfigError(
                    f"{where} cannot take {path} = {format_value(value)} of {space[path]}; "
                    f"{hint}:\n{error}"
                ) from None


def _outcome(
    config: RunConfig,
    method: str,
    number: int,
    values: Mapping[str, Any],
    folder: ComparisonFolder,
    execute: Execute,
) -> dict[str, Any]:
    """Return the outcome of a trial, from its file if it has finished before."""
    trial = trial_config(config, method, number, values)
    key = digest(trial, COMPARE)
    outcome = folder.outcome(method, number)
    if outcome is not None:
        if outcome["digest"] != key:
            raise ConfigError(
                f"trial {number} of {method} in {folder.outcome_path(method, number)} is of "
                "another configuration, or another version of dml_dist or Optuna suggested its "
                f"values {outcome['values']}; give another --run-dir"
            )
        return outcome
    outcome = {"digest": key, "values": dict(values), "map_at_r": None, "problem": None}
    path = folder.trial(method, number)
    try:
        outcome["map_at_r"] = float(execute(trial, path)["validation"]["map_at_r"])
    except DivergedError as error:
        outcome["problem"] = str(error)
    folder.write_outcome(method, number, outcome)
    return outcome
