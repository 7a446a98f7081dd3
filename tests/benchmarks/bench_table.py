"""Losses between a batch and a table on the CPU, forward and backward: time and memory of a peer.

    python -m tests.benchmarks.bench_table [--rows 11318 100000] [--threads 1] [--clock cpu]

The peer is pytorch-metric-learning with the same formula, miner and `ref_emb`, the table. Both give
the gradients of batch and table. Times and memory are measured as in `bench_pairs`; extra memory is
without the table and its gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor, nn

from dml_dist.config.objective import (
    ContrastiveConfig,
    LossConfig,
    MultiSimilarityConfig,
    TripletConfig,
)
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.representatives import RepresentativeObjective, TableForm
from tests.benchmarks.bench_pairs import CLOCKS
from tests.benchmarks.bench_proxy_nca import MIB, resident

Loss = Callable[[Tensor, Tensor], Tensor]
MARGIN = 1.3
"""Of the contrastive loss: about the nearest of 100,000 negatives; at 0.5 none would count."""


def contrastive_peer(rows: Tensor, classes: Tensor) -> Loss:
    """Return the contrastive loss over Euclidean distances of unit rows."""
    loss = losses.ContrastiveLoss(pos_margin=0, neg_margin=MARGIN)
    return lambda x, labels: loss(x, labels, ref_emb=rows, ref_labels=classes)


def triplet_peer(kind: str, rows: Tensor, classes: Tensor) -> Loss:
    """Return the triplet loss with a miner."""
    loss = losses.TripletMarginLoss(margin=0.1)
    table = {"ref_emb": rows, "ref_labels": classes}
    if kind == "all":
        return lambda x, labels: loss(x, labels, **table)
    if kind == "hard":
        miner = miners.BatchHardMiner()
    else:
        miner = miners.TripletMarginMiner(margin=0.1, type_of_triplets=kind)
    return lambda x, labels: loss(x, labels, miner(x, labels, **table), **table)


def multi_similarity_peer(rows: Tensor, classes: Tensor) -> Loss:
    """Return the multi-similarity loss with its miner."""
    cosine = distances.CosineSimilarity()
    loss = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=cosine)
    miner = miners.MultiSimilarityMiner(epsilon=0.1, distance=cosine)
    table = {"ref_emb": rows, "ref_labels": classes}
    return lambda x, labels: loss(x, labels, miner(x, labels, **table), **table)


CONTESTS: dict[str, tuple[LossConfig, Callable[[Tensor, Tensor], Loss]]] = {
    "contrastive": (ContrastiveConfig(negative_margin=MARGIN), contrastive_peer),
    "triplet, all": (TripletConfig(), lambda *table: triplet_peer("all", *table)),
    "triplet, semi-hard": (
        TripletConfig(mining="semi_hard"),
        lambda *table: triplet_peer("semihard", *table),
    ),
    "triplet, hard": (TripletConfig(mining="hard"), lambda *table: triplet_peer("hard", *table)),
    "multi_similarity": (MultiSimilarityConfig(), multi_similarity_peer),
}


def inputs(rows: int, per_class: int, size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a table, embeddings in the direction of a row of their class, and labels, seeded."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows // per_class * per_class, dim, generator=generator)
    labels = torch.randint(rows // per_class, (size // 4,), generator=generator)
    labels = labels.repeat_interleave(4)
    noise = 4 * torch.randn(size, dim, generator=generator)
    return table, (table[labels * per_class] + noise).requires_grad_(), labels


def contender(name: str, who: str, table: Tensor, per_class: int) -> tuple[Loss, nn.Parameter]:
    """Return a loss of this project or of the peer, and the table that it differentiates."""
    config, peer = CONTESTS[name]
    classes = torch.arange(len(table)) // per_class
    if who == "peer":
        rows = nn.Parameter(table)
        return peer(rows, classes), rows
    objective = build_objective(
        config,
        num_classes=len(table) // per_class,
        embedding_size=table.shape[1],
        seed=0,
        comm=Comm.single(),
        table=TableForm(per_class, in_batch_weight=0.0),
    )
    assert isinstance(objective, RepresentativeObjective)
    objective.rows.data = table
    images = torch.arange(len(table))
    objective.image_rows.copy_(images)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        # Images that are no rows of the table.
        others = len(images) + torch.arange(len(x))
        return objective(x, labels, [len(x)], image_rows_B=others).loss

    assert isinstance(objective.rows, nn.Parameter)
    return loss, objective.rows


def step(loss: Loss, rows: nn.Parameter, x: Tensor, labels: Tensor) -> float:
    """Run one forward and backward pass with fresh gradients; return the loss."""
    x.grad = rows.grad = None
    value = loss(x, labels)
    value.backward()
    return value.item()


def memory_of(name: str, who: str, rows: int, per_class: int, size: int, dim: int) -> float:
    """Return the extra peak memory of one pass in this process, MiB."""
    table, x, labels = inputs(1000, per_class, size, dim)
    step(*contender(name, who, table, per_class), x, labels)  # libraries and their buffers
    table, x, labels = inputs(rows, per_class, size, dim)
    own = contender(name, who, table, per_class)
    before = resident("VmRSS")
    step(*own, x, labels)
    return (resident("VmHWM") - before - table.numel() * table.element_size()) / MIB


def compare(name: str, rows: int, given: argparse.Namespace) -> str:
    """Return the line of a loss and a table."""
    clock = CLOCKS[given.clock]
    shape = given.rows_per_class, given.batch, given.dim
    table, x, labels = inputs(rows, *shape)
    contenders = {who: contender(name, who, table, shape[0]) for who in ("own", "peer")}
    values = [step(*of, x, labels) for of in contenders.values()]
    if abs(values[0] - values[1]) > 1e-3 * max(1.0, *values):
        raise SystemExit(f"{name}: the contenders must compute the same loss, got {values}")
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(given.repetitions):
        for who, of in contenders.items():
            began = clock()
            step(*of, x, labels)
            seconds[who].append(clock() - began)
            of[1].grad = None
    memory = {}
    for who in contenders:
        command = [sys.executable, "-m", "tests.benchmarks.bench_table", "--memory-of", name, who]
        command += ["--rows", str(rows), "--rows-per-class", str(shape[0])]
        command += ["--batch", str(shape[1]), "--dim", str(shape[2])]
        command += ["--threads", str(given.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[who] = float(json.loads(done.stdout.strip().splitlines()[-1]))
    own, peer = (statistics.median(of) for of in seconds.values())
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return (
        f"{rows:7} {name:20} {own * 1e3:8.0f} ms {memory['own']:8.0f} MiB   "
        f"peer {peer * 1e3:8.0f} ms {memory['peer']:8.0f} MiB   {ratio:.2f} of its time"
    )


def main() -> None:
    """Print a line for each loss and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[11318, 100000])
    parser.add_argument("--rows-per-class", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--losses", nargs="+", choices=sorted(CONTESTS), default=list(CONTESTS))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        shape = given.rows_per_class, given.batch, given.dim
        print(json.dumps(memory_of(*given.memory_of, given.rows[0], *shape)))
        return
    print(
        f"B = {given.batch}, D = {given.dim}, {given.rows_per_class} rows a class, "
        f"{given.threads} threads, {given.clock} time, torch {torch.__version__}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for rows in given.rows:
        for name in given.losses:
            print(compare(name, rows, given), flush=True)


if __name__ == "__main__":
    main()
