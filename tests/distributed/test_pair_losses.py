"""Pair losses on real ranks against loops on the concatenated batch: values, gradients, betas.

All cases of a world size run in one process group, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.objective import (
    ContrastiveConfig,
    LossConfig,
    MarginConfig,
    MultiSimilarityConfig,
    TripletConfig,
)
from dml_dist.errors import TopologyError
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.class_table import Use, fetch_rows
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.process_group import init
from dml_dist.partition import part_bounds, part_sizes
from dml_dist.topology import Topology
from tests.boundary_pairs import LABELS, boundary_losses, boundary_rows, expected
from tests.oracles_pairs import (
    contrastive_oracle,
    margin_oracle,
    multi_similarity_oracle,
    triplet_oracle,
)
from tests.ranks import run_ranks

INPUT, DIM = 6, 4
SEED = 5
NUM_CLASSES = 7
LOSSES: tuple[tuple[LossConfig, Callable[..., Tensor]], ...] = (
    (
        ContrastiveConfig(positive_margin=0.1, negative_margin=1.3),
        partial(contrastive_oracle, positive_margin=0.1, negative_margin=1.3),
    ),
    (
        TripletConfig(margin=0.4, triplet_memory_mb=1e-4),
        partial(triplet_oracle, margin=0.4),
    ),
    (
        TripletConfig(margin=0.6, mining="semi_hard", squared=True, reduction="mean"),
        partial(triplet_oracle, margin=0.6, mining="semi_hard", squared=True, reduction="mean"),
    ),
    (
        TripletConfig(margin=0.3, mining="hard", swap=True, smooth=True),
        partial(triplet_oracle, margin=0.3, mining="hard", swap=True, smooth=True),
    ),
    (
        MarginConfig(beta=0.9, nu=0.2),
        partial(margin_oracle, nu=0.2, seed=SEED),
    ),
    (
        MarginConfig(beta=1.1, beta_form="class", nu=0.2, reduction="mean"),
        partial(margin_oracle, nu=0.2, seed=SEED, reduction="mean"),
    ),
    (
        MultiSimilarityConfig(negative_scale=10.0),
        partial(multi_similarity_oracle, negative_scale=10.0),
    ),
)


@dataclass(frozen=True)
class Batch:
    """The rows of a global batch."""

    name: str
    labels: tuple[int, ...]
    zero_rows: tuple[int, ...] = ()
    equal_rows: tuple[tuple[int, int], ...] = field(default=())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, a mask that makes rows of the embeddings zero, and labels."""
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(len(self.labels), INPUT, generator=generator, dtype=torch.float64)
        for one, other in self.equal_rows:
            x[other] = x[one]
        mask = torch.ones(len(x), 1, dtype=torch.float64)
        mask[list(self.zero_rows)] = 0
        return x, mask, torch.tensor(self.labels)


BATCHES = (
    Batch("classes on several ranks", (0, 3, 3, 6, 1, 0, 5, 3)),
    Batch("one class", (2,) * 5),
    Batch("zero rows, equal rows", (0, 1, 0, 1, 2, 0, 2, 1), (1, 4), ((0, 5), (2, 7))),
    Batch("no positive", (0, 1, 2, 3, 4)),
    Batch("one row", (3,)),
)


class Network(nn.Module):
    """Two layers and a mask; equal rows give equal bits, in whatever part of the batch they are.

    Which of two equally far rows a miner takes depends on the last bit, and a matrix product's
    last bits depend on the number of rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(INPUT, 5, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(5, DIM, dtype=torch.float64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings, zero where the mask is."""
        return self._product(self._product(x, self.first).tanh(), self.second) * mask

    @staticmethod
    def _product(x: Tensor, weight: Tensor) -> Tensor:
        columns = zip(x.unbind(dim=1), weight.unbind(dim=0), strict=True)
        return sum((column[:, None] * row for column, row in columns), x.new_zeros(()))


def _close(actual: Tensor | float, expected: Tensor | float, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
        msg=lambda text: f"{what}: {text}",
    )


def _betas(loss: LossConfig) -> Tensor | None:
    """Return the betas of one process, different for each class."""
    if not isinstance(loss, MarginConfig):
        return None
    if loss.beta_form == "scalar":
        return torch.tensor([loss.beta], dtype=torch.float64)
    return loss.beta + 0.05 * torch.arange(NUM_CLASSES, dtype=torch.float64)


def _initial_network() -> Network:
    torch.manual_seed(3)
    return Network()


def _reference(loss: LossConfig, oracle: Callable[..., Tensor], batch: Batch) -> dict[str, Any]:
    """Two steps of one process on the whole batch."""
    network, betas = _initial_network(), _betas(loss)
    learnt = [] if betas is None else [nn.Parameter(betas)]
    optimizer = torch.optim.Adam([*network.parameters(), *learnt], lr=0.01)
    x, mask, labels = batch.tensors()
    found: dict[str, Any] = {"losses": [], "grads": []}
    for step in range(2):
        optimizer.zero_grad()
        draws = {"step": step} if learnt else {}
        value = oracle(network(x, mask), labels, *learnt, **draws)
        value.backward()
        found["losses"].append(value.item())
        named = [*network.named_parameters(), *(("betas", p) for p in learnt)]
        found["grads"].append({name: p.grad.clone() for name, p in named if p.grad is not None})
        optimizer.step()
    return found | {"betas": learnt[0].detach() if learnt else None}


@cache
def _references() -> dict[tuple[int, str], dict[str, Any]]:
    """Return what one process gives for every loss and batch; loops take their time."""
    return {
        (number, batch.name): _reference(loss, oracle, batch)
        for number, (loss, oracle) in enumerate(LOSSES)
        for batch in BATCHES
    }


def _own_betas(objective: Objective) -> tuple[nn.Parameter, slice] | None:
    """Return this rank's betas and which of all they are."""
    for rows in objective.owned_parameters().values():
        return rows.parameter, slice(rows.row_low, rows.row_high)
    for parameter in objective.replicated_parameters().values():
        return parameter, slice(None)
    return None


def _check_case(loss: LossConfig, batch: Batch, expected: dict[str, Any], comm: Comm) -> None:
    network, betas = _initial_network(), _betas(loss)
    objective = build_objective(
        loss,
        num_classes=NUM_CLASSES,
        embedding_size=DIM,
        seed=SEED,
        comm=comm,
        dtype=torch.float64,
    )
    own = _own_betas(objective)
    if own is not None and betas is not None:
        own[0].data.view(-1).copy_(betas[own[1]])
    wrapped = DistributedDataParallel(network) if comm.world_size > 1 else network
    learnt = [] if own is None else [own[0]]
    optimizer = torch.optim.Adam([*network.parameters(), *learnt], lr=0.01)
    x, mask, labels = batch.tensors()
    sizes = part_sizes(len(x), comm.world_size)
    part = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    for step in range(2):
        what = f"{loss.name}, {batch.name}, W={comm.world_size}, step {step}"
        optimizer.zero_grad()
        before = comm.traffic
        output = objective(wrapped(x[part], mask[part]), labels[part], sizes, step=step)
        output.loss.backward()
        objective.sum_replicated_gradients()
        assert comm.traffic - before == objective.traffic(sizes), what
        _close(output.loss.item(), expected["losses"][step], f"{what}: loss")
        grads = expected["grads"][step]
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            _close(parameter.grad, grads[name], f"{what}: {name}")
        if own is not None:
            assert own[0].grad is not None
            _close(own[0].grad.view(-1), grads["betas"][own[1]], f"{what}: betas")
        optimizer.step()
    if own is not None:
        _close(own[0].detach().view(-1), expected["betas"][own[1]], f"{loss.name}: two steps")


def _check_traffic_of_projections(loss: LossConfig, comm: Comm) -> None:
    """Representatives and counts of mined negatives are sent, too."""
    objective = build_objective(
        loss, num_classes=NUM_CLASSES, embedding_size=DIM, seed=SEED, comm=comm
    )
    sizes = part_sizes(8, comm.world_size)
    labels = torch.arange(sizes[comm.rank]) % NUM_CLASSES
    for representatives in (False, True):
        for mined in (False, True):
            before = comm.traffic
            objective(
                torch.randn(len(labels), DIM, requires_grad=True),
                labels,
                sizes,
                is_representative_B=labels < 2 if representatives else None,
                neighbors_Ch=torch.zeros(NUM_CLASSES, 1, dtype=torch.int64) if mined else None,
            ).loss.backward()
            objective.sum_replicated_gradients()
            given = {"representatives": representatives, "mined": mined}
            assert comm.traffic - before == objective.traffic(sizes, **given), (loss, given)


def _check_boundaries(loss: LossConfig, dtype: torch.dtype, comm: Comm) -> None:
    """Choices that hang on the last bit are those of the exact form on the whole batch."""
    x = boundary_rows(dtype)
    shape = {"num_classes": len(LABELS), "embedding_size": x.shape[1]}
    objective = build_objective(loss, **shape, seed=SEED, comm=comm, dtype=dtype)
    sizes = part_sizes(len(LABELS), comm.world_size)
    part = slice(*part_bounds(len(LABELS), comm.world_size, comm.rank))
    rows = x[part].requires_grad_()
    output = objective(rows, LABELS[part], sizes)
    output.loss.backward()
    wanted = expected(loss, dtype)
    what = f"{loss}, {dtype}, W={comm.world_size}"
    active = torch.stack([v for name, v in output.statistics.items() if name.startswith("active")])
    torch.testing.assert_close(active.float(), wanted.active.float(), rtol=1e-6, atol=0, msg=what)
    single = dtype == torch.float32
    tolerance = {"rtol": 2e-4, "atol": 2e-6} if single else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(
        output.loss.detach(), wanted.loss, **tolerance, msg=lambda text: f"{what}: {text}"
    )
    assert rows.grad is not None
    torch.testing.assert_close(
        rows.grad / comm.world_size,
        wanted.gradient[part],
        **tolerance,
        msg=lambda text: f"{what}: gradient: {text}",
    )


def _check_fetch(comm: Comm) -> None:
    """Rows of a table and their gradients, when ranks compute parts and when they do the whole."""
    ids = torch.tensor([4, 0, 6, 6, 2])
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    dense = table.clone().requires_grad_()
    expected = (dense[ids] ** 3 * weights).sum()
    expected.backward()
    assert dense.grad is not None
    low, high = part_bounds(7, comm.world_size, comm.rank)
    first, last = part_bounds(5, comm.world_size, comm.rank)
    uses: tuple[tuple[Use, slice], ...] = (
        ("parts", slice(first, last)),
        ("whole", slice(None)),
    )
    for use, part in uses:
        own = table[low:high].clone().requires_grad_()
        rows = fetch_rows(own, ids, low, high, comm, use=use)
        _close(rows.detach(), table[ids], f"rows for {use}")
        (rows[part] ** 3 * weights[part]).sum().backward()
        assert own.grad is not None
        _close(own.grad, dense.grad[low:high], f"gradient for {use}")
    with pytest.raises(ValueError, match="owns rows 0 to 8, but was given"):
        fetch_rows(table, ids, 0, 9, comm)


def _check_refusal(comm: Comm) -> None:
    """Betas of classes need a class for each rank; a loss without a table does not."""
    shape = {"num_classes": 2, "embedding_size": DIM, "seed": 0, "comm": comm}
    build_objective(TripletConfig(), **shape)
    if comm.world_size == 3:
        with pytest.raises(TopologyError, match="there are 2 training classes and 3 ranks"):
            build_objective(MarginConfig(beta_form="class"), **shape)


def _on_rank(topology: Topology, references: dict[tuple[int, str], dict[str, Any]]) -> None:
    comm = init(topology) if topology.world_size > 1 else Comm.single()
    for number, (loss, _) in enumerate(LOSSES):
        for batch in BATCHES:
            _check_case(loss, batch, references[number, batch.name], comm)
        _check_traffic_of_projections(loss, comm)
    for dtype in (torch.float32, torch.float64):
        for loss in boundary_losses(dtype):
            _check_boundaries(loss, dtype, comm)
    _check_fetch(comm)
    _check_refusal(comm)


@pytest.mark.parametrize("world_size", [2, 3])
def test_pair_losses_equal_one_process(world_size: int) -> None:
    run_ranks(_on_rank, world_size, _references(), timeout=120)


def test_pair_losses_in_one_process() -> None:
    _on_rank(Topology(), _references())
