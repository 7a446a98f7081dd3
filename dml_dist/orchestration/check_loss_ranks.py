"""Values and gradients of a loss on seeded batches, in one process or on several gloo ranks.

Ranks are local processes, forked from a server that has imported torch and has no threads; they
use a file for rendezvous. Neither Ray nor a run is involved.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.objective import LossConfig
from dml_dist.errors import ConfigError, RunError, TopologyError
from dml_dist.losses.build_loss import build_loss
from dml_dist.losses.table import MISSING
from dml_dist.losses.table_losses import table_loss
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init, shutdown
from dml_dist.parallel.representatives import RepresentativeObjective, TableForm
from dml_dist.partition import part_sizes
from dml_dist.random_streams import Stream, seed_of
from dml_dist.topology import Topology

INPUT_SIZE, EMBEDDING_SIZE = 6, 5
_SEED = 11
_TIMEOUT_SECONDS = 120.0
"""Timeout of collectives, including imports on a busy machine."""

_TOTAL_TIMEOUT_SECONDS = 300.0
"""Timeout of all ranks together."""

_GRACE_SECONDS = 5.0
"""How long other ranks may continue after one has failed."""


@dataclass(frozen=True)
class Case:
    """One seeded batch.

    Attributes:
        name: What is special about it.
        labels: Class of every row of the global batch.
        num_classes: C.
        zero_rows: Rows whose embedding is zero.
        equal_rows: Pairs of rows that are equal.
        table_rows: Rows of each class in a table of representatives; 0 for a loss without one.
    """

    name: str
    labels: tuple[int, ...]
    num_classes: int = 8
    zero_rows: tuple[int, ...] = ()
    equal_rows: tuple[tuple[int, int], ...] = ()
    table_rows: int = 0


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

TABLE_CASES = tuple(replace(case, name=f"table, {case.name}", table_rows=2) for case in CASES)
"""The same batches against a table of representatives, for losses that have this form."""


@dataclass(frozen=True)
class Measured:
    """Result of one rank for one case.

    Attributes:
        loss: Value of the loss; NaN if `skipped`.
        grads: Gradients by name: of the network and replicated parameters, and of this rank's
            rows of tables.
        row_low: First row of this rank in each table, by name.
        skipped: Why the loss does not support this case, or "".
    """

    loss: float
    grads: dict[str, Tensor] = field(default_factory=dict)
    row_low: dict[str, int] = field(default_factory=dict)
    skipped: str = ""


class _Network(nn.Module):
    """Two layers and a mask; the bits of a row do not depend on the rest of the batch.

    A miner's choice among equally far rows depends on the last bit of their embeddings. With a
    matrix product that bit would depend on the batch of the rank, not on the loss.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed_of(Stream.CHECK_LOSS_NETWORK, _SEED))
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


def cases_of(config: LossConfig) -> tuple[Case, ...]:
    """Return the cases that a loss is checked on."""
    try:
        table_loss(build_loss(config, CASES[0].num_classes), memory_mb=1.0)
    except ConfigError:
        return CASES
    return (*CASES, *TABLE_CASES)


def measure(config: LossConfig, comm: Comm) -> list[Measured]:
    """Return the results of all cases; every rank calls this."""
    return [_measure_case(config, case, comm) for case in cases_of(config)]


def preload_forkserver() -> None:
    """Let the forkserver import this module once, before ranks are forked from it."""
    mp.get_context("forkserver").set_forkserver_preload([__name__])


def measure_on_ranks(config: LossConfig, world_size: int) -> list[list[Measured]]:
    """Start ranks, and return the results of all cases by rank.

    Raises:
        ConfigError: If the loss raised on a rank, but not in one process.
        RunError: If ranks did not start or end.
    """
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(config, rank, world_size, name), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        late = _wait(ranks)
        errors = {
            rank: path.read_text()
            for rank in range(world_size)
            if (path := folder / f"error-{rank}").exists()
        }
        # PeerLostError is only the consequence of another rank's error.
        first = {r: text for r, text in errors.items() if not text.startswith("PeerLostError")}
        if problems := [f"rank {rank}: {text}" for rank, text in (first or errors).items()]:
            raise ConfigError(
                f"the loss runs in one process but failed on {world_size} ranks: "
                + "; ".join(problems)
            )
        if late or any(process.exitcode != 0 for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise RunError(
                f"the {world_size} ranks ended with exit codes {codes}"
                f"{f', and ranks {late} were stopped by a timeout' if late else ''}; check their "
                "output"
            )
        return [
            torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)
        ]


def _wait(ranks: list[BaseProcess]) -> list[int]:
    """Wait for all ranks, only briefly after one has failed; kill and return those that remain."""
    deadline = time.monotonic() + _TOTAL_TIMEOUT_SECONDS
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


def _rank_main(config: LossConfig, rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    try:
        topology = Topology(rank, world_size, rank)
        comm = init(
            topology,
            init_method=f"file://{place}/meet",
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        torch.save(measure(config, comm), place / f"result-{rank}")
        comm.barrier()
        shutdown()
    except Exception as error:  # User code may raise anything.
        (place / f"error-{rank}.tmp").write_text(f"{type(error).__name__}: {error}")
        os.replace(place / f"error-{rank}.tmp", place / f"error-{rank}")
        raise SystemExit(1) from None


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    size = len(case.labels)
    generator = torch.Generator().manual_seed(seed_of(Stream.CHECK_LOSS_INPUTS, _SEED, size))
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
            table=TableForm(case.table_rows) if case.table_rows else None,
        )
    except TopologyError as error:
        return Measured(float("nan"), skipped=str(error))
    network = _Network()
    wrapped = DistributedDataParallel(network) if comm.world_size > 1 else network
    x, mask, labels = _inputs(case)
    sizes = part_sizes(len(x), comm.world_size)
    own = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    images = None
    if isinstance(objective, RepresentativeObjective):
        images = _fill_table(objective, labels)[own]
    with comm.guard("gradients"):
        embeddings = wrapped(x[own], mask[own])
        output = objective(embeddings, labels[own], sizes, step=3, image_rows_B=images)
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


def _fill_table(objective: RepresentativeObjective, labels: Tensor) -> Tensor:
    """Fill the table, with missing rows, and return the batch's image rows, some of them in it."""
    shape = objective.num_classes, objective.form.rows_per_class
    seed = seed_of(Stream.CHECK_LOSS_INPUTS, _SEED, shape[0] * shape[1])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn((*shape, EMBEDDING_SIZE), generator=generator, dtype=torch.float64)
    images = torch.arange(shape[0] * shape[1]).view(shape)
    images_of_batch = images[labels, 0] + images.numel() * (torch.arange(len(labels)) % 2)
    images[::3, -1] = MISSING
    objective.rewrite(rows, images)
    return images_of_batch
