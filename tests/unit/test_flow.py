"""The conditional flow against formulas written out, brute-force Jacobians and its own inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.losses.flow import ConditionalFlow


def make_flow(num_features: int = 6, num_conditions: int = 4, **options: object) -> ConditionalFlow:
    """Return a small flow in float64 whose sub-networks are not near zero."""
    settings = {"num_blocks": 3, "depth": 3, "width": 16, "seed": 0, "dtype": torch.float64}
    flow = ConditionalFlow(num_features, num_conditions, **{**settings, **options})
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= 2.0
    return flow


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))


def written_out(flow: ConditionalFlow, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and log-determinant of one row by the formulas, coordinate by coordinate."""
    state = flow.state_dict()
    log_det = torch.zeros((), dtype=x.dtype)

    def subnet(name: str, values: Tensor) -> Tensor:
        layer = 0
        while f"{name}.{layer}.weight" in state:
            if layer:
                values = values.clamp_min(0.0)
            values = state[f"{name}.{layer}.weight"] @ values + state[f"{name}.{layer}.bias"]
            layer += 2
        return values

    for k in range(len(flow.blocks)):
        x = torch.stack([x[int(i)] for i in state[f"blocks.{k}.permutation"]])
        d1 = {2: 1, 3: 2, 5: 2, 6: 3, 7: 4, 17: 8}[len(x)]
        first, second = x[:d1], x[d1:]
        a = subnet(f"blocks.{k}.subnet2", torch.cat([second, condition]))
        scales = [2.0 * 0.636 * math.atan(float(v)) for v in a[:d1]]
        first = torch.stack([v * math.exp(s) for v, s in zip(first, scales, strict=True)]) + a[d1:]
        log_det = log_det + sum(scales)
        a = subnet(f"blocks.{k}.subnet1", torch.cat([first, condition]))
        rest = len(second)
        scales = [2.0 * 0.636 * math.atan(float(v)) for v in a[:rest]]
        second = torch.stack([v * math.exp(s) for v, s in zip(second, scales, strict=True)])
        second = second + a[rest:]
        log_det = log_det + sum(scales)
        x = torch.cat([first, second])
    return x, log_det


@pytest.mark.parametrize("num_features", [2, 3, 5, 6, 7, 17])
def test_the_formulas(num_features: int) -> None:
    flow = make_flow(num_features)
    x, condition = draw(4, num_features), draw(4, 4, seed=1)
    z, log_det = flow(x, condition)
    for row in range(4):
        expected_z, expected_log_det = written_out(flow, x[row], condition[row])
        torch.testing.assert_close(z[row], expected_z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det[row], expected_log_det, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_features", [2, 7])
def test_log_determinant_is_that_of_the_jacobian(num_features: int) -> None:
    flow = make_flow(num_features)
    x, condition = draw(3, num_features), draw(3, 4, seed=1)
    _, log_det = flow(x, condition)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda value, row=row: flow(value[None], condition[row : row + 1])[0][0], x[row]
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_det[row], expected, rtol=1e-10, atol=1e-10)


def test_inverse() -> None:
    flow = make_flow(9)
    x, condition = draw(20, 9), draw(20, 4, seed=1)
    z, _ = flow(x, condition)
    assert not torch.allclose(z, x)
    torch.testing.assert_close(flow.inverse(z, condition), x, rtol=1e-9, atol=1e-9)


def test_gradients_reach_rows_conditions_and_weights() -> None:
    flow = make_flow(4, 2, num_blocks=2, width=5)
    x, condition = draw(3, 4).requires_grad_(), draw(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(flow, (x, condition))
    z, log_det = flow(x, condition)
    (z.square().sum() - log_det.sum()).backward()
    assert all((p.grad != 0).any() for p in flow.parameters())


def test_sizes_of_the_released_flow() -> None:
    sizes = {
        dim: sum(p.numel() for p in ConditionalFlow(dim, dim, seed=0).parameters())
        for dim in (64, 128, 512)
    }
    assert {dim: round(size / 1e6, 2) for dim, size in sizes.items()} == {
        64: 1.2,
        128: 1.4,
        512: 2.64,
    }


def test_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = make_flow(8)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    two, other = make_flow(8), make_flow(8, seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    permutations = [flow.blocks[0].permutation for flow in (one, other)]
    assert not torch.equal(*permutations)
    assert not torch.equal(one.blocks[0].permutation, one.blocks[1].permutation)


@pytest.mark.parametrize(
    "sizes",
    [{"num_features": 1}, {"num_conditions": 0}, {"num_blocks": 0}, {"depth": 1}, {"width": 0}],
)
def test_invalid_sizes_are_rejected(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a flow needs num_features >= 2"):
        make_flow(**sizes)
