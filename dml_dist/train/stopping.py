"""Stops and checkpoints that the clock or a request decides: how all ranks agree on the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch

from dml_dist.parallel.comm import Comm

StopReason = Callable[[int, Mapping[str, float] | None], str | None]
"""Takes the updates made and, after a validation, its metrics; gives why to stop, or None."""

_SECONDS_BETWEEN_CHECKS = 1.0


def first_reason(*sources: StopReason) -> StopReason:
    """Return a source that gives the first reason among several sources, in their order."""

    def ask(step: int, metrics: Mapping[str, float] | None) -> str | None:
        reasons = (source(step, metrics) for source in sources)
        return next((reason for reason in reasons if reason is not None), None)

    return ask


class StopChecks:
    """When all ranks ask whether to stop or to save, and what they agree on.

    A rank's own clock must not decide when it takes part in a collective. So each check also
    agrees on the step of the next one: about one second later at the slowest rank's pace.

    Attributes:
        save_is_due: Whether at the last check the time for a checkpoint had come; the same on
            every rank.
    """

    def __init__(
        self,
        ask: StopReason,
        comm: Comm,
        *,
        every_minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take this rank's source of reasons; `restart` is called before the first step.

        Args:
            ask: Gives why to stop.
            comm: The ranks.
            every_minutes: Minutes between checkpoints, by the first clock that says so; None: none
                is due by time.
            clock: Seconds, for tests.
        """
        self._ask = ask
        self._comm = comm
        self._clock = clock
        self._every = math.inf if every_minutes is None else 60.0 * every_minutes
        self._saved = clock()
        self._interval = 1
        self._next = 0
        self.save_is_due = False

    def restart(self, step: int) -> None:
        """Measure the pace from here: after `step` updates, at the start or after a pause."""
        self._step, self._start = step, self._clock()

    def saved(self) -> None:
        """Count the time to the next checkpoint from now."""
        self._saved = self._clock()

    def is_due(self, step: int) -> bool:
        """Whether `check` has to be called after `step` updates; the same on every rank."""
        return step >= self._next

    def check(self, step: int, metrics: Mapping[str, float] | None = None) -> str | None:
        """Return why to stop, the same on every rank, or None; every rank calls this.

        Args:
            step: Updates made.
            metrics: Those of a validation, right after one.
        """
        reason = self._ask(step, metrics)
        pace = (self._clock() - self._start) / max(1, step - self._step)
        late = self._clock() - self._saved >= self._every
        own = torch.tensor([reason is not None, late, pace], dtype=torch.float64)
        stops, saves, slowest = self._comm.all_reduce_max(own, what="stop request").tolist()
        self.save_is_due = bool(saves)
        if step > self._step:
            # At most doubled: the pace of few steps, or of steps that get slower, says little.
            fitting = int(_SECONDS_BETWEEN_CHECKS / max(slowest, 1e-9))
            self._interval = max(1, min(2 * self._interval, fitting))
        self._next = step + self._interval
        self.restart(step)
        if not stops:
            return None
        reasons = self._comm.gather_objects(reason, what="stop reasons")
        return next(reason for reason in reasons if reason is not None)
