"""Distributed training and exact evaluation of image embeddings.

The public API below is for custom training loops; it needs neither Ray nor a run. Names are
imported on first use, so that `import dml_dist` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dml_dist.data.batches import PlanSampler, ShardDataset
    from dml_dist.data.datasets import build_importer
    from dml_dist.data.index import read_index
    from dml_dist.data.plans import build_plan
    from dml_dist.data.transforms import build_transform
    from dml_dist.data.write_shards import import_dataset
    from dml_dist.evaluation.retrieval import evaluate
    from dml_dist.losses.pairs import contrastive_loss
    from dml_dist.losses.pairs_margin import margin_loss
    from dml_dist.losses.pairs_multi_similarity import multi_similarity_loss
    from dml_dist.losses.pairs_triplet import triplet_loss
    from dml_dist.losses.proxy_anchor import proxy_anchor_loss
    from dml_dist.losses.proxy_nca_functions import dynamic_proxy_nca_loss, proxy_nca_loss
    from dml_dist.losses.soft_triple import soft_triple_loss
    from dml_dist.losses.softmax import arcface_loss, cosface_loss, normalized_softmax_loss
    from dml_dist.models.build_model import build_model
    from dml_dist.parallel.build_objective import build_objective
    from dml_dist.parallel.comm import Comm
    from dml_dist.topology import Topology

_MODULES = {
    "Comm": "parallel.comm",
    "PlanSampler": "data.batches",
    "ShardDataset": "data.batches",
    "Topology": "topology",
    "arcface_loss": "losses.softmax",
    "build_importer": "data.datasets",
    "build_model": "models.build_model",
    "build_objective": "parallel.build_objective",
    "build_plan": "data.plans",
    "build_transform": "data.transforms",
    "contrastive_loss": "losses.pairs",
    "cosface_loss": "losses.softmax",
    "dynamic_proxy_nca_loss": "losses.proxy_nca_functions",
    "evaluate": "evaluation.retrieval",
    "import_dataset": "data.write_shards",
    "margin_loss": "losses.pairs_margin",
    "multi_similarity_loss": "losses.pairs_multi_similarity",
    "normalized_softmax_loss": "losses.softmax",
    "proxy_anchor_loss": "losses.proxy_anchor",
    "proxy_nca_loss": "losses.proxy_nca_functions",
    "read_index": "data.index",
    "soft_triple_loss": "losses.soft_triple",
    "triplet_loss": "losses.pairs_triplet",
}

__all__ = [
    "Comm",
    "PlanSampler",
    "ShardDataset",
    "Topology",
    "arcface_loss",
    "build_importer",
    "build_model",
    "build_objective",
    "build_plan",
    "build_transform",
    "contrastive_loss",
    "cosface_loss",
    "dynamic_proxy_nca_loss",
    "evaluate",
    "import_dataset",
    "margin_loss",
    "multi_similarity_loss",
    "normalized_softmax_loss",
    "proxy_anchor_loss",
    "proxy_nca_loss",
    "read_index",
    "soft_triple_loss",
    "triplet_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
