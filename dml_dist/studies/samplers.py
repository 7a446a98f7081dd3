"""Optuna's studies, samplers and pruners from their configuration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, assert_never

from dml_dist.config.search_space import (
    CategoricalDistributionConfig,
    CMAESSamplerConfig,
    DistributionConfig,
    FloatDistributionConfig,
    GPSamplerConfig,
    GridSamplerConfig,
    IntDistributionConfig,
    RandomSamplerConfig,
    SearchSection,
    TPESamplerConfig,
)
from dml_dist.config.study import (
    METHOD_KEY,
    ASHAPrunerConfig,
    MedianPrunerConfig,
    NoPrunerConfig,
    ObjectiveConfig,
    PrunerConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.random_streams import Stream, seed_of

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

_MAX_STARTUP_TRIALS = 10
_DEFAULT_RUNG = 9
"""Without grace_steps the median rule begins after 1 / 9 of a trial, as ASHA does by default."""


def create_study(
    section: SearchSection,
    objectives: Sequence[ObjectiveConfig],
    pruner: PrunerConfig,
    *,
    steps: int,
    name: str | None = None,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """Open a study, or make it where there is none of this name.

    Args:
        section: The search, for its sampler and seed.
        objectives: What is optimised.
        pruner: What ends trials early.
        steps: Optimiser updates of a whole trial.
        name: Of the study in the storage.
        storage: Optuna's storage; None keeps trials in memory.

    Raises:
        ConfigError: If the sampler needs a package that is not installed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=[objective.direction for objective in objectives],
        pruner=_pruner(pruner, steps),
        load_if_exists=True,
    )
    # A sampler that begins again with the same seed would repeat its first values.
    begun = len(study.trials)
    seed = seed_of(Stream.HYPERPARAMETERS, section.seed, *([begun] if begun else []), bits=32)
    study.sampler = _sampler(section, seed)
    return study


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


def grid_points(
    space: Mapping[str, DistributionConfig],
    paths_of: Callable[[str | None], Sequence[str]],
    methods: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Yield every combination of values, method by method."""
    for method in methods or (None,):
        paths = paths_of(method)
        chosen = {} if method is None else {METHOD_KEY: method}
        for values in product(*(space[path].grid or () for path in paths)):
            yield {**chosen, **dict(zip(paths, values, strict=True))}


def grid_size(space: Mapping[str, DistributionConfig], paths: Sequence[str]) -> int:
    """Return the number of combinations of values of some paths."""
    return math.prod(len(space[path].grid or ()) for path in paths)


def _sampler(section: SearchSection, seed: int) -> BaseSampler:
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Options that Optuna may change.
        match section.sampler:
            case TPESamplerConfig(startup_trials=startup):
                trials = int(getattr(section, "trials", 2 * _MAX_STARTUP_TRIALS))
                return samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=startup or max(1, min(_MAX_STARTUP_TRIALS, trials // 2)),
                    multivariate=True,
                    group=True,
                    constant_liar=True,
                )
            case RandomSamplerConfig() | GridSamplerConfig():
                return samplers.RandomSampler(seed=seed)  # A grid is enqueued.
            case CMAESSamplerConfig(startup_trials=startup):
                if find_spec("cmaes") is None:
                    raise ConfigError(
                        "sampler cmaes needs the package cmaes, which is not installed; install it "
                        "with pip install cmaes, or use tpe, gp or random"
                    )
                return samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case GPSamplerConfig(startup_trials=startup):
                return samplers.GPSampler(
                    seed=seed, n_startup_trials=startup, deterministic_objective=False
                )
            case _:
                assert_never(section.sampler)


def first_rung(pruner: PrunerConfig, steps: int) -> int | None:
    """Return the first step at which a trial of `steps` can be pruned; None: at no step."""
    match pruner:
        case ASHAPrunerConfig():
            return pruner.grace_steps or max(1, steps // pruner.reduction**2)
        case MedianPrunerConfig():
            return pruner.grace_steps or max(1, steps // _DEFAULT_RUNG)
        case NoPrunerConfig():
            return None
        case _:
            assert_never(pruner)


def _pruner(config: PrunerConfig, steps: int) -> BasePruner:
    from optuna import pruners

    first = first_rung(config, steps) or 0
    match config:
        case ASHAPrunerConfig():
            return pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=config.reduction, min_early_stopping_rate=0
            )
        case MedianPrunerConfig():
            return pruners.MedianPruner(
                n_startup_trials=config.startup_trials, n_warmup_steps=first
            )
        case NoPrunerConfig():
            return pruners.NopPruner()
        case _:
            assert_never(config)
