"""What a run costs its machine: rank 0's peak memory, and bytes on the network interface."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import time
from pathlib import Path

import torch

from dml_dist.topology import Topology

_LOOPBACK = "lo"


class MachineMeter:
    """Measures from now on; on rank 0.

    Memory is what the process (on a GPU: PyTorch on the device) takes at its peak above what it
    takes now. Bytes are those that the kernel counts as sent, with headers: on the loopback
    interface when all ranks are on this machine, else on all others. What was sent per second while
    all ranks waited, as by Ray, is taken off.
    """

    def __init__(self, topology: Topology, *, idle_seconds: float = 1.0) -> None:
        """Begin to measure, before the network is built.

        Args:
            topology: This rank's place.
            idle_seconds: Time for which several ranks wait for this one, to count what is sent
                beside their collectives.
        """
        self._device = topology.device if topology.device_type == "cuda" else None
        self._ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
        self._is_alone = self._ranks_here == topology.world_size
        self._idle_rate = 0.0
        self._memory = self._reset_memory()
        self._sent, self._time = self._count()
        if topology.world_size > 1 and idle_seconds:
            time.sleep(idle_seconds)
            self._idle_rate = self._sent_since_last() / idle_seconds

    def read(self) -> dict[str, float]:
        """Return `memory_bytes`, the peak, and `interface_bytes` of a rank since the last reading.

        NaN is what this system does not tell.
        """
        if self._device is not None:
            peak = float(torch.cuda.max_memory_allocated(self._device))
        else:
            peak = _status_bytes("VmHWM")
        return {"memory_bytes": peak - self._memory, "interface_bytes": self._sent_since_last()}

    def _count(self) -> tuple[float, float]:
        return sent_bytes(loopback=self._is_alone), time.monotonic()

    def _sent_since_last(self) -> float:
        """Return what a rank sent since the last call, less what is sent anyway."""
        sent, at = self._sent, self._time
        self._sent, self._time = self._count()
        return (self._sent - sent) / self._ranks_here - self._idle_rate * (self._time - at)

    def _reset_memory(self) -> float:
        """Forget the peak so far; return the bytes taken now."""
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            return float(torch.cuda.memory_allocated(self._device))
        with contextlib.suppress(OSError, AttributeError):
            # Else freed memory that the process keeps would hide what is allocated next.
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # Another system, or no right: an earlier peak would count as this one's.
            return math.nan
        return _status_bytes("VmRSS")


def sent_bytes(*, loopback: bool, table: str = "/proc/net/dev") -> float:
    """Return the bytes that the kernel has counted as sent; NaN if it does not tell.

    Args:
        loopback: Count the loopback interface; else all others.
        table: The kernel's table of interfaces.
    """
    try:
        lines = Path(table).read_text().splitlines()[2:]
    except OSError:
        return math.nan
    rows = (line.partition(":") for line in lines)
    return float(
        sum(
            int(counts.split()[8])
            for name, _, counts in rows
            if (name.strip() == _LOOPBACK) == loopback
        )
    )


def _status_bytes(key: str) -> float:
    """Return a size of this process, such as VmRSS."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return math.nan if found is None else int(found[1]) * 1024.0
