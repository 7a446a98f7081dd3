"""Losses over pairs and triplets on the CPU, forward and backward: time and memory against a peer.

    python -m tests.benchmarks.bench_pairs [--batch 256] [--dim 512] [--threads 1] [--clock cpu]

The peer is pytorch-metric-learning with the same formula and miner (its margin loss draws other
negatives). Times are medians of alternating repetitions in one process, and ratios are medians of
the ratios of neighbors; `--clock cpu` counts the process's CPU time, which other programs disturb
less. Extra memory is what one pass adds to the process's peak, each contender in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor

import dml_dist
from tests.benchmarks.bench_proxy_nca import MIB, resident

Loss = Callable[[Tensor, Tensor], Tensor]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DRAWN = "margin"
"""Whose negatives are drawn, so that two contenders do not compute the same number."""


def contrastive_peer() -> Loss:
    """Return the contrastive loss over Euclidean distances of unit rows."""
    return losses.ContrastiveLoss(pos_margin=0, neg_margin=0.5)


def triplet_peer(kind: str) -> Loss:
    """Return the triplet loss with a miner."""
    loss = losses.TripletMarginLoss(margin=0.1)
    if kind == "hard":
        miner = miners.BatchHardMiner()
    else:
        miner = miners.TripletMarginMiner(margin=0.1, type_of_triplets=kind)
    return loss if kind == "all" else lambda x, labels: loss(x, labels, miner(x, labels))


def margin_peer() -> Loss:
    """Return the margin loss with distance-weighted negatives."""
    loss, miner = losses.MarginLoss(margin=0.2, beta=1.2), miners.DistanceWeightedMiner()
    return lambda x, labels: loss(x, labels, miner(x, labels))


def multi_similarity_peer() -> Loss:
    """Return the multi-similarity loss with its miner."""
    cosine = distances.CosineSimilarity()
    loss = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=cosine)
    miner = miners.MultiSimilarityMiner(epsilon=0.1, distance=cosine)
    return lambda x, labels: loss(x, labels, miner(x, labels))


CONTESTS: dict[str, tuple[Loss, Callable[[], Loss]]] = {
    "contrastive": (dml_dist.contrastive_loss, contrastive_peer),
    "triplet, all": (dml_dist.triplet_loss, lambda: triplet_peer("all")),
    "triplet, semi-hard": (
        lambda x, labels: dml_dist.triplet_loss(x, labels, mining="semi_hard"),
        lambda: triplet_peer("semihard"),
    ),
    "triplet, hard": (
        lambda x, labels: dml_dist.triplet_loss(x, labels, mining="hard"),
        lambda: triplet_peer("hard"),
    ),
    DRAWN: (dml_dist.margin_loss, margin_peer),
    "multi_similarity": (dml_dist.multi_similarity_loss, multi_similarity_peer),
}


def contender(name: str, who: str) -> Loss:
    """Return a loss of this project or of the peer."""
    own, peer = CONTESTS[name]
    return own if who == "own" else peer()


def batch_of(size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return embeddings near their classes and labels, 4 rows a class, seeded."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) // 4
    centers = torch.randn(size // 4 + 1, dim, generator=generator)
    noise = torch.randn(size, dim, generator=generator)
    return (centers[labels] + noise).requires_grad_(), labels


def step(loss: Loss, batch: tuple[Tensor, Tensor]) -> None:
    """Run one forward and backward pass with a fresh gradient."""
    batch[0].grad = None
    loss(*batch).backward()


def memory_of(name: str, who: str, size: int, dim: int) -> float:
    """Return the extra peak memory of one pass in this process, MiB."""
    loss = contender(name, who)
    step(loss, batch_of(16, dim))  # libraries, threads and their buffers
    batch = batch_of(size, dim)
    before = resident("VmRSS")
    step(loss, batch)
    return max(0, resident("VmHWM") - before) / MIB


def main() -> None:
    """Print a line for each loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        print(json.dumps(memory_of(*given.memory_of, given.batch, given.dim)))
        return
    clock = CLOCKS[given.clock]
    print(
        f"B = {given.batch}, D = {given.dim}, 4 rows a class, {given.threads} threads, "
        f"{given.clock} time, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
    for name in CONTESTS:
        contenders = {who: contender(name, who) for who in ("own", "peer")}
        batch = batch_of(given.batch, given.dim)
        values = [loss(*batch).item() for loss in contenders.values()]
        if name != DRAWN and abs(values[0] - values[1]) > 1e-3 * max(1.0, *values):
            raise SystemExit(f"{name}: the contenders must compute the same loss, got {values}")
        seconds: dict[str, list[float]] = {who: [] for who in contenders}
        memory = {}
        for _ in range(given.repetitions):
            for who, loss in contenders.items():
                began = clock()
                step(loss, batch)
                seconds[who].append(clock() - began)
        for who in contenders:
            command = [sys.executable, "-m", "tests.benchmarks.bench_pairs"]
            command += ["--memory-of", name, who, "--batch", str(given.batch)]
            command += ["--dim", str(given.dim), "--threads", str(given.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[who] = float(json.loads(done.stdout.strip().splitlines()[-1]))
        own, peer = (statistics.median(values) for values in seconds.values())
        ratio = statistics.median(
            mine / theirs for mine, theirs in zip(*seconds.values(), strict=True)
        )
        print(
            f"{name:20} {own * 1e3:8.1f} ms {memory['own']:8.1f} MiB   "
            f"peer {peer * 1e3:8.1f} ms {memory['peer']:8.1f} MiB   {ratio:.2f} of its time",
            flush=True,
        )


if __name__ == "__main__":
    main()
