"""What alternating projections are given on one rank: systematic batches, and embeddings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dml_dist.config.data import BalancedBatchesConfig
from dml_dist.data.systematic import SystematicPlan
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.runtime.context import Bench
from dml_dist.train.projections import ProjectionMeans


def projection_means(bench: Bench) -> ProjectionMeans | None:
    """Return the means of a run's alternating projections, or None when it has none."""
    config = bench.config
    if config.projections is None:
        return None
    batches = config.data.batches
    assert isinstance(batches, BalancedBatchesConfig), "the plan of the run has looked at it"
    rows = bench.split.train_rows
    plan = SystematicPlan(
        rows,
        bench.index.label[rows],
        config.seed,
        batches.classes_per_batch,
        batches.samples_per_class,
    )

    def embed(model: EmbeddingModel, rows: np.ndarray) -> Tensor:
        found, _, _ = bench.embed(model, rows, "embed representatives")
        comm = bench.comm
        sizes = comm.gather_objects(len(found), what="numbers of representatives")
        if not len(found):
            found = np.zeros((0, config.model.embedding_size), dtype=np.float32)
        own = torch.from_numpy(found).to(comm.device)
        # Ranks embed contiguous parts, so rank order is the order of the rows.
        return comm.all_gather_rows(own, sizes, what="embeddings of representatives")

    return ProjectionMeans(plan, embed)
