"""What a network draws in training (dropout, stochastic depth): by seed, rank and step alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology
from tests.ranks import run_ranks
from tests.training_setup import SmallRun, small_config

STEPS = 4


class DrawingBackbone(nn.Module):
    """A custom backbone with dropout and stochastic depth, which keeps what it drew."""

    drawn: list[list[float]] = []  # noqa: RUF012  # the run builds the network: shared on purpose

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.layer = nn.Conv2d(3, 8, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(images).relu()
        kept = nn.functional.dropout(torch.ones(64), 0.5, self.training)
        depth = torch.rand(8)  # As torchvision's stochastic depth draws one number per image.
        self.drawn.append([*kept.tolist(), *depth.tolist()])
        return maps


def draws(
    topology: Topology, folder: str, seed: int = 3, fail_at: int | None = None
) -> list[list[float]]:
    """Train; return what the network drew on this rank at each step."""
    backbone = f"{{name: custom, target: '{__name__}:DrawingBackbone'}}"
    config = small_config(
        seed=seed, model__backbone=backbone, train__steps=STEPS, checkpoint__every_steps=2
    )
    comm = Comm.single() if topology.world_size == 1 else Comm.from_default_group()
    DrawingBackbone.drawn.clear()
    run = SmallRun(topology, comm, config, Path(folder), validation=False, fail_at=fail_at)
    if fail_at is not None:
        with pytest.raises(KeyboardInterrupt):
            run.train()
        DrawingBackbone.drawn.clear()
        run.fail_at, run.attempt = None, 2
    run.train(resume=fail_at is not None)
    return list(DrawingBackbone.drawn)


def test_draws_differ_between_ranks_and_steps(tmp_path: Path) -> None:
    ranks = run_ranks(draws, 2, str(tmp_path))
    assert [len(steps) for steps in ranks] == [STEPS, STEPS]
    different = {tuple(drawn) for steps in ranks for drawn in steps}
    assert len(different) == 2 * STEPS


def test_draws_depend_on_the_seed_and_not_on_earlier_draws(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = draws(Topology(), str(tmp_path / "first"))
    torch.manual_seed(1)  # Another program that draws before the run changes nothing.
    assert draws(Topology(), str(tmp_path / "again")) == first
    assert draws(Topology(), str(tmp_path / "cut"), fail_at=3) == first[2:]
    other = draws(Topology(), str(tmp_path / "other"), seed=4)
    assert not {tuple(drawn) for drawn in first} & {tuple(drawn) for drawn in other}
