"""Collectives on real ranks: values at 1, 2, 3 ranks, agreement on errors, dead and late ranks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from dml_dist.errors import ConfigError, DataError, DmlDistError, RunError
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init
from dml_dist.topology import Topology
from tests.ranks import RankFailure, run_ranks


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
    return {"bytes": comm.bytes_sent, "errors": _agreements(comm)}


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


@pytest.mark.parametrize("sizes", [[3], [2, 3], [1, 2, 1]])
def test_collectives(sizes: list[int]) -> None:
    world_size = len(sizes)
    results = run_ranks(_collectives, world_size, sizes)
    for result in results:
        if world_size == 1:
            continue
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


def _lonely(topology: Topology, behaviour: str) -> tuple[str, float]:
    """Rank 0 waits in a sum; rank 1 ends, or comes too late."""
    comm = init(topology, timeout_seconds=2.0)
    comm.barrier()
    if comm.rank == 1:
        if behaviour == "dies":
            raise SystemExit(3)
        time.sleep(6)
    start = time.monotonic()
    try:
        comm.all_reduce_sum(torch.zeros(2), what="proxy statistics")
    except RunError as error:
        raise SystemExit(f"{error} after {time.monotonic() - start:.1f}") from None
    return "", 0.0


@pytest.mark.parametrize("behaviour", ["dies"])
def test_others_raise_when_a_rank_is_gone(behaviour: str) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(_lonely, 2, behaviour)
    text = str(failure.value)
    assert "rank 0 of 2: required all ranks in the collective 'proxy statistics'" in text
