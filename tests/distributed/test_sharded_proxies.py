"""Gradients, traffic and initial values of sharded objectives on real ranks, against one process.

Every case of a world size runs in one process group. The reference is an oracle of loops on the
concatenated batch, in float64, with plain autograd.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml_dist.config.objective import LossConfig, ProxyNCAConfig
from dml_dist.config.proxy_losses import ProxiesConfig
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.process_group import init
from dml_dist.partition import part_sizes
from dml_dist.topology import Topology
from tests.distributed.loss_cases import CASES, SEED, Case
from tests.ranks import run_ranks
from tests.unit.test_sampled_negatives import sampled_steps

INPUT, DIM = 6, 4
SHARDED = ProxiesConfig()


class Network(nn.Module):
    """A backbone and a head, with a mask that makes rows of the output zero."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(INPUT, 5), nn.Tanh())
        self.head = nn.Linear(5, DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return embeddings, zero where the mask is."""
        return self.head(self.backbone(x)) * mask


def _batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(case.labels), INPUT, generator=generator, dtype=torch.float64)
    if case.equal_rows:
        x[case.equal_rows[1]] = x[case.equal_rows[0]]
    mask = torch.ones(len(x), 1, dtype=torch.float64)
    mask[list(case.zero_rows)] = 0
    return x, mask, torch.tensor(case.labels)


def _reference(case: Case, network: nn.Module, proxies: Tensor, steps: int) -> dict[str, Any]:
    """Two Adam steps of one process on the whole batch; losses and gradients of the first."""
    table = nn.Parameter(proxies.clone())
    optimizer = torch.optim.Adam([*network.parameters(), table], lr=0.01)
    x, mask, labels = _batch(case)
    losses, grads = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        embeddings = network(x, mask)
        arguments = (embeddings, labels) + ((table,) if len(proxies) else ())
        assert case.oracle is not None
        loss = case.oracle(*arguments, **case.options)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            grads = {name: p.grad.clone() for name, p in network.named_parameters()}
            grads["proxies"] = table.grad.clone() if len(proxies) else None
        optimizer.step()
    return {"losses": losses, "grads": grads, "proxies": table.detach()}


def _table(case: Case, objective: Objective, comm: Comm) -> Tensor:
    """Set what the case wants in this rank's proxies; return the whole initial table."""
    for parameter, low, high, total in objective.owned_parameters().values():
        if case.zero_proxy is not None and low <= case.zero_proxy < high:
            parameter.data[case.zero_proxy - low] = 0
        k = case.proxies_per_class
        sizes = [n * k for n in part_sizes(total // k, comm.world_size)]
        table = comm.all_gather_rows(parameter.detach(), sizes)
        assert len(table) == total
        return table
    for parameter in objective.replicated_parameters().values():
        if case.zero_proxy is not None:
            parameter.data[case.zero_proxy] = 0
        return parameter.detach()
    return torch.empty(0, DIM, dtype=torch.float64)


def _close(actual: Tensor | float, expected: Tensor | float, what: str) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
        msg=lambda text: f"{what}: {text}",
    )


def _check_case(case: Case, comm: Comm, proxies: ProxiesConfig = SHARDED) -> None:
    objective = build_objective(
        case.loss,
        num_classes=case.num_classes,
        embedding_size=DIM,
        seed=SEED,
        comm=comm,
        dtype=torch.float64,
        class_sizes=case.class_sizes,
        proxies=proxies,
    )
    torch.manual_seed(3)
    network = Network().double()
    table = _table(case, objective, comm)
    expected = _reference(case, deepcopy(network), table, steps=2)
    wrapped = DistributedDataParallel(network)
    owned = [rows.parameter for rows in objective.owned_parameters().values()]
    owned += objective.replicated_parameters().values()
    optimizer = torch.optim.Adam([*network.parameters(), *owned], lr=0.01)
    x, mask, labels = _batch(case)
    sizes = part_sizes(len(x), comm.world_size)
    own = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    for step in range(2):
        optimizer.zero_grad()
        before = comm.traffic
        output = objective(wrapped(x[own], mask[own]), labels[own], sizes)
        output.loss.backward()
        objective.sum_replicated_gradients()
        assert comm.traffic - before == objective.traffic(sizes), case.name
        what = f"{case.name}, {proxies.placement}, W={comm.world_size}, step {step}"
        _close(output.loss.item(), expected["losses"][step], f"{what}: loss")
        assert output.statistics["loss"].item() == output.loss.item()
        if step == 0:
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                _close(parameter.grad, expected["grads"][name], f"{what}: {name}")
            for rows in objective.owned_parameters().values():
                reference = expected["grads"]["proxies"][rows.row_low : rows.row_high]
                assert rows.parameter.grad is not None
                _close(rows.parameter.grad, reference, f"{what}: proxies")
            for parameter in objective.replicated_parameters().values():
                assert parameter.grad is not None
                _close(parameter.grad, expected["grads"]["proxies"], f"{what}: proxies")
        optimizer.step()
    for rows in objective.owned_parameters().values():
        reference = expected["proxies"][rows.row_low : rows.row_high]
        _close(rows.parameter.detach(), reference, f"{case.name}: proxies after two steps")
    for parameter in objective.replicated_parameters().values():
        _close(parameter.detach(), expected["proxies"], f"{what}: proxies after two steps")


def _check_replicated(comm: Comm) -> None:
    """Losses that are means over rows have the same results with replicated proxies."""
    replicated = ProxiesConfig(placement="replicated")
    refused = set()
    for case in CASES:
        shape = {"num_classes": case.num_classes, "embedding_size": DIM, "seed": SEED, "comm": comm}
        if refuses(case.loss, proxies=replicated, class_sizes=case.class_sizes, **shape):
            refused.add(case.name)
        else:
            _check_case(case, comm, replicated)
    assert len(CASES) - len(refused) >= 15
    kinds = {case.loss.name for case in CASES if case.name in refused}
    assert kinds >= {"proxy_anchor", "custom", "proxy_nca"}  # Proxy-NCA with weights of classes.


def refuses(loss: LossConfig, **options: Any) -> bool:
    """Whether the objective is refused for its placement of proxies."""
    try:
        build_objective(loss, **options)
    except ConfigError as error:
        return "is no such mean" in str(error)
    return False


def _check_traffic(comm: Comm) -> None:
    """The bytes of a step do not depend on the number of classes, and are as predicted."""
    sizes = part_sizes(5, comm.world_size)
    sent = {}
    for num_classes in (1_000, 1_000_000):
        objective = build_objective(
            ProxyNCAConfig(), num_classes=num_classes, embedding_size=8, seed=0, comm=comm
        )
        embeddings = torch.randn(sizes[comm.rank], 8, requires_grad=True)
        before = comm.traffic
        labels = torch.arange(sizes[comm.rank]) + num_classes // 2 - 1
        objective(embeddings, labels, sizes).loss.backward()
        sent[num_classes] = comm.traffic - before
    planned = build_objective(
        ProxyNCAConfig(),
        num_classes=1_000_000,
        embedding_size=8,
        seed=0,
        comm=Comm.planned(comm.world_size),
    ).traffic(sizes)
    assert sent == {1_000: planned, 1_000_000: planned}
    others, rows = comm.world_size - 1, max(sizes) * comm.world_size
    assert planned.total <= others * rows * (2 * 8 * 4 + 8 + 3 * 2 * 4)


def _check_refusals(comm: Comm) -> None:
    """A bad label of one rank ends all of them alike; more ranks than classes are refused."""
    objective = build_objective(
        ProxyNCAConfig(), num_classes=4, embedding_size=3, seed=0, comm=comm
    )
    sizes = [1] * comm.world_size
    bad = 4 if comm.rank == comm.world_size - 1 else 0
    with pytest.raises(ValueError, match=r"labels are \d \.\. 4, outside the class ids 0 \.\. 3"):
        objective(torch.randn(1, 3), torch.tensor([bad]), sizes)
    if comm.world_size == 3:
        with pytest.raises(TopologyError, match="there are 2 training classes and 3 ranks"):
            build_objective(ProxyNCAConfig(), num_classes=2, embedding_size=3, seed=0, comm=comm)


def _on_rank(topology: Topology) -> list[Tensor]:
    comm = init(topology)
    for case in CASES:
        _check_case(case, comm)
    _check_replicated(comm)
    _check_traffic(comm)
    _check_refusals(comm)
    objective = build_objective(
        ProxyNCAConfig(proxies_per_class=2), num_classes=301, embedding_size=3, seed=9, comm=comm
    )
    tables = [rows.parameter.detach() for rows in objective.owned_parameters().values()]
    return [*tables, sampled_steps(comm)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_objectives_equal_one_process(world_size: int) -> None:
    parts = run_ranks(_on_rank, world_size, timeout=120)
    alone = build_objective(
        ProxyNCAConfig(proxies_per_class=2),
        num_classes=301,
        embedding_size=3,
        seed=9,
        comm=Comm.single(),
    )
    table = torch.cat([part[0] for part in parts])
    assert torch.equal(table, alone.owned_parameters()["proxies"].parameter)
    assert 0.9 < table.norm(dim=1).mean() < 1.1
    _close(torch.cat([part[1] for part in parts]), sampled_steps(Comm.single()), "sampled")


def test_objectives_in_one_process_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same checks through `Comm.single()`, with the network not in DDP."""
    monkeypatch.setitem(globals(), "DistributedDataParallel", lambda network: network)
    _on_rank(Topology())
