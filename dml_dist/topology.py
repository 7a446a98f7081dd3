"""Facts about the ranks of one run, as a value that is passed in and never looked up."""

from __future__ import annotations

from dataclasses import dataclass

from dml_dist.errors import TopologyError
from dml_dist.partition import part_bounds


@dataclass(frozen=True)
class Topology:
    """One rank's place among the ranks of a run.

    Attributes:
        rank: This rank, 0 .. world_size - 1.
        world_size: Number of ranks (training processes).
        local_rank: This rank's number on its machine.
        device: torch device string, "cpu" or "cuda:N".
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise TopologyError(
                f"required 0 <= rank < world_size, got rank={self.rank}, "
                f"world_size={self.world_size}; start every rank through one launcher"
            )

    @property
    def is_main(self) -> bool:
        """Whether this rank writes records, checkpoints' manifests and reports."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.split(":")[0]

    def part(self, total: int) -> tuple[int, int]:
        """Return this rank's half-open part of `total` items."""
        return part_bounds(total, self.world_size, self.rank)
