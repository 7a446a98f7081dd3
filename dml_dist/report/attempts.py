"""The history of a run: restarts on other ranks and nodes, and the cost of checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from dml_dist.report.formatting import MISSING, format_count, format_seconds, number
from dml_dist.runs.info import Attempt

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Restart:
    """An attempt after the first.

    Attributes:
        attempt: Its number.
        began: UTC time of its first step, ISO 8601; None if unknown or if it made none.
        made_no_step: Whether it ended before its first step.
        ranks_before: Number of ranks of the attempt before.
        ranks_after: Its own number of ranks.
        nodes: Name of each rank's machine; empty if unknown.
        reason: Why it was started; empty if unknown.
        first_step: Updates that it builds on; None if unknown or if it made no step.
        steps_repeated: Recorded steps of the last attempt that this one made again.
        since: When the run last stood at `first_step`, Unix seconds: the checkpoint was saved, or
            an attempt began there.
        seconds_lost: Time from then until `began`.
    """

    attempt: int
    began: str | None
    made_no_step: bool
    ranks_before: int
    ranks_after: int
    nodes: tuple[str, ...]
    reason: str
    first_step: int | None
    steps_repeated: int | None
    since: float | None
    seconds_lost: float | None

    @property
    def ranks(self) -> str:
        """Its number of ranks, and the one before if it differs."""
        return _ranks(self.ranks_before, self.ranks_after)

    @property
    def nodes_text(self) -> str:
        """The names of its nodes, each with its number of ranks if there are several."""
        counts = Counter(self.nodes).items()
        return ", ".join(f"{node} ({n} ranks)" if n > 1 else node for node, n in counts) or _UNKNOWN

    @property
    def first_step_text(self) -> str:
        """The step after which it continued."""
        return self._text(None if self.first_step is None else format_count(self.first_step))

    @property
    def steps_repeated_text(self) -> str:
        """How many steps it repeated."""
        steps = self.steps_repeated
        return self._text(None if steps is None else format_count(steps))

    @property
    def seconds_lost_text(self) -> str:
        """How much time was lost."""
        seconds = self.seconds_lost
        return self._text(None if seconds is None else format_seconds(seconds))

    def _text(self, known: str | None) -> str:
        return MISSING if self.made_no_step else known or _UNKNOWN


@dataclass(frozen=True)
class Mark:
    """Where training continued after a restart.

    Attributes:
        step: Updates made before.
        text: The change of the number of ranks; empty if there was none.
        problem: Whether a problem of alternating projections begins here, not an attempt.
    """

    step: int
    text: str
    problem: bool = False


@dataclass(frozen=True)
class History:
    """Restarts and saved checkpoints of a run.

    Attributes:
        restarts: In order.
        marks: One for each step at which an attempt after the first began, in order of steps.
        checkpoints: Seconds that each saved checkpoint took.
        training_seconds: Time from the first step of each attempt to its last record, together;
            None if unknown.
        whole_seconds: Time from the first step of the run to its last record; None if unknown.
    """

    restarts: tuple[Restart, ...]
    marks: tuple[Mark, ...]
    checkpoints: tuple[float, ...]
    training_seconds: float | None
    whole_seconds: float | None

    @property
    def title(self) -> str:
        """What there is to show; empty if there is nothing."""
        if self.restarts:
            return "Restarts and checkpoints" if self.checkpoints else "Restarts"
        return "Checkpoints" if self.checkpoints else ""

    @property
    def seconds_lost(self) -> float:
        """The time that all restarts lost, as far as it is known."""
        total, until = 0.0, float("inf")
        for restart in reversed(self.restarts):
            if restart.since is not None and restart.seconds_lost is not None:
                # After a return to an older checkpoint, its time covers that of restarts before.
                end = min(restart.since + restart.seconds_lost, until)
                total += max(0.0, end - restart.since)
                until = min(until, restart.since)
        return total

    @property
    def restarts_text(self) -> str | None:
        """The restarts in one line; None if there were none."""
        if not self.restarts:
            return None
        text = _counted(len(self.restarts), "restart")
        made = [restart for restart in self.restarts if not restart.made_no_step]
        steps = [r.steps_repeated for r in made if r.steps_repeated is not None]
        lost = [r for r in made if r.seconds_lost is not None]
        if not steps and not lost:
            return text
        least = "at least " if min(len(steps), len(lost)) < len(made) else ""
        share = _share(self.seconds_lost, self.whole_seconds, "the run")
        return (
            f"{text}: {least}{_counted(sum(steps), 'step')} repeated, "
            f"{format_seconds(self.seconds_lost)} lost{share}"
        )

    @property
    def checkpoints_text(self) -> str | None:
        """The cost of checkpoints in one line; None if none is recorded."""
        if not self.checkpoints:
            return None
        count, total = len(self.checkpoints), sum(self.checkpoints)
        each = f", {format_seconds(total / count)} each" if count > 1 else ""
        share = _share(total, self.training_seconds, "the training time")
        return f"{_counted(count, 'checkpoint')} saved in {format_seconds(total)}{each}{share}"


def read_history(
    attempts: Sequence[Attempt],
    steps: Sequence[Mapping[str, Any]],
    saves: Sequence[Mapping[str, Any]],
) -> History:
    """Return the history of a run.

    Args:
        attempts: All attempts in order; those of older versions lack most of the facts.
        steps: Every training record in order, also of steps that were made again.
        saves: Every record of a saved checkpoint in order.
    """
    last = {record["attempt"]: record for record in steps}
    seconds = [number(record.get("seconds")) for record in saves]
    trained = [a for a in attempts if a.first_step is not None or a.attempt in last]
    training, whole = _durations(trained, [*steps, *saves])
    restarts = tuple(
        _restart(attempts[:at], attempts[at], last, saves) for at in range(1, len(attempts))
    )
    return History(
        restarts=restarts,
        marks=_marks(trained),
        checkpoints=tuple(value for value in seconds if value is not None),
        training_seconds=training,
        whole_seconds=whole,
    )


def _restart(
    before: Sequence[Attempt],
    attempt: Attempt,
    last: Mapping[int, Mapping[str, Any]],
    saves: Sequence[Mapping[str, Any]],
) -> Restart:
    first, began = attempt.first_step, _unix(attempt.began)
    since = _last_time_at(first, before, saves)
    lost = None if began is None or since is None else max(0.0, began - since)
    return Restart(
        attempt=attempt.attempt,
        began=attempt.began,
        # Versions that did not record the first step wrote training records, too.
        made_no_step=first is None and attempt.attempt not in last,
        ranks_before=before[-1].world_size,
        ranks_after=attempt.world_size,
        nodes=attempt.nodes,
        reason=attempt.reason,
        first_step=first,
        steps_repeated=None if first is None else _repeated(first, before, last),
        since=since,
        seconds_lost=lost,
    )


def _repeated(
    first: int, before: Sequence[Attempt], last: Mapping[int, Mapping[str, Any]]
) -> int | None:
    """Return how far the last attempt that trained got beyond a step.

    Not the farthest of all attempts: what others made beyond it was counted for a restart before.
    """
    for attempt in reversed(before):
        if attempt.attempt in last:
            return max(0, int(last[attempt.attempt]["step"]) - first)
        if attempt.first_step is not None:
            return max(0, attempt.first_step - first)
    return 0


def _last_time_at(
    step: int | None, before: Sequence[Attempt], saves: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return when earlier attempts last stood at a step, with a checkpoint or at their begin."""
    numbers = {attempt.attempt for attempt in before}
    times = [_unix(attempt.began) for attempt in before if attempt.first_step == step]
    times += [
        number(save.get("time"))
        for save in saves
        if save["step"] == step and save["attempt"] in numbers
    ]
    return max((time for time in times if time is not None), default=None)


def _marks(trained: Sequence[Attempt]) -> tuple[Mark, ...]:
    """Return where attempts after the first one that trained continued."""
    changes: dict[int, tuple[int, int]] = {}
    for before, attempt in pairwise(trained):
        if (step := attempt.first_step) is not None:
            # Attempts that continued at the same step share a mark.
            ranks_before, _ = changes.get(step, (before.world_size, 0))
            changes[step] = ranks_before, attempt.world_size
    return tuple(
        Mark(step, _ranks(*ranks) if ranks[0] != ranks[1] else "")
        for step, ranks in sorted(changes.items())
    )


def _durations(
    trained: Sequence[Attempt], records: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """Return the training time of all attempts together, and that from the first to last step."""
    starts = {attempt.attempt: _unix(attempt.began) for attempt in trained}
    begins = {at: began for at, began in starts.items() if began is not None}
    ends = dict(begins)
    for record in records:
        time = number(record.get("time"))
        if time is not None and record["attempt"] in ends:
            ends[record["attempt"]] = max(time, ends[record["attempt"]])
    if not begins:
        return None, None
    training = sum(end - begins[at] for at, end in ends.items())
    first = starts[trained[0].attempt]
    return training, None if first is None else max(ends.values()) - first


def _unix(time: str | None) -> float | None:
    return None if time is None else datetime.fromisoformat(time).timestamp()


def _ranks(before: int, after: int) -> str:
    return f"{before} → {after}" if before != after else str(after)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _share(part: float, whole: float | None, name: str) -> str:
    return f" ({100 * part / whole:.1f} % of {name})" if whole else ""
