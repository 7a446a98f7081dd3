"""The result of a search: its best configuration as a file, and `dml-dist tune --final`.

Test classes are locked during a search. `run_final` alone evaluates them, for one choice of values:
whoever picks among several results on test classes has no result on unseen classes any more.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from dml_dist.config.load import dump_config
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import format_value
from dml_dist.config.study import METHOD_KEY
from dml_dist.errors import ConfigError, RunError
from dml_dist.files import read_json, write_config_atomic, write_json_atomic
from dml_dist.orchestration.train import plan_without_data
from dml_dist.report.formatting import (
    format_metric,
    group,
    is_metric,
    is_share,
    metric_label,
    recall_key,
    result_table,
)
from dml_dist.report.study.stats import LEVEL, Interval, format_interval, t_interval
from dml_dist.runs.artifacts import read_metrics
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.tuning import (
    TuningFolder,
    final_config,
    trial_configs,
    tune_section,
    tuned_config,
)
from dml_dist.runtime.progress import Emit, note, phase
from dml_dist.studies.pool import Pool
from dml_dist.studies.trials import LABEL, Trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TUNED, UNTUNED = "tuned", "untuned"
"""The variants of --final: the best trial's values, and the configuration's own."""


# ---------------------------------------------------------------- the best configuration


def write_best(config: RunConfig, folder: TuningFolder, trials: Trials) -> Path | None:
    """Write the best trial's configuration for `dml-dist train`, headed by where it comes from.

    Args:
        config: The search's configuration, paths absolute.
        folder: The search's folder.
        trials: Its trials.

    Returns:
        The file; None if no trial is complete.
    """
    best = trials.best()
    if best is None:
        return None
    found = tuned_config(config, best.params)
    found = found.model_copy(update={"name": f"{config.name}_best"})
    lines = _origin(config, folder, best, trials.count())
    text = "".join(f"# {line}\n" for line in lines)
    write_config_atomic(folder.best_path, f"{text}\n{dump_config(found)}")
    return folder.best_path


def _origin(config: RunConfig, folder: TuningFolder, best: FrozenTrial, count: int) -> list[str]:
    section = tune_section(config)
    label = best.user_attrs[LABEL]
    names = [one.name for one in trial_configs(config, label, best.params)]
    metrics = [read_metrics(RunFolder(folder.run(name)).metrics_path) for name in names]
    steps = [str(one["checkpoint"]["step"]) for one in metrics if "checkpoint" in one]
    values = [
        f"{objective.metric} {value!r}"
        for objective, value in zip(section.objectives, best.values, strict=True)
    ]
    measured = "the validation classes"
    if section.folds > 1:
        measured = f"validation classes, mean of {section.folds} folds"
    lines = [
        f"Best trial of the search {config.name} in {folder.path}",
        f"Trial: {label} (number {best.number}), the best of {count}"
        + (f" by {section.objectives[0].metric}" if len(values) > 1 else ""),
        f"Result on {measured}: {', '.join(values)}",
    ]
    if steps:
        lines.append(f"Step of the best validation: {', '.join(steps)}")
    # JSON keeps every digit and has no line ends.
    searched = [f"  {path}: {json.dumps(value)}" for path, value in best.params.items()]
    command = f"dml-dist train {shlex.quote(str(folder.best_path))}"
    return [*lines, "Searched values:", *searched, f"Train with: {command}"]


# ---------------------------------------------------------------- the runs on test classes


def check_final(folder: TuningFolder, trials: Trials) -> FrozenTrial:
    """Return the trial whose values --final evaluates on test classes.

    Raises:
        ConfigError: If there is none, or trials are left to finish, or the test classes have been
            used for other values.
    """
    import optuna

    states = [trial.state for trial in trials.all()]
    if unfinished := states.count(optuna.trial.TrialState.RUNNING):
        raise ConfigError(
            f"{unfinished} {'trial is' if unfinished == 1 else 'trials are'} not finished in "
            f"{folder.path}, and --final evaluates the best of all: run the command without "
            "--final first"
        )
    best = trials.best()
    if best is None:
        raise ConfigError(
            f"--final needs a complete trial, but none of the {trials.count()} in {folder.path} "
            "is: run the command without --final first, or with more trials"
        )
    if folder.final_path.is_file():
        used = read_json(folder.final_path)
        if used["values"] != best.params:
            raise ConfigError(
                f"the test classes have been used for {used['label']} with "
                f"{_listed(used['values'])} ({folder.final_path}), but the best trial is now "
                f"{best.user_attrs[LABEL]} with {_listed(best.params)}: a choice among several "
                "results on test classes is no longer a result on unseen classes. Keep the first "
                "result, or begin a new study with another --run-dir"
            )
    return best


def run_final(
    config: RunConfig, folder: TuningFolder, trials: Trials, pool: Pool, emit: Emit
) -> None:
    """Train the best values and the configuration's own on all training classes; evaluate tests.

    Both variants are trained as long as the configuration says, with each seed of
    `tune.final_seeds`. Finished runs are not repeated.

    Args:
        config: The search's configuration, paths absolute.
        folder: The search's folder.
        trials: Its trials.
        pool: Executes the runs.
        emit: Receives progress events.

    Raises:
        ConfigError: As by `check_final`, or if a run cannot be trained on all classes.
        RunError: If a run failed, after all others are finished.
    """
    best = check_final(folder, trials)
    method = best.params.get(METHOD_KEY)
    variants: dict[str, dict[str, Any]] = {
        TUNED: best.params,
        UNTUNED: {} if method is None else {METHOD_KEY: method},
    }
    seeds = tune_section(config).final_seeds
    configs = [
        final_config(config, variant, seed, values)
        for seed in seeds
        for variant, values in variants.items()
    ]
    for one in configs[: len(variants)]:  # Seeds change nothing in a plan.
        plan_without_data(one)
    _record(folder, best, seeds)
    problems = []
    tasks = [partial(pool.execute, one, folder.run(one.name)) for one in configs]
    for done, (number, future) in enumerate(pool.each(tasks), start=1):
        name, error = configs[number].name, future.exception()
        if isinstance(error, RunError):  # The other runs are executed nevertheless.
            problems.append(f"{name}: {error}")
            emit(note(f"{name}: {error}"))
        else:
            emit(note(f"{name}: {_score(future.result())}"))
        emit(phase("final runs", done, len(configs)))
    if problems:
        raise RunError(
            f"{len(problems)} of {len(configs)} final runs failed: {'; '.join(problems)}; fix the "
            "cause, then repeat the command"
        )


def _record(folder: TuningFolder, best: FrozenTrial, seeds: tuple[int, ...]) -> None:
    """Write which values are evaluated, before any run reads a test class."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    used: dict[str, Any] = {
        "label": best.user_attrs[LABEL],
        "number": best.number,
        "values": best.params,
        "seeds": {},
    }
    if folder.final_path.is_file():
        used = read_json(folder.final_path)
    # Seeds that were begun stay part of the result, so that none can be left out later.
    new = {str(seed): now for seed in seeds if str(seed) not in used["seeds"]}
    if new:
        write_json_atomic(folder.final_path, {**used, "seeds": {**used["seeds"], **new}})


def _score(metrics: Mapping[str, Any]) -> str:
    trained = group(metrics, "trained")
    keys = [recall_key(trained) or "", "map_at_r"]
    return ", ".join(f"{metric_label(key)} {format_metric(key, trained.get(key))}" for key in keys)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {format_value(value)}" for path, value in values.items())


# ---------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class FinalRuns:
    """The runs of one variant.

    Attributes:
        name: TUNED or UNTUNED.
        metrics: Seed of a finished run -> its metrics on test classes.
        missing: Seeds whose run is not finished.
    """

    name: str
    metrics: Mapping[int, Mapping[str, float]]
    missing: tuple[int, ...]

    def interval(self, key: str) -> Interval:
        """Return mean and interval of a metric over the seeds."""
        return t_interval([one[key] for one in self.metrics.values() if key in one])


@dataclass(frozen=True, eq=False)
class Final:
    """What --final has found so far.

    Attributes:
        label: The trial whose values were evaluated.
        number: Its number.
        values: Its values: path -> value.
        seeds: Seed -> UTC time at which its runs were begun, ISO 8601.
        tuned: Runs with these values.
        untuned: Runs with the configuration's own values.
    """

    label: str
    number: int
    values: Mapping[str, Any]
    seeds: Mapping[int, str]
    tuned: FinalRuns
    untuned: FinalRuns

    @property
    def keys(self) -> list[str]:
        """Metrics of the runs, recalls first; no counts."""
        runs = [*self.tuned.metrics.values(), *self.untuned.metrics.values()]
        found = {key: 0.0 for one in runs for key in one if is_metric(key)}
        return [row.key for row in result_table({"trained": found}) if not row.is_count]

    @property
    def missing(self) -> list[str]:
        """Names of the runs that are not finished."""
        return [f"{one.name}-seed-{seed}" for one in self.variants for seed in one.missing]

    @property
    def num_finished(self) -> int:
        """Number of finished runs of both variants."""
        return sum(len(one.metrics) for one in self.variants)

    @property
    def variants(self) -> tuple[FinalRuns, FinalRuns]:
        """Both variants."""
        return self.tuned, self.untuned

    def difference(self, key: str) -> Interval:
        """Return mean and interval of tuned - untuned, seed by seed; both must have the seed."""
        pairs = [
            (own[key], self.untuned.metrics.get(seed, {}).get(key))
            for seed, own in self.tuned.metrics.items()
            if key in own
        ]
        return t_interval([own - other for own, other in pairs if other is not None])


def read_final(folder: TuningFolder) -> Final | None:
    """Return the result on test classes; None if --final was not begun.

    Raises:
        DataError: If a file is damaged.
    """
    if not folder.final_path.is_file():
        return None
    used = read_json(folder.final_path)
    seeds = {int(seed): time for seed, time in used["seeds"].items()}
    return Final(
        label=used["label"],
        number=used["number"],
        values=used["values"],
        seeds=seeds,
        tuned=_runs(folder, TUNED, tuple(seeds)),
        untuned=_runs(folder, UNTUNED, tuple(seeds)),
    )


def _runs(folder: TuningFolder, variant: str, seeds: tuple[int, ...]) -> FinalRuns:
    metrics = {}
    for seed in seeds:
        run = RunFolder(folder.run(f"{variant}-seed-{seed}"))
        if run.info_path.is_file() and run.info().finished:
            trained = group(read_metrics(run.metrics_path), "trained")
            metrics[seed] = {key: float(value) for key, value in trained.items()}
    return FinalRuns(variant, metrics, tuple(seed for seed in seeds if seed not in metrics))


def print_final(folder: TuningFolder, console: Console) -> None:
    """Print the result on test classes, if --final was begun."""
    final = read_final(folder)
    if final is None:
        return
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("test classes", overflow="fold")
    for heading in (TUNED, UNTUNED, "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for key in final.keys:
        share = is_share(key)
        table.add_row(
            metric_label(key),
            format_interval(final.tuned.interval(key), share=share),
            format_interval(final.untuned.interval(key), share=share),
            format_interval(final.difference(key), share=share, signed=True),
        )
    lines = [
        f"{TUNED}: {final.label} with {_listed(final.values)}",
        f"mean over {len(final.seeds)} {'seed' if len(final.seeds) == 1 else 'seeds'} ± half the "
        f"{LEVEL:.0%} interval by Student's t; the difference is taken seed by seed",
    ]
    if final.missing:
        lines.append(f"not finished: {', '.join(final.missing)}")
    console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
