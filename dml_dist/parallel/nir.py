"""Non-isotropy regularisation over a loss with sharded proxies (formulas: `losses/{flow,nir}.py`).

Under the gradient contract of `parallel/proxies.py`, with the rows of rank r as one part of the
sum that the regulariser is:

    c_i     normalised proxy of row i's class, fetched from its owner; the ranks' gradients for it
            are summed and go to the owner, without a factor
    flow    the same on every rank, a replicated parameter: the parts' gradients are summed
    x_i     this rank's own rows, which DDP averages: their gradient is multiplied by W

A class of K proxies gives their mean, normalised again, as its condition.

Shape legend: G rows of the global batch, B rows of this rank, D embedding size, K proxies a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dml_dist.losses.flow import ConditionalFlow
from dml_dist.losses.nir import Link, continued_linearly, linked, negative_log_likelihood
from dml_dist.losses.numerics import Merge, normalize_rows
from dml_dist.parallel.class_table import fetch_rows, fetch_traffic
from dml_dist.parallel.collectives import merge_over_ranks, merge_traffic, times_world_size
from dml_dist.parallel.objective import (
    GlobalBatch,
    Objective,
    ObjectiveOutput,
    OwnedBuffer,
    OwnedRows,
)
from dml_dist.parallel.proxies import ProxyObjective
from dml_dist.parallel.traffic import Traffic
from dml_dist.random_streams import Stream, generator_of

_CONDITIONS = "conditions of the flow"

_MERGES: dict[str, Merge] = dict.fromkeys(("nir", "flow_nll", "flow_continued_share"), "sum")
"""Sums over the batch, in the order in which they are packed."""

Target = Literal["embeddings", "proxies", "flow"]


class NIRObjective(Objective):
    """flow_weight times the regulariser, plus loss_weight times the base loss."""

    def __init__(
        self,
        base: ProxyObjective,
        flow: ConditionalFlow,
        *,
        seed: int,
        flow_weight: float = 1.0,
        loss_weight: float = 1.0,
        link: Link = "nll",
        noise: float = 0.0,
        warmup_steps: int = 0,
        gradients_to: Sequence[Target] = ("embeddings", "proxies", "flow"),
    ) -> None:
        """Wrap an objective with proxies.

        Args:
            base: The objective of the base loss; each class must have proxies of its own.
            flow: The flow, equal on every rank, whose condition has the embedding's size.
            seed: Names, with the step, the noise.
            flow_weight: Weight of the regulariser, > 0.
            loss_weight: Weight of the base loss, > 0.
            link: What is averaged: `nll`, or its exponential.
            noise: Width of the uniform noise on normalised embeddings, >= 0.
            warmup_steps: Steps at the start whose regulariser reaches the flow alone.
            gradients_to: Where the regulariser's gradients go.
        """
        super().__init__(
            num_classes=base.num_classes,
            embedding_size=base.embedding_size,
            comm=base.comm,
            dtype=base.dtype,
        )
        self.base = base
        self.flow = flow
        self.seed = seed
        self.flow_weight = flow_weight
        self.loss_weight = loss_weight
        self.link: Link = link
        self.noise = noise
        self.warmup_steps = warmup_steps
        self.gradients_to = frozenset(gradients_to)

    def owned_parameters(self) -> dict[str, OwnedRows]:
        """Return this rank's rows of the base objective's tables."""
        return self.base.owned_parameters()

    def owned_buffers(self) -> dict[str, OwnedBuffer]:
        """Return what the base objective counts."""
        return self.base.owned_buffers()

    def after_update(self, step: int) -> dict[str, Tensor]:
        """Do what is due in the base objective."""
        return self.base.after_update(step)

    def replicated_parameters(self) -> dict[str, nn.Parameter]:
        """Return the flow's parameters, and those of the base objective."""
        own = {f"flow.{name}": value for name, value in self.flow.named_parameters()}
        return {**self.base.replicated_parameters(), **own}

    def proxy_rows(self) -> tuple[int, ...]:
        """Return the rows of proxies of each rank."""
        return self.base.proxy_rows()

    def _loss_traffic(self, num_rows: int, *, mined: bool) -> Traffic:
        """Return what the base loss and the regulariser send after warm-up."""
        world_size, per_class = self.comm.world_size, self.base.shard.proxies_per_class
        conditions = fetch_traffic(
            num_rows * per_class,
            self.embedding_size,
            self.dtype,
            world_size,
            what=_CONDITIONS,
            sums_gradients="proxies" in self.gradients_to,
        )
        sums = merge_traffic(_MERGES, dict.fromkeys(_MERGES, 1), self.dtype, world_size)
        return self.base._loss_traffic(num_rows, mined=mined) + conditions + sums

    def _output(self, batch: GlobalBatch) -> ObjectiveOutput:
        base = self.base._output(batch)
        own, num_rows = batch.part(self.comm.rank), len(batch.labels_G)
        conditions_GD = self._conditions(batch.labels_G)
        rows_BD = normalize_rows(batch.embeddings_BD.to(conditions_GD.dtype))
        rows_BD = self._with_noise(rows_BD, num_rows, own, batch.step)
        targets = self.gradients_to if batch.step >= self.warmup_steps else frozenset({"flow"})
        if "embeddings" not in targets:
            rows_BD = rows_BD.detach()
        if "proxies" not in targets:
            conditions_GD = conditions_GD.detach()
        rows_BD = times_world_size(rows_BD, self.comm)
        nll_B = negative_log_likelihood(*self._flow(rows_BD, conditions_GD[own], targets))
        sums = {
            "nir": linked(nll_B, self.link).sum(),
            "flow_nll": nll_B.detach().sum(),
            "flow_continued_share": continued_linearly(nll_B.detach(), self.link).sum(),
        }
        sums = {name: value.to(nll_B.dtype) for name, value in sums.items()}
        total = {
            name: value / num_rows
            for name, value in merge_over_ranks(sums, _MERGES, self.comm).items()
        }
        loss = self.flow_weight * total["nir"] + self.loss_weight * base.loss
        recorded = {name: value.detach() for name, value in total.items()}
        return ObjectiveOutput(
            loss, {**base.statistics, "base_loss": base.loss.detach(), **recorded}
        )

    def _conditions(self, labels_G: Tensor) -> Tensor:
        """Return the normalised proxy of each row's class, (G, D)."""
        proxies_LD, shard = self.base.proxies, self.base.shard
        ids_GK = self.base.rows_of_classes(labels_G)
        assert ids_GK is not None
        rows = fetch_rows(
            proxies_LD,
            ids_GK.reshape(-1),
            shard.row_low,
            shard.row_high,
            self.comm,
            what=_CONDITIONS,
        )
        rows = normalize_rows(rows)
        if shard.proxies_per_class == 1:
            return rows
        return normalize_rows(rows.reshape(*ids_GK.shape, -1).mean(dim=1))

    def _flow(
        self, rows_BD: Tensor, conditions_BD: Tensor, targets: frozenset[str]
    ) -> tuple[Tensor, Tensor]:
        if "flow" in targets:
            z_BD, log_det_B = self.flow(rows_BD, conditions_BD)
            return z_BD, log_det_B
        state = {name: value.detach() for name, value in self.flow.state_dict().items()}
        z_BD, log_det_B = torch.func.functional_call(self.flow, state, (rows_BD, conditions_BD))
        return z_BD, log_det_B

    def _with_noise(self, rows_BD: Tensor, num_rows: int, own: slice, step: int) -> Tensor:
        """Return the rows with noise that is drawn for the whole batch: the same for any W."""
        if self.noise == 0:
            return rows_BD
        generator = generator_of(Stream.NIR_NOISE, self.seed, step)
        drawn = generator.random((num_rows, rows_BD.shape[1]))
        noise_BD = torch.from_numpy(drawn[own]).to(rows_BD)
        return normalize_rows(rows_BD + self.noise * noise_BD)
