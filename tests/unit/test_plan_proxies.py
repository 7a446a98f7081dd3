"""Tables of proxies in the run plan: spread, classes without images, copies on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dml_dist.config.proxy_losses import ProxiesConfig, ProxyNCAConfig
from dml_dist.errors import ConfigError
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.train.run_plan import resolve
from tests.unit.test_plan import CPU, SIZES, config


@pytest.mark.parametrize("world_size", [1, 2])
def test_proxies_begin_with_their_spread(world_size: int) -> None:
    def proxies(rank: int, initial_std: float | None) -> torch.Tensor:
        comm = cast(Comm, SimpleNamespace(rank=rank, world_size=world_size, device=CPU))
        objective = build_objective(
            ProxyNCAConfig(),
            num_classes=700,
            embedding_size=64,
            seed=0,
            comm=comm,
            proxies=ProxiesConfig(initial_std=initial_std),
        )
        return objective.owned_parameters()["proxies"].parameter

    wide = torch.cat([proxies(rank, 0.5) for rank in range(world_size)])
    assert wide.std().item() == pytest.approx(0.5, rel=0.02)
    default = torch.cat([proxies(rank, None) for rank in range(world_size)])
    assert default.std().item() == pytest.approx(1 / 8, rel=0.02)
    torch.testing.assert_close(wide, 4 * default)


def test_pair_losses_have_no_proxies_to_spread() -> None:
    pairs = config(loss="{name: triplet}", proxies__initial_std=0.1)
    with pytest.raises(ConfigError, match=r"initial_std is 0.1, but loss triplet has no proxies"):
        resolve(pairs, train_class_sizes=SIZES, world_size=1)


def test_tables_of_scaling_studies() -> None:
    """More classes than have images; the whole table on every rank, whose gradients are summed."""
    larger = config(proxies="{num_classes: 1001}")
    plan = resolve(larger, train_class_sizes=SIZES, world_size=2)
    assert (plan.num_classes, plan.proxy_rows) == (len(SIZES), (1000, 1002))  # 2 proxies a class
    changes = {"optim": "{name: adam, proxy_lr: 0.5, loss_lr: 0.1}"}
    replicated = config(proxies="{num_classes: 1001, placement: replicated}", **changes)
    plan = resolve(replicated, train_class_sizes=SIZES, world_size=2)
    assert plan.proxy_rows == (2002, 2002)
    table = 2002 * replicated.model.embedding_size * 4
    assert plan.traffic["objective"].by_kind()["all_reduce"] == table + 4
    assert dict(plan.describe())["learning rates"].endswith(", proxies 0.5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxies": "{num_classes: 2}"}, r"num_classes is 2, but there are \d+ training classes"),
        ({"proxies": "{num_classes: 99}", "loss": "{name: triplet}"}, "triplet has no proxies"),
        (
            {
                "proxies": "{num_classes: 99}",
                "loss": "{name: proxy_nca, class_weighting: inverse_frequency}",
            },
            "both need images of every class",
        ),
        (
            {"proxies": "{placement: replicated}", "loss": "{name: proxy_anchor}"},
            "proxy_anchor as it is set is no such mean",
        ),
        (
            {
                "proxies": "{placement: replicated}",
                "loss": "{name: cosface, negatives_share: 0.5}",
            },
            "cosface as it is set is no such mean",
        ),
    ],
)
def test_tables_that_do_not_fit_the_loss(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(**changes), train_class_sizes=SIZES, world_size=1)
