"""What the page of a search of values shows, read from its folder: trials, best values, savings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import CategoricalDistributionConfig, DistributionConfig
from dml_dist.config.study import METHOD_KEY, ObjectiveConfig
from dml_dist.report.formatting import number
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from dml_dist.runs.tuning import TuningFolder, searched_paths, tune_section
from dml_dist.studies.ranges import CHANGES
from dml_dist.studies.storage import load_study
from dml_dist.studies.trials import (
    CONTINUES,
    LABEL,
    PROBLEM,
    SECONDS,
    STEPS,
    State,
    Trials,
    state_of,
)

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

EDGE = 0.02
"""Part of a range at each end in which a best value suggests that better ones lie outside."""


@dataclass(frozen=True, eq=False)
class TrialResult:
    """One trial of the storage, and what its runs have recorded.

    Attributes:
        number: Its number in the storage.
        label: Name of its run; a trial that continues another one has the same.
        continues: Number of the trial that it continues.
        state: "diverged": Optuna's COMPLETE with made-up values, since the loss was not finite;
            "outside": a change of ranges has put its values outside of them.
        values: Searched path, or `method`, -> value.
        objectives: One value of each objective; none unless complete.
        last: The last intermediate value of the first objective.
        steps: Optimiser updates made.
        seconds: Time of its runs, evaluations included.
        problem: Why it failed or diverged.
        started: When it was suggested.
        ended: When its outcome was known.
        runs: The folders of its runs that are there, in the order of the folds.
    """

    number: int
    label: str
    continues: int | None
    state: State
    values: Mapping[str, Any]
    objectives: tuple[float, ...]
    last: float | None
    steps: int | None
    seconds: float | None
    problem: str | None
    started: datetime | None
    ended: datetime | None
    runs: tuple[Path, ...]

    def curve(self, metric: str, run_steps: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return steps of the trial and a validation metric at them.

        Folds follow one another as they are trained, with a NaN between them, which parts lines.
        """
        steps: list[float] = []
        values: list[float] = []
        for fold, run in enumerate(self.runs):
            if fold:
                steps, values = [*steps, math.nan], [*values, math.nan]
            for record in read_records(RunFolder(run).records("evaluations")):
                value = number(record.get(metric))
                if record.get("protocol") == "validation" and value is not None:
                    steps.append(fold * (run_steps or 0) + record["step"])
                    values.append(value)
        return np.array(steps), np.array(values)


@dataclass(frozen=True)
class Savings:
    """What pruning saved.

    Attributes:
        trials: Number of pruned trials.
        steps: Steps that they did not make.
        share: Of the steps of all trials, had none been pruned.
        seconds: Time of those steps, at the speed of the same trial.
    """

    trials: int
    steps: int
    share: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Tuning:
    """A search of values as its folder shows it, finished or not.

    Attributes:
        folder: The folder.
        config: Its configuration.
        trials: In the order of their numbers.
        best: The best complete trial by the first objective, if there is one.
        front: The complete trials of the Pareto front, by the first objective.
        changes: Changes of ranges, one text each.
    """

    folder: TuningFolder
    config: RunConfig
    trials: tuple[TrialResult, ...]
    best: TrialResult | None
    front: tuple[TrialResult, ...]
    changes: tuple[str, ...]

    @property
    def objectives(self) -> Sequence[ObjectiveConfig]:
        """What was optimised."""
        return tune_section(self.config).objectives

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """Searched path, or `method`, -> its scale, wide enough for the values of all trials."""
        section = tune_section(self.config)
        scales = {}
        if section.methods:
            scales[METHOD_KEY] = Scale(METHOD_KEY, choices=tuple(section.methods))
        for path, distribution in section.space.items():
            tried = [trial.values[path] for trial in self.trials if path in trial.values]
            scales[path] = scale_of(path, distribution, tried)
        return scales

    @property
    def chosen(self) -> tuple[TrialResult, ...]:
        """The best trial, or with two objectives the Pareto front."""
        if len(self.objectives) > 1:
            return self.front
        return () if self.best is None else (self.best,)

    @cached_property
    def complete(self) -> list[TrialResult]:
        """The trials that have values."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @cached_property
    def latest(self) -> list[TrialResult]:
        """One trial for each label: of those with the same run folder, the last one."""
        return list({trial.label: trial for trial in self.trials}.values())

    @cached_property
    def counts(self) -> Counter[State]:
        """State -> number of trials."""
        return Counter(trial.state for trial in self.latest)

    @property
    def is_finished(self) -> bool:
        """Whether as many trials have ended as the configuration asks for."""
        wanted = tune_section(self.config).trials
        return not self.counts["running"] and len(self.latest) >= wanted

    @property
    def run_steps(self) -> int | None:
        """Steps of a whole run, as configured or as the longest complete trial made them."""
        if self.config.train.steps is not None:
            return self.config.train.steps
        made = max((trial.steps or 0 for trial in self.complete), default=0)
        return made // tune_section(self.config).folds or None

    @property
    def trial_steps(self) -> int | None:
        """Steps of a whole trial, those of all its folds."""
        return None if self.run_steps is None else self.run_steps * tune_section(self.config).folds

    @property
    def seconds(self) -> float:
        """Time of all runs together."""
        return sum(trial.seconds or 0.0 for trial in self.latest)

    @property
    def wall_seconds(self) -> float | None:
        """Time from the first trial's start to the last one's end; None before any has ended."""
        begun = [trial.started for trial in self.trials if trial.started]
        ended = [trial.ended for trial in self.trials if trial.ended]
        return (max(ended) - min(begun)).total_seconds() if begun and ended else None

    @property
    def savings(self) -> Savings:
        """What pruning saved, without pruned trials that were continued."""
        pruned = [trial for trial in self.latest if trial.state == "pruned"]
        whole = self.trial_steps or 0
        saved, seconds = 0, 0.0
        for trial in pruned:
            rest = max(0, whole - (trial.steps or 0))
            saved += rest
            if trial.steps and trial.seconds:
                seconds += rest * trial.seconds / trial.steps
        made = sum(trial.steps or 0 for trial in self.latest)
        return Savings(len(pruned), saved, saved / (made + saved) if saved else 0.0, seconds)


def read_tuning(path: Path) -> Tuning:
    """Read the folder of a search of values.

    Raises:
        ConfigError: If it is none.
    """
    folder = TuningFolder(Path(path).absolute())
    config = folder.config()
    section = tune_section(config)
    study = load_study(folder)
    found = Trials(study, section.space, partial(searched_paths, config), tuple(section.methods))
    trials = {
        trial.number: _trial(folder, trial, section.folds)
        for trial in found.all()
        if LABEL in trial.user_attrs or trial.state.name == "RUNNING"  # Else it never began.
    }
    best = found.best()
    return Tuning(
        folder=folder,
        config=config,
        trials=tuple(trials.values()),
        best=None if best is None else trials[best.number],
        front=_front(study, trials),
        changes=tuple(map(str, study.user_attrs.get(CHANGES, ()))),
    )


def _trial(folder: TuningFolder, trial: FrozenTrial, folds: int) -> TrialResult:
    facts = trial.user_attrs
    label = str(facts.get(LABEL, f"trial-{trial.number}"))
    state = state_of(trial)
    names = [label] if folds == 1 else [f"{label}-fold-{fold}" for fold in range(folds)]
    runs = [folder.run(name) for name in names]
    last = trial.last_step
    return TrialResult(
        number=trial.number,
        label=label,
        continues=facts.get(CONTINUES),
        state=state,
        values=trial.params,
        objectives=tuple(trial.values) if state == "complete" else (),
        last=None if last is None else trial.intermediate_values[last],
        steps=facts.get(STEPS, last),
        seconds=number(facts.get(SECONDS)),
        problem=facts.get(PROBLEM),
        started=trial.datetime_start,
        ended=trial.datetime_complete,
        runs=tuple(run for run in runs if RunFolder(run).info_path.is_file()),
    )


def _front(study: optuna.Study, trials: Mapping[int, TrialResult]) -> tuple[TrialResult, ...]:
    found = [trials[trial.number] for trial in study.best_trials] if trials else []
    kept = [trial for trial in found if trial.state == "complete"]
    return tuple(sorted(kept, key=lambda trial: trial.objectives[0]))


# ---------------------------------------------------------------- scales

_FEW_VALUES = 5


@dataclass(frozen=True)
class Scale:
    """Positions of a path's values on an axis, as its distribution spaces them.

    Attributes:
        path: The path.
        low: The value at 0.
        high: The value at 1.
        log: Whether positions are logarithmic.
        whole: Whether all values are integers.
        choices: Values without an order, evenly spaced; none for numbers.
        grid: All values, if they are few.
    """

    path: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()
    grid: tuple[Any, ...] = ()

    def position(self, value: Any) -> float:
        """Return where a value is, 0 to 1."""
        if self.choices:
            return self.choices.index(value) / max(1, len(self.choices) - 1)
        if self.low == self.high:
            return 0.5
        value, low, high = float(value), self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def scale_of(path: str, distribution: DistributionConfig, tried: Sequence[Any] = ()) -> Scale:
    """Return the scale of a distribution, wide enough for values tried with another range."""
    if isinstance(distribution, CategoricalDistributionConfig):
        return Scale(path, choices=tuple(distribution.choices))
    values = [distribution.low, distribution.high, *tried]
    low, high = min(values), max(values)
    grid = distribution.grid or ()
    return Scale(
        path,
        low,
        high,
        log=distribution.log,
        whole=distribution.type == "int",
        grid=grid if len(grid) <= _FEW_VALUES else (),
    )


def edge_of(distribution: DistributionConfig, value: Any) -> Literal["low", "high"] | None:
    """Return the end of its range at which a value is, if it is at one."""
    if isinstance(distribution, CategoricalDistributionConfig):
        return None
    if distribution.low == distribution.high:
        return None
    position = scale_of("", distribution).position(value)
    if position <= EDGE:
        return "low"
    return "high" if position >= 1 - EDGE else None
