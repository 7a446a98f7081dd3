"""A training step against the same model in a plain PyTorch loop, and what exact resume costs.

    python -m tests.benchmarks.bench_step [--steps 200] [--threads 1]

One process: the project's whole loop (records, progress, clipping off) takes turns, step by step,
with a plain loop (network, softmax cross-entropy over cosines to the proxies, backward, Adam), so
that both meet the same machine. Target: a ratio of at most 1.03 to the plain loop with the same
fused Adam.

Three ranks: the same step with and without DDP's `find_unused_parameters`, taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.loader import Batch
from dml_dist.models.build import build_model
from dml_dist.parallel.build import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.records import RecordWriter
from dml_dist.topology import Topology
from dml_dist.train.loop import Surroundings, train
from dml_dist.train.plan import resolve
from dml_dist.train.state import TrainState, build_state
from dml_dist.train.step import train_step
from tests.ranks import run_ranks

NUM_CLASSES = 500
BATCH_SIZE = 64
IMAGE_SIZE = 32
WARMUP = 20


def configuration(steps: int) -> RunConfig:
    """Return the quickstart's network and loss."""
    return parse_config(
        {
            "name": "bench",
            "data": {"path": "unused"},
            "model": {"backbone": {"name": "conv4", "width": 64}, "embedding_size": 128},
            "train": {"global_batch_size": BATCH_SIZE, "steps": steps},
        }
    )


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return random images and class ids."""
    generator = torch.Generator().manual_seed(step % 8)
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return images, torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)


class PlainLoop:
    """What one would write by hand."""

    def __init__(self, config: RunConfig, *, fused: bool) -> None:
        self.model = build_model(config.model, seed=0)
        objective = build_objective(
            config.loss, num_classes=NUM_CLASSES, embedding_size=128, seed=0, comm=Comm.single()
        )
        self.proxies = objective.owned_parameters()["proxies"].parameter
        self.optimizer = torch.optim.Adam([*self.model.parameters(), self.proxies], fused=fused)

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Make one update and return its seconds."""
        start = time.perf_counter()
        cosines = F.normalize(self.model(images)) @ F.normalize(self.proxies).T
        loss = F.cross_entropy(18.0 * cosines, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def against_plain_loop(steps: int) -> dict[str, list[float]]:
    """Return the seconds of every step of the three loops."""
    config = configuration(steps)
    plan = resolve(config, train_class_sizes=[12] * NUM_CLASSES, world_size=1)
    peers = {
        name: PlainLoop(config, fused=name == "plain, fused Adam")
        for name in ("plain, fused Adam", "plain, default Adam")
    }
    seconds: dict[str, list[float]] = {"dml_dist": [], **{name: [] for name in peers}}

    def batches(start: int, end: int) -> Iterator[Batch]:
        for step in range(start, end):
            images, labels = global_batch(step)
            began = time.perf_counter()
            yield Batch(images, labels, labels, step)
            seconds["dml_dist"].append(time.perf_counter() - began)
            for name, peer in peers.items():
                seconds[name].append(peer.step(images, labels))

    with tempfile.TemporaryDirectory() as folder:
        around = Surroundings(
            checkpoints=Path(folder) / "checkpoints",
            attempt=1,
            batches=batches,
            class_ids=lambda labels: labels,
            evaluate=lambda model, split, step: {},
            report=lambda event: None,
            step_records=RecordWriter(Path(folder) / "steps.jsonl", 1),
        )
        train(config, plan, Comm.single(), around)
    return seconds


def with_and_without_bucket_rule(topology: Topology, steps: int) -> dict[str, list[float]]:
    """Return the seconds of steps with and without `find_unused_parameters`."""
    comm = Comm.from_default_group()
    config = configuration(steps)
    sizes = resolve(
        config, train_class_sizes=[12] * NUM_CLASSES, world_size=topology.world_size
    ).batch_sizes(0)
    states: dict[str, TrainState] = {}
    for name in ("find_unused_parameters", "rebuilt buckets"):
        states[name] = build_state(config, num_classes=NUM_CLASSES, comm=comm)
    states["rebuilt buckets"].network = DistributedDataParallel(
        states["rebuilt buckets"].model,
        process_group=comm.group,
        gradient_as_bucket_view=True,
    )
    low = sum(sizes[: topology.rank])
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for step in range(steps):
        images, labels = global_batch(step)
        part = slice(low, low + sizes[topology.rank])
        for name, state in states.items():
            comm.barrier()
            start = time.perf_counter()
            train_step(state, images[part], labels[part], sizes, learning_rate_factor=1.0)
            comm.barrier()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(title: str, seconds: dict[str, list[float]], ratios: list[tuple[str, str]]) -> None:
    """Print medians in milliseconds, and ratios of steps that followed each other."""
    print(title)
    for name, values in seconds.items():
        print(f"  {name:28s} {statistics.median(values[WARMUP:]) * 1e3:8.2f} ms")
    for one, two in ratios:
        pairs = zip(seconds[one][WARMUP:], seconds[two][WARMUP:], strict=False)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"  {one} / {two}: {ratio:.3f}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    one = against_plain_loop(given.steps)
    show(
        f"one process, {given.threads} threads, conv4 of 64 channels, {BATCH_SIZE} images of "
        f"{IMAGE_SIZE} px, {NUM_CLASSES} classes",
        one,
        [("dml_dist", "plain, fused Adam"), ("dml_dist", "plain, default Adam")],
    )
    found: dict[str, Any] = {"one": one}
    for world_size in (2, 3):
        ranks = run_ranks(with_and_without_bucket_rule, world_size, given.steps, timeout=600.0)
        found[f"{world_size} ranks"] = ranks[0]
        show(
            f"{world_size} ranks, gloo, one thread each",
            ranks[0],
            [("find_unused_parameters", "rebuilt buckets")],
        )
    return found


if __name__ == "__main__":
    main()
