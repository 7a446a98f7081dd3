"""Backbones of timm (extra `timm`): networks, their inputs, and their weights."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dml_dist.config.data import StandardTransformConfig, TransformConfig
from dml_dist.config.model import BackboneConfig, TimmConfig
from dml_dist.config.shape import nearest
from dml_dist.errors import ConfigError
from dml_dist.models.rescale import Channels, Rescale
from dml_dist.models.weights import find_weight_file, load_weights, read_weight_file

_PROBE_SIDE = 224


@dataclass(frozen=True)
class _Layout:
    """What a network of timm takes and gives.

    Attributes:
        mean, std, interpolation: Of its data configuration.
        image_size: Side of the images that it takes; None for any.
        num_features: F.
        is_map: Whether its features are a map that `model.pooling` reduces, with no layer between
            the map and the classifier; otherwise they are vectors, of timm's own pooling.
        unused: Parameters that the features do not depend on.
    """

    mean: Channels
    std: Channels
    interpolation: str
    image_size: int | None
    num_features: int
    is_map: bool
    unused: frozenset[str]


class _Trunk(nn.Module):
    """Rescaled images to a feature map (B, F, h, w) or features (B, F)."""

    def __init__(self, network: nn.Module, layout: _Layout, facts: tuple[tuple[str, str], ...]):
        super().__init__()
        self.rescale = Rescale(layout.mean, layout.std)
        self.network: Any = network
        self.layout = layout
        self.facts = facts
        """Labels and values for the plan."""

    def forward(self, images: Tensor) -> Tensor:
        side, given = self.layout.image_size, tuple(images.shape[-2:])
        if side is not None and given != (side, side):
            raise ConfigError(
                f"model.backbone takes images of {side} x {side} pixels, but data.transform gives "
                f"{given[0]} x {given[1]}; set model.backbone.image_size to the size of the images"
            )
        features: Tensor = self.network.forward_features(self.rescale(images))
        if not self.layout.is_map:
            pooled: Tensor = self.network.forward_head(features, pre_logits=True)
            return pooled
        if features.shape[1] != self.layout.num_features:  # Swin's maps are (B, h, w, F).
            features = features.permute(0, 3, 1, 2)
        return features


def build_timm(config: TimmConfig, *, pretrained: bool) -> tuple[nn.Module, int]:
    """Return timm's network without its classifier, and its number of features.

    Args:
        config: Network, batch normalisation and weights.
        pretrained: Whether to load `config.weights`; False if a checkpoint is loaded next.

    Raises:
        ConfigError: If timm is missing, the name is unknown, or the weights do not fit.
    """
    layout = _layout(config.model, config.image_size)
    network = _create(config.model, config.image_size)
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    frozen = "frozen" in (config.batch_norm.statistics, config.batch_norm.affine)
    if layers and frozen and config.weights == "none":
        raise ConfigError(
            f"model.backbone: frozen batch normalisation needs trained weights, but {config.model} "
            "has weights: none; set batch_norm.statistics: synchronized and affine: trained, or "
            "give weights"
        )
    if pretrained and config.weights != "none":
        path = find_weight_file(config.weights)
        if path is None:
            raise ConfigError(
                f"model.backbone.weights must be none, package:NAME or the path of a state dict, "
                f"but {config.weights!r} is no file"
            )
        load_weights(network, read_weight_file(path), config.weights, by_order=True)
    for name, parameter in network.named_parameters():
        if name in layout.unused:
            parameter.requires_grad_(False)
    trunk = _Trunk(_with_plain_norms(network), layout, _facts(config, layout))
    return trunk, layout.num_features


def network_transform(transform: TransformConfig, backbone: BackboneConfig) -> TransformConfig:
    """Return the transform with the interpolation of the network for `auto`.

    Raises:
        ConfigError: If the network takes images of another size.
    """
    if not isinstance(transform, StandardTransformConfig):
        return transform
    interpolation = "bilinear"
    if isinstance(backbone, TimmConfig):
        layout = _layout(backbone.model, backbone.image_size)
        interpolation = layout.interpolation
        if layout.image_size not in (None, transform.size):
            raise ConfigError(
                f"data.transform.size is {transform.size}, but {backbone.model} takes images of "
                f"{layout.image_size} pixels; set model.backbone.image_size: {transform.size}, or "
                f"data.transform.size: {layout.image_size}"
            )
    if transform.interpolation != "auto":
        return transform
    return transform.model_copy(update={"interpolation": interpolation})


def _facts(config: TimmConfig, layout: _Layout) -> tuple[tuple[str, str], ...]:
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (layout.mean, layout.std))
    shape = "a map" if layout.is_map else "pooled by timm"
    size = "" if layout.image_size is None else f", {layout.image_size} pixels"
    return (
        ("network", f"timm {config.model}, weights {config.weights}"),
        ("network input", f"mean {mean}, std {std}, {layout.interpolation}{size}"),
        ("features", f"{layout.num_features:,}, {shape}"),
    )


def _import_timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            "model.backbone.name timm needs the package timm, which is not installed; run "
            "`pip install 'dml-dist[timm]'`"
        ) from error
    module: ModuleType = timm
    return module


def _create(model: str, image_size: int | None) -> nn.Module:
    """Return timm's network without its classifier, with random weights."""
    timm = _import_timm()
    if ":" in model or not timm.is_model(model):
        close = nearest(model, timm.list_models())
        raise ConfigError(
            f"model.backbone.model is {model!r}, which timm {timm.__version__} does not know"
            f"{f'; did you mean {close}?' if close else ''}; timm.list_models() lists its networks"
        )
    size = {} if image_size is None else {"img_size": image_size}
    try:
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **size)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.backbone: timm cannot build {model}{f' with {size}' if size else ''} "
            f"({type(error).__name__}: {error}); change model.backbone"
        ) from error
    return network


@lru_cache(maxsize=64)
def _layout(model: str, image_size: int | None) -> _Layout:
    """Return what a network takes and gives, found without memory for its parameters."""
    timm = _import_timm()
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network: Any = _create(model, image_size).eval()
        data = timm.data.resolve_data_config({}, model=network)
        is_fixed = image_size is not None or bool(network.pretrained_cfg.get("fixed_input_size"))
        side = image_size or data["input_size"][1] or _PROBE_SIDE
        features = network.forward_features(torch.empty(2, 3, side, side))
        pooled = network.forward_head(features, pre_logits=True)
        num_features = pooled.shape[1]
        unused = _unused(network, pooled)
        is_map = (
            features.ndim == 4
            and num_features in (features.shape[1], features.shape[3])
            and not _unused(network, features)
        )
    return _Layout(
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bicubic" if data["interpolation"] == "bicubic" else "bilinear",
        image_size=side if is_fixed else None,
        num_features=num_features,
        is_map=is_map,
        unused=frozenset() if is_map else unused,
    )


def _unused(network: nn.Module, output: Tensor) -> frozenset[str]:
    """Return the parameters that an output of the network does not depend on."""
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(
        output.sum(), list(named.values()), allow_unused=True, retain_graph=True
    )
    pairs = zip(named, gradients, strict=True)
    return frozenset(name for name, gradient in pairs if gradient is None)


def _with_plain_norms(module: nn.Module) -> nn.Module:
    """Replace timm's batch normalisation with an activation in it by torch's and the activation.

    So `batch_norm` means the same as for other networks, on any number of ranks. Weights have been
    loaded under timm's names.
    """
    from timm.layers import BatchNormAct2d

    for name, child in module.named_children():
        if not isinstance(child, BatchNormAct2d):
            _with_plain_norms(child)
            continue
        norm = nn.BatchNorm2d(
            child.num_features,
            child.eps,
            child.momentum,
            child.affine,
            child.track_running_stats,
            device="meta",
        )
        for own in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(norm, own, getattr(child, own))
        parts = OrderedDict([("norm", norm), ("drop", child.drop), ("act", child.act)])
        setattr(module, name, nn.Sequential(parts))
    return module
