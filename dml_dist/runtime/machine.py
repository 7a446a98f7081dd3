"""What a run costs its machine: rank 0's peak memory, and bytes on the network interface."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
from pathlib import Path

import torch

from dml_dist.topology import Topology

_LOOPBACK = "lo"


class MachineMeter:
    """Measures from now on; on rank 0.

    Memory is what the process (on a GPU: PyTorch on the device) takes at its peak above what it
    takes now. Bytes are those that the kernel counts as sent: on the loopback interface when all
    ranks are on this machine, else on all others. Headers and other programs count, too.
    """

    def __init__(self, topology: Topology) -> None:
        self._device = topology.device if topology.device_type == "cuda" else None
        self._ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", topology.world_size))
        self._is_alone = self._ranks_here == topology.world_size
        self._memory = self._reset_memory()
        self._sent = sent_bytes(loopback=self._is_alone)

    def read(self) -> dict[str, float]:
        """Return `memory_bytes`, the peak, and `interface_bytes` of a rank since the last reading.

        NaN is what this system does not tell.
        """
        before, self._sent = self._sent, sent_bytes(loopback=self._is_alone)
        sent = (self._sent - before) / self._ranks_here
        if self._device is not None:
            peak = float(torch.cuda.max_memory_allocated(self._device))
        else:
            peak = _status_bytes("VmHWM")
        return {"memory_bytes": peak - self._memory, "interface_bytes": sent}

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
