"""What regularisation and alternating projections cost: per step, and at a problem's start.

    python -m tests.benchmarks.bench_methods [--steps 200] [--classes 11318] [--dimension 512]

Per step: one process and one thread; variants of the same step (conv4, 64 images of 28 px, 64
numbers an embedding) take turns on the same images, so that all meet the same machine. Ratios are
medians over steps that followed each other. The flow alone: forward and backward of the objective
with and without it, at the batch and dimension of the published recipes (B = 112, D = 512).

A problem's start: choosing representatives by k-centre from a pool, and searching every class's
nearest classes, at the size of SOP. What it takes to embed the pool is the number of images that is
printed, at the speed of an evaluation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.search.representatives import k_center, nearest_classes
from dml_dist.train.proximal import ProximalTerm, pulled_weights
from dml_dist.train.state import TrainState, build_state
from dml_dist.train.step import train_step

NUM_CLASSES = 97
BATCH_SIZE = 64
IMAGE_SIZE = 28
WARMUP = 10
REPRESENTATIVES = torch.arange(BATCH_SIZE) % 4 == 0
SMALL_FLOW = "nir={flow_weight: 0.01, flow: {num_blocks: 4, depth: 3, width: 64}}"
VARIANTS: dict[str, tuple[str, ...]] = {
    "Proxy-NCA": (),
    "Proxy-NCA, small flow": (SMALL_FLOW,),
    "Proxy-NCA, default flow": ("nir={}",),
    "Proxy-NCA, projections": ("projections={}",),
    "triplet": ("loss={name: triplet}",),
    "triplet, projections": ("loss={name: triplet}", "projections={}"),
    "triplet, projections and mining": ("loss={name: triplet}", "projections={mining: {}}"),
}
BASES = {name: name.split(",")[0] for name in VARIANTS}


def configuration(*changes: str) -> RunConfig:
    """Return the run of a variant."""
    return parse_config(
        {
            "name": "bench",
            "data": {
                "path": "unused",
                "batches": {"name": "balanced", "classes_per_batch": 16, "samples_per_class": 4},
            },
            "model": {
                "backbone": {"name": "conv4", "width": 64, "norm": "batch"},
                "pooling": "gem",
                "embedding_size": 64,
            },
            "train": {"global_batch_size": BATCH_SIZE, "steps": 1000},
        },
        list(changes),
    )


def step_of(config: RunConfig) -> Callable[[Tensor, Tensor], None]:
    """Return what makes an update; under projections the second problem is trained on."""
    state: TrainState = build_state(config, num_classes=NUM_CLASSES, comm=Comm.single())
    projections = config.projections
    term = None
    if projections is not None:
        term = ProximalTerm(pulled_weights(state.model), projections.proximal_weight)
    mined = projections is not None and projections.mining is not None
    places = torch.arange(NUM_CLASSES)[:, None] + torch.arange(1, 4)
    neighbors = places % NUM_CLASSES if mined else None

    def step(images: Tensor, labels: Tensor) -> None:
        train_step(
            state,
            images,
            labels,
            [BATCH_SIZE],
            learning_rate_factor=1.0,
            is_representative=REPRESENTATIVES if projections is not None else None,
            neighbors=neighbors,
            proximal=term,
        )

    return step


def per_step(num_steps: int) -> dict[str, list[float]]:
    """Return the seconds of every step of each variant."""
    steps = {name: step_of(configuration(*changes)) for name, changes in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(0)
    names = list(steps)
    for number in range(num_steps):
        images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        labels = torch.randperm(NUM_CLASSES, generator=generator)[:16].repeat_interleave(4)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            steps[name](images, labels)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def of_objectives(repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of forward and backward of the objective, without and with a flow."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(112, 512, generator=generator)
    labels = torch.randint(100, (112,), generator=generator)
    objectives = {}
    for name, change in (("Proxy-NCA", ()), ("Proxy-NCA, default flow", ("nir={}",))):
        config = configuration(*change)
        objectives[name] = build_objective(
            config.loss,
            num_classes=100,
            embedding_size=512,
            seed=0,
            comm=Comm.single(),
            nir=config.nir,
        )
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for number in range(repetitions):
        for name, objective in objectives.items():
            leaf = embeddings.clone().requires_grad_()
            began = time.perf_counter()
            objective(leaf, labels, [112], step=number).loss.backward()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def problem_start(num_classes: int, dimension: int, pool: int) -> list[tuple[str, float]]:
    """Return the seconds of what a problem's start computes from embeddings."""
    embeddings = torch.randn(num_classes, pool, dimension)
    began = time.perf_counter()
    picked = k_center(embeddings, 1)
    k_center(embeddings, 4)
    chosen = time.perf_counter() - began
    representatives = embeddings[torch.arange(num_classes)[:, None], picked]
    began = time.perf_counter()
    nearest_classes(representatives, 3, Comm.single())
    return [
        (f"k-centre, 1 and 4 of {pool} for each of {num_classes:,} classes", chosen),
        (f"3 nearest of {num_classes:,} classes", time.perf_counter() - began),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--classes", type=int, default=11_318)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--pool", type=int, default=12)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for title, seconds, bases in (
        (f"a step: conv4, {BATCH_SIZE} images of {IMAGE_SIZE} px", per_step(given.steps), BASES),
        (
            "the objective alone: B = 112, D = 512, 100 classes",
            of_objectives(given.steps),
            {"Proxy-NCA, default flow": "Proxy-NCA"},
        ),
    ):
        print(title)
        for name, values in seconds.items():
            text = f"  {name:34s} {statistics.median(values[WARMUP:]) * 1e3:8.2f} ms"
            if (base := bases.get(name, name)) != name:
                pairs = zip(values[WARMUP:], seconds[base][WARMUP:], strict=True)
                text += f"  {statistics.median(a / b for a, b in pairs):.3f} of {base}"
            print(text)
    torch.set_num_threads(2)
    print(f"a problem's start, 2 threads, D = {given.dimension}")
    for what, spent in problem_start(given.classes, given.dimension, given.pool):
        print(f"  {what}: {spent:.2f} s")
    print(f"  images to embed: {given.classes * given.pool:,} (k-centre) or {given.classes:,}")


if __name__ == "__main__":
    main()
