"""The search of a method's values with Optuna's sampler, by ask and tell; files alone are kept.

A search that is continued asks the sampler for all trials again: with the same seed and the same
results it suggests the same values, and finished trials are read from their files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import (
    CategoricalDistributionConfig,
    DistributionConfig,
    FloatDistributionConfig,
    IntDistributionConfig,
    format_value,
)
from dml_dist.config.study import SearchConfig
from dml_dist.errors import ConfigError, RunError
from dml_dist.orchestration.ray_tasks import Execute
from dml_dist.random_streams import Stream, seed_of
from dml_dist.runs.comparison import (
    COMPARE,
    ComparisonFolder,
    compare_section,
    method_config,
    searched_paths,
    trial_config,
)
from dml_dist.runs.study import digest, value_at
from dml_dist.studies.pool import is_diverged

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

MAX_STARTUP_TRIALS = 10
"""Upper bound on the trials with random values, before the sampler learns from earlier ones."""

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
    import optuna

    section = compare_section(config).search
    paths = searched_paths(config, method)
    if section is None or not paths:
        return {}
    space = {path: distribution(section.space[path]) for path in paths}
    study = _study(section)
    study.enqueue_trial(own_values(config, method))
    found: list[tuple[float, dict[str, Any]]] = []
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
            f"none of the {section.trials} trials of {method} had a finite loss; see "
            f"{folder.trial(method, 0).parent}, and lower the values in compare.search.space"
        )
    return max(found, key=lambda one: one[0])[1]  # The first of equals.


def distribution(config: DistributionConfig) -> BaseDistribution:
    """Return Optuna's distribution of a configured one."""
    from optuna import distributions

    match config:
        case FloatDistributionConfig():
            return distributions.FloatDistribution(
                config.low, config.high, log=config.log, step=config.step
            )
        case IntDistributionConfig():
            return distributions.IntDistribution(
                config.low, config.high, log=config.log, step=config.step
            )
        case CategoricalDistributionConfig():
            return distributions.CategoricalDistribution(config.choices)
        case _:
            assert_never(config)


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


def own_values(config: RunConfig, method: str) -> dict[str, Any]:
    """Return the method's own values of the searched paths, where the space contains them."""
    section = compare_section(config).search
    assert section is not None
    own = method_config(config, method)
    values = {path: value_at(own, path) for path in searched_paths(config, method)}
    return {path: value for path, value in values.items() if section.space[path].contains(value)}


def _study(section: SearchConfig) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=seed_of(Stream.HYPERPARAMETERS, section.seed, bits=32),
        n_startup_trials=max(1, min(MAX_STARTUP_TRIALS, section.trials // 2)),
    )
    return optuna.create_study(direction="maximize", sampler=sampler)


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
                "another configuration, or another version of Optuna suggested its values "
                f"{outcome['values']}; give another --run-dir"
            )
        return outcome
    outcome = {"digest": key, "values": dict(values), "map_at_r": None, "problem": None}
    path = folder.trial(method, number)
    try:
        outcome["map_at_r"] = float(execute(trial, path)["validation"]["map_at_r"])
    except RunError as error:
        if not is_diverged(path):
            raise
        outcome["problem"] = str(error)
    folder.write_outcome(method, number, outcome)
    return outcome
