"""Steps in micro-batches on 1, 2 and 3 ranks: the gradients of the whole batch in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.proximal import ProximalTerm, pulled_parameters
from dml_dist.train.state import TrainState, build_state
from dml_dist.train.step import train_step
from tests.distributed.test_projections import ProjectedRun, projected_config
from tests.distributed.test_training import custom
from tests.ranks import run_ranks
from tests.training_setup import (
    IMAGES_PER_CLASS,
    NUM_CLASSES,
    SmallRun,
    images_of,
    small_config,
    whole_snapshot,
)

HERE = "tests.distributed.test_micro_batches"
SIZES = {1: [10], 2: [7, 3], 3: [6, 1, 3]}
"""Images of each rank: with micro-batches of 3 ranks have other numbers of them."""

ROWS = np.array([0, 1, 7, 20, 30, 2, 8, 21, 22, 12])
"""Classes 0, 0, 1, 4, 6, 0, 1, 4, 4, 2."""


NIR = "{flow: {num_blocks: 2, depth: 2, width: 8}, flow_weight: 0.5, noise: 0.1}"
CASES: dict[str, dict[str, Any]] = {
    "proxy-nca": {},
    "proxy-anchor, nir": {"loss": "{name: proxy_anchor}", "nir": NIR},
    "triplet": {"loss": "{name: triplet, margin: 0.5}"},
    "learnt beta": {"loss": "{name: margin, beta_form: scalar}"},
    "projections": {"loss": "{name: triplet, mining: hard, margin: 0.5}"},
    "half used": {"model__backbone": custom("HalfUsedBackbone")},
    "frozen": {"model__backbone": custom("NormedBackbone", "batch_norm: {statistics: frozen}")},
}


def state_of(topology: Topology, **changes: Any) -> TrainState:
    comm = Comm.single() if topology.world_size == 1 else Comm.from_default_group()
    config = small_config(train__precision="float64", **changes)
    return build_state(config, num_classes=NUM_CLASSES, comm=comm)


def step(state: TrainState, micro_batch_size: int | None, **options: Any) -> float:
    """Make a step of this rank's part of the batch of ROWS; return the loss."""
    sizes = SIZES[state.comm.world_size]
    low = sum(sizes[: state.comm.rank])
    part = slice(low, low + sizes[state.comm.rank])
    output = train_step(
        state,
        images_of(ROWS)[part].double(),
        torch.from_numpy(ROWS // IMAGES_PER_CLASS)[part],
        sizes,
        learning_rate_factor=1.0,
        micro_batch_size=micro_batch_size,
        **{
            name: value[part] if name == "is_representative" else value
            for name, value in options.items()
        },
    )
    assert output.embedding_norms.shape == (sizes[state.comm.rank],)
    return float(output.statistics["loss"])


def gradients(state: TrainState) -> dict[str, Tensor | None]:
    """Return all gradients, those of proxies of all ranks joined; every rank calls this."""
    found = {name: p.grad for name, p in state.model.named_parameters()}
    found |= {name: p.grad for name, p in state.replicated.items()}
    for name, parameter in state.owned.items():
        found[name] = torch.cat(state.comm.gather_objects(parameter.grad))
    return found


def all_gradients(topology: Topology, sizes: tuple[int | None, ...]) -> dict[Any, Any]:
    """Return loss and gradients of every case, by name and size of the micro-batches."""
    found: dict[Any, Any] = {}
    for name, changes in CASES.items():
        for size in sizes:
            state = state_of(topology, **changes)
            options: dict[str, Any] = {}
            if name == "projections":
                pulled = pulled_parameters(state.model).items()
                options = {
                    "is_representative": torch.from_numpy(ROWS % 5 < 2),
                    "neighbors": torch.tensor([[1, 4]] * NUM_CLASSES),
                    "proximal": ProximalTerm({key: p.detach() + 0.1 for key, p in pulled}, 0.3),
                }
            found[name, size] = step(state, size, **options), gradients(state)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_those_of_the_whole_batch(world_size: int) -> None:
    expected = all_gradients(Topology(), (None,))
    for found in run_ranks(all_gradients, world_size, (1, 3, 100)):
        for (name, size), (loss, values) in found.items():
            expected_loss, expected_values = expected[name, None]
            assert loss == pytest.approx(expected_loss, rel=1e-12)
            assert values.keys() == expected_values.keys()
            for key, value in expected_values.items():
                if value is None:
                    assert key.startswith("backbone.unused")
                    assert values[key] is None
                    continue
                assert float(value.abs().max()) > 0
                difference = float((values[key] - value).abs().max())
                assert difference <= 1e-10, (name, size, key, difference)


class DrawingBackbone(nn.Module):
    """Features times factors that depend on draws and on a buffer that each pass changes."""

    factors: list[Tensor] = []  # noqa: RUF012  # the run builds the network: shared on purpose
    replayed: Tensor | None = None
    """Factors to be used instead, without draws."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.layer = nn.Conv2d(3, 8, 3, 2)
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(images).relu()
        if self.replayed is not None:
            return maps * self.replayed
        self.passes.add_(1)
        drawn = F.dropout(torch.ones_like(maps), 0.5, self.training)
        depth = maps.new_empty(len(images), 1, 1, 1).uniform_()  # as stochastic depth draws
        self.factors.append(drawn * depth / self.passes)
        return maps * self.factors[-1]


STEPS = 2


def draw(topology: Topology, size: int) -> dict[str, Any]:
    """Return the factors of each step and gradients of the last one."""
    state = state_of(topology, model__backbone=custom("DrawingBackbone", module=HERE))
    reduced: list[int] = []
    if topology.world_size > 1:
        state.network.register_comm_hook(
            state.comm.group,
            lambda group, bucket: (
                reduced.append(bucket.index()),
                allreduce_hook(group, bucket),
            )[1],
        )
    DrawingBackbone.factors.clear()
    factors = []
    for number in range(STEPS):
        torch.manual_seed(100 * number + topology.rank)
        step(state, size)
        factors.append(list(DrawingBackbone.factors))
        DrawingBackbone.factors.clear()
    passes = float(state.model.backbone.passes)
    return {
        "factors": factors,
        "gradients": gradients(state),
        "passes": passes,
        "reduced": reduced,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_second_pass_draws_what_the_first_drew(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the embeddings which the loss saw: their factors are replayed."""
    ranks = run_ranks(draw, world_size, 3)
    seen: list[list[Tensor]] = [[] for _ in range(STEPS)]
    for rank, found in enumerate(ranks):
        number = -(-SIZES[world_size][rank] // 3)
        for of_step, drawn in zip(seen, found["factors"], strict=True):
            assert len(drawn) == 2 * number
            for first, second in zip(drawn[:number], drawn[number:], strict=True):
                assert torch.equal(first, second)
            of_step += drawn[:number]
        # A step begins with rank 0's buffers and counts a micro-batch once.
        before = -(-SIZES[world_size][0] // 3) * (STEPS - 1)
        assert found["passes"] == before + number
        assert found["reduced"] == ([0] * STEPS if world_size > 1 else [])
    state = state_of(Topology(), model__backbone=custom("DrawingBackbone", module=HERE))
    for of_step in seen:
        monkeypatch.setattr(DrawingBackbone, "replayed", torch.cat(of_step))
        if world_size > 1:
            assert len({float(factor) for factors in of_step for factor in factors[:, 0, 0, 0]}) > 3
        step(state, None)
    expected = gradients(state)
    for found in ranks:
        for key, value in expected.items():
            assert value is not None
            difference = float((found["gradients"][key] - value).abs().max())
            assert difference <= 1e-10, (key, difference)


RUNS: dict[str, dict[str, Any]] = {
    "adam": {"train__max_grad_norm": 0.3},
    "warm-up": {
        "optim": "{name: sgd, lr: 0.05, head_lr: 0.1}",
        "train__backbone_warmup_epochs": 1,
        "model__pooling": "gem",
    },
    "sampled": {"loss": "{name: cosface, negatives_share: 0.5}"},
    "nir": {"loss": "{name: proxy_anchor}", "nir": NIR},
    "projections": {"loss": "{name: triplet}"},
}


def train_all(topology: Topology, root: str, size: int | None) -> dict[str, Any]:
    """Train every configuration for 6 steps; return the ranks' joined results and losses."""
    comm = Comm.single() if topology.world_size == 1 else Comm.from_default_group()
    found: dict[str, Any] = {}
    for name, changes in RUNS.items():
        changes = {
            "train__precision": "float64",
            "train__steps": 6,
            "train__log_every": 1,
            **({} if size is None else {"train__micro_batch_size": size}),
            **changes,
        }
        is_projected = name == "projections"
        config = projected_config("random", **changes) if is_projected else small_config(**changes)
        folder = Path(root) / f"{name}-{topology.world_size}-{size}"
        kind = ProjectedRun if is_projected else SmallRun
        result = kind(topology, comm, config, folder).train()
        comm.barrier()
        losses = [record["loss"] for record in read_records(folder / "steps.jsonl")]
        found[name] = whole_snapshot(result.state), losses
    return found


@pytest.mark.parametrize(("world_size", "size"), [(1, 3), (2, 1), (3, 3)])
def test_runs_end_with_the_weights_of_runs_of_whole_batches(
    tmp_path: Path, world_size: int, size: int
) -> None:
    expected = train_all(Topology(), str(tmp_path), None)
    for found in run_ranks(train_all, world_size, str(tmp_path), size):
        for name, (tensors, losses) in expected.items():
            np.testing.assert_allclose(found[name][1], losses, rtol=1e-9)
            assert found[name][0].keys() == tensors.keys()
            for key, value in tensors.items():
                difference = float((found[name][0][key] - value).abs().max())
                assert difference <= 1e-9, (name, key, difference)
