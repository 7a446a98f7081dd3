"""How busy other programs keep this machine while a point is measured."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_PROC = Path("/proc")
_SECONDS_BETWEEN_SAMPLES = 1.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """Processor time until a moment, in seconds.

    Attributes:
        time: Unix time.
        busy: Of all processes, and time that the host of a virtual machine took.
        own: Of this process and of all that it started.
    """

    time: float
    busy: float
    own: float


class LoadMeter:
    """Samples processor times from a thread while the block runs."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._samples: list[Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> LoadMeter:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def load(self, start: float, end: float) -> float:
        """Return the processors that others used between two Unix times, on average.

        NaN if the system does not tell.
        """
        return others(self._samples, start, end)

    def _work(self) -> None:
        while not self._done.wait(_SECONDS_BETWEEN_SAMPLES):
            self._sample()

    def _sample(self) -> None:
        # A process that ended keeps its last count.
        with contextlib.suppress(OSError):
            self._seconds |= process_seconds(os.getpid())
            self._samples.append(Sample(time.time(), busy_seconds(), sum(self._seconds.values())))


def others(samples: list[Sample], start: float, end: float) -> float:
    """Return processors used by others in the samples that enclose a time; NaN with less than two.

    Args:
        samples: In the order of time.
        start: Unix time.
        end: Unix time.
    """
    before = [sample for sample in samples if sample.time <= start]
    after = [sample for sample in samples if sample.time >= end]
    first, last = (before or samples[:1])[-1:], (after or samples[-1:])[:1]
    if not first or not last or last[0].time <= first[0].time:
        return math.nan
    (one,), (other,) = first, last
    used = (other.busy - one.busy) - (other.own - one.own)
    return max(0.0, used / (other.time - one.time))


def busy_seconds(proc: Path = _PROC) -> float:
    """Return the time of all processors in programs, and time stolen from a virtual machine.

    Interrupts are left out: those of the network are caused by the ranks.
    """
    fields = (proc / "stat").read_text().splitlines()[0].split()
    user, nice, system, steal = (int(fields[place]) for place in (1, 2, 3, 8))
    return (user + nice + system + steal) / _TICKS


def process_seconds(root: int, proc: Path = _PROC) -> dict[int, float]:
    """Return the processor time of a process and of its descendants, by process id."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in proc.iterdir():
        if not path.name.isdecimal():
            continue
        try:
            # The name, which may hold spaces and parentheses, ends at the last one.
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It ended.
            continue
        number = int(path.name)
        parents[number] = int(fields[1])
        seconds[number] = (int(fields[11]) + int(fields[12])) / _TICKS
    found = {root}
    grew = True
    while grew:
        children = {number for number, parent in parents.items() if parent in found}
        grew = not children <= found
        found |= children
    return {number: seconds[number] for number in found & seconds.keys()}
