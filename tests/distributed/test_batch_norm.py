"""Synchronised batch normalisation: one rank's part of the batch gives the whole batch's values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dml_dist.errors import ConfigError
from dml_dist.parallel.batch_norm import (
    SynchronizedBatchNorm,
    batch_norm_traffic,
    synchronize_batch_norm,
)
from dml_dist.parallel.comm import Comm
from dml_dist.partition import part_bounds
from dml_dist.topology import Topology
from tests.ranks import run_ranks

NUM_IMAGES = 7  # parts of 3 and 4, of 2, 2 and 3
SHAPES = {"2d": (5, 4, 3), "1d": (5, 6), "vectors": (5,)}


class ForeignNorm(nn.BatchNorm2d):
    """A layer that may do something else."""


def layer_of(name: str, options: dict[str, Any]) -> nn.Module:
    kind = nn.BatchNorm2d if name == "2d" else nn.BatchNorm1d
    layer = kind(5, **options).double()
    if layer.affine:
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            parameter.data.normal_(generator=generator)
    return layer


def batch_of(name: str, step: int) -> tuple[Tensor, Tensor]:
    """Return inputs far from zero against their spread, and weights of a loss."""
    generator = torch.Generator().manual_seed(step)
    shape = (NUM_IMAGES, *SHAPES[name])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 50.0 + x, torch.randn(shape, generator=generator, dtype=torch.float64)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mean of all batches": {"momentum": None, "eps": 1e-3},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
}


def pass_batches(layer: nn.Module, name: str, low: int, high: int) -> dict[str, Tensor]:
    """Return outputs, gradients and running statistics over two steps, and the evaluation."""
    found: dict[str, Tensor] = {}
    for step in range(2):
        x, weights = (values[low:high] for values in batch_of(name, step))
        x.requires_grad_()
        y = layer(x)
        layer.zero_grad()
        # A loss that is no sum over rows, so that the gradient is not constant.
        (weights * y.square()).sum().backward()
        assert x.grad is not None
        found |= {f"rows y {step}": y.detach(), f"rows dx {step}": x.grad}
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None
            found[f"sum {key} {step}"] = parameter.grad.clone()
        for key, buffer in layer.named_buffers():
            found[f"same {key} {step}"] = buffer.clone()
    if layer.track_running_stats:
        found["rows eval"] = layer.eval()(batch_of(name, 2)[0][low:high]).detach()
    return found


def pass_part(topology: Topology) -> dict[str, Any]:
    comm = Comm.from_default_group()
    low, high = part_bounds(NUM_IMAGES, topology.world_size, topology.rank)
    results: dict[str, Any] = {}
    for name in SHAPES:
        for case, options in CASES.items():
            plain = layer_of(name, options)
            layer = SynchronizedBatchNorm(plain, comm)
            assert layer.state_dict().keys() == plain.state_dict().keys()
            results[f"{name} {case}"] = pass_batches(layer, name, low, high)
    before = comm.traffic
    layer = SynchronizedBatchNorm(layer_of("2d", {}), comm)
    layer(batch_of("2d", 0)[0][low:high].requires_grad_()).sum().backward()
    results["traffic"] = comm.traffic - before
    with pytest.raises(ConfigError, match="at least 2 values of each channel"):
        SynchronizedBatchNorm(nn.BatchNorm1d(5), _Alone(comm))(torch.zeros(1, 5))
    results["converted"] = converted(comm)
    return results


class _Alone(Comm):
    """One rank's view of a group of one."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(None)


def converted(comm: Comm) -> list[str]:
    inner = nn.Sequential(nn.BatchNorm2d(3), nn.GroupNorm(1, 3))
    network = nn.Sequential(nn.Conv2d(3, 3, 1), inner, nn.BatchNorm1d(3))
    weight = inner[0].weight
    result = synchronize_batch_norm(network, comm)
    assert inner[0].weight is weight
    if comm.world_size > 1:
        with pytest.raises(ConfigError, match=r"got ForeignNorm at 1; use those, or batch_norm"):
            synchronize_batch_norm(nn.Sequential(nn.ReLU(), ForeignNorm(3)), comm)
    return [type(layer).__name__ for layer in result.modules()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_count_gives_what_the_whole_batch_gives(world_size: int) -> None:
    ranks = run_ranks(pass_part, world_size)
    for name in SHAPES:
        for case, options in CASES.items():
            expected = pass_batches(layer_of(name, options), name, 0, NUM_IMAGES)
            parts = [found[f"{name} {case}"] for found in ranks]
            for key, value in expected.items():
                each = [part[key] for part in parts]
                if key.startswith("same"):
                    assert all(torch.equal(other, each[0]) for other in each)
                    found = each[0]
                else:
                    found = torch.cat(each) if key.startswith("rows") else sum(each)
                difference = float((found - value).abs().max())
                assert difference <= 1e-10, (name, case, key, difference)
            assert parts[0].keys() == expected.keys()
    for found in ranks:
        assert found["traffic"] == batch_norm_traffic(5, world_size, torch.float64)
        names = ["Sequential", "Conv2d", "Sequential", "BatchNorm2d", "GroupNorm", "BatchNorm1d"]
        if world_size > 1:
            names = [n if "BatchNorm" not in n else "SynchronizedBatchNorm" for n in names]
        assert found["converted"] == names


def test_gradients_of_one_rank_by_differences() -> None:
    layer = SynchronizedBatchNorm(layer_of("2d", {}), Comm.single())
    x = batch_of("2d", 0)[0][:3, :, :2, :1].clone().requires_grad_()
    layer.track_running_stats = False
    assert torch.autograd.gradcheck(layer, (x,))


def test_half_precision_is_summed_in_float32() -> None:
    x = (100 + torch.randn(8, 5, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    layer = SynchronizedBatchNorm(nn.BatchNorm2d(5), Comm.single())
    expected = nn.BatchNorm2d(5)(x.float())
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.02)
