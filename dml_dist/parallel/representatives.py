"""The table form of alternating projections: a sharded table of representatives, and its loss.

    loss = table_weight * (batch against all rows of the table) + in_batch_weight * (in the batch)

The table's rows begin a problem as the embeddings of its representatives, M a class, and may be
trained within it (`losses/table.py`). Ranks own whole classes, as with proxies, and the gradient
contract is that of `parallel/proxies.py`, with the rounds of the table's loss as row forms.

Shape legend: B rows of this rank, G rows of the global batch, D embedding size, C classes, M rows a
class, L rows of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import Merge, Statistics
from dml_dist.losses.table import MISSING, TableLoss, TableRound, table_batch
from dml_dist.parallel.collectives import merge_over_ranks, merge_traffic
from dml_dist.parallel.objective import (
    GlobalBatch,
    Objective,
    ObjectiveOutput,
    OwnedBuffer,
    OwnedRows,
)
from dml_dist.parallel.pairs import AnchorObjective
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_bounds, part_sizes

REPRESENTATIVES = "representatives"
"""Name of the table of representatives."""

REPRESENTATIVE_ROWS = "representative_rows"
"""Name of its rows' image rows."""

_TABLE = "table of representatives"


@dataclass(frozen=True)
class TableForm:
    """Options of the table form.

    Attributes:
        rows_per_class: M >= 1, rows of each class.
        trainable: Whether the rows are parameters; otherwise they stay as they were written.
        in_batch_weight: Weight of the loss of the batch's own pairs, >= 0.
        table_weight: Weight of the loss between batch and table, > 0.
        memory_mb: Bound on the memory of a chunk of the table in MiB, > 0.
    """

    rows_per_class: int
    trainable: bool = True
    in_batch_weight: float = 0.1
    table_weight: float = 1.0
    memory_mb: float = 64.0


class RepresentativeObjective(Objective):
    """A loss of pairs between the batch and all representatives, and within the batch.

    Before the first `rewrite` all rows of the table are missing.

    Attributes:
        shard: This rank's classes.
        rows: This rank's rows, (L, D); a parameter if they are trainable.
        image_rows: Their image rows, (L,) int64; -1 for missing rows.
    """

    needs_image_rows = True
    rows: Tensor
    image_rows: Tensor

    def __init__(self, of_table: TableLoss, form: TableForm, *, seed: int, **shared: Any) -> None:
        """Take the loss, its options, and the other arguments of `AnchorObjective`."""
        super().__init__(**shared)
        self.in_batch = AnchorObjective(of_table.loss, seed=seed, **shared)
        self.of_table = of_table
        self.form = form
        low, high = part_bounds(self.num_classes, self.comm.world_size, self.comm.rank)
        self.shard = ProxyShard(self.num_classes, low, high, form.rows_per_class)
        num_rows, device = self.shard.row_high - self.shard.row_low, self.comm.device
        rows = torch.zeros((num_rows, self.embedding_size), dtype=self.dtype, device=device)
        if form.trainable:
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)
        missing = torch.full((num_rows,), MISSING, dtype=torch.int64, device=device)
        self.register_buffer("image_rows", missing)

    @torch.no_grad()
    def rewrite(self, embeddings_CMD: Tensor, image_rows_CM: Tensor) -> Tensor:
        """Replace the whole table; every rank calls this with the same values.

        Args:
            embeddings_CMD: Embeddings of the representatives, of any length.
            image_rows_CM: Their image rows, int64; -1 for missing rows, whose embedding is ignored.

        Returns:
            The rows of this rank that were reset, which are all, (L,) int64: the caller resets
            their optimizer state.

        Raises:
            ValueError: If shapes do not fit.
        """
        size = self.num_classes, self.form.rows_per_class
        if embeddings_CMD.shape != (*size, self.embedding_size) or image_rows_CM.shape != size:
            raise ValueError(
                f"The table has {size[0]} classes of {size[1]} rows, each of "
                f"{self.embedding_size} values, but the new rows have the shape "
                f"{tuple(embeddings_CMD.shape)} and their image rows {tuple(image_rows_CM.shape)}. "
                "Pass one embedding and one image row for each row."
            )
        own = slice(self.shard.low_class, self.shard.high_class)
        self.image_rows.copy_(image_rows_CM[own].reshape(-1))
        self.rows.copy_(embeddings_CMD[own].reshape(len(self.rows), -1))
        self.rows[self.image_rows == MISSING] = 0.0
        return torch.arange(len(self.rows), device=self.rows.device)

    @torch.no_grad()
    def class_rows(self) -> tuple[Tensor, Tensor]:
        """Return the whole table, (C, M, D) and (C, M); a collective, called by every rank.

        A missing row, whose image row is -1, is a copy of the first row that its class has, so that
        all are representatives of their class.
        """
        sizes = self.proxy_rows()
        rows = self.comm.all_gather_rows(self.rows.detach(), sizes, what=_TABLE)
        images = self.comm.all_gather_rows(self.image_rows, sizes, what=f"images of {_TABLE}")
        rows_CMD = rows.view(self.num_classes, -1, self.embedding_size)
        images_CM = images.view(self.num_classes, -1)
        missing_CM = images_CM == MISSING
        first_C = (~missing_CM).to(torch.uint8).argmax(dim=1)
        copies_C1D = rows_CMD[torch.arange(len(first_C), device=rows.device), first_C][:, None]
        return torch.where(missing_CM[:, :, None], copies_C1D, rows_CMD), images_CM

    def owned_parameters(self) -> dict[str, OwnedRows]:
        """Return this rank's rows of the table, if they are trainable."""
        if not isinstance(self.rows, nn.Parameter):
            return {}
        shard = self.shard
        rows = OwnedRows(self.rows, shard.row_low, shard.row_high, shard.num_rows)
        return {REPRESENTATIVES: rows}

    def owned_buffers(self) -> dict[str, OwnedBuffer]:
        """Return the rows' image rows, and the rows if they are not trainable."""
        owned = {REPRESENTATIVE_ROWS: self.image_rows}
        if not self.form.trainable:
            owned[REPRESENTATIVES] = self.rows
        shard = self.shard
        where = shard.row_low, shard.row_high, shard.num_rows
        return {name: OwnedBuffer(values, *where) for name, values in owned.items()}

    def proxy_rows(self) -> tuple[int, ...]:
        """Return the table's rows of each rank."""
        classes = part_sizes(self.num_classes, self.comm.world_size)
        return tuple(size * self.form.rows_per_class for size in classes)

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what merging the statistics of both losses sends."""
        sent = self.in_batch._loss_traffic(num_rows, mined=mined)
        for round_, merges in self._rounds():
            numels = {name: round_.widths.get(name, 0) * num_rows or 1 for name in merges}
            sent += merge_traffic(merges, numels, self.dtype, self.comm.world_size)
        return sent

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        in_batch = self.in_batch._output(batch)
        total = self._table_total(batch)
        missing = total.pop("missing")
        loss = self.of_table.finish(total)
        with torch.no_grad():
            of_table = self.of_table.statistics(total)
        return ObjectiveOutput(
            self.form.table_weight * loss + self.form.in_batch_weight * in_batch.loss,
            {
                "table_loss": loss.detach(),
                "in_batch_loss": in_batch.loss.detach(),
                **{f"table_{name}": value for name, value in of_table.items()},
                **{f"in_batch_{name}": value for name, value in in_batch.statistics.items()},
                "missing_representatives": missing,
            },
        )

    def _rounds(self) -> list[tuple[TableRound, Mapping[str, Merge]]]:
        """Return the rounds, each with its merges; the first also counts the missing rows."""
        first, *others = self.of_table.rounds(self.form.rows_per_class)
        return [
            (first, {**first.merges, "missing": "sum"}),
            *((round_, round_.merges) for round_ in others),
        ]

    def _table_total(self, batch: GlobalBatch) -> Statistics:
        """Return the statistics of the table's loss over all ranks."""
        assert batch.image_rows_G is not None
        of_batch = batch.embeddings_GD, batch.labels_G, batch.image_rows_G
        prepared = table_batch(*of_batch, self.rows, self.image_rows, self.shard)
        missing = (~prepared.present_L).count_nonzero().to(self.dtype)
        total: Statistics = {}
        for round_, merges in self._rounds():
            known = {name: value.detach() for name, value in total.items()}
            partial = {**round_.partial(prepared, known), "missing": missing}
            total |= merge_over_ranks({name: partial[name] for name in merges}, merges, self.comm)
        return total
