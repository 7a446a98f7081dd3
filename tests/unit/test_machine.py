"""What the kernel counts: peak memory of a process, bytes sent on interfaces."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch

from dml_dist.runtime import machine
from dml_dist.runtime.machine import MachineMeter, sent_bytes
from dml_dist.topology import Topology

MB = 2**20

TABLE = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo
    lo: 111      3    0    0    0     0          0         0      700       3    0    0
  eth0:12345678     4    0    0    0     0          0         0       20       9    0    0
  veth1:     1      4    0    0    0     0          0         0        3       9    0    0
"""


def test_interfaces_are_counted(tmp_path: Path) -> None:
    table = tmp_path / "dev"
    table.write_text(TABLE)
    assert sent_bytes(loopback=True, table=str(table)) == 700
    assert sent_bytes(loopback=False, table=str(table)) == 23
    assert math.isnan(sent_bytes(loopback=True, table=str(tmp_path / "missing")))


def test_what_is_sent_anyway_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    clock = {"now": 0.0, "collectives": 0.0}

    def sent(*, loopback: bool) -> float:
        return clock["collectives"] + 300.0 * clock["now"]  # Others send 300 bytes a second.

    def sleep(seconds: float) -> None:
        clock["now"] += seconds

    monkeypatch.setattr(machine, "sent_bytes", sent)
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(machine.time, "sleep", sleep)
    meter = MachineMeter(Topology(world_size=2))
    clock["now"] += 10
    clock["collectives"] += 5000
    assert meter.read()["interface_bytes"] == pytest.approx(2500)
    clock["now"] += 10
    assert meter.read()["interface_bytes"] == pytest.approx(0)


def test_the_peak_and_the_bytes_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    earlier = torch.zeros(60 * MB, dtype=torch.uint8)
    del earlier  # A peak from before counts as nothing.
    meter = MachineMeter(Topology(world_size=2), idle_seconds=0)
    assert meter.read()["memory_bytes"] < 20 * MB
    held = torch.zeros(40 * MB, dtype=torch.uint8)
    del held
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    for _ in range(64):
        client.sendall(bytes(2**16))  # Less than the buffers hold.
        left = 2**16
        while left:
            left -= len(other.recv(left))
    found = meter.read()
    assert 38 * MB < found["memory_bytes"] < 60 * MB  # The kernel counts in batches of pages.
    # Two ranks sent it together; other programs of this machine may send, too.
    assert found["interface_bytes"] >= 2 * MB
    for one in (server, client, other):
        one.close()
