"""Times of the parts of a step, on a clock that only the parts advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dml_dist.data.loader import Batch
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import ObjectiveOutput
from dml_dist.parallel.proxies import ProxyObjective
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train import loop, step
from dml_dist.train.spans import Spans
from tests.training_setup import SmallRun, small_config

TICK = 0.001
PARTS = {"data": 1, "forward": 2, "gather": 4, "objective": 8, "backward": 16, "optimizer": 32}


@dataclass
class Clock:
    """Seconds pass where something is done; each look at the clock takes a little, too."""

    now: float = 0.0
    num_reads: int = field(default=0)

    def read(self) -> float:
        self.num_reads += 1
        self.now += TICK
        return self.now

    def spend(self, part: str) -> None:
        self.now += PARTS[part]

    def spans(self) -> Spans:
        return Spans(self.read, lambda start, end: end - start)


@dataclass
class TimedRun(SmallRun):
    """A run whose batches take their time."""

    clock: Clock = field(default_factory=Clock)

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        for batch in super().batches(start, end):
            self.clock.spend("data")
            yield batch


def _spend(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Let every part of a step take its time on the clock."""

    def slow(owner: Any, name: str, part: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            clock.spend(part)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def with_slow_backward(self: ProxyObjective, *args: Any) -> ObjectiveOutput:
        output = original(self, *args)
        output.loss.register_hook(lambda _: clock.spend("backward"))
        return output

    original = ProxyObjective.global_loss
    monkeypatch.setattr(ProxyObjective, "global_loss", with_slow_backward)
    slow(EmbeddingModel, "forward", "forward")
    slow(ProxyObjective, "gather", "gather")
    slow(ProxyObjective, "global_loss", "objective")
    slow(step, "set_learning_rates", "optimizer")


@pytest.mark.parametrize("record", [True, False])
def test_spans_of_a_run(record: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    _spend(monkeypatch, clock)
    monkeypatch.setattr(loop.Spans, "on", lambda device: clock.spans())
    config = small_config(train__record_spans=str(record).lower(), train__steps=5)
    TimedRun(Topology(), Comm.single(), config, tmp_path, clock=clock).train()
    records = read_records(tmp_path / "steps.jsonl")
    assert [entry["step"] for entry in records] == [2, 3, 4, 5]  # after 2, 1, 1 and 1 steps
    found = [
        {name: value for name, value in entry.items() if name.startswith("seconds_")}
        for entry in records
    ]
    if not record:
        assert clock.num_reads == 0
        assert not any(found)
        return
    sums = [sum(seconds.values()) for seconds in found]
    steps = [2, 1, 1, 1]
    covered = sum(size * total for size, total in zip(steps, sums, strict=True))
    assert covered == pytest.approx(clock.now, rel=0.001)
    for seconds in found:
        assert seconds.pop("seconds_wait") == seconds.pop("seconds_reduction") == 0
        for part, value in PARTS.items():
            assert seconds.pop(f"seconds_{part}") == pytest.approx(value, abs=3 * TICK)
        assert not seconds


class _Behind(Comm):
    """A rank of two; the other one comes later."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(None)
        self.topology = Topology(world_size=2)
        self.clock = clock

    def all_reduce_max(self, x: Tensor, *, what: str = "maximum") -> Tensor:
        assert what == "ranks before the gather"
        self.clock.now += 5
        return x


def test_a_rank_waits_for_the_slowest() -> None:
    clock = Clock()
    spans = clock.spans()
    for _ in range(2):
        spans.wait_for_ranks(_Behind(clock))
    seconds = spans.read(num_steps=2)
    assert seconds["seconds_wait"] == pytest.approx(5, abs=2 * TICK)
    assert sum(seconds.values()) == seconds["seconds_wait"]
    assert not any(spans.read(num_steps=1).values())  # begun anew
    Spans.off().wait_for_ranks(_Behind(clock))
    assert clock.now < 11
    assert Spans.off().read(num_steps=1) == {}


def test_a_reduction_begins_after_the_last_gradient() -> None:
    clock = Clock()
    spans = clock.spans()
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    network[1].bias.requires_grad_(False)  # A frozen parameter has no gradient to wait for.
    spans.watch_gradients(network)
    for _ in range(2):
        with spans.backward():
            loss = network(torch.ones(4, 2)).sum()
            loss.register_hook(lambda _: clock.spend("backward"))
            loss.backward()
            clock.now += 7
    seconds = spans.read(num_steps=2)
    assert seconds["seconds_backward"] == pytest.approx(PARTS["backward"], abs=6 * TICK)
    assert seconds["seconds_reduction"] == pytest.approx(7, abs=2 * TICK)
    network[0].requires_grad_(False)
    network[1].requires_grad_(False)
    with spans.backward():  # Nothing of the network is trained in it.
        clock.now += 7
    assert spans.read(num_steps=1)["seconds_backward"] == pytest.approx(7, abs=2 * TICK)
    off = Spans.off()
    off.watch_gradients(nn.Linear(1, 1))
    with off.backward():
        pass
    assert off.read(num_steps=1) == {}


@pytest.mark.gpu
def test_spans_of_a_device() -> None:
    """Work that the host has only queued counts as time of its span."""
    device = torch.device("cuda")
    spans = Spans.on(device)
    x = torch.randn(4096, 4096, device=device)
    with spans("forward"):
        for _ in range(50):
            x = (x @ x).clamp(-1, 1)
    with spans("objective"):
        pass
    seconds = spans.read(num_steps=1)
    assert seconds["seconds_forward"] > 100 * seconds["seconds_objective"] >= 0
