"""TPE against random values: the best of 64 trials over 50 seeds, paired, without training.

    python -m tests.benchmarks.bench_search STUDY [--seeds 50] [--trials 64]

STUDY is the folder of a finished `dml-dist tune` with the sampler random and no pruner. A Gaussian
process is fitted to its trials, ranges scaled to 0..1 (logarithmic ones in their logarithm); its
mean is the surface that both samplers then search, with the code of `dml-dist tune`, one trial
after another and without pruning. How well it predicts a trial from all others is printed first:
what the samplers reach says something about training only as far as the surface does.

The surface has no noise, unlike training: the same values always give the same result, and the
best trial is truly the best one. Both samplers draw the same startup trials of a seed, so their
difference is that of the later ones.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from dml_dist.config.search_space import (
    CategoricalDistributionConfig,
    RandomSamplerConfig,
    SamplerConfig,
    TPESamplerConfig,
)
from dml_dist.config.study import METHOD_KEY, NoPrunerConfig, ObjectiveConfig, TuneConfig
from dml_dist.report.study.stats import t_interval
from dml_dist.runs.tuning import TuningFolder, tune_section
from dml_dist.studies.samplers import create_study
from dml_dist.studies.storage import load_study
from dml_dist.studies.trials import PROBLEM, Trials, completed

FEWEST_TRIALS = 10
SHOWN = (8, 16, 32, 64)
Surface = Callable[[Mapping[str, Any]], float]


def encoded(section: TuneConfig, values: Mapping[str, Any]) -> list[float]:
    """Return values as numbers in 0..1; choices and methods have one place each."""
    row = [float(values[METHOD_KEY] == method) for method in section.methods]
    for path, one in section.space.items():
        if isinstance(one, CategoricalDistributionConfig):
            row += [float(path in values and values[path] == choice) for choice in one.choices]
        elif path in values:
            scale = math.log if one.log else float
            low, high = scale(one.low), scale(one.high)
            row.append((scale(values[path]) - low) / ((high - low) or 1.0))
        else:
            row.append(0.5)  # A path that this method does not have.
    return row


def read_trials(path: Path) -> tuple[TuneConfig, np.ndarray, np.ndarray]:
    """Return the search of a study, and values (N, D) and results (N,) of its trials."""
    folder = TuningFolder(path)
    section = tune_section(folder.config())
    trials = completed(load_study(folder))
    if len(trials) < FEWEST_TRIALS:
        raise SystemExit(
            f"a surface needs at least {FEWEST_TRIALS} complete trials, {path} has {len(trials)}"
        )
    if section.sampler.name != "random" or section.pruner.name != "none":
        raise SystemExit(
            f"{path} has the sampler {section.sampler.name} and the pruner {section.pruner.name}; "
            "a surface needs trials all over the space, so give a study with random and none"
        )
    sign = 1.0 if section.objectives[0].direction == "maximize" else -1.0
    diverged = sum(PROBLEM in trial.user_attrs for trial in trials)
    print(f"{path}: {len(trials)} complete trials, {diverged} of them diverged")
    rows = np.array([encoded(section, trial.params) for trial in trials])
    return section, rows, np.array([sign * trial.values[0] for trial in trials])


def fit_surface(section: TuneConfig, rows: np.ndarray, results: np.ndarray) -> Surface:
    """Fit a Gaussian process, print what it is worth, and return its mean."""
    kernel = ConstantKernel() * Matern(np.full(rows.shape[1], 0.5), (0.05, 20.0), nu=2.5)
    model = GaussianProcessRegressor(
        kernel + WhiteKernel(0.1, (1e-6, 1.0)),
        normalize_y=True,
        n_restarts_optimizer=1,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # A length at the end of its range.
        predicted = cross_val_predict(clone(model), rows, results, cv=LeaveOneOut())
        model.fit(rows, results)
    print(
        f"results {results.min():.4f} to {results.max():.4f}, leave-one-out "
        f"R^2 {r2_score(results, predicted):.3f}, rank correlation "
        f"{spearmanr(results, predicted).statistic:.3f}"
    )
    return lambda values: float(model.predict(np.array([encoded(section, values)]))[0])


def best_so_far(section: TuneConfig, sampler: SamplerConfig, surface: Surface) -> np.ndarray:
    """Return the best result (trials,) after each trial of a search."""
    search = section.model_copy(update={"sampler": sampler})
    study = create_study(search, [ObjectiveConfig()], NoPrunerConfig(), steps=1)
    trials = Trials(study, search.space, search.paths_of, tuple(search.methods))
    results = []
    for _ in range(search.trials):
        suggestion = trials.suggest()
        results.append(surface(suggestion.values))
        trials.complete(suggestion.number, results[-1:])
    return np.maximum.accumulate(results)


def print_table(tpe: np.ndarray, random: np.ndarray) -> None:
    """Print the mean best and paired differences of best results (seeds, trials)."""
    num_seeds, num_trials = tpe.shape
    print(f"\n{'trials':>6}  {'TPE':>8}  {'random':>8}  {'difference, 95 %':<19}  won/tied/lost")
    for count in sorted({*(shown for shown in SHOWN if shown < num_trials), num_trials}):
        ours, theirs = tpe[:, count - 1], random[:, count - 1]
        gain = t_interval((ours - theirs).tolist())
        signs = [int((np.sign(ours - theirs) == sign).sum()) for sign in (1, 0, -1)]
        print(
            f"{count:6}  {ours.mean():8.4f}  {theirs.mean():8.4f}  "
            f"{gain.mean:+.4f} ± {gain.half:.4f}    {'/'.join(map(str, signs))}"
        )
    mark = random[:, -1].mean()
    passed = np.flatnonzero(tpe.mean(axis=0) >= mark)
    after = f"after {passed[0] + 1} trials" if len(passed) else f"not in {num_trials} trials"
    print(
        f"\nmeans of {num_seeds} seeds; the mean of TPE reaches that of random's {num_trials} "
        f"trials, {mark:.4f}, {after}"
    )


def main() -> None:
    """Fit the surface, search it with both samplers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=64)
    arguments = parser.parse_args()
    section, rows, results = read_trials(arguments.study)
    surface = fit_surface(section, rows, results)
    found: dict[str, list[np.ndarray]] = {"tpe": [], "random": []}
    for seed in range(arguments.seeds):
        search = section.model_copy(update={"seed": seed, "trials": arguments.trials})
        for sampler in (TPESamplerConfig(), RandomSamplerConfig()):
            found[sampler.name].append(best_so_far(search, sampler, surface))
    print_table(np.stack(found["tpe"]), np.stack(found["random"]))


if __name__ == "__main__":
    main()
