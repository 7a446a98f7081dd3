"""Changes of ranges: a study's trials under new distributions.

Optuna's samplers learn only from trials of one distribution. So the trials are copied, under the
same numbers, to a new study in the same storage; readers take the last study that is marked ready.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dml_dist.config.search_space import (
    CategoricalDistributionConfig,
    DistributionConfig,
    FloatDistributionConfig,
    IntDistributionConfig,
)
from dml_dist.studies.samplers import distribution
from dml_dist.studies.trials import OUTSIDE, PROBLEM

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study._frozen import FrozenStudy
    from optuna.trial import FrozenTrial

READY = "ready"
"""User attribute of a study: all its first trials, or the copied ones, are there."""
RANGES = "ranges"
"""User attribute of a study: path -> low and high."""
CHANGES = "changes"
"""User attribute of a study: texts on the changes of ranges, with their times."""

_FIXED = "fixed_params"  # Optuna's system attribute of values that were enqueued.
_RUNG = "completed_rung_"  # And of values at ASHA's rungs.


def current_study(storage: BaseStorage) -> FrozenStudy | None:
    """Return the last study that is ready; a first one counts before; None if there is none."""
    studies = sorted(storage.get_all_studies(), key=lambda study: study._study_id)
    ready = [study for study in studies if READY in study.user_attrs]
    return next(reversed(ready or studies), None)


def ranges_of(space: Mapping[str, DistributionConfig]) -> dict[str, list[float]]:
    """Return low and high of every range of a search space."""
    return {
        path: [one.low, one.high]
        for path, one in space.items()
        if not isinstance(one, CategoricalDistributionConfig)
    }


def changed_ranges(space: Mapping[str, DistributionConfig], old: Mapping[str, Any]) -> list[str]:
    """Return lines on the ranges of a space that differ from `ranges_of` an older one."""
    changes = []
    for path, one in space.items():
        match one:
            case FloatDistributionConfig() | IntDistributionConfig():
                low, high = old.get(path, (one.low, one.high))
                if (low, high) != (one.low, one.high):
                    before = one.model_copy(update={"low": low, "high": high})
                    changes.append(f"{path}: {before} -> {one}")
    return changes


def copy_study(
    storage: BaseStorage,
    old: FrozenStudy,
    name: str,
    space: Mapping[str, DistributionConfig],
    changes: list[str],
) -> str:
    """Copy a study with the ranges of a new space, and return the new study's name.

    Trials inside the ranges keep all they have; others become FAIL with their own distributions,
    and are restored when later ranges contain them again.

    Args:
        storage: Of both studies.
        old: The study.
        name: Name of the first study.
        space: Path -> distribution.
        changes: Lines on what changed.
    """
    import optuna

    studies = {study.study_name: study for study in storage.get_all_studies()}
    number = 2
    while READY in getattr(studies.get(f"{name} ({number})"), "user_attrs", ()):
        number += 1
    new_name = f"{name} ({number})"
    if new_name in studies:  # A command was killed while it copied.
        storage.delete_study(studies[new_name]._study_id)
    study = optuna.create_study(storage=storage, study_name=new_name, directions=old.directions)
    now = datetime.now(UTC)
    time = now.strftime("%Y-%m-%d %H:%M UTC")
    for trial in storage.get_all_trials(old._study_id, deepcopy=False):
        study.add_trial(_under(space, trial, now, f"outside the ranges since {time}"))
    for key, value in old.user_attrs.items():
        if key != READY:
            study.set_user_attr(key, value)
    texts = [*old.user_attrs.get(CHANGES, ()), *(f"{time}: {change}" for change in changes)]
    study.set_user_attr(CHANGES, texts)
    study.set_user_attr(RANGES, ranges_of(space))
    study.set_user_attr(READY, True)
    return new_name


def _under(
    space: Mapping[str, DistributionConfig], found: FrozenTrial, now: datetime, problem: str
) -> FrozenTrial:
    """Return a trial as it is under the distributions of a space."""
    from optuna.trial import TrialState

    trial = _restored(found)
    values = trial.params
    if not trial.state.is_finished():
        values = {**trial.system_attrs.get(_FIXED, {}), **values}
    if all(space[path].contains(value) for path, value in values.items() if path in space):
        trial.distributions = {
            path: distribution(space[path]) if path in space else one
            for path, one in trial.distributions.items()
        }
        return trial
    if OUTSIDE in found.user_attrs or trial.state == TrialState.FAIL:
        return found
    outside = {
        "state": trial.state.name,
        "values": trial.values,
        "problem": trial.user_attrs.get(PROBLEM),
        "system_attrs": trial.system_attrs,
    }
    trial.user_attrs = {**trial.user_attrs, PROBLEM: problem, OUTSIDE: outside}
    # Its values at rungs would compete with those of trials inside.
    trial.system_attrs = {k: v for k, v in trial.system_attrs.items() if k == _FIXED}
    trial.state, trial.values = TrialState.FAIL, None
    trial.datetime_start = trial.datetime_start or now
    trial.datetime_complete = trial.datetime_complete or now
    return trial


def _restored(found: FrozenTrial) -> FrozenTrial:
    """Return a copy of a trial as it was before it came to be outside the ranges."""
    from optuna.trial import TrialState

    trial = copy.deepcopy(found)
    if OUTSIDE in trial.user_attrs:
        before = trial.user_attrs.pop(OUTSIDE)
        trial.state, trial.values = TrialState[before["state"]], before["values"]
        trial.system_attrs = before["system_attrs"]
        trial.user_attrs.pop(PROBLEM)
        if before["problem"] is not None:
            trial.user_attrs[PROBLEM] = before["problem"]
        if not trial.state.is_finished():
            trial.datetime_complete = None
        if trial.state == TrialState.WAITING:
            trial.datetime_start = None
    # The state of CMA-ES is of the old ranges; it begins again from the trials.
    trial.system_attrs = {
        key: value
        for key, value in trial.system_attrs.items()
        if key == _FIXED or key.startswith(_RUNG)
    }
    return trial
