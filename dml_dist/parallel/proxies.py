"""Losses over the global batch, with class proxies sharded over ranks.

The gradient contract. Ranks r = 0 .. W - 1 hold rows of the batch and the network f (replicated,
inside DDP); rank r alone owns the proxies P_r of its class range (outside DDP). The loss l is the
formula of METHODS over the GLOBAL batch, and every rank returns its value. Written out for a row
form, with S_r the statistics of all rows over P_r:

    X   = gather(x_0 .. x_{W-1})                 all rows on every rank
    S_r = partial(X, P_r)                        nothing crosses ranks
    l   = finish(merge(S_0 .. S_{W-1}))          the same value on every rank

The backward pass of rank r computes dl/dS_r from the whole l, without communication, then

    dl/dP_r           plain, no factor: P_r has one owner, and all terms of l that see P_r are here
    dl/dX through P_r a part of dl/dX: the parts are summed over ranks and cut to rank r's own rows
                      (reduce-scatter), and multiplied by W, because DDP averages the gradients:
                      (1 / W) sum_r J_r^T (W dl/dx_r) = sum_r J_r^T dl/dx_r = dl/dtheta

A parameter that every rank holds (a scalar beta, a flow) is not in DDP either: each rank's part of
dl/dbeta comes from its own rows, plain, and one all-reduce sums the parts after the backward pass.

A loss of several rounds does so round by round. Results of earlier rounds are constants to later
ones, so only dl/dX crosses ranks in the backward pass.

A pair form has no proxies: every rank computes the whole l from X, keeps dl/dx_r and multiplies it
by W for the same reason. So all gradients equal those of one process on the concatenated batch,
for any W, any cut of the batch and of the classes. No other code multiplies or divides by W.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dml_dist.losses.class_weights import table_labels
from dml_dist.losses.forms import ProxyShard, RoundsLoss, RowLoss, rounds_of, table_units
from dml_dist.losses.numerics import Statistics
from dml_dist.parallel.collectives import merge_over_ranks, merge_traffic
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import GlobalBatch, Objective, ObjectiveOutput, OwnedRows
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_bounds, part_sizes
from dml_dist.random_streams import Stream, generator_of

PROXIES = "proxies"
"""Name of the table of proxies; other parameters of a loss have another learning rate."""


class ProxyObjective(Objective):
    """A loss of row form over a class table of proxies, of which this rank owns a class range.

    Attributes:
        proxies: This rank's rows, (L, D), of any length.
        shard: Which classes they are of.
    """

    def __init__(
        self,
        loss: RowLoss | RoundsLoss,
        *,
        num_classes: int,
        embedding_size: int,
        seed: int,
        comm: Comm,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            num_classes=num_classes, embedding_size=embedding_size, comm=comm, dtype=dtype
        )
        self.loss = loss
        units = table_units(loss, num_classes)
        low, high = part_bounds(units, comm.world_size, comm.rank)
        self.shard = ProxyShard(units, low, high, loss.proxies_per_class)
        shape = self.shard.row_high - self.shard.row_low, embedding_size
        if comm.device.type == "meta":  # planned ranks: nothing is drawn
            initial = torch.empty(shape, dtype=dtype, device="meta")
        else:
            initial = torch.empty(shape, dtype=dtype)
            fill_initial_proxies(initial, self.shard.row_low, seed)
        self.proxies = nn.Parameter(initial.to(comm.device))

    def rows_of_classes(self, labels_G: Tensor) -> Tensor | None:
        """Return the whole table's rows of each label's class, (G, K); None without any."""
        rows_G = table_labels(labels_G, getattr(self.loss, "class_rows", None))
        k = self.shard.proxies_per_class
        return rows_G[:, None] * k + torch.arange(k, device=labels_G.device)

    def owned_parameters(self) -> dict[str, OwnedRows]:
        """Return this rank's rows of the proxies."""
        shard = self.shard
        rows = OwnedRows(self.proxies, shard.row_low, shard.row_high, shard.num_rows)
        return {PROXIES: rows}

    def proxy_rows(self) -> tuple[int, ...]:
        """Return the rows of proxies of each rank."""
        units = part_sizes(self.shard.num_classes, self.comm.world_size)
        return tuple(size * self.shard.proxies_per_class for size in units)

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what merging the statistics of all rounds sends.

        A statistic has one value per row, unless its round says otherwise.
        """
        sent = Traffic()
        for round_ in rounds_of(self.loss):
            numels = dict.fromkeys(round_.merges, num_rows) | dict.fromkeys(round_.scalars, 1)
            for name, most in round_.columns.items():
                numels[name] = min(most, num_rows) * num_rows
            sent += merge_traffic(round_.merges, numels, self.dtype, self.comm.world_size)
        return sent

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        total = self._total(batch.embeddings_GD, *self._table(batch))
        with torch.no_grad():
            statistics = self.loss.statistics(total)
            statistics |= self._observe(batch.embeddings_GD, batch.labels_G, total)
        return ObjectiveOutput(self.loss.finish(total), statistics)

    def _table(self, batch: GlobalBatch) -> tuple[Tensor, Tensor, ProxyShard]:
        """Return the labels, rows and shard that a step uses."""
        return batch.labels_G, self.proxies, self.shard

    def _total(
        self, embeddings_GD: Tensor, labels_G: Tensor, proxies_LD: Tensor, shard: ProxyShard
    ) -> Statistics:
        """Return the statistics of all rounds over all ranks."""
        total: Statistics = {}
        for round_ in rounds_of(self.loss):
            known = {name: value.detach() for name, value in total.items()}
            partial = round_.partial(embeddings_GD, labels_G, proxies_LD, shard, known)
            total |= merge_over_ranks(partial, round_.merges, self.comm)
        return total

    def _observe(
        self, embeddings_GD: Tensor, labels_G: Tensor, total: Statistics
    ) -> dict[str, Tensor]:
        """Return further statistics to be recorded, without gradients."""
        return {}


# ---------------- initial proxies

_BLOCK_ROWS = 256
"""Rows drawn from one stream; part of what a seed means, so never changed."""


def fill_initial_proxies(proxies: Tensor, row_low: int, seed: int) -> None:
    """Fill rows with normal values of variance 1 / D, so that their length is about 1.

    Each block of rows has its own stream, named by seed and block.

    Args:
        proxies: (L, D) CPU tensor, written in place; row i is row `row_low + i` of the table.
        row_low: The first row's index in the whole table.
        seed: Seed, >= 0.
    """
    num_rows, dim = proxies.shape
    row_high = row_low + num_rows
    for block in range(row_low // _BLOCK_ROWS, -(-row_high // _BLOCK_ROWS)):
        generator = generator_of(Stream.PROXIES, seed, block)
        drawn = generator.standard_normal((_BLOCK_ROWS, dim), dtype=np.float32)
        start = block * _BLOCK_ROWS
        low, high = max(row_low, start), min(row_high, start + _BLOCK_ROWS)
        proxies[low - row_low : high - row_low] = torch.from_numpy(
            drawn[low - start : high - start]
        )
    proxies /= dim**0.5
