"""What every loss over the global batch offers: loss, owned and shared parameters, traffic.

The gradients follow the contract at the top of `parallel/proxies.py`.

Shape legend: B rows of this rank, G rows of the global batch, D embedding size, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dml_dist.errors import ConfigError
from dml_dist.losses.numerics import empty_loss, nan_unless_finite
from dml_dist.losses.one_process import check_labels
from dml_dist.parallel.collectives import (
    gather_rows_of_parts,
    gather_rows_of_whole,
    gather_traffic,
    sum_gradients,
    sum_gradients_traffic,
)
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.traffic import Traffic

EMBEDDINGS = "embeddings of the global batch"
"""Name of that collective in errors."""

_LABELS = "labels of the global batch"
_REPRESENTATIVES = "representatives of the global batch"
_IMAGE_ROWS = "image rows of the global batch"


@dataclass(frozen=True, eq=False)
class ObjectiveOutput:
    """What an objective returns for one step.

    Attributes:
        loss: The loss of the global batch, 0-d, the same value on every rank; its backward pass
            gives gradients by the contract above.
        statistics: Detached 0-d tensors to be recorded, the same on every rank; with `loss`.
    """

    loss: Tensor
    statistics: dict[str, Tensor]


class OwnedRows(NamedTuple):
    """Rows of a table that this rank alone owns: optimised and saved here, not seen by DDP."""

    parameter: nn.Parameter
    row_low: int
    row_high: int
    num_rows_total: int


class TouchedRows(NamedTuple):
    """The rows of an owned parameter that one step updates; the others stay as they are.

    `values` is a leaf with the rows' gradient, (n, ...); `rows` are theirs in the parameter, (n,).
    """

    parameter: nn.Parameter
    rows: Tensor
    values: Tensor


class OwnedBuffer(NamedTuple):
    """Rows of values that this rank alone owns: saved here, not optimised."""

    values: Tensor
    row_low: int
    row_high: int
    num_rows_total: int


@dataclass(frozen=True, eq=False)
class GlobalBatch:
    """The gathered batch of a step, the same on every rank but for `embeddings_BD`.

    Attributes:
        embeddings_BD: This rank's embeddings, (B, D), as the network gave them.
        embeddings_GD: The embeddings of all ranks, (G, D), in the objective's dtype.
        labels_G: Class ids of all rows, (G,) int64.
        sizes: Rows of each rank.
        step: Updates made so far; seeds what a loss draws.
        is_representative_G: Which rows are representatives of their classes, (G,) bool; None when
            pairs of all rows count.
        neighbors_Ch: Hard class mining: the nearest classes of every class, (C, h) int64, -1 for
            none; None without it.
        image_rows_G: Index row of every image, (G,) int64, if the objective needs it.
    """

    embeddings_BD: Tensor
    embeddings_GD: Tensor
    labels_G: Tensor
    sizes: Sequence[int]
    step: int = 0
    is_representative_G: Tensor | None = None
    neighbors_Ch: Tensor | None = None
    image_rows_G: Tensor | None = None

    def part(self, rank: int) -> slice:
        """Return the rows of a rank."""
        low = sum(self.sizes[:rank])
        return slice(low, low + self.sizes[rank])


class Objective(nn.Module):
    """The loss of the global batch as a function of this rank's rows. Never wrapped in DDP.

    `forward` is `gather` followed by `global_loss`.

    Attributes:
        num_classes: C.
        embedding_size: D.
        dtype: float32 or float64; embeddings are cast to it.
        comm: The ranks.
        computes_whole: Whether each rank computes the whole loss, not one part of it: its gradient
            for the gathered embeddings is whole then.
        gathers_embeddings: Whether the loss needs the embeddings of all ranks.
        needs_image_rows: Whether each row of the batch must be given with that of its image.
    """

    computes_whole = False
    gathers_embeddings = True
    needs_image_rows = False

    def __init__(
        self, *, num_classes: int, embedding_size: int, comm: Comm, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.comm = comm
        self.dtype = dtype

    def forward(
        self,
        embeddings_BD: Tensor,
        labels_B: Tensor,
        batch_sizes: Sequence[int],
        *,
        step: int = 0,
        is_representative_B: Tensor | None = None,
        neighbors_Ch: Tensor | None = None,
        image_rows_B: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the loss of the global batch; a collective, called by every rank.

        Args:
            embeddings_BD: This rank's embeddings, (B, D), not normalised, of any float dtype.
            labels_B: Their class ids, (B,) int64, 0 .. num_classes - 1.
            batch_sizes: Rows of each rank, the same on every rank; batch_sizes[rank] = B.
            step: Updates made so far, the same on every rank; seeds what a loss draws.
            is_representative_B: Which of the rows are representatives, (B,) bool: a loss of pairs
                or triplets counts those that hold one. None counts all, on every rank.
            neighbors_Ch: Nearest classes of every class from hard class mining, (C, h) int64, -1
                for none, the same on every rank: a loss of pairs or triplets then records which of
                the mined negatives violate its margin.
            image_rows_B: Index rows of the images, (B,) int64; ignored unless `needs_image_rows`.

        Raises:
            ValueError: If shapes or class ids do not fit, or image rows are missing; class ids on
                every rank alike.
        """
        batch = self.gather(
            embeddings_BD,
            labels_B,
            batch_sizes,
            step=step,
            is_representative_B=is_representative_B,
            neighbors_Ch=neighbors_Ch,
            image_rows_B=image_rows_B,
        )
        return self.global_loss(batch)

    def gather(
        self,
        embeddings_BD: Tensor,
        labels_B: Tensor,
        batch_sizes: Sequence[int],
        *,
        step: int = 0,
        is_representative_B: Tensor | None = None,
        neighbors_Ch: Tensor | None = None,
        image_rows_B: Tensor | None = None,
    ) -> GlobalBatch:
        """Return the rows of all ranks; a collective. Arguments and errors are `forward`'s."""
        check_labels(labels_B, embeddings_BD.shape[0], None)
        labels_G = self.comm.all_gather_rows(labels_B, batch_sizes, what=_LABELS)
        # After the gather, so that one rank's bad label ends all ranks alike.
        check_labels(labels_G, sum(batch_sizes), self.num_classes)
        representatives_G = None
        if is_representative_B is not None:
            representatives_G = self.comm.all_gather_rows(
                is_representative_B, batch_sizes, what=_REPRESENTATIVES
            )
        image_rows_G = None
        if self.needs_image_rows:
            if image_rows_B is None:
                raise ValueError(
                    f"{type(self).__name__} tells images of the batch from those of its table by "
                    "their index rows, but image_rows_B is None. Pass them on every rank."
                )
            image_rows_G = self.comm.all_gather_rows(image_rows_B, batch_sizes, what=_IMAGE_ROWS)
        embeddings_GD = embeddings_BD.to(self.dtype)
        if self.gathers_embeddings:
            gather_rows = gather_rows_of_whole if self.computes_whole else gather_rows_of_parts
            embeddings_GD = gather_rows(embeddings_GD, batch_sizes, self.comm, what=EMBEDDINGS)
        return GlobalBatch(
            embeddings_BD,
            embeddings_GD,
            labels_G,
            batch_sizes,
            step,
            representatives_G,
            neighbors_Ch,
            image_rows_G,
        )

    def global_loss(self, batch: GlobalBatch) -> ObjectiveOutput:
        """Return the loss of a gathered batch; a collective, called by every rank.

        It is 0 for a batch without rows, and NaN where an embedding is not finite.
        """
        labels_G = batch.labels_G
        if not len(labels_G):
            loss = empty_loss(batch.embeddings_GD)
            return ObjectiveOutput(loss, {"loss": loss.detach()})
        with torch.autocast(labels_G.device.type, enabled=False):
            output = self._output(batch)
        if not isinstance(output.loss, Tensor) or output.loss.ndim:
            raise ConfigError(
                f"The loss returned {_describe(output.loss)} for a batch, but must return a 0-d "
                "tensor, the mean over the batch. Change the custom loss."
            )
        # Every rank has all embeddings, so all ranks agree.
        loss = nan_unless_finite(output.loss, batch.embeddings_GD)
        if labels_G.device.type != "cpu":
            # Reading labels would wait for the device: a wrong one makes the loss NaN instead.
            valid = ((labels_G >= 0) & (labels_G < self.num_classes)).all()
            loss = loss.where(valid, torch.nan)
        return ObjectiveOutput(loss, {"loss": loss.detach(), **output.statistics})

    def traffic(
        self, batch_sizes: Sequence[int], *, representatives: bool = False, mined: bool = False
    ) -> Traffic:
        """Return what each rank sends in a step, forward and backward, as `Comm.traffic` counts it.

        It follows from shapes alone and needs no process group (`Comm.planned`).

        Args:
            batch_sizes: Rows of each rank.
            representatives: Whether `is_representative_B` is given.
            mined: Whether `neighbors_Ch` is given.
        """
        world_size = len(batch_sizes)
        assert world_size == self.comm.world_size
        sent = gather_traffic(batch_sizes, 1, torch.int64, what=_LABELS, sums_gradients=False)
        if representatives:
            flags = (batch_sizes, 1, torch.bool)
            sent += gather_traffic(*flags, what=_REPRESENTATIVES, sums_gradients=False)
        if self.needs_image_rows:
            images = (batch_sizes, 1, torch.int64)
            sent += gather_traffic(*images, what=_IMAGE_ROWS, sums_gradients=False)
        if self.gathers_embeddings:
            sent += gather_traffic(
                batch_sizes,
                self.embedding_size,
                self.dtype,
                what=EMBEDDINGS,
                sums_gradients=not self.computes_whole,
            )
        sent += self._loss_traffic(sum(batch_sizes), mined=mined)
        return sent + sum_gradients_traffic(list(self.replicated_parameters().values()), self.comm)

    def proxy_rows(self) -> tuple[int, ...]:
        """Return the rows of proxies of each rank; zeros for a loss without proxies."""
        return (0,) * self.comm.world_size

    def owned_parameters(self) -> dict[str, OwnedRows]:
        """Return the parameters that this rank owns, by name, each with its rows of the table."""
        return {}

    def touched_rows(self) -> dict[str, TouchedRows]:
        """Return the owned parameters of which the last step updates only some rows, by name.

        Their own gradient is None. The other rows and their optimiser state must not change
        (`train/optim_state.py: only_rows`).
        """
        return {}

    def owned_buffers(self) -> dict[str, OwnedBuffer]:
        """Return rows of this rank that checkpoints keep, by name, without an optimizer."""
        return {}

    def after_update(self, step: int) -> dict[str, Tensor]:
        """Run after each update; every rank calls this.

        Args:
            step: Updates made, this one included.

        Returns:
            Rows that were reset, (n,) int64, by name of the owned parameter; the caller resets
            their optimiser state.
        """
        return {}

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that every rank holds, by name; they are not in DDP.

        They begin equal on every rank. Each rank's backward pass gives them the gradient of its
        own part of the loss, without a factor; `sum_replicated_gradients` sums the parts.
        """
        return {}

    def sum_replicated_gradients(self) -> None:
        """Add up the replicated parameters' gradients over ranks; every rank calls this.

        Called between the backward pass and the update: one all-reduce, which gives every rank
        the same bits, so that the parameters stay equal. No gradient counts as zeros.
        """
        sum_gradients(list(self.replicated_parameters().values()), self.comm)

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        """Return loss and statistics; subclasses define it."""
        raise NotImplementedError

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what `_output` sends, and its backward pass but for the gathered embeddings."""
        raise NotImplementedError


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__}"
