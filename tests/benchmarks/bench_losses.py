"""Losses over proxies on the CPU, forward and backward: time and extra peak memory against a peer.

    python -m tests.benchmarks.bench_losses [--classes 11318 100000] [--only ...] [--clock cpu]

The peer is pytorch-metric-learning where it has the loss with the same formula; proxies sharing
classes, the margin surrogate and dynamic assignment it has not. Times are medians of alternating
repetitions in one process; `--clock cpu` counts its CPU time, which other programs disturb less.
Extra memory is what one forward and backward pass adds to the process's peak beyond embeddings,
proxies and the proxies' gradient; each is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dml_dist
from dml_dist.losses.class_weights import fractional_rows
from tests.benchmarks.bench_proxy_nca import MIB, inputs, resident

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contest:
    """A loss: the function, its options, the peer's class and its name of the proxies.

    `per_class` rows of the table belong to a class; `share` of them where it is cut by rows. The
    batch has `samples_per_class` images of each of its classes.
    """

    function: str
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    table: str = "W"
    peer_options: dict[str, Any] = field(default_factory=dict)
    per_class: int = 1
    share: float = 1.0
    samples_per_class: int = 1


CONTESTS = {
    "proxy_nca": Contest("proxy_nca_loss", {}, "ProxyNCALoss", "proxies", {"softmax_scale": 9.0}),
    "proxy_nca, margin": Contest("proxy_nca_loss", {"surrogate": "margin"}),
    "proxy_nca, fractional 1/4": Contest("proxy_nca_loss", {"class_rows": "drawn"}, share=0.25),
    "proxy_nca, dynamic": Contest("dynamic_proxy_nca_loss", samples_per_class=4),
    "proxy_nca, dynamic, margin": Contest(
        "dynamic_proxy_nca_loss", {"surrogate": "margin"}, samples_per_class=4
    ),
    "proxy_anchor": Contest("proxy_anchor_loss", {}, "ProxyAnchorLoss", "proxies"),
    "soft_triple, K = 2": Contest(
        "soft_triple_loss",
        {"centers_per_class": 2},
        "SoftTripleLoss",
        "fc",
        {"centers_per_class": 2},
        per_class=2,
    ),
    "normalized_softmax": Contest("normalized_softmax_loss", {}, "NormalizedSoftmaxLoss"),
    "cosface": Contest("cosface_loss", {}, "CosFaceLoss"),
    "arcface": Contest("arcface_loss", {}, "ArcFaceLoss"),
}


def own_loss(contest: Contest, proxies: Tensor, classes: int) -> Loss:
    """Return this project's loss over `proxies`, a leaf that gathers the gradient."""
    options = dict(contest.options)
    if "class_rows" in options:
        options["class_rows"] = fractional_rows(classes, len(proxies), 0)
    function = getattr(dml_dist, contest.function)
    return lambda embeddings, labels: function(embeddings, labels, proxies, **options)


def peer_loss(contest: Contest, proxies: Tensor) -> tuple[Loss, Tensor]:
    """Return the peer's loss and its leaf; no second table is made."""
    from pytorch_metric_learning import losses

    assert contest.peer is not None
    loss = getattr(losses, contest.peer)(2, proxies.shape[1], **contest.peer_options)
    turned = contest.table != "proxies"
    # As it makes them itself: (D, rows), contiguous.
    leaf = torch.nn.Parameter(proxies.detach().T.contiguous() if turned else proxies.detach())
    setattr(loss, contest.table, leaf)
    loss.num_classes = len(proxies) // contest.per_class
    if contest.peer == "ProxyNCALoss":
        loss.proxy_labels = torch.arange(len(proxies))
    return loss, leaf


def step(loss: Loss, batch: tuple[Tensor, Tensor], leaf: Tensor) -> None:
    """Run one forward and backward pass with fresh gradients."""
    leaf.grad = None
    batch[0].grad = None
    loss(*batch).backward()


def table_of(
    contest: Contest, classes: int, size: int, dim: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return proxies and a batch, seeded."""
    proxies, (embeddings, _) = inputs(
        max(2, int(classes * contest.per_class * contest.share)), size, dim
    )
    drawn = (size // contest.samples_per_class,)
    labels = torch.randint(classes, drawn, generator=torch.Generator().manual_seed(1))
    return proxies, (embeddings, labels.repeat_interleave(contest.samples_per_class))


def measure_memory(name: str, who: str, classes: int, size: int, dim: int) -> dict[str, float]:
    """Return extra peak memory in MiB of one pass, in this process."""
    contest = CONTESTS[name]

    def make(num_classes: int) -> tuple[Loss, Tensor, tuple[Tensor, Tensor]]:
        proxies, batch = table_of(contest, num_classes, size, dim)
        if who == "own":
            return own_loss(contest, proxies, num_classes), proxies, batch
        loss, leaf = peer_loss(contest, proxies)
        return loss, leaf, batch

    loss, leaf, batch = make(1000)
    step(loss, batch, leaf)  # libraries, threads and their buffers
    loss, leaf, batch = make(classes)
    before = resident("VmRSS")
    step(loss, batch, leaf)
    extra = resident("VmHWM") - before - leaf.numel() * leaf.element_size()
    return {"extra_mib": max(0, extra) / MIB}


def memory_in_own_process(name: str, who: str, classes: int, arguments: Any) -> float:
    """Run `measure_memory` in a fresh interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_losses", "--memory-of", name, who]
    for option in ("batch", "dim", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--classes", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout.strip().splitlines()[-1])["extra_mib"]
    return found


def measure_times(name: str, classes: int, arguments: Any) -> dict[str, float]:
    """Return the median seconds of own and peer, alternating in this process."""
    contest = CONTESTS[name]
    proxies, batch = table_of(contest, classes, arguments.batch, arguments.dim)
    contenders = {"own": (own_loss(contest, proxies, classes), proxies)}
    if contest.peer is not None:
        contenders["peer"] = peer_loss(contest, proxies)
    values = {who: loss(*batch).item() for who, (loss, _) in contenders.items()}
    if max(values.values()) - min(values.values()) > 1e-3 * max(1.0, *values.values()):
        raise SystemExit(f"{name}: the contenders must compute the same loss, got {values}")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {who: [] for who in contenders}
    for _ in range(arguments.repetitions):
        for who, (loss, leaf) in contenders.items():
            start = clock()
            step(loss, batch, leaf)
            seconds[who].append(clock() - start)
    return {who: statistics.median(times) for who, times in seconds.items()}


def main() -> None:
    """Print a line for each loss and number of classes, with ratios to the peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[11_318, 100_000])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        name, who = arguments.memory_of
        sizes = (arguments.classes[0], arguments.batch, arguments.dim)
        print(json.dumps(measure_memory(name, who, *sizes)))
        return
    print(f"B = {arguments.batch}, D = {arguments.dim}, float32, {arguments.threads} threads")
    for classes in arguments.classes:
        for name in arguments.only:
            times = measure_times(name, classes, arguments)
            memory = {who: memory_in_own_process(name, who, classes, arguments) for who in times}
            line = f"C = {classes:>7,}  {name:27}"
            line += f" {times['own'] * 1e3:8.1f} ms {memory['own']:8.1f} MiB"
            if "peer" in times:
                line += f"   peer {times['peer'] * 1e3:8.1f} ms {memory['peer']:8.1f} MiB"
                line += f"   {times['own'] / times['peer']:.2f} of its time"
                line += f", {memory['own'] / max(memory['peer'], 0.1):.2f} of its memory"
            print(line, flush=True)


if __name__ == "__main__":
    main()
