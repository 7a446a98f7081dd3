"""Ranks that are slow, raise, die or find no port: the others continue, or end with an error."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from dml_dist.errors import RunError
from dml_dist.parallel.process_group import init
from dml_dist.topology import Topology
from tests.e2e.conftest import config_file, glyphs
from tests.faults.forked import command, forked
from tests.faults.runs import act, assert_same_end
from tests.ranks import leave, run_ranks

__all__ = ["config_file", "glyphs"]


def train_on_two(
    config: Path, folder: Path, run: str, *changes: str
) -> tuple[list[int], list[str]]:
    """Train on two ranks and return their exit codes and outputs."""
    sets = [part for change in changes for part in ("--set", change)]
    arguments = ("train", str(config), "--run-dir", run, *sets)
    ended = forked(command, *arguments, folder=folder, world_size=2)
    return ended.codes, ended.output


@pytest.mark.parametrize(
    "action", ["raise", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kill", "sleep"))]
)
def test_a_rank_that_fails_the_others(action: str, config_file: Path, tmp_path: Path) -> None:
    """Too slow, an error of its own, or dead: the other one names the collective it waited in."""
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action=action, after=70, seconds=5.0)
    codes, output = train_on_two(config, tmp_path, "run", "launch.timeout_seconds=2")
    assert mark.exists()
    assert codes[0] == 1, output
    assert "rank 0 of 2: the collective '" in output[0]
    assert "with a timeout of 2 s" in output[0]
    assert "Traceback" not in output[0]
    assert codes[1] == (-9 if action == "kill" else 1), output
    if action == "raise":
        assert "a fault of the transform" in output[1]
    if action == "sleep":
        assert "rank 1 of 2: the collective '" in output[1]


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(config_file: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action="sleep", after=70, seconds=2.0)
    codes, output = train_on_two(config, tmp_path, "slow")
    assert codes == [0, 0], output
    assert mark.exists()
    codes, output = train_on_two(config, tmp_path, "whole")
    assert codes == [0, 0], output
    assert_same_end(tmp_path / "slow", tmp_path / "whole")


def meet_at_a_taken_port(topology: Topology, port: int, folder: str) -> tuple[str, float]:
    """Try to join the ranks where something else listens; return the error and the seconds."""
    leave()
    start = time.monotonic()
    with pytest.raises(RunError) as caught:
        init(topology, init_method=f"tcp://127.0.0.1:{port}", timeout_seconds=3.0)
    seconds = time.monotonic() - start
    init(topology, init_method=f"file://{folder}/meet", timeout_seconds=30.0)  # For run_ranks.
    return str(caught.value), seconds


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()  # It accepts connections and never answers.
        port = other.getsockname()[1]
        found = run_ranks(meet_at_a_taken_port, 2, port, str(tmp_path))
    for rank, (message, seconds) in enumerate(found):
        assert f"rank {rank} of 2: not all ranks met at tcp://127.0.0.1:{port}" in message
        assert seconds < 30
    assert "address already in use" in found[0][0]
