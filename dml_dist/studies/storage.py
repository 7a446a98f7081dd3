"""The study of a search of values in its folder: made, continued with other ranges, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml_dist.config.load import Difference
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import GridSamplerConfig
from dml_dist.config.study import METHOD_KEY, TuneConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.study import fixed_differences
from dml_dist.runs.tuning import TUNE, TuningFolder, own_values, searched_paths, tune_section
from dml_dist.studies.ranges import (
    RANGES,
    READY,
    changed_ranges,
    copy_study,
    current_study,
    ranges_of,
)
from dml_dist.studies.samplers import create_study, grid_points
from dml_dist.studies.storage_files import choose_storage, open_storage, read_storage
from dml_dist.studies.trials import LABEL, OUTSIDE, PROBLEM, Trials, completed

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_BEST_OF_OLD_STUDY = 5


def load_study(folder: TuningFolder) -> optuna.Study:
    """Return the current study in a folder, for reading.

    Raises:
        ConfigError: If there is none.
        DataError: If the storage is damaged.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = read_storage(folder)
    current = current_study(storage) if storage is not None else None
    if storage is None or current is None:
        raise ConfigError(
            f"{folder.path} holds no trials ({folder.sqlite_path.name} or "
            f"{folder.journal_path.name}); give the folder that `dml-dist tune` named"
        )
    return optuna.load_study(study_name=current.study_name, storage=storage)


def check_tuning(config: RunConfig, folder: TuningFolder, source: Path | None = None) -> list[str]:
    """Check that a search can begin in a folder, or continue there; nothing is written.

    Args:
        config: The configuration, paths absolute.
        folder: The study's folder.
        source: Folder of an older study; a new one begins with its best values.

    Returns:
        Lines on the ranges that differ from those in the folder.

    Raises:
        ConfigError: If the folder is used by something else or another study, the older study does
            not exist, or the sampler needs a package that is not installed.
    """
    section = tune_section(config)
    choose_storage(folder, section.storage)
    create_study(section, section.objectives, section.pruner, steps=1)
    if not folder.config_path.is_file():
        folder.check_unused()
        starting_points(config, source)
        return []
    saved = folder.config()
    others = [one for one in fixed_differences(saved, config, TUNE) if not _is_range(one)]
    if others:
        raise ConfigError(
            f"{folder.path} holds a search with another configuration than {config.name} has now "
            f"(there -> now): {'; '.join(map(str, others))}; only low and high of ranges can "
            "change. Undo the other changes, or give another --run-dir, with "
            f"--from {folder.path} to begin with the best values found there"
        )
    return changed_ranges(section.space, ranges_of(tune_section(saved).space))


def open_trials(
    config: RunConfig, folder: TuningFolder, steps: int, source: Path | None = None
) -> tuple[Trials, list[str]]:
    """Make the study of a folder whose lock is held, or continue it.

    The folder's tune.yaml is written before: a folder with a storage alone is refused.

    Args:
        config: The configuration, which `check_tuning` has accepted.
        folder: The study's folder.
        steps: Optimiser updates of a whole trial.
        source: Folder of an older study; a new one begins with its best values.

    Returns:
        The trials, and lines for the console.
    """
    section = tune_section(config)
    storage, chosen = open_storage(folder, section.storage)
    notes = [chosen]
    current = current_study(storage)
    if current is not None and READY not in current.user_attrs:
        storage.delete_study(current._study_id)  # A command was killed before it had enqueued all.
        current = None
    name = config.name if current is None else current.study_name
    if current is not None:
        changes = changed_ranges(section.space, current.user_attrs[RANGES])
        if changes:
            name = copy_study(storage, current, config.name, section.space, changes)
            notes += [f"range of {change}" for change in changes]
    study = create_study(
        section, section.objectives, section.pruner, steps=steps, name=name, storage=storage
    )
    trials = Trials(study, section.space, partial(searched_paths, config), list(section.methods))
    if current is None:
        points, found = starting_points(config, source)
        notes += found
        trials.enqueue(points)
        study.set_user_attr(RANGES, ranges_of(section.space))
        study.set_user_attr(READY, True)
    elif source is not None:
        notes.append(f"--from {source}: not read, since this study has begun")
    _enqueue_grid(config, trials)
    return trials, [*notes, *_progress(trials)]


def trials_left(section: TuneConfig, trials: Trials) -> int:
    """Return the number of trials that are still to be suggested; a grid ends with its points."""
    left = max(0, section.trials - trials.count())
    return min(left, trials.waiting()) if isinstance(section.sampler, GridSamplerConfig) else left


def starting_points(
    config: RunConfig, source: Path | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the values of the first trials, without duplicates, and lines for the console.

    They are the configuration's own values of each method, but not for a grid, which has its own;
    `tune.start`; and the best values of an older study.

    Args:
        config: The configuration.
        source: Folder of the older study.

    Raises:
        ConfigError: If the older study does not exist.
    """
    section = tune_section(config)
    points: list[dict[str, Any]] = []
    if not isinstance(section.sampler, GridSamplerConfig):
        points += [own_values(config, method) for method in section.methods or (None,)]
    points += section.start
    notes = []
    if source is not None:
        best, note = _best_of(config, source)
        points += best
        notes.append(note)
    # Without values, or with a method alone, a point says nothing.
    points = [point for point in points if point.keys() - {METHOD_KEY}]
    return [point for place, point in enumerate(points) if point not in points[:place]], notes


def _best_of(config: RunConfig, source: Path) -> tuple[list[dict[str, Any]], str]:
    folder = TuningFolder(source)
    ranked = _ranked(load_study(folder))
    points: list[dict[str, Any]] = []
    unfit = 0
    for trial in ranked:
        if len(points) == _BEST_OF_OLD_STUDY:
            break
        if not _fits(config, trial.params):
            unfit += 1
        elif trial.params not in points:
            points.append(trial.params)
    note = f"--from {source}: begins with the best {len(points)} of {len(ranked)} complete trials"
    return points, f"{note}; {unfit} better ones do not fit the space" if unfit else note


def _ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Return complete trials, best first by the first objective; with two, the Pareto front."""
    import optuna

    done = [trial for trial in completed(study) if PROBLEM not in trial.user_attrs]
    if len(study.directions) > 1:
        front = {trial.number for trial in study.best_trials}
        done = [trial for trial in done if trial.number in front]
    descending = study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
    return sorted(done, key=lambda trial: trial.values[0], reverse=descending)


def _fits(config: RunConfig, values: Mapping[str, Any]) -> bool:
    """Whether a search could suggest values."""
    section = tune_section(config)
    method = values.get(METHOD_KEY)
    if (method is not None or section.methods) and method not in section.methods:
        return False
    paths: Sequence[str] = searched_paths(config, method)
    return all(
        path in paths and section.space[path].contains(value)
        for path, value in values.items()
        if path != METHOD_KEY
    )


def _enqueue_grid(config: RunConfig, trials: Trials) -> None:
    """Enqueue the points of a grid that are still missing, as many as `tune.trials` asks for."""
    section = tune_section(config)
    if isinstance(section.sampler, GridSamplerConfig):
        points = grid_points(section.space, partial(searched_paths, config), list(section.methods))
        missing = section.trials - trials.count() - trials.waiting()
        trials.enqueue(points, limit=max(0, missing))


def _progress(trials: Trials) -> list[str]:
    """Return a line on the trials there are; none for a new study."""
    words = {
        "COMPLETE": "complete",
        "PRUNED": "pruned",
        "FAIL": "failed",
        "OUTSIDE": "outside the ranges",
        "RUNNING": "interrupted, to be continued first",
    }
    found = [
        "OUTSIDE" if OUTSIDE in trial.user_attrs else trial.state.name
        for trial in trials.all()
        if LABEL in trial.user_attrs or trial.state.name == "RUNNING"  # Not what is enqueued.
    ]
    parts = [f"{found.count(key)} {word}" for key, word in words.items() if key in found]
    return [f"{len(found)} trials so far: {', '.join(parts)}"] if found else []


def _is_range(one: Difference) -> bool:
    """Whether a difference is low or high of a range, and nothing else."""
    if not one.path.startswith("tune.space.") or not (
        isinstance(one.old, dict) and isinstance(one.new, dict)
    ):
        return False
    differing = {key for key in {*one.old, *one.new} if one.old.get(key) != one.new.get(key)}
    return differing <= {"low", "high"}
