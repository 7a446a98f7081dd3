"""Collectives with gradients; their factors are the gradient contract of `parallel/proxies.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.numerics import Merge, Statistics, safe_exp_difference
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.traffic import Traffic

_NEAREST = "nearest proxies"
_NEAREST_ROWS = "rows of nearest proxies"
_MAXIMA = "maxima of loss statistics"
_OWNERS = "owners of maxima"
_SUMS = "sums of loss statistics"
_GRADIENTS = "gradients of replicated parameters"


def gather_rows_of_parts(x: Tensor, sizes: Sequence[int], comm: Comm, *, what: str) -> Tensor:
    """Return all ranks' rows, for a loss of which each rank computes one part.

    The gradient is the sum of the ranks' parts, times W for DDP's mean: one reduce-scatter.

    Args:
        x: This rank's rows, (sizes[rank], D).
        sizes: Rows of each rank.
        comm: The ranks.
        what: Name of the collective in errors.
    """
    if comm.world_size == 1:
        return x
    return _GatherRowsOfParts.apply(x, tuple(sizes), comm, what)


def gather_rows_of_whole(x: Tensor, sizes: Sequence[int], comm: Comm, *, what: str) -> Tensor:
    """Return all ranks' rows, for a loss that each rank computes as a whole.

    Every rank has the whole gradient then: it keeps its own rows, times W for DDP's mean.

    Args:
        x: This rank's rows, (sizes[rank], D).
        sizes: Rows of each rank.
        comm: The ranks.
        what: Name of the collective in errors.
    """
    if comm.world_size == 1:
        return x
    return _GatherRowsOfWhole.apply(x, tuple(sizes), comm, what)


def gather_traffic(
    sizes: Sequence[int], width: int, dtype: torch.dtype, *, what: str, sums_gradients: bool
) -> Traffic:
    """Return what `gather_rows_of_parts` (which sums gradients) or `..._of_whole` sends.

    Args:
        sizes: Rows of each rank.
        width: Columns of a row.
        dtype: Of the rows.
        what: Name of the collective.
        sums_gradients: Whether the ranks' gradients are summed in the backward pass.
    """
    world_size = len(sizes)
    num_bytes = max(sizes) * width * dtype.itemsize
    sent = Traffic.of("all_gather", what, num_bytes, world_size)
    if sums_gradients:
        name = f"gradient of {what}"
        sent += Traffic.of("reduce_scatter", name, world_size * num_bytes, world_size)
    return sent


def times_world_size(x: Tensor, comm: Comm) -> Tensor:
    """Return x, whose gradient is multiplied by W for DDP's mean.

    For rows of this rank that enter its part of a loss without being gathered.
    """
    return x if comm.world_size == 1 else _TimesWorldSize.apply(x, comm.world_size)


def merge_over_ranks(partial: Statistics, merges: Mapping[str, Merge], comm: Comm) -> Statistics:
    """Return the statistics over all ranks' proxy shards, on every rank.

    One all-reduce of maxima and one of sums, whatever the number of statistics (and a second one
    of maxima when a statistic is merged by `max`, to find whose it is: the lowest rank's among
    equals; two of maxima for `argmax`). The backward pass moves nothing: what flows back is the
    derivative of the whole loss by this rank's statistics.

    Args:
        partial: This rank's statistics; the same shapes on every rank.
        merges: The merge of each statistic.
        comm: The ranks.
    """
    if comm.world_size == 1:
        return partial  # One shard's statistics are the total.
    nearest = _argmax_over_ranks(
        {name: partial[name] for name, how in merges.items() if how == "argmax"}, comm
    )
    merges = {name: how for name, how in merges.items() if how != "argmax"}
    if not merges:
        return nearest
    peaks = _peaks_over_ranks(partial, [n for n, how in merges.items() if how != "sum"], comm)
    winners = _winners(partial, peaks, [n for n, how in merges.items() if how == "max"], comm)
    addends: Statistics = {}
    for name, how in merges.items():
        match how:
            case "logsumexp":
                addends[name] = safe_exp_difference(partial[name], peaks[name])
            case "max":
                addends[name] = torch.where(winners[name], partial[name], 0.0)
            case "sum":
                addends[name] = partial[name]
            case "argmax":
                raise AssertionError("merged above")
            case _:
                assert_never(how)
    packed = _SumOverRanks.apply(_pack(addends), comm, _SUMS)
    total = _unpack(packed, addends)
    for name, how in merges.items():
        if how == "logsumexp":
            # At least 1 but where no rank has anything: -inf then, with a gradient of 0.
            positive = total[name].clamp_min(torch.finfo(total[name].dtype).tiny)
            total[name] = peaks[name] + positive.log()
    return {**nearest, **total}


def merge_traffic(
    merges: Mapping[str, Merge], numels: Mapping[str, int], dtype: torch.dtype, world_size: int
) -> Traffic:
    """Return what `merge_over_ranks` sends.

    Args:
        merges: The merge of each statistic.
        numels: Elements of each statistic (`argmax`: of its values alone).
        dtype: Of statistics that are not merged by `argmax`.
        world_size: W.
    """

    def reduced(what: str, names: list[str], dtype: torch.dtype) -> Traffic:
        if not names:
            return Traffic()
        num_bytes = sum(numels[name] for name in names) * dtype.itemsize
        return Traffic.of("all_reduce", what, num_bytes, world_size)

    nearest = [name for name, how in merges.items() if how == "argmax"]
    peaks = [name for name, how in merges.items() if how in ("logsumexp", "max")]
    return (
        reduced(_NEAREST, nearest, torch.float64)
        + reduced(_NEAREST_ROWS, nearest, torch.float64)
        + reduced(_MAXIMA, peaks, dtype)
        + reduced(_OWNERS, [name for name in peaks if merges[name] == "max"], torch.int32)
        + reduced(_SUMS, [name for name in merges if name not in nearest], dtype)
    )


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], comm: Comm) -> None:
    """Replace gradients by their sums over ranks: one all-reduce of all of them, laid end to end.

    Args:
        parameters: Of one dtype; the same shapes on every rank. A missing gradient is zeros.
        comm: The ranks.
    """
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if comm.world_size == 1:
        return
    if len(parameters) == 1:  # Without a copy: it may be a table of replicated proxies.
        only = parameters[0]
        assert only.grad is not None
        only.grad = only.grad.contiguous()
        comm.add_over_ranks_(only.grad, what=_GRADIENTS)
        return
    parts = [parameter.grad.reshape(-1) for parameter in parameters if parameter.grad is not None]
    total = comm.all_reduce_sum(torch.cat(parts), what=_GRADIENTS)
    sizes = [part.numel() for part in parts]
    for parameter, part in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def sum_gradients_traffic(parameters: Sequence[nn.Parameter], comm: Comm) -> Traffic:
    """Return what `sum_gradients` sends."""
    if not parameters:
        return Traffic()
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return Traffic.of("all_reduce", _GRADIENTS, num_bytes, comm.world_size)


@torch.no_grad()
def _argmax_over_ranks(values: Statistics, comm: Comm) -> Statistics:
    """Return largest values and, among equals, the lowest of their rows, each (2, ...)."""
    if not values:
        return {}
    own = {name: value[0] for name, value in values.items()}
    best = _unpack(comm.all_reduce_max(_pack(own), what=_NEAREST), own)
    # Minus the row, so that the lowest one is the largest bid.
    bids = {
        name: torch.where(value[0] == best[name], -value[1], -torch.inf)
        for name, value in values.items()
    }
    rows = _unpack(comm.all_reduce_max(_pack(bids), what=_NEAREST_ROWS), bids)
    return {name: torch.stack([best[name], -rows[name]]) for name in values}


@torch.no_grad()
def _peaks_over_ranks(partial: Statistics, names: list[str], comm: Comm) -> Statistics:
    """Return the maxima over ranks of the named statistics."""
    if not names:
        return {}
    chosen = {name: partial[name] for name in names}
    return _unpack(comm.all_reduce_max(_pack(chosen), what=_MAXIMA), chosen)


@torch.no_grad()
def _winners(partial: Statistics, peaks: Statistics, names: list[str], comm: Comm) -> Statistics:
    """Return where this rank is the lowest one that has the maximum, as booleans."""
    if not names:
        return {}
    bids = {
        name: (partial[name] == peaks[name]).to(torch.int32) * (comm.world_size - comm.rank)
        for name in names
    }
    best = _unpack(comm.all_reduce_max(_pack(bids), what=_OWNERS), bids)
    return {name: best[name] == comm.world_size - comm.rank for name in names}


def _pack(values: Statistics) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def _unpack(packed: Tensor, like: Statistics) -> Statistics:
    parts = packed.split([value.numel() for value in like.values()])
    return {
        name: part.reshape(value.shape)
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm, what: str) -> Tensor:
        return comm.all_reduce_sum(x, what=what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Every rank computes the whole loss of the sum, so its gradient is whole already.
        return grad, None, None


class _GatherRowsOfParts(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], comm: Comm, what: str) -> Tensor:
        ctx.sizes, ctx.comm, ctx.what = sizes, comm, what
        return comm.all_gather_rows(x, sizes, what=what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own = ctx.comm.reduce_scatter_rows(grad, ctx.sizes, what=f"gradient of {ctx.what}")
        return own * ctx.comm.world_size, None, None, None


class _GatherRowsOfWhole(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], comm: Comm, what: str) -> Tensor:
        ctx.sizes, ctx.comm = sizes, comm
        return comm.all_gather_rows(x, sizes, what=what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own = grad.split(ctx.sizes)[ctx.comm.rank]
        return own * ctx.comm.world_size, None, None, None


class _TimesWorldSize(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.world_size, None
