"""Rank 0's store listens where the other ranks look for it, and nowhere else."""

from __future__ import annotations

import importlib
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from dml_dist.parallel.process_group import bind_store

# `import ... as` finds the function of the same name.
rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
LIMIT = timedelta(seconds=10)


@pytest.fixture(autouse=True)
def _bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # Restored at the end: other tests use torch's own.
    monkeypatch.setattr(rendezvous, "_create_c10d_store", rendezvous._create_c10d_store)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    bind_store()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=2):
            return True
    except OSError:
        return False


def store(host: str, port: int) -> dist.Store:
    made: dist.Store = rendezvous._create_c10d_store(host, port, 0, 1, LIMIT)
    return made


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.3"])
def test_other_addresses_do_not_answer(host: str) -> None:
    port = free_port()
    served = store(host, port)
    client = dist.TCPStore(host, port, is_master=False, timeout=LIMIT)
    served.set("key", "value")
    assert client.get("key") == b"value"
    assert not answers("127.0.0.2", port)  # torch alone would answer at every address.


def test_a_name_is_left_to_torch() -> None:
    # It may mean 127.0.0.1 here, and another address on the machines of other ranks.
    port = free_port()
    served = store(socket.gethostname(), port)
    assert served is not None
    assert answers("127.0.0.2", port)


def test_an_earlier_store_of_the_same_port_is_used_again() -> None:
    port = free_port()
    first = store("127.0.0.1", port)
    first.set("key", "value")
    assert store("127.0.0.1", port).get("key") == b"value"


def test_torchruns_own_store_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=LIMIT, wait_for_workers=False)
    agent.set("key", "value")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert store("127.0.0.1", port).get("key") == b"value"
