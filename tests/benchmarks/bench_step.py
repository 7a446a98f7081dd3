"""A training step against the same model in a plain PyTorch loop, and what exact resume costs.

    python -m tests.benchmarks.bench_step [--steps 200] [--model conv4] [--image-size 32]

One process: the project's whole loop (records, progress, clipping off) takes turns, step by step,
with a plain loop (network, softmax cross-entropy over cosines to the proxies, backward, Adam), so
that both meet the same machine. Target: a ratio of at most 1.03 to the plain loop with the same
fused Adam.

Two and three ranks (`--ranks`): the same step with and without DDP's `find_unused_parameters`,
taking turns.

Ratios are medians over steps that followed each other. `--clock cpu` counts the CPU time of the
training thread, which other programs on a busy machine disturb less.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.loader import Batch
from dml_dist.models.build_model import build_model
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import RecordWriter
from dml_dist.topology import Topology
from dml_dist.train.loop import TrainHooks, train
from dml_dist.train.run_plan import resolve
from dml_dist.train.state import TrainState, build_state
from dml_dist.train.step import train_step
from tests.ranks import run_ranks

NUM_CLASSES = 500
BATCH_SIZE = 64
WARMUP = 10
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
BACKBONES = {
    "conv4": {"name": "conv4", "width": 64},
    "resnet18": {"name": "resnet18", "norm": "group"},
}


@dataclass(frozen=True)
class Setting:
    """What is measured, and how."""

    steps: int
    model: str
    image_size: int
    clock: str


def configuration(setting: Setting) -> RunConfig:
    """Return the run: Proxy-NCA, 128-d embeddings, Adam."""
    return parse_config(
        {
            "name": "bench",
            "data": {"path": "unused"},
            "model": {"backbone": BACKBONES[setting.model], "embedding_size": 128},
            "train": {"global_batch_size": BATCH_SIZE, "steps": setting.steps},
        }
    )


def global_batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Return random images and class ids."""
    generator = torch.Generator().manual_seed(step % 8)
    images = torch.randn(BATCH_SIZE, 3, size, size, generator=generator)
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

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Make one update."""
        cosines = F.normalize(self.model(images)) @ F.normalize(self.proxies).T
        loss = F.cross_entropy(18.0 * cosines, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def against_plain_loop(setting: Setting) -> dict[str, list[float]]:
    """Return the seconds of every step of the three loops."""
    config, clock = configuration(setting), CLOCKS[setting.clock]
    plan = resolve(config, train_class_sizes=[12] * NUM_CLASSES, world_size=1)
    peers = {
        name: PlainLoop(config, fused=name == "plain, fused Adam")
        for name in ("plain, fused Adam", "plain, default Adam")
    }
    seconds: dict[str, list[float]] = {"dml_dist": [], **{name: [] for name in peers}}

    def batches(start: int, end: int) -> Iterator[Batch]:
        for step in range(start, end):
            images, labels = global_batch(step, setting.image_size)
            # Who goes first finds other things in the caches: they take turns at that, too.
            names = list(seconds)
            for name in names[step % len(names) :] + names[: step % len(names)]:
                began = clock()
                if name == "dml_dist":
                    yield Batch(images, labels, labels, step)
                else:
                    peers[name].step(images, labels)
                seconds[name].append(clock() - began)

    with tempfile.TemporaryDirectory() as folder:
        hooks = TrainHooks(
            checkpoints=Path(folder) / "checkpoints",
            attempt=1,
            batches=batches,
            class_ids=lambda labels: labels,
            evaluate=lambda model, split, step: {},
            report=lambda event: None,
            step_records=RecordWriter(Path(folder) / "steps.jsonl", 1),
        )
        train(config, plan, Comm.single(), hooks)
    return seconds


def with_and_without_bucket_rule(topology: Topology, setting: Setting) -> dict[str, list[float]]:
    """Return the seconds of steps with and without `find_unused_parameters`."""
    comm = Comm.from_default_group()
    config, clock = configuration(setting), CLOCKS[setting.clock]
    sizes = resolve(
        config, train_class_sizes=[12] * NUM_CLASSES, world_size=topology.world_size
    ).batch_sizes(0)
    states: dict[str, TrainState] = {}
    for name in ("find_unused_parameters", "rebuilt buckets"):
        states[name] = build_state(config, num_classes=NUM_CLASSES, comm=comm)
    states["rebuilt buckets"].network = states["rebuilt buckets"].model
    gc.collect()  # The first DDP's hooks go with it.
    states["rebuilt buckets"].network = DistributedDataParallel(
        states["rebuilt buckets"].model,
        process_group=comm.group,
        gradient_as_bucket_view=True,
    )
    low = sum(sizes[: topology.rank])
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for step in range(setting.steps):
        images, labels = global_batch(step, setting.image_size)
        part = slice(low, low + sizes[topology.rank])
        for name, state in states.items():
            comm.barrier()
            start = clock()
            train_step(state, images[part], labels[part], sizes, learning_rate_factor=1.0)
            comm.barrier()
            seconds[name].append(clock() - start)
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


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", choices=sorted(BACKBONES), default="conv4")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting(given.steps, given.model, given.image_size, given.clock)
    what = (
        f"{given.model}, {BATCH_SIZE} images of {given.image_size} px, {NUM_CLASSES} classes, "
        f"one thread a rank, {given.clock} time"
    )
    one = against_plain_loop(setting)
    show(f"1 rank, {what}", one, [("dml_dist", name) for name in list(one)[1:]])
    for world_size in given.ranks:
        ranks = run_ranks(with_and_without_bucket_rule, world_size, setting, timeout=900.0)
        show(
            f"{world_size} ranks, gloo, {what}",
            ranks[0],
            [("find_unused_parameters", "rebuilt buckets")],
        )


if __name__ == "__main__":
    main()
