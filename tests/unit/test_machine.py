"""What the kernel counts: peak memory of a process, bytes sent on interfaces."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch

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


def test_the_peak_and_the_bytes_since_the_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    earlier = torch.zeros(60 * MB, dtype=torch.uint8)
    del earlier  # A peak from before counts as nothing.
    meter = MachineMeter(Topology(world_size=2))
    assert meter.read()["memory_bytes"] < 20 * MB
    held = torch.zeros(40 * MB, dtype=torch.uint8)
    del held
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    data = bytes(4 * MB)
    client.setblocking(False)
    left_to_send = len(data)
    while left_to_send:
        try:
            left_to_send -= client.send(data[:left_to_send])
        except BlockingIOError:
            other.recv(MB)
    found = meter.read()
    assert 38 * MB < found["memory_bytes"] < 60 * MB  # The kernel counts in batches of pages.
    # Two ranks sent it together; other programs of this machine may send, too.
    assert found["interface_bytes"] >= 2 * MB
    for one in (server, client, other):
        one.close()
