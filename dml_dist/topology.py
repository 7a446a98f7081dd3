"""Rank, world size and device of a process, passed in as a value and never looked up."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from dml_dist.errors import TopologyError
from dml_dist.partition import part_bounds


@dataclass(frozen=True)
class Topology:
    """Position of one rank among the ranks of a run.

    Attributes:
        rank: This rank, 0 .. world_size - 1.
        world_size: Number of ranks (training processes).
        local_rank: This rank's number on its machine.
        device: torch device string, "cpu" or "cuda:N".
        node: Name of its machine, for messages.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    node: str = field(default_factory=socket.gethostname)

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise TopologyError(
                f"rank {self.rank} is not in 0 .. world_size - 1 with world_size "
                f"{self.world_size}; start all ranks with the same launcher"
            )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes records, checkpoint manifests and reports."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.split(":")[0]

    def part(self, total: int) -> tuple[int, int]:
        """Return this rank's half-open part of `total` items."""
        return part_bounds(total, self.world_size, self.rank)
