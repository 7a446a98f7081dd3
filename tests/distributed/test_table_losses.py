"""Losses between the batch and a table of representatives on real ranks, against loops.

All cases of a world size run in one process group, in float64 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_dist.config.objective import (
    ContrastiveConfig,
    LossConfig,
    MultiSimilarityConfig,
    TripletConfig,
)
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.process_group import init
from dml_dist.parallel.representatives import (
    REPRESENTATIVE_ROWS,
    REPRESENTATIVES,
    RepresentativeObjective,
    TableForm,
)
from dml_dist.partition import part_bounds, part_sizes
from dml_dist.topology import Topology
from tests.boundary_pairs import DIM, LABELS, ROWS, boundary_losses, boundary_rows, expected
from tests.oracles_pairs import contrastive_oracle, multi_similarity_oracle, triplet_oracle
from tests.oracles_table import (
    Pairs,
    table_contrastive_oracle,
    table_multi_similarity_oracle,
    table_triplet_oracle,
)
from tests.ranks import run_ranks

SIZE, NUM_CLASSES, M = 4, 7, 3
ROW_BY_ROW = 1e-6
"""Chunks of one row."""

Oracle = Callable[..., Tensor]


def _losses() -> tuple[tuple[LossConfig, Oracle, Oracle], ...]:
    """Return losses, with their oracles between batch and table and within the batch."""
    margins = {"positive_margin": 0.1, "negative_margin": 1.3}
    options: tuple[dict[str, Any], ...] = (
        {"margin": 0.4},
        {"margin": 0.6, "mining": "semi_hard", "squared": True, "reduction": "mean"},
        {"margin": 0.3, "mining": "hard"},
        {"margin": 0.3, "smooth": True, "squared": True},
        {"margin": 0.2, "mining": "hard", "smooth": True, "squared": True, "reduction": "mean"},
    )
    pairs: list[tuple[LossConfig, Oracle, Oracle]] = [
        (
            ContrastiveConfig(**margins, reduction=reduction),
            partial(table_contrastive_oracle, **margins, reduction=reduction),
            partial(contrastive_oracle, **margins, reduction=reduction),
        )
        for reduction in ("nonzero", "mean")
    ]
    triplets: list[tuple[LossConfig, Oracle, Oracle]] = [
        (TripletConfig(**of), partial(table_triplet_oracle, **of), partial(triplet_oracle, **of))
        for of in options
    ]
    similarities: list[tuple[LossConfig, Oracle, Oracle]] = [
        (
            MultiSimilarityConfig(negative_scale=10.0, **of),
            partial(table_multi_similarity_oracle, negative_scale=10.0, **of),
            partial(multi_similarity_oracle, negative_scale=10.0, **of),
        )
        for of in ({}, {"epsilon": None, "reduction": "nonzero"})
    ]
    return (*pairs, *triplets, *similarities)


LOSSES = _losses()


@dataclass(frozen=True)
class Case:
    """A global batch and the table's image rows, -1 for missing ones."""

    name: str
    labels: tuple[int, ...]
    images: tuple[int, ...]
    table_images: tuple[int, ...]

    def tensors(self, *, zero_row: bool = False) -> tuple[Tensor, Tensor]:
        """Return embeddings, some of them equal, and the table's rows.

        All distances of a zero row are 1, up to rounding: a miner's choice would depend on it.
        """
        generator = torch.Generator().manual_seed(4)
        shape = len(self.labels) + len(self.table_images), SIZE
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        x, table = drawn[: len(self.labels)], drawn[len(self.labels) :]
        x[-1] = x[0]
        table[4], table[10] = 2 * x[0], table[1]
        if zero_row:
            x[len(x) // 2] = 0.0
        return x, table


COMPLETE = tuple(range(100, 100 + NUM_CLASSES * M))
SHORT = tuple(-1 if row in (1, 2, 5, 13) else image for row, image in enumerate(COMPLETE))
CASES = (
    Case("no missing rows", (0, 3, 3, 6, 1, 0, 5, 3), tuple(range(8)), COMPLETE),
    # Rows 0 of class 0, 10 of class 3 and 20 of class 6 are the images 0, 1 and 3 of the batch.
    Case("missing and own rows", (0, 3, 3, 6, 1, 0, 5), (100, 110, 7, 120, 8, 9, 116), SHORT),
    Case("one class", (2,) * 5, (106, 107, 3, 4, 5), SHORT),
    Case("one row", (4,), (9,), COMPLETE),
    Case("an empty table", (0, 1, 0), (1, 2, 3), (-1,) * len(COMPLETE)),
)


def _close(actual: Tensor | float, expected: Tensor | float, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
        msg=lambda text: f"{what}: {text}",
    )


@cache
def _references() -> dict[tuple[int, str], tuple[Tensor, ...]]:
    """Return table loss, loss in the batch, and the gradients of batch and table, by loops."""
    found = {}
    for number, (loss, of_table, in_batch) in enumerate(LOSSES):
        for case in CASES:
            x, table = (
                values.clone().requires_grad_()
                for values in case.tensors(zero_row=not isinstance(loss, TripletConfig))
            )
            labels = torch.tensor(case.labels)
            first = of_table(Pairs(x, labels, case.images, table, case.table_images, M))
            second = in_batch(x, labels)
            (0.7 * first + 0.3 * second).backward()
            assert x.grad is not None
            assert table.grad is not None
            found[number, case.name] = first.detach(), second.detach(), x.grad, table.grad
    return found


def _objective(loss: LossConfig, comm: Comm, **form: Any) -> RepresentativeObjective:
    objective = build_objective(
        loss,
        num_classes=NUM_CLASSES,
        embedding_size=SIZE,
        seed=5,
        comm=comm,
        dtype=torch.float64,
        table=TableForm(M, in_batch_weight=0.3, table_weight=0.7, **form),
    )
    assert isinstance(objective, RepresentativeObjective)
    return objective


def _check_case(
    loss: LossConfig, case: Case, memory_mb: float, wanted: tuple[Tensor, ...], comm: Comm
) -> None:
    what = f"{loss}, {case.name}, W={comm.world_size}"
    objective = _objective(loss, comm, memory_mb=memory_mb)
    x, table = case.tensors(zero_row=not isinstance(loss, TripletConfig))
    objective.rewrite(
        table.view(NUM_CLASSES, M, SIZE), torch.tensor(case.table_images).view(NUM_CLASSES, M)
    )
    # What a missing row holds has no influence.
    with torch.no_grad():
        objective.rows[objective.image_rows == -1] = 3.0
    sizes = part_sizes(len(x), comm.world_size)
    part = slice(*part_bounds(len(x), comm.world_size, comm.rank))
    rows = x[part].clone().requires_grad_()
    before = comm.traffic
    images = torch.tensor(case.images)[part]
    output = objective(rows, torch.tensor(case.labels)[part], sizes, image_rows_B=images)
    output.loss.backward()
    assert comm.traffic - before == objective.traffic(sizes), what
    of_table, in_batch, of_x, of_rows = wanted
    _close(output.loss.detach(), 0.7 * of_table + 0.3 * in_batch, f"{what}: loss")
    _close(output.statistics["table_loss"], of_table, f"{what}: table loss")
    _close(output.statistics["in_batch_loss"], in_batch, f"{what}: loss in the batch")
    assert output.statistics["missing_representatives"] == case.table_images.count(-1)
    own = objective.owned_parameters()[REPRESENTATIVES]
    assert rows.grad is not None
    assert own.parameter.grad is not None
    _close(rows.grad / comm.world_size, of_x[part], f"{what}: gradient of the batch")
    _close(own.parameter.grad, of_rows[own.row_low : own.row_high], f"{what}: of the table")


def _check_boundaries(loss: LossConfig, dtype: torch.dtype, comm: Comm) -> None:
    """A table of the batch's own rows gives the loss of the batch's pairs, with its choices."""
    x = boundary_rows(dtype)
    objective = build_objective(
        loss,
        num_classes=ROWS // 3,
        embedding_size=DIM,
        seed=5,
        comm=comm,
        dtype=dtype,
        table=TableForm(3, in_batch_weight=0.0, memory_mb=0.02),
    )
    assert isinstance(objective, RepresentativeObjective)
    images = torch.arange(ROWS)
    objective.rewrite(x.view(ROWS // 3, 3, DIM), images.view(-1, 3))
    part = slice(*part_bounds(ROWS, comm.world_size, comm.rank))
    rows = x[part].clone().requires_grad_()
    sizes = part_sizes(ROWS, comm.world_size)
    output = objective(rows, LABELS[part], sizes, image_rows_B=images[part])
    output.loss.backward()
    wanted = expected(loss, dtype)
    what = f"{loss}, {dtype}, W={comm.world_size}"
    active = [v for name, v in output.statistics.items() if name.startswith("table_active")]
    torch.testing.assert_close(
        torch.stack(active).float(), wanted.active.float(), rtol=1e-6, atol=0, msg=what
    )
    assert rows.grad is not None
    of_batch = comm.all_gather_rows(rows.grad / comm.world_size, sizes)
    of_table = comm.all_gather_rows(objective.rows.grad, objective.proxy_rows())
    single = dtype == torch.float32
    tolerance = {"rtol": 2e-4, "atol": 2e-6} if single else {"rtol": 1e-10, "atol": 1e-12}
    for actual, value, of in (
        (output.loss.detach(), wanted.loss, "loss"),
        (of_batch + of_table, wanted.gradient, "gradient"),
    ):
        torch.testing.assert_close(
            actual, value, **tolerance, msg=lambda text, of=of: f"{what}: {of}: {text}"
        )


def _check_table(comm: Comm) -> None:
    """The whole table comes back on every rank; frozen rows are a buffer and get no gradient."""
    case = CASES[1]
    x, table = case.tensors()
    images = torch.tensor(case.table_images).view(NUM_CLASSES, M)
    objective = _objective(ContrastiveConfig(), comm, trainable=False)
    reset = objective.rewrite(table.view(NUM_CLASSES, M, SIZE), images)
    assert reset.tolist() == list(range(objective.proxy_rows()[comm.rank]))
    rows, found = objective.class_rows()
    assert torch.equal(found, images)
    filled = table.view(NUM_CLASSES, M, SIZE).clone()
    filled[0, 1:], filled[1, 2], filled[4, 1] = filled[0, 0], filled[1, 0], filled[4, 0]
    assert torch.equal(rows, filled)
    assert objective.owned_parameters() == {}
    buffers = objective.owned_buffers()
    low, high = part_bounds(NUM_CLASSES, comm.world_size, comm.rank)
    assert buffers.keys() == {REPRESENTATIVES, REPRESENTATIVE_ROWS}
    for buffer in buffers.values():
        assert buffer[1:] == (low * M, high * M, NUM_CLASSES * M)
    part = slice(*part_bounds(len(x), comm.world_size, comm.rank))
    leaf, labels = x[part].clone().requires_grad_(), torch.tensor(case.labels)[part]
    sizes = part_sizes(len(x), comm.world_size)
    objective(leaf, labels, sizes, image_rows_B=torch.tensor(case.images)[part]).loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.any()
    with pytest.raises(ValueError, match="index rows, but image_rows_B is None"):
        objective(leaf, labels, sizes)


def _on_rank(topology: Topology, references: dict[tuple[int, str], tuple[Tensor, ...]]) -> None:
    comm = init(topology) if topology.world_size > 1 else Comm.single()
    for number, (loss, _, _) in enumerate(LOSSES):
        for case in CASES:
            for memory_mb in (ROW_BY_ROW, 64.0):
                _check_case(loss, case, memory_mb, references[number, case.name], comm)
    for dtype in (torch.float32, torch.float64):
        for loss in boundary_losses(dtype):
            _check_boundaries(loss, dtype, comm)
    _check_table(comm)


@pytest.mark.parametrize("world_size", [2, 3])
def test_table_losses_equal_one_process(world_size: int) -> None:
    run_ranks(_on_rank, world_size, _references(), timeout=120)


def test_table_losses_in_one_process() -> None:
    _on_rank(Topology(), _references())
