"""One loss on seeded batches, in one process or on several gloo ranks: values and gradients.

Ranks are processes of this machine, forked from a server that has imported torch and holds no
threads, that meet in a file. They run neither Ray nor a run.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.objective import LossConfig
from dml_dist.errors import ConfigError, RunError, TopologyError
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init, shutdown
from dml_dist.partition import part_sizes
from dml_dist.topology import Topology

INPUT_SIZE, EMBEDDING_SIZE = 6, 5
_SEED = 11
_MEET_SECONDS = 120.0
"""How long ranks wait for each other, imports on a busy machine included."""

_ALL_SECONDS = 300.0
"""How long ranks may take in all."""

_GRACE_SECONDS = 5.0
"""How long the others may go on after one rank has ended badly."""


@dataclass(frozen=True)
class Case:
    """One seeded batch.

    Attributes:
        name: What is awkward about it.
        labels: Class of every row of the global batch.
        num_classes: C.
        zero_rows: Rows whose embedding is zero.
        equal_rows: Pairs of rows that are equal.
    """

    name: str
    labels: tuple[int, ...]
    num_classes: int = 8
    zero_rows: tuple[int, ...] = ()
    equal_rows: tuple[tuple[int, int], ...] = ()


CASES = (
    Case("parts that differ by one row", (0, 3, 3, 6, 1, 0, 5, 3)),
    Case("a class on every rank", (2, 7, 2, 7, 2, 7, 2, 7, 2, 7, 2)),
    Case("one class", (4,) * 7),
    Case("no two rows of a class", (0, 1, 2, 3, 4, 5, 6)),
    Case("equal rows", (0, 1, 0, 1, 2, 0, 2, 1), equal_rows=((0, 5), (2, 7), (4, 6))),
    Case("zero rows", (0, 1, 0, 1, 2, 0, 2, 1), zero_rows=(1, 4, 5)),
    Case("as many classes as ranks", (0, 1, 2, 2, 1), num_classes=3),
    Case("many rows", tuple(i * i % 10 for i in range(31)), num_classes=10),
)


@dataclass(frozen=True)
class Measured:
    """What one rank found for one case.

    Attributes:
        loss: The loss's value; NaN where `skipped`.
        grads: Gradients by name: of the network and replicated parameters, whole, and of this
            rank's rows of tables.
        row_low: First row of each table's rows here, by name.
        skipped: Why the loss does not take this case, or "".
    """

    loss: float
    grads: dict[str, Tensor] = field(default_factory=dict)
    row_low: dict[str, int] = field(default_factory=dict)
    skipped: str = ""


class _Network(nn.Module):
    """Two layers whose bits of a row do not depend on the batch around it, and a mask.

    What a miner takes of equally far rows depends on the last bit of their embeddings: with a
    matrix product that would be another one on other ranks, whatever the loss does.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(_SEED)
        for name, shape in (("first", (INPUT_SIZE, 7)), ("second", (7, EMBEDDING_SIZE))):
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        first, second = self.parameters()
        return self._product(self._product(x, first).tanh(), second) * mask

    @staticmethod
    def _product(x: Tensor, weight: Tensor) -> Tensor:
        total = x.new_zeros((len(x), weight.shape[1]))
        for column, row in zip(x.unbind(dim=1), weight, strict=True):
            total = total + column[:, None] * row
        return total


def measure(config: LossConfig, comm: Comm) -> list[Measured]:
    """Return what the loss gives for every case; every rank calls this."""
    return [_measure_case(config, case, comm) for case in CASES]


def prepare_ranks() -> None:
    """Let the server that ranks are forked from import what they need, once; call it first."""
    mp.get_context("forkserver").set_forkserver_preload([__name__])


def measure_on_ranks(config: LossConfig, world_size: int) -> list[list[Measured]]:
    """Return what the loss gives for every case on new ranks, by rank.

    Raises:
        ConfigError: If the loss raised on a rank where it did not in one process.
        RunError: If ranks did not start or end.
    """
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_on_rank, args=(config, rank, world_size, name), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        late = _wait(ranks)
        told = {
            rank: path.read_text()
            for rank in range(world_size)
            if (path := folder / f"error-{rank}").exists()
        }
        # Who lost a peer only tells of another rank's error.
        first = {r: text for r, text in told.items() if not text.startswith("PeerLostError")}
        if problems := [f"rank {rank}: {text}" for rank, text in (first or told).items()]:
            raise ConfigError(
                f"required a loss that runs on {world_size} ranks as in one process, got "
                + "; ".join(problems)
            )
        if late or any(process.exitcode != 0 for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise RunError(
                f"required {world_size} ranks that end by themselves, got exit codes {codes}"
                f"{f', and ranks {late} still running' if late else ''}; look at their output"
            )
        return [
            torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)
        ]


# ---------------------------------------------------------------- on a rank


def _wait(ranks: list[BaseProcess]) -> list[int]:
    """Wait for all ranks, and not long after one has ended badly; end those that are left."""
    deadline = time.monotonic() + _ALL_SECONDS
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        connection.wait([process.sentinel for process in ranks if process.is_alive()], timeout=0.5)
    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in late:
        ranks[rank].kill()
    for process in ranks:
        process.join()
    return late


def _on_rank(config: LossConfig, rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    try:
        topology = Topology(rank, world_size, rank)
        comm = init(topology, init_method=f"file://{place}/meet", timeout_seconds=_MEET_SECONDS)
        torch.save(measure(config, comm), place / f"result-{rank}")
        comm.barrier()
        shutdown()
    except Exception as error:  # User code: whatever it raises is told as a message.
        (place / f"error-{rank}.tmp").write_text(f"{type(error).__name__}: {error}")
        os.replace(place / f"error-{rank}.tmp", place / f"error-{rank}")
        raise SystemExit(1) from None


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED + len(case.labels))
    size = len(case.labels)
    x = torch.randn(size, INPUT_SIZE, generator=generator, dtype=torch.float64)
    for one, other in case.equal_rows:
        x[other] = x[one]
    mask = torch.ones(size, 1, dtype=torch.float64)
    mask[list(case.zero_rows)] = 0.0
    return x, mask, torch.tensor(case.labels)


def _measure_case(config: LossConfig, case: Case, comm: Comm) -> Measured:
    try:
        objective = build_objective(
            config,
            num_classes=case.num_classes,
            embedding_size=EMBEDDING_SIZE,
            seed=_SEED,
            comm=comm,
            dtype=torch.float64,
            class_sizes=[3 + i for i in range(case.num_classes)],
        )
    except TopologyError as error:
        return Measured(float("nan"), skipped=str(error))
    network = _Network()
    wrapped = DistributedDataParallel(network) if comm.world_size > 1 else network
    x, mask, labels = _inputs(case)
    sizes = part_sizes(len(x), comm.world_size)
    own = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    with comm.guard("gradients"):
        output = objective(wrapped(x[own], mask[own]), labels[own], sizes, step=3)
        output.loss.backward()
    objective.sum_replicated_gradients()
    tables = objective.owned_parameters()
    parameters: dict[str, Any] = {f"network.{n}": p for n, p in network.named_parameters()}
    parameters |= {name: rows.parameter for name, rows in tables.items()}
    parameters |= objective.replicated_parameters()
    return Measured(
        output.loss.item(),
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()},
        {name: rows.row_low for name, rows in tables.items()},
    )
