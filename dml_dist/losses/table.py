"""Losses of pairs between the global batch and all rows of a sharded table of representatives.

The table holds M rows for each of C classes: embeddings of training images, the representatives.
The rows of an image's own class are its positives, all other rows its negatives, so that every
image meets every class at each step. Distances, options and reductions are those of the losses
over pairs (`losses/pairs.py`); an anchor is a row of the batch.

A row whose image row is -1 is missing and counts nowhere: its class has fewer than M images. An
image's own row is no positive of it.

Like the losses over proxies these are row forms, `partial -> merge -> finish` over shards of whole
classes. A shard's negatives are processed in chunks of table rows, of which one is in memory at a
time; the few positives are taken from the table beforehand, with exact distances.

Shape legend: G rows of the global batch, D embedding size, L table rows of this shard, c rows of a
chunk, M rows a class, Q rows of the batch whose class this shard holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import Merge, Statistics, merge_statistics, normalize_rows
from dml_dist.losses.pairs import AnchorLoss

MISSING = -1
"""Image row of a missing table row."""

_LIVE_TENSORS = 14
"""Upper bound on the (G, c) tensors of a chunk and its backward pass."""

_LIVE_ROWS = 6
"""Upper bound on its (c, D) tensors."""


@dataclass(frozen=True, eq=False)
class TableBatch:
    """The global batch, one shard of the table, and the batch's positives in it.

    Attributes:
        queries_GD: Normalized embeddings of the batch.
        labels_G: Their classes, int64.
        rows_LD: The shard's rows, of any length.
        classes_L: Their classes, int64.
        present_L: Which of them are not missing, bool.
        held_Q: The rows of the batch whose class is in this shard, int64.
        own_QMD: Normalized rows of their classes.
        positive_QM: Which of these are positives: neither missing nor of the same image, bool.
    """

    queries_GD: Tensor
    labels_G: Tensor
    rows_LD: Tensor
    classes_L: Tensor
    present_L: Tensor
    held_Q: Tensor
    own_QMD: Tensor
    positive_QM: Tensor

    def negatives(self, low: int, high: int) -> Tensor:
        """Return which rows of a chunk are negatives of which rows of the batch, (G, c) bool."""
        other_Gc = self.labels_G[:, None] != self.classes_L[low:high]
        return other_Gc.logical_and_(self.present_L[low:high])

    def own_distances(self) -> Tensor:
        """Return |x_i - p_im| in the exact form, (Q, M); the gradient is 0 at distance 0."""
        queries_QD = self.queries_GD.index_select(0, self.held_Q)
        return exact_distances(queries_QD[:, None], self.own_QMD)[:, 0]

    def own_cosines(self) -> Tensor:
        """Return x_i . p_im, each summed by itself, (Q, M)."""
        queries_QD = self.queries_GD.index_select(0, self.held_Q)
        return (queries_QD[:, None] * self.own_QMD).sum(dim=2)

    def of_all(self, own_QM: Tensor) -> Tensor:
        """Return values of `held_Q` as (G, M), with 0 for the other rows of the batch."""
        size = len(self.labels_G), own_QM.shape[1]
        return own_QM.new_zeros(size).index_copy(0, self.held_Q, own_QM)


def table_batch(
    embeddings_GD: Tensor,
    labels_G: Tensor,
    images_G: Tensor,
    rows_LD: Tensor,
    images_L: Tensor,
    shard: ProxyShard,
) -> TableBatch:
    """Return the batch and one shard of the table, prepared for the losses.

    Args:
        embeddings_GD: Embeddings, of any length, float32 or float64.
        labels_G: Their classes, int64.
        images_G: Their image rows, int64 >= 0.
        rows_LD: The shard's rows, of any length and the same dtype.
        images_L: Their image rows, int64; -1 for missing rows.
        shard: The classes of the shard, M rows each.
    """
    m, device = shard.proxies_per_class, labels_G.device
    held_Q = ((labels_G >= shard.low_class) & (labels_G < shard.high_class)).nonzero()[:, 0]
    own_QM = (labels_G[held_Q, None] - shard.low_class) * m + torch.arange(m, device=device)
    own_ND, rows_LD = take_rows(rows_LD, own_QM.reshape(-1))
    own_images_QM = images_L[own_QM]
    classes_L = torch.arange(shard.low_class, shard.high_class, device=device)
    return TableBatch(
        normalize_rows(embeddings_GD),
        labels_G,
        rows_LD,
        classes_L.repeat_interleave(m),
        images_L != MISSING,
        held_Q,
        normalize_rows(own_ND).view(*own_QM.shape, rows_LD.shape[1]),
        (own_images_QM != MISSING) & (own_images_QM != images_G[held_Q, None]),
    )


# ---------------- the form of a loss


@dataclass(frozen=True)
class TableRound:
    """One round of partial and merge, as `losses/forms.py: Round` for losses over proxies.

    Attributes:
        merges: This round's statistics by name, each with its merge.
        partial: From the batch and the statistics of earlier rounds over all shards, detached, to
            this round's statistics over one shard.
        widths: Names of the statistics of all rows of the batch, each with its number of values a
            row; the others are 0-d.
    """

    merges: Mapping[str, Merge]
    partial: Callable[[TableBatch, Statistics], Statistics]
    widths: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class TableLoss(Protocol):
    """A loss between the batch and a table of representatives."""

    @property
    def loss(self) -> AnchorLoss:
        """The same loss over the pairs of the batch."""

    def rounds(self, rows_per_class: int) -> tuple[TableRound, ...]:
        """Return the rounds in order for M rows a class; a name occurs in one round only."""

    def finish(self, total: Statistics) -> Tensor:
        """Return the loss, a 0-d tensor, from the statistics of all rounds over all shards."""

    def statistics(self, total: Statistics) -> Statistics:
        """Return 0-d tensors to be recorded with the loss."""


# ---------------- rows of the table


def exact_distances(a_NAD: Tensor, b_NBD: Tensor) -> Tensor:
    """Return distances by differences, (N, A, B): bits depend on the two rows alone."""
    return torch.cdist(a_NAD, b_NBD, compute_mode="donot_use_mm_for_euclid_dist")


def take_rows(rows_LD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return some rows, (N, D), and the table, to be used in place of `rows_LD` from then on.

    The gradient of the taken rows is added into that of the table: one (L, D) tensor, not two.
    """
    taken_ND, table_LD = _TakeRows.apply(rows_LD, index_N)
    return taken_ND, table_LD


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, rows_LD: Tensor, index_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index_N)
        ctx.shape = rows_LD.shape
        ctx.set_materialize_grads(False)
        return rows_LD.index_select(0, index_N), rows_LD.view_as(rows_LD)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_ND: Tensor | None, grad_LD: Tensor | None
    ) -> tuple[Tensor | None, None]:
        (index_N,) = ctx.saved_tensors
        if grad_ND is None:
            return grad_LD, None
        if grad_LD is None:
            grad_LD = grad_ND.new_zeros(ctx.shape)
        # In place: nothing else holds the gradient that a loss below made for this table.
        return grad_LD.index_add_(0, index_N, grad_ND), None


# ---------------- chunks of the table's rows

OfChunk = Callable[[Tensor, Tensor, Tensor], Statistics]
"""(queries (G, D), normalized rows (c, D), negatives (G, c) bool) -> the chunk's statistics."""


def rows_per_chunk(queries_GD: Tensor, memory_mb: float) -> int:
    """Return the table rows of a chunk whose tensors fit into `memory_mb`."""
    num_queries, size = queries_GD.shape
    per_row = (_LIVE_TENSORS * num_queries + _LIVE_ROWS * size) * queries_GD.element_size()
    return max(1, int(memory_mb * 2**20 / max(1, per_row)))


def sum_over_chunks(
    of_chunk: OfChunk, batch: TableBatch, names: Sequence[str], memory_mb: float
) -> Statistics:
    """Return statistics that add up over chunks of the table, of which the first has a gradient.

    The gradient of a 0-d sum is a scalar factor, so that of batch and table is computed chunk by
    chunk in the forward pass, and only scaled in the backward pass.

    Args:
        of_chunk: Returns the first statistic as a 0-d sum, differentiable, and the others.
        batch: The batch and the shard.
        names: Names of the statistics, in the order of `of_chunk`.
        memory_mb: Bound on the memory of a chunk in MiB.
    """
    step = rows_per_chunk(batch.queries_GD, memory_mb)
    totals = _SumOverChunks.apply(of_chunk, batch, step, batch.queries_GD, batch.rows_LD)
    return dict(zip(names, totals, strict=True))


def merge_over_chunks(
    of_chunk: OfChunk, batch: TableBatch, merges: Mapping[str, Merge], memory_mb: float
) -> Statistics:
    """Return statistics merged over chunks of the table; the backward pass computes them again.

    Args:
        of_chunk: Returns the statistics in the order of `merges`; those merged by `max` have no
            gradient.
        batch: The batch and the shard.
        merges: The merge of each statistic.
        memory_mb: Bound on the memory of a chunk in MiB.
    """
    step = rows_per_chunk(batch.queries_GD, memory_mb)
    kinds = tuple(merges.values())
    stacked = _EveryChunk.apply(of_chunk, batch, step, kinds, batch.queries_GD, batch.rows_LD)
    chunks = [
        dict(zip(merges, values, strict=True))
        for values in zip(*(of_all.unbind() for of_all in stacked), strict=True)
    ]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = merge_statistics(total, chunk, merges)
    return total


def chunk_bounds(num_rows: int, step: int) -> list[tuple[int, int]]:
    """Return the bounds of all chunks of `step` rows, in order."""
    return [(low, min(num_rows, low + step)) for low in range(0, num_rows, step)]


class _SumOverChunks(Function):
    @staticmethod
    def forward(
        ctx: Any, of_chunk: OfChunk, batch: TableBatch, step: int, queries: Tensor, rows: Tensor
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[3:]
        leaf = queries.detach().requires_grad_(needs[0])
        grad_LD = torch.empty_like(rows) if needs[1] else None
        totals: list[Tensor] = []
        for low, high in chunk_bounds(len(rows), step):
            with torch.set_grad_enabled(any(needs)):
                chunk = rows[low:high].detach().requires_grad_(needs[1])
                unit = normalize_rows(chunk)
                found = list(of_chunk(leaf, unit, batch.negatives(low, high)).values())
            if any(needs):
                found[0].backward()
            if grad_LD is not None:
                assert chunk.grad is not None
                grad_LD[low:high] = chunk.grad
            found = [value.detach() for value in found]
            pairs = zip(totals, found, strict=True)
            totals = [total + value for total, value in pairs] if totals else found
        ctx.grads = leaf.grad, grad_LD
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, ()
        assert grads, "a second backward pass needs a second forward pass"
        # In place: a copy would be a second table.
        return (None, None, None, *(None if value is None else value.mul_(grad) for value in grads))


class _EveryChunk(Function):
    """The statistics of every chunk, (number of chunks, ...) each."""

    @staticmethod
    def forward(
        ctx: Any,
        of_chunk: OfChunk,
        batch: TableBatch,
        step: int,
        kinds: tuple[Merge, ...],
        queries: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, ...]:
        found = []
        for low, high in chunk_bounds(len(rows), step):
            unit = normalize_rows(rows[low:high])
            found.append(tuple(of_chunk(queries, unit, batch.negatives(low, high)).values()))
        stacked = tuple(torch.stack(values) for values in zip(*found, strict=True))
        ctx.save_for_backward(queries, rows)
        ctx.of_chunk, ctx.batch, ctx.step = of_chunk, batch, step
        ctx.differentiable = [kind != "max" for kind in kinds]
        pairs = zip(stacked, ctx.differentiable, strict=True)
        ctx.mark_non_differentiable(*(values for values, yes in pairs if not yes))
        return stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, rows = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        leaf = queries.detach().requires_grad_(needs[0])
        grad_LD = torch.empty_like(rows) if needs[1] else None
        for number, (low, high) in enumerate(chunk_bounds(len(rows), ctx.step)):
            with torch.enable_grad():
                chunk = rows[low:high].detach().requires_grad_(needs[1])
                negatives = ctx.batch.negatives(low, high)
                found = ctx.of_chunk(leaf, normalize_rows(chunk), negatives).values()
            chosen = [
                (value, grad[number])
                for value, grad, yes in zip(found, grads, ctx.differentiable, strict=True)
                if yes
            ]
            torch.autograd.backward([v for v, _ in chosen], [g for _, g in chosen])
            if grad_LD is not None:
                assert chunk.grad is not None
                grad_LD[low:high] = chunk.grad
        return None, None, None, None, leaf.grad, grad_LD
