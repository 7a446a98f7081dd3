"""Ending a run before its last step: who may ask for it, and how all ranks agree on the step."""

from __future__ import annotations

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
    """When all ranks ask whether to stop, and what they agree on.

    A rank's own clock must not decide when it takes part in a collective. So each check also
    agrees on the step of the next one: about one second later at the slowest rank's pace.
    """

    def __init__(
        self, ask: StopReason, comm: Comm, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take this rank's source of reasons; `restart` is called before the first step."""
        self._ask = ask
        self._comm = comm
        self._clock = clock
        self._interval = 1
        self._next = 0

    def restart(self, step: int) -> None:
        """Measure the pace from here: after `step` updates, at the start or after a pause."""
        self._step, self._start = step, self._clock()

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
        own = torch.tensor([reason is not None, pace], dtype=torch.float64)
        stops, slowest = self._comm.all_reduce_max(own, what="stop request").tolist()
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
