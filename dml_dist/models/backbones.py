"""Backbones from images (B, 3, H, W) to feature maps (B, F, h, w), with pretrained weights.

torchvision is imported by its own networks alone: that takes as long as importing torch.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeGuard, assert_never
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from dml_dist.config.custom import call_target
from dml_dist.config.model import (
    BackboneConfig,
    Conv4Config,
    ConvNeXtConfig,
    CustomBackboneConfig,
    EfficientNetConfig,
    GoogLeNetConfig,
    ResNetConfig,
    SwinConfig,
    TimmConfig,
    TorchvisionConfig,
    ViTConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.models.rescale import Rescale
from dml_dist.models.timm_backbone import build_timm
from dml_dist.models.weights import find_weight_file, load_weights, read_weight_file

_CONV4_GROUPS = 8
_RESNET_GROUPS = 32
# Mean and std of the inputs that GoogLeNet's weights expect, in [-1, 1].
_GOOGLENET = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Children of torchvision's networks after the last feature map.
_AFTER_FEATURES = ("avgpool", "dropout", "fc", "classifier", "flatten", "head")


def build_conv4(config: Conv4Config) -> tuple[nn.Module, int]:
    """Return four blocks of 3x3 convolution, normalization and ReLU, and their number of channels.

    The first three convolutions have stride 2, which takes half the time of pooling layers.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stride in (2, 2, 2, 1):
        # No bias: normalization subtracts the mean, so it would have no effect.
        layers.append(nn.Conv2d(channels, config.width, 3, stride, padding=1, bias=False))
        layers.append(
            nn.BatchNorm2d(config.width)
            if config.norm == "batch"
            else nn.GroupNorm(_CONV4_GROUPS, config.width)
        )
        layers.append(nn.ReLU(inplace=True))
        channels = config.width
    return nn.Sequential(*layers), config.width


def build_torchvision(config: TorchvisionConfig, *, pretrained: bool) -> tuple[nn.Module, int]:
    """Return torchvision's network without its classifier, and its number of features.

    The output is the last feature map (B, F, h, w), or for a Vision Transformer the class token
    after the last LayerNorm, (B, F). Parameters have torchvision's names.

    Args:
        config: Network, normalization and weights.
        pretrained: Whether to load `config.weights`; False if a checkpoint is loaded next.
    """
    import torchvision

    network = torchvision.models.get_model(config.name, weights=None, **_arguments(config))
    *_, classifier = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    if isinstance(config, ViTConfig):
        trunk = network
        trunk.heads = nn.Identity()
        trunk.register_forward_pre_hook(_require_image_size)
    else:
        trunk = nn.Sequential(
            OrderedDict(
                (name, child)
                for name, child in network.named_children()
                if name not in _AFTER_FEATURES
            )
        )
    if isinstance(config, GoogLeNetConfig) and config.weights != "none":
        trunk = nn.Sequential(
            OrderedDict([("rescale", Rescale(*_GOOGLENET)), *trunk.named_children()])
        )
    if isinstance(config, EfficientNetConfig | ConvNeXtConfig | SwinConfig):
        _set_stochastic_depth(trunk, config.stochastic_depth)
    if pretrained and config.weights != "none":
        load_weights(trunk, _read_weights(config), config.weights)
    return trunk, classifier.in_features


def _arguments(config: TorchvisionConfig) -> dict[str, Any]:
    """Return the keyword arguments of torchvision's builder."""
    match config:
        case ResNetConfig():
            return {"norm_layer": _group_norm} if config.norm == "group" else {}
        case GoogLeNetConfig():
            # Explicit, to avoid torchvision's warning that the default will change.
            return {"aux_logits": False, "init_weights": True}
        case ViTConfig():
            return {"image_size": config.image_size}
        case EfficientNetConfig() | ConvNeXtConfig() | SwinConfig():
            return {}
        case _:
            assert_never(config)


def _set_stochastic_depth(trunk: nn.Module, active: bool) -> None:
    from torchvision.ops import StochasticDepth

    for layer in trunk.modules():
        if isinstance(layer, StochasticDepth) and not active:
            layer.p = 0.0


def _require_image_size(network: nn.Module, inputs: tuple[Tensor]) -> None:
    """Raise for images of another size; with a custom transform it is only known in forward."""
    side, given = network.image_size, tuple(inputs[0].shape[-2:])
    if given != (side, side):
        raise ConfigError(
            f"model.backbone.image_size is {side}, but data.transform gives images of {given[0]} x "
            f"{given[1]} pixels; make the two equal"
        )


def build_custom(config: CustomBackboneConfig) -> tuple[nn.Module, int]:
    """Return the user's module and its `num_features`.

    Raises:
        ConfigError: If the target returns no module with `num_features`, or rejects its options.
    """
    where = f"model.backbone.target {config.target}"
    try:
        module = call_target(config.target, options=config.options)
    except TypeError as error:
        raise ConfigError(
            f"{where} does not accept the options {sorted(config.options)} (TypeError: {error}); "
            "change model.backbone.options"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{where} returned {type(module).__name__}, but must return the network, a "
            "torch.nn.Module"
        )
    num_features = getattr(module, "num_features", None)
    if not isinstance(num_features, int) or num_features < 1:
        raise ConfigError(
            f"{where}: the module's attribute num_features is {num_features!r}; set it to F >= 1 "
            "of its output (B, F) or (B, F, H, W) in __init__"
        )
    return module, num_features


def check_weights(config: BackboneConfig) -> None:
    """Raise for invalid `weights`, without downloading anything; a file must fit the network.

    Args:
        config: The backbone; a relative path is resolved from the current folder.

    Raises:
        ConfigError: If they are neither none, nor a weight name of this network, nor a file of
            weights that fit it.
    """
    if not _is_pretrained(config):
        return
    with torch.device("meta"):  # Of the network only the shapes are made.
        if isinstance(config, TimmConfig):
            build_timm(config, pretrained=True)
        elif _find_file(config) is not None:
            build_torchvision(config, pretrained=True)


def require_weights(config: BackboneConfig) -> None:
    """Check `weights` like `check_weights`, and download them if they are named and missing.

    Before a run begins: otherwise it would fail after its folder was made.

    Raises:
        ConfigError: If they are invalid, or the download fails.
    """
    check_weights(config)
    if not _is_pretrained(config):
        return
    known = _named(config)
    if known is not None and not _cached(known).is_file():
        _download(known)


def describe_weights(config: BackboneConfig) -> list[tuple[str, str]]:
    """Return label and value of pretrained weights, for the plan of a dry run."""
    if not _is_pretrained(config):
        return []
    known = _named(config)
    if known is None:
        return [("pretrained weights", f"{config.weights}, read")]
    where = _cached(known)
    found = f"in {where}" if where.is_file() else f"to be downloaded from {known.url}"
    return [("pretrained weights", f"{config.weights}, {found}")]


def _is_pretrained(config: BackboneConfig) -> TypeGuard[TorchvisionConfig | TimmConfig]:
    return not isinstance(config, Conv4Config | CustomBackboneConfig) and config.weights != "none"


def _named(config: TorchvisionConfig | TimmConfig) -> Any:
    """Return torchvision's entry of a weight name, None for a file."""
    import torchvision

    if isinstance(config, TimmConfig):
        return None
    return torchvision.models.get_model_weights(config.name).__members__.get(config.weights)


def _cached(entry: Any) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name


def _find_file(config: TorchvisionConfig) -> Path | None:
    """Return the file that `weights` names, None for a name of torchvision; raise for others."""
    import torchvision

    known = torchvision.models.get_model_weights(config.name)
    if config.weights not in known.__members__:
        if (path := find_weight_file(config.weights)) is None:
            names = sorted(known.__members__)
            raise ConfigError(
                f"model.backbone.weights must be none, one of {names}, or the path of a state "
                f"dict, but {config.weights!r} is neither a name of {config.name} nor a file"
            )
        return path
    if isinstance(config, ViTConfig):
        side = known[config.weights].meta["min_size"][0]
        if config.image_size != side:
            raise ConfigError(
                f"model.backbone.image_size is {config.image_size}, but the weights "
                f"{config.weights} of {config.name} need {side}; set it and data.transform.size "
                f"to {side}"
            )
    return None


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_RESNET_GROUPS, num_channels)


def _read_weights(config: TorchvisionConfig) -> dict[str, Tensor]:
    """Return the state dict that `weights` names: a torchvision weight name or a file."""
    if (path := _find_file(config)) is not None:
        return read_weight_file(path)
    return _download(_named(config))


def _download(entry: Any) -> dict[str, Tensor]:
    """Return torchvision's weights from its cache folder; download them if missing."""
    target = _cached(entry)
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.backbone.weights {entry.name}: the download of {entry.url} failed ({error}); "
            f"download it on a machine with network access and copy it to {target}, or set "
            "model.backbone.weights to its path"
        ) from error
    return state
