"""Dynamic assignment over ranks: which proxies are in use, which are dead, and their revival.

A proxy is dead when it was the nearest of no sample for `dead_after_steps` steps. Each rank counts
for the rows and classes it owns; checkpoints keep the counts, and any number of ranks reads them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dml_dist.losses.numerics import Statistics, normalize_rows
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA, nearest_rows
from dml_dist.parallel.objective import GlobalBatch, ObjectiveOutput, OwnedBuffer
from dml_dist.parallel.proxies import PROXIES, ProxyObjective
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_bounds
from dml_dist.random_streams import Stream, generator_of

_COUNTS = "counts of assignments"
_NUM_COUNTS = 3

_IMAGES_PER_PROXY = 5
"""Images seen for each proxy until one that was the nearest of none is dead. R@1 after 600 steps of
64 glyphs: 61.2 % with 250 proxies, where it is 20 steps, and 48.0 % without revival; 48.4 % with 31
proxies, where it is 3 steps, and 37.2 % with 20 (one seed).
"""

_REVIVED_NOISE = 0.1
"""Length of the noise added to a drawn sample, so that two proxies at one sample separate."""


class DynamicProxyObjective(ProxyObjective):
    """Proxy-NCA with dynamic assignment, which counts assignments.

    Recorded: `dead_proxies`; `proxy_occupancy`, the share that is not dead; `assignment_churn`,
    the share of the batch's rows whose nearest proxy is not that of their class's last row in the
    step in which the class was seen before (rows of classes never seen do not count).

    Attributes:
        idle_steps_L: Steps since each owned proxy was the nearest of a sample.
        last_rows: Nearest proxy of each owned class's last sample; -1 before the first.
    """

    idle_steps_L: Tensor
    last_rows: Tensor

    def __init__(
        self,
        loss: DynamicProxyNCA,
        *,
        dead_after_steps: int | None,
        revive_dead: bool,
        **of_table: Any,
    ) -> None:
        """Make the table as `ProxyObjective` does.

        Args:
            loss: The loss.
            dead_after_steps: When a proxy counts as dead, >= 1; None is after five images for each
                proxy.
            revive_dead: Whether dead proxies are moved to samples, every `dead_after_steps` steps.
            of_table: Arguments of `ProxyObjective`.
        """
        super().__init__(loss, **of_table)
        self.seed: int = of_table["seed"]
        self._given_dead_after = dead_after_steps
        self.revive_dead = revive_dead
        comm = self.comm
        self.class_low, self.class_high = part_bounds(self.num_classes, comm.world_size, comm.rank)
        zeros = torch.zeros(len(self.proxies), dtype=torch.int64, device=comm.device)
        self.register_buffer("idle_steps_L", zeros)
        unseen = zeros.new_full((self.class_high - self.class_low,), -1)
        self.register_buffer("last_rows", unseen)
        self._last_batch_GD: Tensor | None = None

    def rows_of_classes(self, labels_G: Tensor) -> None:
        """Return None: proxies belong to no class."""
        return None

    def owned_buffers(self) -> dict[str, OwnedBuffer]:
        """Return the counts of this rank's proxies and classes."""
        shard = self.shard
        idle = OwnedBuffer(self.idle_steps_L, shard.row_low, shard.row_high, shard.num_rows)
        last = OwnedBuffer(self.last_rows, self.class_low, self.class_high, self.num_classes)
        return {"proxy_idle_steps": idle, "class_nearest": last}

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        assert isinstance(self.loss, DynamicProxyNCA)
        self.loss = replace(self.loss, step=batch.step)
        return super()._output(batch)

    @torch.no_grad()
    def after_update(self, step: int) -> dict[str, Tensor]:
        """Move dead proxies to drawn samples of the last batch, every `dead_after_steps` steps.

        Sample and noise are drawn from (seed, step, the proxy's row).
        """
        batch_GD = self._last_batch_GD
        if not self.revive_dead or batch_GD is None:
            return {}
        dead_after_steps = self._dead_after_steps(len(batch_GD))
        if step % dead_after_steps:
            return {}
        rows = (self.idle_steps_L >= dead_after_steps).nonzero()[:, 0]
        for row in rows.tolist():
            table_row = self.shard.row_low + row
            draws = generator_of(Stream.REVIVED_PROXIES, self.seed, step, table_row)
            sample_D = normalize_rows(batch_GD[draws.integers(len(batch_GD)), None])[0]
            noise = torch.from_numpy(draws.standard_normal(len(sample_D)))
            noise_D = (noise * (_REVIVED_NOISE / len(sample_D) ** 0.5)).to(sample_D)
            self.proxies[row] = sample_D + noise_D
        self.idle_steps_L[rows] = 0
        return {PROXIES: rows}

    def _dead_after_steps(self, num_images: int) -> int:
        """Return the steps after which a proxy is dead, with this many images a step."""
        if self._given_dead_after is not None:
            return self._given_dead_after
        return math.ceil(_IMAGES_PER_PROXY * self.shard.num_rows / num_images)

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what the loss and the counts send."""
        counts = _NUM_COUNTS * torch.float64.itemsize
        sent = super()._loss_traffic(num_rows, mined=mined)
        return sent + Traffic.of("all_reduce", _COUNTS, counts, self.comm.world_size)

    def _observe(
        self, embeddings_GD: Tensor, labels_G: Tensor, total: Statistics
    ) -> dict[str, Tensor]:
        rows_G = nearest_rows(total)
        changed_G, known_G, last_rows = self._compare(rows_G, labels_G)
        idle_L = self._idle(rows_G)
        if self.training:
            self.idle_steps_L.copy_(idle_L)
            self.last_rows.copy_(last_rows)
            if self.revive_dead:
                self._last_batch_GD = embeddings_GD.detach()
        dead = (idle_L >= self._dead_after_steps(len(rows_G))).sum()
        counts = torch.stack([dead, changed_G.sum(), known_G.sum()]).double()
        dead, changed, known = self.comm.all_reduce_sum(counts, what=_COUNTS)
        return {
            "dead_proxies": dead,
            "proxy_occupancy": 1 - dead / self.shard.num_rows,
            "assignment_churn": changed / known.clamp_min(1),
        }

    def _idle(self, rows_G: Tensor) -> Tensor:
        """Return the idle steps of owned proxies after a batch with these nearest ones."""
        num_rows = len(self.idle_steps_L)
        local_G = rows_G - self.shard.row_low
        held_G = (local_G >= 0) & (local_G < num_rows)
        # One entry more: rows of other ranks are written there.
        chosen = torch.zeros(num_rows + 1, dtype=torch.bool, device=rows_G.device)
        chosen[torch.where(held_G, local_G, num_rows)] = True
        return (self.idle_steps_L + 1).masked_fill(chosen[:-1], 0)

    def _compare(self, rows_G: Tensor, labels_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which owned classes' rows changed, which were known, and the new last rows."""
        num_classes = len(self.last_rows)
        local_G = labels_G - self.class_low
        held_G = (local_G >= 0) & (local_G < num_classes)
        before_G = self.last_rows[local_G.clamp(0, num_classes - 1)]
        known_G = held_G & (before_G >= 0)
        # The class's last row of the batch, by its place, so that equal labels do not race.
        places_G = torch.arange(len(rows_G), device=rows_G.device)
        place = self.last_rows.new_full((num_classes + 1,), -1)
        place.scatter_reduce_(0, torch.where(held_G, local_G, num_classes), places_G, "amax")
        newest = rows_G[place[:-1].clamp_min(0)]
        return (
            known_G & (before_G != rows_G),
            known_G,
            torch.where(place[:-1] >= 0, newest, self.last_rows),
        )
