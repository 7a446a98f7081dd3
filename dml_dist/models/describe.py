"""What a network does that a reader of the plan should know before training."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from dml_dist.models.embedding import EmbeddingModel

_STATISTICS = {
    "frozen": "frozen",
    "synchronized": "of the global batch",
    "per_rank": "of each rank's own images: WARNING, the result depends on the number of ranks",
}


def describe_network(model: EmbeddingModel) -> tuple[tuple[str, str], ...]:
    """Return rows of label and value on batch normalisation and on draws, if it has them."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    rows = []
    if layers:
        trained = any(
            parameter.requires_grad for layer in layers for parameter in layer.parameters()
        )
        affine = "trained" if trained else "frozen"
        rows.append(
            (
                "batch normalisation",
                f"{len(layers)} layers, affine {affine}, statistics "
                f"{_STATISTICS[model.batch_norm]}",
            )
        )
    if draws := [name for name, is_active in _draws(model).items() if is_active]:
        rows.append(("draws in the network", f"{', '.join(draws)}; each rank for its own images"))
    return tuple(rows)


def _draws(model: nn.Module) -> dict[str, bool]:
    return {
        "stochastic depth": any(
            isinstance(layer, StochasticDepth) and layer.p > 0 for layer in model.modules()
        ),
        "dropout": any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules()),
    }


def batch_norm_channels(model: nn.Module) -> list[int]:
    """Return the number of channels of each layer of batch normalisation."""
    return [layer.num_features for layer in model.modules() if isinstance(layer, _BatchNorm)]
