"""Without a cluster: Ray's private names may vanish, and requests to stop reach the ranks."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import TopologyError
from dml_dist.orchestration import launch, ray_launch, ray_mailbox, ray_private
from dml_dist.orchestration.ray_mailbox import Drain, Mailbox, heartbeat
from dml_dist.parallel.process_group import bind_store
from dml_dist.runtime.progress import Event, warnings_as_notes
from dml_dist.runtime.signals import StopRequest


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    ray_private._warn.cache_clear()
    yield
    ray_private._warn.cache_clear()


def test_warnings_are_shown_where_ray_raises_the_level_of_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.root, "level", logging.ERROR)
    package = logging.getLogger("dml_dist")
    monkeypatch.setattr(package, "level", logging.NOTSET)
    package.manager._clear_cache()  # type: ignore[attr-defined]
    events: list[Event] = []
    with warnings_as_notes(events.append):
        for name in ("an older", "an older", "a damaged"):  # The same text is a note once.
            logging.getLogger("dml_dist.train.checkpoint").warning("%s checkpoint", name)
    shown = ["warning: an older checkpoint", "warning: a damaged checkpoint"]
    assert [event["text"] for event in events] == shown
    assert package.level == logging.NOTSET


def test_without_the_node_dead_daemons_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray._private.worker

    assert ray_private.dead_daemons() == ""
    assert caplog.records == []
    monkeypatch.delattr(ray._private.worker, "_global_node")
    for _ in range(3):  # As a watching thread does.
        assert ray_private.dead_daemons() == ""
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "_global_node" in record.getMessage()
    assert "the death of Ray's own processes is not reported" in record.getMessage()


def test_dead_daemons_are_those_that_a_cluster_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray._private.worker

    dead = [("raylet", None), ("log_monitor", None), ("gcs_server", None)]
    node = SimpleNamespace(dead_processes=lambda: dead)
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    assert ray_private.dead_daemons() == "gcs_server and raylet"
    node.dead_processes = lambda everything: dead  # Another signature.
    assert ray_private.dead_daemons() == ""


def test_without_the_method_the_trainer_has_no_controller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.train.torch import TorchTrainer

    assert issubclass(ray_private.trainer_class(), TorchTrainer)
    assert caplog.records == []
    for base in TorchTrainer.__mro__:
        if "_register_sigint_handler" in vars(base):
            monkeypatch.delattr(base, "_register_sigint_handler")
    assert ray_private.trainer_class().controller is None
    ray_private.trainer_class()
    (record,) = caplog.records
    assert "_register_sigint_handler" in record.getMessage()


def test_without_the_context_reports_are_not_silenced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray.train.v2._internal.execution.context as context

    ray_private.silence_reports()
    assert logging.getLogger(context.__file__).level == logging.WARNING
    monkeypatch.setitem(sys.modules, context.__name__, None)
    ray_private.silence_reports()
    (record,) = caplog.records
    assert "Ray Train may log more than asked for" in record.getMessage()


class Workers:
    """Ranks that keep what they are asked to call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def execute(self, function: Any) -> None:
        self.calls.append(function)


def test_ranks_bind_to_the_nodes_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.train.torch import TorchConfig

    base = TorchConfig().backend_cls
    monkeypatch.setattr(base, "on_start", lambda self, workers, config: workers.execute("join"))
    config = ray_private.torch_config_class()(backend="gloo", timeout_s=9)
    assert isinstance(config, TorchConfig)
    assert (config.backend, config.timeout_s) == ("gloo", 9)
    workers = Workers()
    config.backend_cls().on_start(workers, config)
    assert workers.calls == [ray_private.bind_to_node, bind_store, "join"]
    # Without the hook ranks start as Ray starts them.
    monkeypatch.delattr(base, "on_start")
    monkeypatch.delattr(base.__base__, "on_start")
    assert ray_private.torch_config_class() is TorchConfig


def test_the_interface_of_the_nodes_address_is_taken_unless_the_user_chose_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    ray_private.bind_to_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    ray_private.bind_to_node()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    # An address that no interface has, as behind a translation of addresses.
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.77")
    ray_private.bind_to_node()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("use_gpu", "address", "cluster_gpus", "expected"),
    [
        ("auto", None, None, False),  # One GPU here, and two ranks.
        ("auto", "head:1", 1, False),
        ("auto", "head:1", 2, True),  # As many as ranks, although not on this machine.
        ("auto", "head:1", 0, False),
        ("no", "head:1", 2, False),
        ("yes", "head:1", 2, True),
        ("yes", None, None, "needs 2 GPUs on this machine, it has 1"),
        ("yes", "head:1", 1, "needs 2 GPUs in the cluster head:1, it has 1"),
    ],
)
def test_gpus_are_counted_where_the_ranks_run(
    use_gpu: Any,
    address: str | None,
    cluster_gpus: int | None,
    expected: bool | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "available_gpus", lambda: 1)
    config = LaunchConfig(launcher="ray", num_workers=2, use_gpu=use_gpu, address=address)
    if isinstance(expected, bool):
        assert launch.uses_gpu(config, 2, cluster_gpus) is expected
    else:
        with pytest.raises(TopologyError, match=expected):
            launch.uses_gpu(config, 2, cluster_gpus)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([5.0], None),
        ([3.0, 1.0], None),  # Both on the first.
        ([1.0, 1.0, 1.0, 1.0, 1.0], "has 5 on 5 nodes (1, 1, 1, 1, 1); lower"),
        ([2.0], "the cluster head:1 has 2; lower"),
        ([], "the cluster head:1 has 0; lower"),
    ],
)
def test_ranks_must_fit_on_single_nodes(
    nodes: list[float], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes]
    found += [{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {}}]
    monkeypatch.setattr("ray.nodes", lambda: found)
    config = LaunchConfig(launcher="ray", num_workers=2, cpus_per_rank=1.5, address="head:1")
    if message is None:
        ray_launch._require_resources(config)
    else:
        with pytest.raises(TopologyError) as caught:
            ray_launch._require_resources(config)
        assert message in str(caught.value)


class Remote:
    """An actor handle whose calls are made here: `handle.method.remote(...)`."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_reaches_the_ranks_and_the_driver_knows_who_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(ray_mailbox, "_SECONDS_BETWEEN_HEARTBEATS", 0.01)
    mailbox, events = Remote(Mailbox()), []
    driver, ranks = StopRequest(), [StopRequest(), StopRequest()]
    with (
        Drain(mailbox, events.append, driver) as drain,
        heartbeat(mailbox, 0, "a", ranks[0]),
        heartbeat(mailbox, 1, "b", ranks[1]),
    ):
        mailbox.push.remote({"kind": "note", "text": "hello"})
        ranks[1].is_training = True  # Rank 0 alone counts.
        wait_until(lambda: events)
        assert not driver.is_training
        ranks[0].is_training = True
        wait_until(lambda: driver.is_training)
        assert [rank.reason for rank in ranks] == [None, None]
        ranks[1].reason = "its node is preempted"  # No answer without a reason takes it back.
        mailbox.push.remote({"kind": "note", "text": "again"})
        wait_until(lambda: len(events) == 2)
        assert ranks[1].reason == "its node is preempted"
        mailbox.request_stop.remote("SIGTERM")
        wait_until(lambda: all(rank.reason == "SIGTERM" for rank in ranks))
        ranks[0].is_training = False
        wait_until(lambda: not driver.is_training)
        assert drain.nodes == {0: "a", 1: "b"}
    assert [event["text"] for event in events] == ["hello", "again"]
