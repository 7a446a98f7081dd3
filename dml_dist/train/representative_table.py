"""The class table of a problem: the representatives' embeddings, written at its first step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dml_dist.config.projections import ProjectionsConfig
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.representatives import REPRESENTATIVES, RepresentativeObjective, TableForm
from dml_dist.train.optim_state import forget_rows

EmbedRows = Callable[[EmbeddingModel, np.ndarray], Tensor]
"""From a model and (n,) index rows to their embeddings, (n, D) float32, the same on every rank.

In evaluation mode and in batches that do not depend on the number of ranks.
"""


def table_form(config: ProjectionsConfig | None) -> TableForm | None:
    """Return the table of a configuration; None without one."""
    if config is None or config.form != "table":
        return None
    return TableForm(
        rows_per_class=config.representatives_per_class,
        trainable=config.table.trainable,
        in_batch_weight=config.table.in_batch_weight,
        table_weight=config.table.table_weight,
        memory_mb=config.table.memory_mb,
    )


class RepresentativeTable:
    """Writes the objective's table at the start of a problem."""

    def __init__(
        self, objective: RepresentativeObjective, optimizer: Optimizer, embed: EmbedRows
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.embed = embed

    def rewrite(self, model: EmbeddingModel, representatives: np.ndarray) -> None:
        """Make the embeddings of representatives the rows of the table; every rank calls this.

        Args:
            model: The network, as it is at the start of the problem.
            representatives: (C, M) int64 index rows, -1 for missing ones.
        """
        present = representatives >= 0
        embeddings = self.embed(model, representatives[present])
        rows = torch.from_numpy(representatives).to(embeddings.device)
        table = embeddings.new_zeros((*rows.shape, embeddings.shape[1]))
        table[rows >= 0] = embeddings
        written = self.objective.rewrite(table, rows)
        owned = self.objective.owned_parameters()
        if REPRESENTATIVES in owned:
            forget_rows(self.optimizer, owned[REPRESENTATIVES].parameter, written)
