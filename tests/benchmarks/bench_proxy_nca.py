"""Proxy-NCA forward and backward on the CPU: time and extra peak memory against two peers.

    python -m tests.benchmarks.bench_proxy_nca [--classes 100000] [--million]

Peers: pytorch-metric-learning's ProxyNCALoss (the same formula), and a dense softmax
cross-entropy of normalised embeddings and proxies in plain PyTorch. Times are medians of
alternating repetitions in one process. Extra memory is what one forward and backward pass adds to
the process's peak beyond embeddings, proxies and the proxies' gradient; each contender runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dml_dist.losses.proxy_nca_functions import proxy_nca_loss

SCALE = 9.0
CONTENDERS = ("dml_dist", "pytorch-metric-learning", "dense cross-entropy")
MIB = 2**20


def contender(name: str, proxies: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return loss(embeddings, labels) over `proxies`, a leaf that gathers the gradient."""
    if name == "dml_dist":
        return lambda embeddings, labels: proxy_nca_loss(embeddings, labels, proxies)
    if name == "dense cross-entropy":

        def dense(embeddings: Tensor, labels: Tensor) -> Tensor:
            logits = F.normalize(embeddings) @ F.normalize(proxies).T
            return F.cross_entropy(2 * SCALE * logits, labels)

        return dense
    from pytorch_metric_learning.losses import ProxyNCALoss

    loss = ProxyNCALoss(1, proxies.shape[1], softmax_scale=SCALE)
    loss.proxies = proxies
    loss.proxy_labels = torch.arange(len(proxies))
    return loss


def step(loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], p: Tensor) -> None:
    """Run one forward and backward pass with fresh gradients."""
    p.grad = None
    batch[0].grad = None
    loss(*batch).backward()


def inputs(classes: int, size: int, dim: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return proxies (classes, dim) and a batch of embeddings and labels, seeded."""
    generator = torch.Generator().manual_seed(0)
    proxies = torch.nn.Parameter(torch.empty(classes, dim).normal_(generator=generator))
    embeddings = torch.randn(size, dim, generator=generator).requires_grad_()
    return proxies, (embeddings, torch.randint(classes, (size,), generator=generator))


def measure_memory(name: str, classes: int, size: int, dim: int) -> dict[str, float]:
    """Return extra peak memory in MiB and the seconds of one pass, in this process."""
    small, batch = inputs(1000, size, dim)
    step(contender(name, small), batch, small)  # libraries, threads and their buffers
    proxies, batch = inputs(classes, size, dim)
    loss = contender(name, proxies)
    before = resident("VmRSS")
    start = time.perf_counter()
    step(loss, batch, proxies)
    seconds = time.perf_counter() - start
    gradient = proxies.numel() * proxies.element_size()
    extra = resident("VmHWM") - before - gradient
    return {"extra_mib": extra / MIB, "seconds": seconds}


def resident(field: str) -> int:
    """Return this process's resident bytes, now (VmRSS) or at their peak (VmHWM); Linux only.

    Not ru_maxrss, which a process takes over from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def memory_in_own_process(name: str, arguments: argparse.Namespace, classes: int) -> dict:
    """Run `measure_memory` in a fresh interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_proxy_nca", "--memory-of", name]
    for option in ("batch", "dim", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--classes", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_times(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each contender, alternating in this process."""
    proxies, batch = inputs(arguments.classes, arguments.batch, arguments.dim)
    losses = {name: contender(name, proxies) for name in CONTENDERS}
    values = {name: losses[name](*batch).item() for name in CONTENDERS}
    if max(values.values()) - min(values.values()) > 1e-3:
        raise SystemExit(f"the contenders must compute the same loss, got {values}")
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.repetitions):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, batch, proxies)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Print one line per contender, with ratios to pytorch-metric-learning."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--million", action="store_true", help="also run 1,000,000 classes")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.classes, arguments.batch, arguments.dim)
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, *shape)))
        return
    print(
        f"B={arguments.batch} D={arguments.dim} C={arguments.classes} float32, "
        f"{arguments.threads} threads, medians of {arguments.repetitions}, "
        f"torch {torch.__version__}"
    )
    times = measure_times(arguments)
    memory = {
        name: memory_in_own_process(name, arguments, arguments.classes)["extra_mib"]
        for name in CONTENDERS
    }
    peer = CONTENDERS[1]
    for name in CONTENDERS:
        print(
            f"{name:<25} {times[name]:7.3f} s ({times[name] / times[peer]:4.2f})  "
            f"extra {memory[name]:7.1f} MiB ({memory[name] / memory[peer]:5.3f})"
        )
    if arguments.million:
        found = memory_in_own_process(CONTENDERS[0], arguments, 1_000_000)
        print(f"dml_dist, C=1000000: {found['seconds']:.2f} s, extra {found['extra_mib']:.1f} MiB")


if __name__ == "__main__":
    main()
