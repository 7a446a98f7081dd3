"""`dml-dist tune`: search values on validation classes with Ray Tune and Optuna."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dml_dist.config.load import with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, RunError, RunStopped
from dml_dist.orchestration.ray_tune import PRUNED, TIME_LIMIT, Outcome, Payload, run_trials
from dml_dist.report.parts import try_to_write
from dml_dist.runs.tuning import TuningFolder, trial_configs, tune_section
from dml_dist.runtime.datasets import ensure_imported, warn_of_secrets
from dml_dist.runtime.progress import Display
from dml_dist.runtime.signals import stop_on_signals
from dml_dist.studies.final import check_final, print_final, run_final, write_best
from dml_dist.studies.pool import Pool
from dml_dist.studies.storage import check_tuning, open_trials, trials_left
from dml_dist.studies.trials import LABEL, PROBLEM, SECONDS, STEPS, Trials, state_of
from dml_dist.studies.tune_axes import label_of, show
from dml_dist.studies.tune_check import SearchPlan, check_search
from dml_dist.studies.tune_page import write_tuning
from dml_dist.studies.tune_table import Row, Shown, TrialTable, format_values
from dml_dist.studies.tune_trial import execute_trial, trial_payload
from dml_dist.urls import local_path

if TYPE_CHECKING:
    pass


def run_tuning(
    config: RunConfig,
    console: Console,
    *,
    run_dir: Path | None = None,
    source: Path | None = None,
    final: bool = False,
    continue_trial: int | None = None,
) -> Path:
    """Execute a search, or continue the one in the folder, and return its folder.

    Args:
        config: A run's configuration with the section `tune`.
        console: Where progress and results go.
        run_dir: The search's folder; None is runs/NAME.
        source: Folder of another search whose best values are tried first.
        final: Train the best values on all training classes at the end, and evaluate test classes.
        continue_trial: Number of a pruned trial: train it to its end, and nothing else.

    Raises:
        RunStopped: After SIGTERM or SIGINT; trials that were running have checkpoints.
        DmlDistError: If configuration or data are wrong, before anything starts; or if all trials
            failed.
    """
    config = with_absolute_paths(config)
    folder = TuningFolder((run_dir or Path("runs") / config.name).absolute())
    check_tuning(config, folder, source)
    plan = check_search(config)
    warn_of_secrets(config, console)
    if local_path(config.data.path) is not None:
        ensure_imported(config.data, console)
    with folder.lock():
        check_tuning(config, folder, source)  # Again: another command may have been faster.
        folder.write_config(config)
        trials, notes = open_trials(config, folder, plan.steps, source)
        _announce(config, plan, notes, console)
        search = _Search(config, folder, trials, plan, console)
        if continue_trial is not None:
            search.continue_trial(continue_trial)
        stopped = search.run()
        write_best(config, folder, trials)
        page = try_to_write(write_tuning, folder.path)
        if final and stopped is None:
            check_final(folder, trials)  # Before a cluster is started.
            with (
                Pool(folder, config.launch, _final_parallel(config)) as pool,
                Display(console) as emit,
            ):
                run_final(config, folder, trials, pool, emit)
            print_final(folder, console)
            page = try_to_write(write_tuning, folder.path)
    return _conclude(config, folder, trials, page, stopped, console)


# ---------------------------------------------------------------- the search


class _Search:
    """The queue of trials for Ray Tune: from Optuna's storage, and back to it."""

    def __init__(
        self,
        config: RunConfig,
        folder: TuningFolder,
        trials: Trials,
        plan: SearchPlan,
        console: Console,
    ) -> None:
        self._config = config
        self._section = tune_section(config)
        self._folder = folder
        self._trials = trials
        self._plan = plan
        self._console = console
        self._launch = config.launch
        self._is_single = False
        self._begun = 0
        self._table: TrialTable | None = None

    def continue_trial(self, number: int) -> None:
        """Let the search consist of a pruned trial that goes on."""
        import optuna

        pruned = [
            trial.number
            for trial in self._trials.all()
            if trial.state == optuna.trial.TrialState.PRUNED
        ]
        if number not in pruned:
            raise ConfigError(
                f"--continue-trial {number} is no pruned trial of {self._folder.path}; the pruned "
                f"trials are {', '.join(map(str, pruned)) or 'none'}"
            )
        self._trials.add_continuation(number)
        self._is_single = True

    def run(self) -> str | None:
        """Execute trials; return why it stopped early, or None."""
        hours = self._section.hours
        deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
        if not self._has_work():
            return None
        with (
            TrialTable(self._console, self._section.objectives, self._section.trials) as table,
            stop_on_signals() as stop,
        ):
            self._table = table
            self._show_earlier()
            stop.is_training = True  # The first signal is for the trials.
            run_trials(
                self,
                execute_trial,
                self._config.launch,
                parallel=self._section.parallel,
                deadline=deadline,
                folder=self._folder.path,
                stop=stop,
                on_start=self._start,
            )
        if stop.reason is not None:
            return stop.reason
        return TIME_LIMIT if time.monotonic() > deadline and self._has_work() else None

    def next(self) -> tuple[int, Payload] | None:
        """Return the next trial: one that was interrupted, or a new one."""
        found = None
        if not self._is_single or not self._begun:
            found = self._trials.interrupted()
        if found is None and not self._is_single and trials_left(self._section, self._trials):
            found = self._trials.suggest()
        if found is None:
            return None
        self._begun += 1
        configs = trial_configs(self._config, found.label, found.values)
        configs = [one.model_copy(update={"launch": self._launch}) for one in configs]
        folders = [self._folder.run(one.name) for one in configs]
        assert self._table is not None
        self._table.put(found.number, Row(found.label, found.values))
        metrics = [objective.metric for objective in self._section.objectives]
        run_steps = self._plan.steps // self._section.folds
        return found.number, trial_payload(configs, folders, metrics, run_steps)

    def restarted(self, number: int, starts: int) -> None:
        """Say that a trial's process died and was started again."""
        assert self._table is not None
        self._table.note(
            number,
            "its process died and continues from its last checkpoint "
            f"(restart {starts - 1} of at most {self._config.launch.max_failures})",
        )

    def report(self, number: int, step: int, value: float) -> bool:
        """Keep an intermediate value and return whether to prune the trial."""
        assert self._table is not None
        self._table.progress(number, step, value)
        return self._trials.report(number, step, value) and step < self._plan.steps

    def end(self, number: int, outcome: Outcome | None) -> None:
        """Tell Optuna how a trial ended."""
        before = float(self._trials.all()[number].user_attrs.get(SECONDS, 0.0))
        if outcome is None:
            died = f"its process died more than {self._config.launch.max_failures} times"
            outcome = {"state": "failed", "problem": f"{died} (launch.max_failures)", "seconds": 0}
        facts = {SECONDS: before + outcome["seconds"], STEPS: outcome.get("steps", 0)}
        state: Shown = outcome["state"]
        match state:
            case "complete":
                self._trials.complete(number, outcome["values"], **facts)
            case "diverged":
                self._trials.diverged(number, outcome["problem"], **facts)
            case "stopped" if outcome["reason"] == PRUNED:
                self._trials.prune(number, **facts)
                state = "pruned"
            case "stopped":
                self._trials.pause(number, **facts)
            case _:
                self._trials.fail(number, outcome["problem"], **facts)
        assert self._table is not None
        self._table.end(number, state, outcome.get("values", ()), facts[SECONDS])

    def _start(self, concurrent: int) -> None:
        """Divide this machine's cores among the trials, once their number is known."""
        assert self._table is not None
        self._table.set_concurrency(concurrent)
        launch = self._config.launch
        if launch.threads_per_rank is None and launch.address is None:
            ranks = concurrent * (launch.num_workers if launch.launcher == "ray" else 1)
            threads = max(1, len(os.sched_getaffinity(0)) // ranks)
            self._launch = launch.model_copy(update={"threads_per_rank": threads})
        _say(self._console, f"{concurrent} {'trial' if concurrent == 1 else 'trials'} at a time")

    def _has_work(self) -> bool:
        return self._trials.has_interrupted or trials_left(self._section, self._trials) > 0

    def _show_earlier(self) -> None:
        """Put the trials of earlier commands into the table."""
        assert self._table is not None
        for trial in self._trials.all():
            state = state_of(trial)
            if state != "waiting":
                self._table.put(
                    trial.number,
                    Row(
                        label=trial.user_attrs.get(LABEL, f"trial-{trial.number}"),
                        values=trial.params,
                        state="stopped" if state == "running" else state,
                        last=max(trial.intermediate_values.items(), default=None),
                        objectives=trial.values or (),
                        seconds=trial.user_attrs.get(SECONDS, 0.0),
                        start=None,
                    ),
                )


# ---------------------------------------------------------------- before and after


def _announce(config: RunConfig, plan: SearchPlan, notes: Sequence[str], console: Console) -> None:
    section = tune_section(config)
    ranks = config.launch.num_workers if config.launch.launcher == "ray" else 1
    goals = " and ".join(f"{one.direction} {label_of(one.metric)}" for one in section.objectives)
    folds = "" if section.folds == 1 else f" on {section.folds} folds"
    _say(
        console,
        f"{config.name}: {section.trials} trials of {plan.steps:,} steps on {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'}, to {goals}{folds}; sampler {section.sampler.name}, "
        f"pruner {section.pruner.name}",
    )
    for text in notes:
        _say(console, text)


def _conclude(
    config: RunConfig,
    folder: TuningFolder,
    trials: Trials,
    page: Path | None,
    stopped: str | None,
    console: Console,
) -> Path:
    """Print the results, and raise an error where there are none."""
    states = Counter(map(state_of, trials.all()))
    words = {"running": "interrupted"}  # Nothing runs any more.
    counts = ", ".join(f"{n} {words.get(state, state)}" for state, n in states.items()) or "none"
    best = trials.best()
    if best is not None:
        objective = tune_section(config).objectives[0]
        _say(
            console,
            f"best: {best.user_attrs[LABEL]}, validation {label_of(objective.metric)} "
            f"{show(objective.metric, best.values[0])}: {format_values(best.params)}",
        )
        _say(console, f"best configuration: {folder.best_path}")
    _say(console, f"trials: {counts}")
    if page is not None:
        _say(console, f"report:  {page}")
    if stopped is not None and stopped != TIME_LIMIT:
        raise RunStopped(f"{config.name} was stopped by {stopped} ({counts})")
    if stopped is not None:
        _say(console, "the time limit is reached; the same command continues the search")
    elif best is None:
        problems = [
            trial.user_attrs[PROBLEM] for trial in trials.all() if PROBLEM in trial.user_attrs
        ]
        first = problems[0] if problems else "no trial was trained to its end"
        raise RunError(
            f"no trial of {config.name} has a value ({counts}); the first problem: {first}; the "
            f"outputs of the trials are in {folder.run('*.log')}"
        )
    _say(console, f"results: {folder.path}")
    return folder.path


def _final_parallel(config: RunConfig) -> int:
    """Return the number of final runs at a time: one where each takes all ranks."""
    return 1 if config.launch.launcher == "ray" else tune_section(config).parallel or 1


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
