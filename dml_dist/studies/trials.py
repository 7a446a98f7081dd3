"""The trials of a search in Optuna's storage, which alone knows what was tried.

A trial's states: RUNNING from its suggestion on, also while nothing runs it; COMPLETE with its
final values; PRUNED with its intermediate values; FAIL with the problem as a user attribute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, assert_never, get_args

from dml_dist.config.search_space import (
    CategoricalDistributionConfig,
    DistributionConfig,
    FloatDistributionConfig,
    IntDistributionConfig,
)
from dml_dist.config.study import METHOD_KEY

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

LABEL = "label"
"""User attribute: name of the trial's run, also of a trial that continues another one."""
CONTINUES = "continues"
"""User attribute: number of the pruned trial that this one continues."""
PROBLEM = "problem"
"""User attribute: why the trial failed, or why its value is the worst one."""
SECONDS = "seconds"
"""User attribute: time of the trial's runs, all attempts together."""
STEPS = "steps"
"""User attribute: optimiser updates of the trial."""
PRUNED_AT = "pruned_at"
"""User attribute: the step whose value made the pruner end the trial."""
OUTSIDE = "outside"
"""User attribute: what a trial was, before a change of ranges put its values outside of them."""

State = Literal["complete", "pruned", "failed", "diverged", "outside", "running", "waiting"]
"""Diverged: Optuna's COMPLETE with made-up values, since the loss was not finite. Outside: a change
of ranges has put the values outside of them. Waiting: it was enqueued, and not begun.
"""
STATES: tuple[State, ...] = get_args(State)

_LARGE = 1e5
"""A bad value to minimise while there is no other: more than most runs take in seconds."""


@dataclass(frozen=True)
class Suggestion:
    """A trial to execute.

    Attributes:
        number: Its number in the storage.
        label: Name of its run.
        values: Path -> value; `method` names the method, if the search has methods.
    """

    number: int
    label: str
    values: dict[str, Any]


class Trials:
    """Suggests trials and keeps their outcome; one process at a time."""

    def __init__(
        self,
        study: optuna.Study,
        space: Mapping[str, DistributionConfig],
        paths_of: Callable[[str | None], Sequence[str]],
        methods: Sequence[str] = (),
    ) -> None:
        """Take over a study; its RUNNING trials are those that an earlier command left.

        Args:
            study: Optuna's study, with its sampler and pruner.
            space: Path -> distribution.
            paths_of: The searched paths of a method, or of None without methods.
            methods: Names of the methods, if the search chooses among them.
        """
        import optuna

        self.study = study
        self._space = space
        self._paths_of = paths_of
        self._methods = tuple(methods)
        self._active: dict[int, optuna.Trial] = {}
        self._interrupted = [
            trial for trial in self.all() if trial.state == optuna.trial.TrialState.RUNNING
        ]

    def all(self) -> list[FrozenTrial]:
        """Return all trials in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def count(self) -> int:
        """Return the number of trials that were suggested; continuations are not counted."""
        import optuna

        # Without a label: RUNNING, its suggestion interrupted; FAIL, enqueued values that a change
        # of ranges has put outside of them.
        running = optuna.trial.TrialState.RUNNING
        return sum(
            (LABEL in trial.user_attrs or trial.state == running)
            and CONTINUES not in trial.user_attrs
            for trial in self.all()
        )

    def waiting(self) -> int:
        """Return the number of enqueued trials that were not suggested yet."""
        import optuna

        return sum(trial.state == optuna.trial.TrialState.WAITING for trial in self.all())

    def enqueue(self, points: Iterable[Mapping[str, Any]], limit: int | None = None) -> None:
        """Suggest these values before others, those that are missing as the sampler draws them.

        Args:
            points: Path -> value; those that a trial has or had are left out.
            limit: Maximum number of new trials.
        """
        known = {_key(trial.system_attrs.get("fixed_params", trial.params)) for trial in self.all()}
        new = (point for point in points if _key(point) not in known)
        for point in islice(new, limit):
            self.study.enqueue_trial(dict(point))
            known.add(_key(point))

    @property
    def has_interrupted(self) -> bool:
        """Whether `interrupted` has a trial to give."""
        return bool(self._interrupted)

    def interrupted(self) -> Suggestion | None:
        """Return a trial that an earlier command left, or None; each is given once."""
        import optuna

        if not self._interrupted:
            return None
        found = self._interrupted.pop(0)
        # The only way to a trial that another process has begun.
        return self._begin(optuna.trial.Trial(self.study, found._trial_id))

    def suggest(self) -> Suggestion:
        """Return a new trial."""
        return self._begin(self.study.ask())

    def add_continuation(self, number: int) -> None:
        """Add a trial that continues a pruned one; `interrupted` gives it, and it is not pruned."""
        import optuna

        found = self.all()[number]
        self.study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=found.params,
                distributions=found.distributions,
                user_attrs={CONTINUES: number, LABEL: _label(found)},
            )
        )
        self._interrupted.insert(0, self.all()[-1])

    def report(self, number: int, step: int, value: float) -> bool:
        """Keep an intermediate value and return whether to prune the trial.

        Steps that are known are ignored: a trial that is continued reports them again. With two
        objectives nothing is kept or pruned.
        """
        trial = self._active[number]
        found = self.all()[number]
        if PRUNED_AT in found.user_attrs:
            return True  # The command that got the decision has ended before the trial has.
        if (
            len(self.study.directions) > 1
            or not math.isfinite(value)
            or step in found.intermediate_values
        ):
            return False
        trial.report(value, step)
        # In ASHA's rungs the pruned trial stands for the one that continues it.
        if CONTINUES in found.user_attrs or not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED_AT, step)
        return True

    def complete(self, number: int, values: Sequence[float], **facts: Any) -> None:
        """End a trial with its values; those that are not finite become the worst ones.

        Args:
            number: Of the trial.
            values: One of each objective.
            facts: User attributes.
        """
        self._keep(number, facts)
        worst = self._worst()
        kept = [
            value if math.isfinite(value) else worst[place] for place, value in enumerate(values)
        ]
        self.study.tell(self._active.pop(number), kept)

    def diverged(self, number: int, problem: str, **facts: Any) -> None:
        """End a trial whose loss was not finite: the sampler learns the worst values."""
        nothing = [math.nan] * len(self.study.directions)
        self.complete(number, nothing, **{PROBLEM: problem, **facts})

    def prune(self, number: int, **facts: Any) -> None:
        """End a trial that was pruned."""
        import optuna

        self._keep(number, facts)
        self.study.tell(self._active.pop(number), state=optuna.trial.TrialState.PRUNED)

    def pause(self, number: int, **facts: Any) -> None:
        """Leave a trial that was stopped as it is: `interrupted` gives it again, here or later."""
        self._keep(number, facts)
        del self._active[number]
        self._interrupted.append(self.all()[number])

    def fail(self, number: int, problem: str, **facts: Any) -> None:
        """End a trial that failed; the sampler does not learn from it."""
        import optuna

        self._keep(number, {PROBLEM: problem, **facts})
        self.study.tell(self._active.pop(number), state=optuna.trial.TrialState.FAIL)

    def best(self) -> FrozenTrial | None:
        """Return the best complete trial by the first objective, or None; the first of equals."""
        import optuna

        maximize = optuna.study.StudyDirection.MAXIMIZE
        sign = 1.0 if self.study.directions[0] == maximize else -1.0
        # A trial that diverged has made-up values.
        done = [trial for trial in completed(self.study) if PROBLEM not in trial.user_attrs]
        return max(done, key=lambda trial: sign * trial.values[0], default=None)

    def _begin(self, trial: optuna.Trial) -> Suggestion:
        values: dict[str, Any] = {}
        method = None
        if self._methods:
            method = str(trial.suggest_categorical(METHOD_KEY, self._methods))
            values[METHOD_KEY] = method
        for path in self._paths_of(method):
            values[path] = _suggest(trial, path, self._space[path])
        attributes = trial.user_attrs
        if LABEL not in attributes:
            trial.set_user_attr(LABEL, f"trial-{trial.number}")
        self._active[trial.number] = trial
        label = attributes.get(LABEL, f"trial-{trial.number}")
        return Suggestion(trial.number, label, values)

    def _keep(self, number: int, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self._active[number].set_user_attr(name, value)

    def _worst(self) -> list[float]:
        import optuna

        result = []
        for place, direction in enumerate(self.study.directions):
            found = [trial.values[place] for trial in completed(self.study)]
            if direction == optuna.study.StudyDirection.MAXIMIZE:
                result.append(min([0.0, *found]))
            else:
                result.append(max(found, default=_LARGE))
        return result


def state_of(trial: FrozenTrial) -> State:
    """Return the state of a trial as tables and figures show it."""
    match trial.state.name:
        case "COMPLETE":
            return "diverged" if PROBLEM in trial.user_attrs else "complete"
        case "PRUNED":
            return "pruned"
        case "FAIL":
            return "outside" if OUTSIDE in trial.user_attrs else "failed"
        case "WAITING":
            return "waiting"
        case _:
            return "running"


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials of a study."""
    import optuna

    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _label(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get(LABEL, f"trial-{trial.number}"))


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return a key that is equal for equal values, also if they were computed in other ways."""
    return tuple(
        (path, float(f"{value:.12g}") if isinstance(value, float) else value)
        for path, value in sorted(point.items())
    )


def _suggest(trial: optuna.Trial, path: str, config: DistributionConfig) -> Any:
    match config:
        case FloatDistributionConfig():
            # An integer that was enqueued would be a float after it is read from the storage.
            return float(
                trial.suggest_float(path, config.low, config.high, step=config.step, log=config.log)
            )
        case IntDistributionConfig():
            return trial.suggest_int(
                path, config.low, config.high, step=config.step, log=config.log
            )
        case CategoricalDistributionConfig():
            value = trial.suggest_categorical(path, config.choices)
            return config.choices[config.choices.index(value)]  # Likewise 1 for true or 1.0.
        case _:
            assert_never(config)
