"""Comm and process group of one process; ranks are in tests/distributed/test_comm_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dml_dist.errors import PeerLostError, RunError, TopologyError
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init, shutdown, topology_from_environment
from dml_dist.topology import Topology


def test_one_process_gets_copies() -> None:
    comm = Comm.single()
    x = torch.arange(6.0).reshape(3, 2)
    for result in (
        comm.all_gather_rows(x, [3]),
        comm.reduce_scatter_rows(x, [3]),
        comm.all_reduce_sum(x),
        comm.all_reduce_max(x),
        comm.broadcast(x, 0),
    ):
        assert torch.equal(result, x)
        assert result.data_ptr() != x.data_ptr()
    assert comm.gather_objects({"a": 1}) == [{"a": 1}]
    assert comm.broadcast_object([1, "b"]) == [1, "b"]
    comm.barrier()
    assert (comm.rank, comm.world_size, comm.traffic.total) == (0, 1, 0)
    assert comm.device == torch.device("cpu")


def test_rows_must_be_those_of_the_sizes() -> None:
    comm = Comm.single()
    with pytest.raises(ValueError, match=r"labels: rank 0 passed .* must be 2 rows and 1 sizes"):
        comm.all_gather_rows(torch.zeros(3), [2], what="labels")
    with pytest.raises(ValueError, match=r"passed a tensor of shape \(4,\) and sizes \[2, 2\]"):
        comm.reduce_scatter_rows(torch.zeros(4), [2, 2])


def test_guard_names_the_collective_and_leaves_other_errors_alone() -> None:
    comm = Comm.single()
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    with pytest.raises(PeerLostError, match=r"'backward'.*closed by peer"), comm.guard("backward"):
        raise lost
    with pytest.raises(RuntimeError, match=r"^a shape$"), comm.guard("backward"):
        raise RuntimeError("a shape")


def test_agree_raises_the_error_of_one_process_itself() -> None:
    comm = Comm.single()
    comm.agree(None)
    error = KeyError("x")
    with pytest.raises(KeyError) as raised:
        comm.agree(error)
    assert raised.value is error


def test_topology_from_environment() -> None:
    assert topology_from_environment("cpu", {}) == Topology()
    assert topology_from_environment("cuda", {}) == Topology(device="cuda:0")
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert topology_from_environment("cuda", environment) == Topology(5, 8, 1, "cuda:1")
    assert topology_from_environment("cpu", environment) == Topology(5, 8, 1, "cpu")
    for damage in ({"RANK": "x"}, {"LOCAL_RANK": None}):
        damaged = {k: v for k, v in {**environment, **damage}.items() if v is not None}
        with pytest.raises(TopologyError, match="Start every rank with torchrun"):
            topology_from_environment("cpu", damaged)


def test_one_rank_joins_nobody() -> None:
    comm = init(Topology(), timeout_seconds=3)
    assert comm.group is None
    assert not dist.is_initialized()
    shutdown()
    assert Comm.from_default_group().world_size == 1
    with pytest.raises(ValueError, match="timeout_seconds must be positive, but is 0"):
        init(Topology(), timeout_seconds=0)


def test_missing_ranks_are_reported_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"rank 0 of 2: not all ranks met at file.*within 0.5 s"):
        init(Topology(0, 2), init_method=f"file://{tmp_path}/store", timeout_seconds=0.5)
    assert not dist.is_initialized()


def test_a_group_made_by_a_launcher_is_kept(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        comm = init(Topology())
        assert comm.group is not None
        x = torch.ones(2, 3)
        assert torch.equal(comm.all_gather_rows(x, [2]), x)
        assert Comm.from_default_group().group is comm.group
        with pytest.raises(
            TopologyError, match="should be rank 0 of 2, but in the process group it is"
        ):
            init(Topology(0, 2))
        with pytest.raises(ValueError, match="world_size 2, but the process group has 1 ranks"):
            Comm(comm.group, Topology(0, 2))
    finally:
        shutdown()
    assert not dist.is_initialized()
