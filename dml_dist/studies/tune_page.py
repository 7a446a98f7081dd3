"""The page of a search of values: one HTML file that needs no network, figures as PNG, a CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.config.load import dump_config
from dml_dist.config.schema import RunConfig
from dml_dist.config.study import PrunerConfig
from dml_dist.config.yaml_text import read_text
from dml_dist.files import write_text_atomic
from dml_dist.report.figures import Picture
from dml_dist.report.formatting import MISSING, format_seconds
from dml_dist.report.parts import Parts
from dml_dist.report.render import write_page
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.tuning import tune_section
from dml_dist.studies.trials import STATES
from dml_dist.studies.tune_axes import chosen_text, label_of
from dml_dist.studies.tune_figures import (
    draw_cost,
    draw_front,
    draw_history,
    draw_learning,
    rungs_of,
)
from dml_dist.studies.tune_read import Tuning, read_tuning
from dml_dist.studies.tune_tables import (
    best_notes,
    best_table,
    cost_text,
    final_section,
    front_table,
    plain_trials,
    trial_rows,
)
from dml_dist.studies.tune_value_figures import (
    draw_contour,
    draw_importances,
    draw_parallel,
    draw_slices,
    importances,
)
from dml_dist.terminal import csv_text

FEW_TRIALS = 10
"""Complete trials below which the best one may be best by chance alone."""


def write_tuning(path: Path) -> Path:
    """Write report/ of a search of values from its folder: page, figures, trials as CSV.

    Args:
        path: The search's folder, finished or not; nothing else is read.

    Returns:
        Path of the page.

    Raises:
        ConfigError: If the folder is no search of values.
        DataError: If a run's file is damaged.
    """
    tuning = read_tuning(path)
    parts = Parts()
    figures = _figures(tuning, parts)
    final = final_section(tuning)
    best_yaml = read_text(tuning.folder.best_path) if tuning.folder.best_path.is_file() else None
    two = len(tuning.objectives) > 1
    sections: list[tuple[str, str, bool]] = [
        ("best", "Pareto front" if two else "Best values", True),
        ("final", "Test classes", final is not None),
        ("history", "History", bool(figures.history)),
        ("values", "Values", bool(tuning.complete)),
        ("learning", "Learning curves", bool(figures.learning)),
        ("cost", "Cost", bool(figures.cost)),
        ("trials", "Trials", bool(tuning.trials)),
        ("yaml", "Best configuration", best_yaml is not None),
    ]
    report_dir = tuning.folder.report_dir
    page = write_page(
        report_dir,
        "study/tuning.html",
        figures.all,
        kind="search",
        command="tune",
        name=tuning.config.name,
        status="finished" if tuning.is_finished else "unfinished",
        warnings=[*_warnings(tuning), *parts.failed],
        missing=_missing(tuning),
        sections=sections,
        facts=_facts(tuning),
        config=dump_config(tuning.config),
        config_name=tuning.folder.config_path.name,
        states=_states(tuning),
        chosen_text=chosen_text(tuning),
        best=front_table(tuning) if two else best_table(tuning),
        best_notes=[] if two else best_notes(tuning),
        figures_of=figures,
        cost_text=cost_text(tuning),
        final=final,
        trials=trial_rows(tuning),
        objective_labels=[label_of(objective.metric) for objective in tuning.objectives],
        best_yaml=best_yaml,
    )
    write_text_atomic(report_dir / "trials.csv", csv_text(*plain_trials(tuning)))
    return page


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class _Figures:
    """Figures of the page by section; `no_importances` says why there are none."""

    front: Sequence[Picture]
    history: Sequence[Picture]
    parallel: Sequence[Picture]
    importances: Sequence[Picture]
    no_importances: str | None
    slices: Sequence[Picture]
    contour: Sequence[Picture]
    learning: Sequence[Picture]
    cost: Sequence[Picture]

    @property
    def all(self) -> list[Picture]:
        values = [*self.front, *self.history, *self.parallel, *self.importances, *self.slices]
        return [*values, *self.contour, *self.learning, *self.cost]


def _figures(tuning: Tuning, parts: Parts) -> _Figures:
    places = range(len(tuning.objectives))
    found: list[dict[str, float]] = []
    reason = None
    try:
        found = [importances(tuning, place) for place in places]
    except ValueError as error:
        reason = f"Importances are missing: {error}."
    pair = list(found[0])[:2] if found else []
    contour = parts.make("contour", lambda: draw_contour(tuning, pair) if pair[1:] else None, None)

    def draw(name: str, function: Callable[[], Sequence[Picture]]) -> Sequence[Picture]:
        return parts.make(name, function, [])

    return _Figures(
        front=draw(
            "front", lambda: [draw_front(tuning)] if len(places) > 1 and tuning.complete else []
        ),
        history=draw(
            "history",
            lambda: [draw_history(tuning, place) for place in places] if tuning.trials else [],
        ),
        parallel=draw(
            "parallel", lambda: [draw_parallel(tuning)] if len(tuning.complete) > 1 else []
        ),
        importances=draw(
            "importances",
            lambda: [draw_importances(tuning, shares, place) for place, shares in enumerate(found)],
        ),
        no_importances=reason,
        slices=draw("slices", lambda: draw_slices(tuning)),
        contour=[] if contour is None else [contour],
        learning=draw("learning curves", lambda: draw_learning(tuning)),
        cost=draw("cost", lambda: draw_cost(tuning)),
    )


# ---------------------------------------------------------------- notes and facts


def _warnings(tuning: Tuning) -> list[str]:
    counts, complete = tuning.counts, len(tuning.complete)
    warnings = [f"A range has changed, {text}." for text in tuning.changes]
    ended = [trial for trial in tuning.latest if trial.state != "running"]
    if ended and not complete:
        what = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
        warnings.append(f"No trial is complete ({what}), so there are no best values.")
    elif 0 < complete < FEW_TRIALS:
        warnings.append(
            f"Few trials are complete ({complete}): the best of them may be best by chance."
        )
    problems = dict.fromkeys(
        trial.problem for trial in tuning.latest if trial.state == "failed" and trial.problem
    )
    if problems:
        shown = "; ".join(list(problems)[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        warnings.append(f"Failed trials ({counts['failed']}): {shown}{more}.")
    return warnings


def _missing(tuning: Tuning) -> list[str]:
    wanted, made = tune_section(tuning.config).trials, len(tuning.latest)
    missing = []
    if made < wanted:
        missing.append(f"{made} of {wanted} trials have started.")
    if running := [trial.label for trial in tuning.latest if trial.state == "running"]:
        missing.append(f"Running or interrupted, so without a value: {', '.join(running)}.")
    return missing


def _states(tuning: Tuning) -> str:
    found = [f"{tuning.counts[state]} {state}" for state in STATES if tuning.counts[state]]
    if not found:
        return "no trial yet"
    count = len(tuning.latest)
    return f"{count} {'trial' if count == 1 else 'trials'}: {', '.join(found)}"


def _facts(tuning: Tuning) -> list[tuple[str, str]]:
    config, section = tuning.config, tune_section(tuning.config)
    goal = " and ".join(f"{one.direction} {label_of(one.metric)}" for one in tuning.objectives)
    facts = [("trials", f"{len(tuning.latest)} of {section.trials}")]
    facts += [(state, str(tuning.counts[state])) for state in STATES if tuning.counts[state]]
    facts += [
        ("objective", goal),
        ("sampler", f"{section.sampler.name}, seed {section.seed}"),
        ("pruner", _pruner_text(section.pruner, tuning)),
        ("storage", _storage_text(tuning)),
        ("folds", str(section.folds) if section.folds > 1 else "none, held-out classes"),
        ("steps of a run", MISSING if tuning.run_steps is None else f"{tuning.run_steps:,}"),
        ("ranks of a run", _ranks_text(config, tuning)),
    ]
    if tuning.wall_seconds is not None:
        facts.append(("from first start to last end", format_seconds(tuning.wall_seconds)))
    facts.append(("all trials together", format_seconds(tuning.seconds)))
    return facts


def _pruner_text(pruner: PrunerConfig, tuning: Tuning) -> str:
    rungs = rungs_of(tuning)
    return f"asha, rungs at {', '.join(f'{rung:,}' for rung in rungs)}" if rungs else pruner.name


def _storage_text(tuning: Tuning) -> str:
    paths = tuning.folder.sqlite_path, tuning.folder.journal_path
    return next((path.name for path in paths if path.is_file()), MISSING)


def _ranks_text(config: RunConfig, tuning: Tuning) -> str:
    run = next((run for trial in tuning.latest for run in trial.runs), None)
    attempts = RunFolder(run).info().attempts if run is not None else ()
    if attempts:
        return f"{attempts[-1].world_size}: {attempts[-1].device}"
    return str(config.launch.num_workers if config.launch.launcher == "ray" else 1)
