"""Reads a comparison's folder: results of its methods, curves, trials, and missing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dml_dist.config.load import load_config
from dml_dist.config.schema import RunConfig
from dml_dist.report.formatting import number
from dml_dist.report.study.references import Published, find_published
from dml_dist.report.study.stats import (
    Band,
    Curve,
    Interval,
    Reached,
    band_of,
    reached,
    t_interval,
)
from dml_dist.report.summary import RunSummary, read_summary
from dml_dist.runs.comparison import (
    ComparisonFolder,
    compare_section,
    method_config,
    run_name,
    searched_paths,
)
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.study import value_at


@dataclass(frozen=True, eq=False)
class RunResult:
    """A finished run of a comparison.

    Attributes:
        seed: Its seed.
        trained: Metrics on the test split.
        step: Step of the checkpoint that was evaluated.
        seconds: Time from its first step to its last, evaluations included.
        curve: R@1 during training.
        summary: The contents of its folder.
    """

    seed: int
    trained: Mapping[str, Any]
    step: int | None
    seconds: float | None
    curve: Curve
    summary: RunSummary


@dataclass(frozen=True, eq=False)
class MethodResult:
    """The results of one method.

    Attributes:
        name: The method.
        changes: Its changes to the common configuration.
        runs: Finished runs by rising seed.
        missing: Seeds whose run is not finished.
        values: Searched path -> value that its runs have.
        without: Searched paths that do not apply to it.
        trials: Outcomes of its trials, in order.
    """

    name: str
    changes: tuple[str, ...]
    runs: tuple[RunResult, ...]
    missing: tuple[int, ...]
    values: Mapping[str, Any]
    without: tuple[str, ...]
    trials: Sequence[Mapping[str, Any]]

    def interval(self, key: str) -> Interval:
        """Return mean and interval of a metric on the test split over the seeds."""
        found = [number(run.trained.get(key)) for run in self.runs]
        return t_interval([value for value in found if value is not None])

    def difference(self, base: MethodResult, key: str) -> Interval:
        """Return mean and interval of a metric's gain over another method, seed by seed.

        A seed draws the same first weights and validation classes for both, so their difference
        varies less than either; only seeds that both have count.
        """
        others = {run.seed: number(run.trained.get(key)) for run in base.runs}
        pairs = [(number(run.trained.get(key)), others.get(run.seed)) for run in self.runs]
        return t_interval([a - b for a, b in pairs if a is not None and b is not None])

    @cached_property
    def band(self) -> Band:
        """Mean, lowest and highest R@1 over the seeds while training."""
        return band_of([run.curve for run in self.runs])

    def reached(self, target: float) -> Reached:
        """Return where its curves first reach a target recall."""
        return reached([run.curve for run in self.runs], target)

    @property
    def best_trial(self) -> float | None:
        """The highest validation MAP@R of its trials."""
        return max((t["map_at_r"] for t in self.trials if t["map_at_r"] is not None), default=None)

    @property
    def num_diverged(self) -> int:
        """Number of trials whose loss was not finite."""
        return sum(trial["map_at_r"] is None for trial in self.trials)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison as its folder shows it, finished or not.

    Attributes:
        folder: The folder.
        config: Its configuration.
        methods: In the order of the configuration.
        published: Published rows that may be shown with it.
    """

    folder: Path
    config: RunConfig
    methods: tuple[MethodResult, ...]
    published: Published

    @property
    def recall_key(self) -> str:
        """Recall with the smallest K, R@1 as a rule."""
        return f"recall_at_{self.config.evaluation.recall_at[0]}"

    @property
    def protocol(self) -> str:
        """Protocol of the curves: "literature" (test classes) or "validation"."""
        return curve_protocol(self.config)

    @property
    def reference(self) -> MethodResult | None:
        """The method that sets the target recall, if it has curves."""
        name = compare_section(self.config).mark
        found = next((one for one in self.methods if one.name == name), None)
        return found if found is not None and len(found.band.mean) else None

    @property
    def differences(self) -> list[tuple[MethodResult, MethodResult]]:
        """Methods with the one that each should improve, in the order of the configuration."""
        found = {method.name: method for method in self.methods}
        bases = compare_section(self.config).bases
        return [(one, found[bases[one.name]]) for one in self.methods if one.name in bases]

    @property
    def target_recall(self) -> float | None:
        """The highest R@1 of the reference's mean curve."""
        found = self.reference
        return None if found is None else float(found.band.mean.recall.max())

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """What the pooled features of the given networks reach without training, by label."""
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for method in self.methods:
            found = next((run.summary.result("features") for run in method.runs), {})
            if not found:
                continue
            same = next((names for values, names in groups if values == found), None)
            if same is None:
                groups.append((found, [method.name]))
            else:
                same.append(method.name)
        if len(groups) == 1:
            return {"features, not trained": groups[0][0]}
        return {f"features of {', '.join(names)}, not trained": one for one, names in groups}

    @property
    def runs(self) -> list[RunResult]:
        """All finished runs."""
        return [run for method in self.methods for run in method.runs]

    @property
    def num_missing(self) -> int:
        """Number of runs that are not finished."""
        return sum(len(method.missing) for method in self.methods)


def curve_protocol(config: RunConfig) -> str:
    """Return the protocol whose evaluations make the curves of a configuration's runs.

    Test classes if they are evaluated during training, since the final result is measured on them;
    else validation classes.
    """
    return "validation" if config.evaluation.evaluate_test_every is None else "literature"


def read_comparison(path: Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        ConfigError: If it is none.
        DataError: If a run's file is damaged.
    """
    folder = ComparisonFolder(Path(path).absolute())
    config = folder.config()
    return Comparison(
        folder=folder.path,
        config=config,
        methods=tuple(_method(config, name, folder) for name in compare_section(config).methods),
        published=find_published(config, folder.references_path),
    )


def _method(config: RunConfig, name: str, folder: ComparisonFolder) -> MethodResult:
    section = compare_section(config)
    runs, missing = [], []
    for seed in section.seeds:
        run = RunFolder(folder.run(run_name(name, seed)))
        if run.info_path.is_file() and run.info().finished:
            runs.append(_run(config, seed, read_summary(run.path)))
        else:
            missing.append(seed)
    own = method_config(config, name)
    if runs:  # What they were really made with.
        own = load_config(RunFolder(runs[0].summary.folder).config_path)
    search = section.search
    return MethodResult(
        name=name,
        changes=section.methods[name],
        runs=tuple(runs),
        missing=tuple(missing),
        values={path: value_at(own, path) for path in searched_paths(config, name)},
        without=search.without.get(name, ()) if search else (),
        trials=folder.outcomes(name),
    )


def _run(config: RunConfig, seed: int, summary: RunSummary) -> RunResult:
    seconds = summary.metrics.get("seconds", {}).get("train")
    return RunResult(
        seed=seed,
        trained=summary.result("trained"),
        step=summary.metrics.get("checkpoint", {}).get("step"),
        seconds=number(seconds),
        curve=_curve(config, summary),
        summary=summary,
    )


def _curve(config: RunConfig, summary: RunSummary) -> Curve:
    """Return R@1 against steps; what the untrained network gives is the first point of a test."""
    key = f"recall_at_{config.evaluation.recall_at[0]}"
    protocol = curve_protocol(config)
    series = summary.evaluation(key, protocol)
    steps, recall = series.steps, series.values
    untrained = number(summary.result("untrained").get(key)) if protocol == "literature" else None
    if untrained is not None:
        steps, recall = np.append(0.0, steps), np.append(untrained, recall)
    return Curve(steps, training_seconds(config, summary, steps), recall)


def training_seconds(config: RunConfig, summary: RunSummary, steps: np.ndarray) -> np.ndarray:
    """Return the time that was spent on training until each step.

    It is added up from the speeds that were recorded, so pauses (evaluations, checkpoints, the
    time between a stop and its continuation) do not count.
    """
    speed = summary.training("images_per_second")
    known = np.isfinite(speed.values) & (speed.values > 0)
    at = np.append(0.0, speed.steps[known])
    images = np.diff(at) * config.train.global_batch_size
    spent = np.append(0.0, np.cumsum(images / speed.values[known]))
    return np.interp(steps, at, spent)
