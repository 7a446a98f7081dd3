"""Moments of a batch: any partition and any merge order give those of the whole."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_dist.models.batch_moments import Moments, finish, merge, pack, partial, unpack


def values_of(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A mean of a million spreads: sums of squares would lose all digits in float32.
    return 1e6 + torch.randn(rows, 3, 4, generator=generator, dtype=torch.float64)


def assert_close(found: Moments, x_NCP: torch.Tensor) -> None:
    mean_C, variance_C, unbiased_C = (value.numpy() for value in finish(found))
    values = x_NCP.permute(1, 0, 2).reshape(3, -1).numpy()
    np.testing.assert_allclose(mean_C, values.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(variance_C, values.var(axis=1), rtol=1e-8)
    np.testing.assert_allclose(unbiased_C, values.var(axis=1, ddof=1), rtol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
)
def test_any_partition_in_any_order(sizes: list[int], order: object, seed: int) -> None:
    x_NCP = values_of(seed, sum(sizes))
    parts = [unpack(pack(partial(part))[0]) for part in x_NCP.split(sizes)]
    assert_close(partial(x_NCP), x_NCP)
    assert_close(reduce(merge, parts), x_NCP)
    while len(parts) > 1:
        order.shuffle(parts)  # type: ignore[attr-defined]
        parts = [merge(parts[0], parts[1]), *parts[2:]]
    assert_close(parts[0], x_NCP)


def test_float32_keeps_the_digits_of_a_large_mean() -> None:
    x_NCP = values_of(0, 500).sub_(1e6 - 1e3).to(torch.float32)
    mean_C, variance_C, _ = finish(partial(x_NCP))
    exact = x_NCP.to(torch.float64)
    torch.testing.assert_close(mean_C, exact.mean(dim=(0, 2)), rtol=1e-12, atol=0)
    expected = exact.var(dim=(0, 2), correction=0)
    torch.testing.assert_close(variance_C, expected, rtol=1e-6, atol=0)
    _, nothing_C, _ = finish(partial(torch.full((4, 3, 5), 1234.567)))
    assert torch.equal(nothing_C, torch.zeros(3, dtype=torch.float64))
