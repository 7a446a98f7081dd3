"""Non-isotropy regularization on real ranks, against one process that holds everything densely."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.losses.flow import ConditionalFlow
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.nir import NIRObjective
from dml_dist.parallel.proxies import ProxyObjective
from dml_dist.partition import part_sizes
from dml_dist.random_streams import Stream, generator_of
from dml_dist.topology import Topology
from tests.oracles_losses import proxy_nca_oracle
from tests.ranks import run_ranks

DIM = 5


@dataclass(frozen=True)
class Case:
    """One batch and one setting of the regularizer."""

    name: str
    num_classes: int = 7
    labels: tuple[int, ...] = (0, 3, 3, 6, 1, 0, 5, 3)
    proxies_per_class: int = 1
    step: int = 0
    zero_row: int | None = None
    weights_factor: float = 2.0
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("as the paper"),
    Case("as released", options={"link": "exp", "flow_weight": 1.0, "loss_weight": 0.3}),
    Case("one class, rows that differ by one", labels=(2,) * 7),
    Case("two proxies a class", proxies_per_class=2, num_classes=4, labels=(0, 3, 1, 1)),
    Case("noise", step=3, options={"noise": 0.1}),
    Case("a row of zeros", zero_row=1),
    Case("warm-up", step=4, options={"warmup_steps": 5}),
    Case("after warm-up", step=5, options={"warmup_steps": 5}),
    Case("flow alone", options={"gradients_to": ("flow",)}),
    Case("all but the flow", options={"gradients_to": ("embeddings", "proxies")}),
    Case("continued along the tangent", weights_factor=3.0, options={"link": "exp"}),
)


def _embeddings(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(case.labels), DIM, generator=generator, dtype=torch.float64)
    if case.zero_row is not None:
        values[case.zero_row] = 0.0
    return values


def _objective(case: Case, comm: Comm) -> NIRObjective:
    base = ProxyObjective(
        ProxyNCA(case.num_classes, proxies_per_class=case.proxies_per_class),
        num_classes=case.num_classes,
        embedding_size=DIM,
        seed=1,
        comm=comm,
        dtype=torch.float64,
    )
    flow = ConditionalFlow(DIM, DIM, seed=2, num_blocks=2, depth=3, width=8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= case.weights_factor
    return NIRObjective(base, flow, seed=9, **case.options)


def _normalized(x: Tensor) -> Tensor:
    return torch.stack([row / row.norm().clamp_min(1e-12) for row in x])


def _reference(case: Case) -> dict[str, Tensor]:
    """Return the loss and the gradients of embeddings, proxies and flow, from dense formulas."""
    objective = _objective(case, Comm.single())
    x = _embeddings(case).requires_grad_()
    labels, per_class = torch.tensor(case.labels), case.proxies_per_class
    proxies = objective.base.proxies.detach().clone().requires_grad_()
    rows = _normalized(x)
    if noise := case.options.get("noise"):
        drawn = generator_of(Stream.NIR_NOISE, 9, case.step).random(tuple(x.shape))
        rows = _normalized(rows + noise * torch.from_numpy(drawn))
    own = _normalized(proxies).reshape(case.num_classes, per_class, DIM).mean(dim=1)
    conditions = _normalized(own)[labels]
    targets = set(case.options.get("gradients_to", ("embeddings", "proxies", "flow")))
    if case.step < case.options.get("warmup_steps", 0):
        targets = {"flow"}
    rows = rows if "embeddings" in targets else rows.detach()
    conditions = conditions if "proxies" in targets else conditions.detach()
    z, log_det = objective.flow(rows, conditions)
    nll = (z**2).sum(dim=1) / 2 - log_det
    terms = nll
    if case.options.get("link") == "exp":
        tangent = np.exp(60.0) * (1 + nll - 60.0)
        terms = torch.where(nll > 60.0, tangent, nll.clamp_max(60.0).exp())
    weight = case.options.get("loss_weight", 1.0)
    base = proxy_nca_oracle(x, labels, proxies, proxies_per_class=per_class)
    loss = case.options.get("flow_weight", 1.0) * terms.mean() + weight * base
    loss.backward()
    flow = [p.grad for p in objective.flow.parameters()]
    learns = "flow" in targets
    return {
        "loss": loss.detach(),
        "x": x.grad,
        "proxies": proxies.grad,
        "flow": torch.cat([g.reshape(-1) if learns else g.reshape(-1) * 0 for g in flow]),
        "flow_nll": nll.detach().mean(),
        "flow_continued_share": (nll > 60.0).double().mean()
        if case.options.get("link") == "exp"
        else torch.zeros((), dtype=torch.float64),
    }


def _on_rank(case: Case, comm: Comm) -> dict[str, Tensor]:
    objective = _objective(case, comm)
    sizes = part_sizes(len(case.labels), comm.world_size)
    low = sum(sizes[: comm.rank])
    own = slice(low, low + sizes[comm.rank])
    x = _embeddings(case)[own].requires_grad_()
    before = comm.traffic
    output = objective(x, torch.tensor(case.labels)[own], sizes, step=case.step)
    output.loss.backward()
    objective.sum_replicated_gradients()
    if case.step >= case.options.get("warmup_steps", 0):
        assert comm.traffic - before == objective.traffic(sizes), case.name
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in objective.replicated_parameters().items()
        if name.startswith("flow.")
    ]
    return {
        "loss": output.loss.detach(),
        "x": x.grad / comm.world_size,  # What DDP's mean over ranks makes of it.
        "proxies": objective.base.proxies.grad,
        "flow": torch.cat([grad.reshape(-1) for grad in grads]),
        "flow_nll": output.statistics["flow_nll"],
        "flow_continued_share": output.statistics["flow_continued_share"],
    }


def _all_cases(topology: Topology) -> dict[str, dict[str, Tensor]]:
    comm = Comm.from_default_group()
    assert comm.topology.world_size == topology.world_size
    return {case.name: _on_rank(case, comm) for case in CASES}


def _assert_equal(found: list[dict[str, Tensor]], case: Case) -> None:
    expected = _reference(case)
    for name, value in expected.items():
        if name in ("x", "proxies"):
            whole = torch.cat([part[name] for part in found])
            torch.testing.assert_close(whole, value, rtol=1e-10, atol=1e-10, msg=case.name)
            continue
        for part in found:
            torch.testing.assert_close(part[name], value, rtol=1e-10, atol=1e-10, msg=case.name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_rank(case: Case) -> None:
    _assert_equal([_on_rank(case, Comm.single())], case)
    if case.name == "continued along the tangent":
        assert 0 < _reference(case)["flow_continued_share"] < 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks(world_size: int) -> None:
    ranks = run_ranks(_all_cases, world_size)
    for case in CASES:
        _assert_equal([rank[case.name] for rank in ranks], case)
