"""Configuration of launching: how the processes of a run are started, and how many."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from dml_dist.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, resumable


class LaunchConfig(Section):
    """How the processes of a run are started, and how many."""

    launcher: Literal["ray", "torchrun", "inprocess"] = resumable("inprocess")
    """Ray: Ray Train starts and restarts ranks. Torchrun: run by torchrun. Inprocess: one rank."""

    num_workers: PositiveInt = resumable(1)
    """W, the number of ranks under Ray; `{min: M, max: N}` is short for N with min_workers M."""

    min_workers: PositiveInt | None = resumable(None)
    """Fewest ranks to go on with when nodes are lost; null means num_workers.

    Below num_workers the run is elastic: it starts with as many ranks as there is room for, saves a
    checkpoint and grows when there is room for more, and goes on with fewer from its last
    checkpoint when a node is lost. Global batches stay the same.
    """

    threads_per_rank: PositiveInt | None = resumable(None)
    """CPU threads of each rank; null divides the cores among the ranks."""

    cpus_per_rank: PositiveFloat = resumable(1.0)
    """CPUs that Ray reserves for each rank."""

    use_gpu: Literal["auto", "yes", "no"] = resumable("auto")
    """Auto uses GPUs if there is one for each rank, on this machine or in the cluster `address`."""

    address: str | None = resumable(None)
    """Address of a running Ray cluster; null starts one on this machine."""

    max_failures: NonNegativeInt = resumable(3)
    """Number of times that Ray restarts failed ranks from the last checkpoint."""

    timeout_seconds: PositiveFloat = resumable(600.0)
    """Timeout of a collective, after which the run fails."""

    @property
    def fewest_workers(self) -> int:
        """Number of ranks that the run needs at least, under Ray."""
        return self.min_workers or self.num_workers

    @model_validator(mode="before")
    @classmethod
    def _range(cls, values: Any) -> Any:
        given = values.get("num_workers") if isinstance(values, dict) else None
        if not isinstance(given, dict) or sorted(given) != ["max", "min"]:
            return values
        if "min_workers" in values:
            raise ValueError("give either min_workers or num_workers: {min: M, max: N}, not both")
        return {**values, "num_workers": given["max"], "min_workers": given["min"]}

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        if self.fewest_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} must be at most num_workers {self.num_workers}"
            )
        return self
