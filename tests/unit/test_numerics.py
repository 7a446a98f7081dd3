"""Shared numerics of the losses."""

from __future__ import annotations

import torch

from dml_dist.losses.numerics import (
    accurate_dtype,
    merge_statistics,
    normalize_rows,
    safe_exp_difference,
)


def test_accurate_dtype_is_never_half() -> None:
    half, single, double = (
        torch.zeros(1, dtype=t) for t in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert accurate_dtype(half) == torch.float32
    assert accurate_dtype(single, half) == torch.float32
    assert accurate_dtype(single, double) == torch.float64


def test_normalize_rows_keeps_zero_rows_finite() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    unit = normalize_rows(x)
    torch.testing.assert_close(unit[0], torch.tensor([0.6, 0.8]))
    assert unit[1].tolist() == [0, 0]
    unit.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_safe_exp_difference() -> None:
    x = torch.tensor([0.0, -torch.inf, -torch.inf])
    reference = torch.tensor([1.0, 1.0, -torch.inf])
    expected = torch.tensor([torch.e**-1, 0.0, 0.0])
    torch.testing.assert_close(safe_exp_difference(x, reference), expected)


def test_merge_statistics_by_hand() -> None:
    a = {"total": torch.tensor([1.0]), "peak": torch.tensor([1.0]), "lse": torch.tensor([0.0])}
    b = {"total": torch.tensor([2.0]), "peak": torch.tensor([5.0]), "lse": torch.tensor([0.0])}
    merged = merge_statistics(a, b, {"total": "sum", "peak": "max", "lse": "logsumexp"})
    assert merged["total"].item() == 3
    assert merged["peak"].item() == 5
    torch.testing.assert_close(merged["lse"], torch.tensor([2.0]).log())


def test_equal_maxima_give_their_gradient_to_the_lower_shard() -> None:
    a, b = (torch.tensor([2.0], requires_grad=True) for _ in range(2))
    merge_statistics({"peak": a}, {"peak": b}, {"peak": "max"})["peak"].backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.item(), b.grad.item()) == (1, 0)
