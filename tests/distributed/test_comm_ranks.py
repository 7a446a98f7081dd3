"""Collectives on real ranks: values at 1, 2, 3 ranks, agreement on errors, dead and late ranks."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dml_dist.errors import ConfigError, DataError, DmlDistError
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init
from dml_dist.topology import Topology
from tests.ranks import RankFailure, leave, run_ranks


def _rows(rank: int, size: int) -> torch.Tensor:
    return torch.arange(size * 3, dtype=torch.float64).reshape(size, 3) + 100 * rank


def _collectives(topology: Topology, sizes: list[int]) -> dict[str, Any]:
    comm = init(topology)
    rank, world_size = comm.rank, comm.world_size
    x = _rows(rank, sizes[rank])
    everything = torch.cat([_rows(r, sizes[r]) for r in range(world_size)])
    assert torch.equal(comm.all_gather_rows(x, sizes), everything)
    flags = comm.all_gather_rows(x > 100, sizes)
    assert flags.dtype == torch.bool
    assert torch.equal(flags, everything > 100)
    scattered = comm.reduce_scatter_rows(everything * (rank + 1), sizes)
    assert torch.equal(scattered, x * sum(range(1, world_size + 1)))
    number = torch.tensor([rank + 1])
    assert comm.all_reduce_sum(number).item() == sum(range(1, world_size + 1))
    assert comm.all_reduce_max(number).item() == world_size
    assert number.item() == rank + 1, "arguments are not changed"
    last = world_size - 1
    assert torch.equal(comm.broadcast(number, last), torch.tensor([world_size]))
    assert comm.gather_objects({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    assert comm.broadcast_object(f"from {rank}", last) == f"from {last}"
    comm.barrier()
    comm.agree(None)
    return {"bytes": comm.traffic.total, "errors": _agreements(comm)}


def _agreements(comm: Comm) -> list[tuple[str, str]]:
    """Return class and text of what `agree` raises for errors on the last rank and on all."""
    raised: list[tuple[str, str]] = []
    last = comm.rank == comm.world_size - 1
    for error in (
        DataError("bad tar") if last else None,
        KeyError("x") if last else None,
        ConfigError("same everywhere"),
    ):
        try:
            comm.agree(error)
        except (DmlDistError, KeyError) as caught:
            raised.append((type(caught).__name__, str(caught)))
    return raised


@pytest.mark.parametrize("sizes", [[2, 3], [1, 2, 1]])
def test_collectives(sizes: list[int]) -> None:
    world_size = len(sizes)
    results = run_ranks(_collectives, world_size, sizes)
    for result in results:
        place = f"rank {world_size - 1} of {world_size}: "
        assert result["errors"] == [
            ("DataError", place + "bad tar"),
            ("RunError", place + "KeyError: 'x'"),
            ("ConfigError", "same everywhere"),
        ]
        assert result["bytes"] > 0


def test_collectives_in_one_process_need_no_group() -> None:
    result = _collectives(Topology(), [3])
    assert result["bytes"] == 0
    assert result["errors"] == [
        ("DataError", "bad tar"),
        ("KeyError", "'x'"),
        ("ConfigError", "same everywhere"),
    ]


def _warns(topology: Topology) -> None:
    warnings.warn(f"rank {topology.rank} calls something old", FutureWarning, stacklevel=1)


def test_warnings_fail_a_rank() -> None:
    # So a collective that torch calls deprecated fails the tests above, on every rank.
    with pytest.raises(RankFailure, match="FutureWarning: rank 1 calls something old"):
        run_ranks(_warns, 2)


def _lonely(topology: Topology, behaviour: str, folder: str) -> None:
    """Rank 0 waits in a sum; rank 1 has ended, or comes too late."""
    leave()
    comm = init(topology, init_method=f"file://{folder}/{behaviour}", timeout_seconds=1.0)
    comm.barrier()
    if comm.rank == 1:
        if behaviour == "ends":
            raise SystemExit(3)
        time.sleep(2)
    comm.all_reduce_sum(torch.zeros(2), what="sums of loss statistics")


@pytest.mark.parametrize("behaviour", ["ends", "lags"])
def test_a_rank_that_is_gone_or_late_fails_the_others(behaviour: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        run_ranks(_lonely, 2, behaviour, str(tmp_path))
    text = str(failure.value)
    assert "PeerLostError: rank 0 of 2: the collective 'sums of loss statistics' (number 1)" in text
    assert "with a timeout of 1 s. Another rank ended, is late or" in text
    assert time.monotonic() - start < 30
