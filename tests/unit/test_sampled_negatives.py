"""Sampled negatives: which classes take part, and that nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from dml_dist.config.nir import NIRConfig
from dml_dist.config.objective import CosFaceConfig
from dml_dist.errors import ConfigError
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.sampling import drawn_classes
from dml_dist.partition import part_sizes
from dml_dist.train.optim_state import only_rows
from tests.oracles_row_losses import cosface_oracle

CLASSES, SEED, SHARE = 23, 5, 0.3
LABELS = [[0, 7, 7, 20, 3], [7, 7, 7, 7, 7], [22, 1, 0, 9, 14], [2, 2, 11, 20, 5]]


def _objective(comm: Comm, **options: Any) -> Objective:
    return build_objective(
        CosFaceConfig(scale=8.0, negatives_share=SHARE),
        num_classes=CLASSES,
        embedding_size=4,
        seed=SEED,
        comm=comm,
        dtype=torch.float64,
        **options,
    )


def _batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(LABELS[step]), 4, generator=generator, dtype=torch.float64)


def sampled_steps(comm: Comm) -> Tensor:
    """Four steps of Adam with weight decay; this rank's rows after them."""
    objective = _objective(comm)
    table = objective.owned_parameters()["proxies"].parameter
    optimizer = Adam([table], lr=0.05, weight_decay=0.1, fused=True)
    for step, labels in enumerate(LABELS):
        sizes = part_sizes(len(labels), comm.world_size)
        own = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
        optimizer.zero_grad()
        x = _batch(step)[own].requires_grad_()
        before = comm.traffic
        objective(x, torch.tensor(labels)[own], sizes, step=step).loss.backward()
        assert comm.traffic - before == objective.traffic(sizes)
        assert table.grad is None
        with only_rows(optimizer, objective.touched_rows().values()):
            optimizer.step()
        assert optimizer.state[table]["step"] == step + 1
    return table.detach()


@pytest.mark.parametrize("kind", ["adam", "momentum", "rmsprop"])
def test_only_rows_that_take_part_move(kind: str) -> None:
    """Against a full table and loops, whose untouched rows and state are put back each step."""

    def optimizer_of(table: Tensor) -> Optimizer:
        match kind:
            case "adam":
                return Adam([table], lr=0.05, weight_decay=0.1)
            case "momentum":
                return SGD([table], lr=0.05, momentum=0.9, weight_decay=0.1)
            case _:
                return RMSprop([table], lr=0.05, momentum=0.9)

    objective = _objective(Comm.single())
    table = objective.owned_parameters()["proxies"].parameter
    optimizer = optimizer_of(table)
    whole = table.detach().clone().requires_grad_()
    reference = optimizer_of(whole)
    moved = torch.zeros(CLASSES, dtype=torch.bool)
    for step, labels in enumerate(LABELS):
        taking_part = drawn_classes(0, CLASSES, SHARE, SEED, step)
        taking_part[labels] = True
        rows = taking_part.nonzero()[:, 0]
        moved |= taking_part
        places = torch.tensor([rows.tolist().index(label) for label in labels])
        reference.zero_grad()
        expected = cosface_oracle(_batch(step), places, whole[rows], scale=8.0)
        expected.backward()
        before = whole.detach().clone()
        states = {k: v.clone() for k, v in reference.state.get(whole, {}).items() if k != "step"}
        reference.step()
        with torch.no_grad():
            whole[~taking_part] = before[~taking_part]
            for key, value in reference.state[whole].items():
                if key != "step":
                    value[~taking_part] = states[key][~taking_part] if states else 0
        optimizer.zero_grad()
        output = objective(_batch(step), torch.tensor(labels), [len(labels)], step=step)
        output.loss.backward()
        with only_rows(optimizer, objective.touched_rows().values()):
            optimizer.step()
        torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(table.detach(), whole.detach(), rtol=1e-12, atol=1e-14)
        for key, value in optimizer.state[table].items():
            torch.testing.assert_close(value, reference.state[whole][key], rtol=1e-12, atol=1e-14)
    assert optimizer.param_groups[0]["params"] == [table]
    assert 0 < moved.sum() < CLASSES, "some rows must never have moved"
    untouched = _objective(Comm.single()).owned_parameters()["proxies"].parameter
    assert torch.equal(table[~moved], untouched[~moved])


def test_draws_are_by_class_step_and_seed() -> None:
    whole = drawn_classes(0, 10_000, 0.25, 3, 7)
    parts = [drawn_classes(low, low + 2_500, 0.25, 3, 7) for low in range(0, 10_000, 2_500)]
    assert torch.equal(torch.cat(parts), whole)
    assert 2_300 < int(whole.sum()) < 2_700
    for other in (drawn_classes(0, 10_000, 0.25, 3, 8), drawn_classes(0, 10_000, 0.25, 4, 7)):
        assert 500 < int((whole & other).sum()) < 750


def test_sampled_negatives_are_refused_under_a_flow() -> None:
    pytest.importorskip("zuko")
    with pytest.raises(ConfigError, match=r"loss\.negatives_share is 0\.3\. Set it to 1"):
        _objective(Comm.single(), nir=NIRConfig())
