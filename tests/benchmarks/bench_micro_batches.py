"""Memory and time of a step in micro-batches against the step of the whole batch.

    python -m tests.benchmarks.bench_micro_batches [--steps 20] [--model conv4] [--batch 512]

Time: one process and one thread; the sizes take turns step by step on the same images, so that all
meet the same machine. Ratios to the whole batch are medians over steps that followed each other.
`--clock cpu` counts the CPU time of the training thread, which other programs disturb less.

Memory: each size in a process of its own. Saved bytes are the largest sum of what graphs keep for
the backward pass; peak memory is that of the process beyond weights, optimiser state and images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dml_dist.config.load import parse_config
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology
from dml_dist.train.state import TrainState, build_state
from dml_dist.train.step import train_step
from tests.ranks import run_ranks
from tests.saved_bytes import SavedBytes

NUM_CLASSES = 500
WARMUP = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
BACKBONES = {
    "conv4": {"name": "conv4", "width": 64},
    "resnet18": {"name": "resnet18", "norm": "group"},
}


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    steps: int
    model: str
    batch: int
    image_size: int
    clock: str


def state_of(setting: Setting) -> TrainState:
    """Return a state: Proxy-NCA, 128-d embeddings, Adam."""
    config = parse_config(
        {
            "name": "bench",
            "data": {"path": "unused"},
            "model": {"backbone": BACKBONES[setting.model], "embedding_size": 128},
            "train": {"global_batch_size": setting.batch, "steps": setting.steps},
        }
    )
    return build_state(config, num_classes=NUM_CLASSES, comm=Comm.single())


def batch_of(setting: Setting, step: int) -> tuple[Tensor, Tensor]:
    """Return random images and class ids."""
    generator = torch.Generator().manual_seed(step)
    size = setting.image_size
    images = torch.randn(setting.batch, 3, size, size, generator=generator)
    return images, torch.randint(NUM_CLASSES, (setting.batch,), generator=generator)


def step(state: TrainState, images: Tensor, labels: Tensor, size: int | None) -> None:
    """Make an update."""
    train_step(
        state, images, labels, [len(labels)], learning_rate_factor=1.0, micro_batch_size=size
    )


def time_steps(setting: Setting, sizes: list[int | None]) -> dict[int | None, list[float]]:
    """Return the seconds of every step with each size."""
    clock = CLOCKS[setting.clock]
    states = {size: state_of(setting) for size in sizes}
    seconds: dict[int | None, list[float]] = {size: [] for size in sizes}
    for number in range(WARMUP + setting.steps):
        images, labels = batch_of(setting, number)
        turn = number % len(sizes)
        for size in sizes[turn:] + sizes[:turn]:
            began = clock()
            step(states[size], images, labels, size)
            seconds[size].append(clock() - began)
    return {size: values[WARMUP:] for size, values in seconds.items()}


def measure_memory(topology: Topology, setting: Setting, size: int | None) -> tuple[int, int]:
    """Return saved bytes and peak memory of one step, in bytes."""
    state = state_of(setting)
    images, labels = batch_of(setting, 0)
    step(state, images[:2], labels[:2], None)  # optimiser state
    before = _status("VmRSS")
    step(state, images, labels, size)
    peak = _status("VmHWM") - before
    with SavedBytes([*state.model.parameters(), *state.owned.values()]) as saved:
        step(state, images, labels, size)
    return saved.peak, peak


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", choices=sorted(BACKBONES), default="conv4")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 64, 16, 4])
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting(given.steps, given.model, given.batch, given.image_size, given.clock)
    sizes = [None, *given.sizes]
    memory = {size: run_ranks(measure_memory, 1, setting, size, timeout=600.0)[0] for size in sizes}
    seconds = time_steps(setting, sizes)
    print(
        f"{given.model}, {given.batch} images of {given.image_size} px, {NUM_CLASSES} classes, "
        f"one thread, {given.clock} time, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    print("| micro-batch | saved MiB | ratio | peak MiB | ratio | ms | ratio |")
    for size in sizes:
        saved, peak = (value / 2**20 for value in memory[size])
        shares = [value / whole for value, whole in zip(memory[size], memory[None], strict=True)]
        pairs = zip(seconds[size], seconds[None], strict=True)
        ratio = statistics.median(one / whole for one, whole in pairs)
        print(
            f"| {size or 'none'} | {saved:,.1f} | {shares[0]:.3f} | {peak:,.0f} | {shares[1]:.3f} "
            f"| {statistics.median(seconds[size]) * 1e3:,.0f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
