"""Rows of a class table that is sharded over ranks, fetched by every rank, with gradients.

Under the gradient contract of `parallel/proxies.py` a table's row has one owner, who gets the plain
sum of its gradients: nothing computed from fetched rows is multiplied by W. Which sum that
is depends on what each rank computes from them:

    parts   each rank computes its own part of the loss (its rows of the batch), and the parts add
            up to the loss: the parts' gradients are summed over ranks, one all-reduce
    whole   every rank computes the whole loss: each has the whole gradient, nothing moves

Shape legend: G ids, D columns, L rows that this rank owns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.parallel.comm import Comm
from dml_dist.parallel.traffic import Traffic

Use = Literal["parts", "whole"]
"""What each rank computes from fetched rows: one part of the loss, or the whole of it."""


def fetch_rows(
    table_rows_LD: Tensor,
    ids_G: Tensor,
    row_low: int,
    row_high: int,
    comm: Comm,
    *,
    use: Use = "parts",
    what: str = "rows of a table",
) -> Tensor:
    """Return the rows of all ids on every rank, (G, D); a collective, called by every rank.

    One all-reduce of (G, D) forwards and, for `parts`, one backwards: the traffic does not depend
    on the size of the table.

    Args:
        table_rows_LD: This rank's rows, (row_high - row_low, D), float.
        ids_G: Rows of the whole table, (G,) int64, the same on every rank; they may repeat.
        row_low: The whole table's row that is row 0 here.
        row_high: One past the whole table's last row here.
        comm: The ranks.
        use: What each rank computes from the result.
        what: Name of the collective in errors.

    Raises:
        ValueError: If the table's shape does not fit its bounds.
    """
    if table_rows_LD.ndim != 2 or len(table_rows_LD) != row_high - row_low:
        raise ValueError(
            f"{what}: this rank owns rows {row_low} to {row_high - 1}, but was given a tensor of "
            f"shape {tuple(table_rows_LD.shape)}. Pass a matrix with one row for each."
        )
    rows: Tensor = _FetchRows.apply(table_rows_LD, ids_G, row_low, comm, use == "parts", what)
    return rows


def fetch_traffic(
    num_ids: int,
    width: int,
    dtype: torch.dtype,
    world_size: int,
    *,
    what: str,
    sums_gradients: bool = True,
) -> Traffic:
    """Return what `fetch_rows` sends.

    Args:
        num_ids: G.
        width: D.
        dtype: Of the table.
        world_size: W.
        what: Name of the collective.
        sums_gradients: Whether gradients flow back, and ranks compute parts.
    """
    num_bytes = num_ids * width * dtype.itemsize
    sent = Traffic.of("all_reduce", what, num_bytes, world_size)
    if sums_gradients:
        sent += Traffic.of("all_reduce", f"gradient of {what}", num_bytes, world_size)
    return sent


class _FetchRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        table_rows_LD: Tensor,
        ids_G: Tensor,
        row_low: int,
        comm: Comm,
        sums_parts: bool,
        what: str,
    ) -> Tensor:
        place_G = ids_G - row_low
        own_G = (place_G >= 0) & (place_G < len(table_rows_LD))
        # In the backward pass other ranks' ids add to a row behind the table, which is cut off.
        place_G = torch.where(own_G, place_G, len(table_rows_LD))
        rows_GD = table_rows_LD.new_zeros((len(ids_G), table_rows_LD.shape[1]))
        rows_GD[own_G] = table_rows_LD[place_G[own_G]]
        ctx.save_for_backward(place_G)
        ctx.comm, ctx.sums_parts, ctx.what = comm, sums_parts, what
        ctx.num_rows = len(table_rows_LD)
        return comm.all_reduce_sum(rows_GD, what=what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (place_G,) = ctx.saved_tensors
        if ctx.sums_parts:
            grad_GD = ctx.comm.all_reduce_sum(grad_GD, what=f"gradient of {ctx.what}")
        grad_LD = grad_GD.new_zeros((ctx.num_rows + 1, grad_GD.shape[1]))
        grad_LD.index_add_(0, place_G, grad_GD)
        return grad_LD[:-1], None, None, None, None, None
