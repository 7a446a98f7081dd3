"""Shared numerics: row normalization, precision of products, merging of partial statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, assert_never

import torch
from torch import Tensor

Merge = Literal["logsumexp", "max", "sum", "argmax"]
"""How a statistic of two proxy shards is merged.

`argmax` takes (2, ...) float64 tensors without gradient: values and the table rows they come from.
The larger value wins, ties go to the lower row.
"""

Statistics = dict[str, Tensor]
"""Statistics of a batch over some proxy shards: name -> tensor, same shapes on every shard."""

MIN_NORM = 1e-12
"""Rows with a smaller norm are divided by this instead, so that they stay finite."""

_SOFTPLUS_LINEAR = 50.0


def accurate_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32: losses never run in half precision."""
    found = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if found else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products in true float32 inside the context.

    Overrides the caller's matmul precision and autocast.

    Args:
        device: Device of the products.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def normalize_rows(x_ND: Tensor) -> Tensor:
    """Return x / max(|x|, 1e-12) row by row, (N, D); zero rows stay zero."""
    return torch.nn.functional.normalize(x_ND, dim=1, eps=MIN_NORM)


def nan_unless_finite(loss: Tensor, rows_ND: Tensor) -> Tensor:
    """Return the loss, or NaN where the norm of a row is not finite; waits for no device.

    Comparisons with NaN are false: a miner would leave such rows out, and the loss would be that of
    the others, or 0. A norm that overflows makes normalized rows zero.
    """
    norms_N = torch.linalg.vector_norm(rows_ND.detach(), dim=1)
    return loss.where(norms_N.isfinite().all(), torch.nan)


def empty_loss(*inputs: Tensor) -> Tensor:
    """Return the loss of a batch without rows: 0, with zero gradients for all inputs."""
    dtype = accurate_dtype(*inputs)
    return torch.stack([x.to(dtype).sum() * 0.0 for x in inputs]).sum()


def safe_exp_difference(x: Tensor, reference: Tensor) -> Tensor:
    """Return exp(x - reference), and 0 where x is -inf, even if the reference is -inf as well."""
    return (x - reference.masked_fill(reference == -torch.inf, 0.0)).exp()


def softplus_exact(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)); above 50 it is x, which is exact in float64."""
    return torch.nn.functional.softplus(x, threshold=_SOFTPLUS_LINEAR)


def group_rows(keys_G: Tensor) -> Tensor:
    """Return the group number 0 .. n - 1 of each key, (G,) int64, groups in order of their key."""
    ordered_G, order_G = keys_G.sort(stable=True)
    begins_G = torch.cat([keys_G.new_zeros(1), (ordered_G[1:] != ordered_G[:-1]).to(keys_G.dtype)])
    return torch.empty_like(keys_G).scatter_(0, order_G, begins_G.cumsum(0))


def merge_statistics(a: Statistics, b: Statistics, merges: Mapping[str, Merge]) -> Statistics:
    """Return the statistics over the proxy shards of `a` and `b` together.

    Associative, and commutative except for the gradient of equal maxima, which goes to `a`: pass
    the shard with the lower rows first.

    Args:
        a: Statistics over some shards.
        b: Statistics over other shards, with the same names and shapes.
        merges: The merge of each statistic.
    """
    return {name: _merge(a[name], b[name], how) for name, how in merges.items()}


def _merge(a: Tensor, b: Tensor, how: Merge) -> Tensor:
    match how:
        case "logsumexp":
            # Not logaddexp: its gradient is NaN where both are -inf.
            peak = torch.maximum(a, b).detach()
            total = safe_exp_difference(a, peak) + safe_exp_difference(b, peak)
            return peak + total.clamp_min(torch.finfo(total.dtype).tiny).log()
        case "max":
            return torch.where(a >= b, a, b)
        case "sum":
            return a + b
        case "argmax":
            first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
            return torch.where(first, a, b)
        case _:
            assert_never(how)
