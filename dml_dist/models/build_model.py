"""Build a model from its configuration."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dml_dist.config.model import (
    BackboneConfig,
    BatchNormConfig,
    Conv4Config,
    CustomBackboneConfig,
    ModelConfig,
    TimmConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.models.backbones import build_conv4, build_custom, build_torchvision
from dml_dist.models.embedding import BatchNormStatistics, EmbeddingModel, freeze_affine
from dml_dist.models.pooling import build_pooling
from dml_dist.models.timm_backbone import build_timm
from dml_dist.random_streams import Stream, seed_of


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    pretrained: bool = True,
    dtype: torch.dtype = torch.float32,
) -> EmbeddingModel:
    """Return the embedding network on the CPU, in training mode.

    Initial weights depend on the seed alone: they are the same on every rank and for any number of
    ranks. The global random state is unchanged.

    Args:
        config: The model section.
        seed: The run's seed.
        pretrained: Whether to load the backbone's `weights`; False if a checkpoint is loaded next,
            so that the weight file need not exist any more.
        dtype: float32, or float64 for exact comparisons.

    Raises:
        ConfigError: If weights or a custom backbone are invalid.
    """
    # torch's initializers draw from the global generator: fork it so that callers see no change.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(Stream.MODEL_WEIGHTS, seed))
        model = _build(config, pretrained)
    model = model.to(dtype=dtype)
    if config.channels_last:
        # Any: older types of `to` do not know memory_format alone.
        cast(Any, model).to(memory_format=torch.channels_last)
    return model.train()


def _build(config: ModelConfig, pretrained: bool) -> EmbeddingModel:
    backbone, num_features = _build_backbone(config.backbone, pretrained)
    batch_norm = _batch_norm(config.backbone)
    if batch_norm is not None and batch_norm.affine == "frozen":
        freeze_affine(backbone)
    norm = (
        nn.LayerNorm(num_features, elementwise_affine=False) if config.layer_norm else nn.Identity()
    )
    return EmbeddingModel(
        backbone=backbone,
        pool=build_pooling(config.pooling, config.gem_power),
        norm=norm,
        head=_build_head(config, num_features),
        normalize=(
            nn.BatchNorm1d(config.embedding_size, affine=False)
            if config.normalize == "batch"
            else nn.Identity()
        ),
        embedding_size=config.embedding_size,
        batch_norm="frozen" if batch_norm is None else batch_norm.statistics,
        has_own_buffers=isinstance(config.backbone, CustomBackboneConfig),
        channels_last=config.channels_last,
    )


def _build_head(config: ModelConfig, num_features: int) -> nn.Module:
    if config.head == "linear":
        # Batch normalisation subtracts a bias again: it would only follow rounding errors.
        return nn.Linear(num_features, config.embedding_size, bias=config.normalize == "none")
    if config.embedding_size != num_features:
        raise ConfigError(
            f"model.embedding_size is {config.embedding_size}, but model.head none makes the "
            f"network's {num_features} features the embedding; set embedding_size: {num_features}"
        )
    return nn.Identity()


def _build_backbone(config: BackboneConfig, pretrained: bool) -> tuple[nn.Module, int]:
    match config:
        case Conv4Config():
            return build_conv4(config)
        case CustomBackboneConfig():
            return build_custom(config)
        case TimmConfig():
            return build_timm(config, pretrained=pretrained)
        case _:
            return build_torchvision(config, pretrained=pretrained)


def _batch_norm(config: BackboneConfig) -> BatchNormConfig | None:
    return config.batch_norm if isinstance(config, CustomBackboneConfig) else config.normalization


_STATISTICS = {
    "frozen": "frozen",
    "synchronized": "of the global batch",
    "per_rank": "of each rank's own images: WARNING, the result depends on the number of ranks",
}


def describe_network(model: EmbeddingModel) -> tuple[tuple[str, str], ...]:
    """Return (label, value) rows on batch normalization and random layers, if there are any."""
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, _BatchNorm)]
    rows = [*getattr(model.backbone, "facts", ())]
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
    if isinstance(model.normalize, _BatchNorm):
        statistics = _STATISTICS[model.normalize_statistics]
        rows.append(("batch normalisation of embeddings", f"no weights, statistics {statistics}"))
    if draws := [name for name, is_active in _random_layers(model).items() if is_active]:
        rows.append(("random layers", f"{', '.join(draws)}; each rank for its own images"))
    return tuple(rows)


def _random_layers(model: nn.Module) -> dict[str, bool]:
    # A network that holds torchvision's layers has imported it; others need not wait for that.
    ops = sys.modules.get("torchvision.ops")
    return {
        "stochastic depth": ops is not None
        and any(
            isinstance(layer, ops.StochasticDepth) and layer.p > 0 for layer in model.modules()
        ),
        "dropout": any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in model.modules()),
    }


def batch_norm_channels(model: EmbeddingModel, statistics: BatchNormStatistics) -> list[int]:
    """Return the channels of each batch normalization layer with such statistics in training."""
    parts = ((model.backbone, model.batch_norm), (model.normalize, model.normalize_statistics))
    return [
        layer.num_features
        for part, of_part in parts
        if of_part == statistics
        for layer in part.modules()
        if isinstance(layer, _BatchNorm)
    ]
