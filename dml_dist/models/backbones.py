"""Networks that turn images (B, 3, H, W) into feature maps (B, F, h, w), with their weights."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, assert_never
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn

from dml_dist.config.custom import load_target
from dml_dist.config.model import (
    BackboneConfig,
    Conv4Config,
    CustomBackboneConfig,
    ResNet18Config,
    ResNet50Config,
)
from dml_dist.errors import ConfigError

_CONV4_GROUPS = 8
_RESNET_GROUPS = 32


def build_conv4(config: Conv4Config) -> tuple[nn.Module, int]:
    """Return four blocks of convolution 3x3, GroupNorm, ReLU, and their number of channels.

    The first three convolutions have stride 2: half the time of pooling after each block.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stride in (2, 2, 2, 1):
        # GroupNorm subtracts the mean, so that a bias of the convolution would do nothing.
        layers.append(nn.Conv2d(channels, config.width, 3, stride, padding=1, bias=False))
        layers.append(nn.GroupNorm(_CONV4_GROUPS, config.width))
        layers.append(nn.ReLU(inplace=True))
        channels = config.width
    return nn.Sequential(*layers), config.width


def build_resnet(
    config: ResNet18Config | ResNet50Config, *, pretrained: bool
) -> tuple[nn.Module, int]:
    """Return torchvision's ResNet without pooling and classifier, and its number of channels.

    Parameters have torchvision's names.

    Args:
        config: Which network, normalisation and weights.
        pretrained: False leaves `config.weights` out (a checkpoint is loaded next).
    """
    norm_layer = _group_norm if config.norm == "group" else nn.BatchNorm2d
    match config.name:
        case "resnet18":
            network = torchvision.models.resnet18(weights=None, norm_layer=norm_layer)
        case "resnet50":
            network = torchvision.models.resnet50(weights=None, norm_layer=norm_layer)
    trunk = nn.Sequential(
        OrderedDict(
            (name, child)
            for name, child in network.named_children()
            if name not in ("avgpool", "fc")
        )
    )
    if pretrained and config.weights != "none":
        _load(trunk, _read_weights(config), config.weights)
    return trunk, network.fc.in_features


def build_custom(config: CustomBackboneConfig) -> tuple[nn.Module, int]:
    """Return the user's module and its `num_features`.

    Raises:
        ConfigError: If the target is no module with `num_features`, or refuses its options.
    """
    where = f"model.backbone.target {config.target}"
    factory = load_target(config.target)
    try:
        module = factory(**config.options)
    except TypeError as error:
        raise ConfigError(
            f"{where}: required a callable that takes the options {sorted(config.options)}, "
            f"got TypeError: {error}; change model.backbone.options"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{where}: required a torch.nn.Module, got {type(module).__name__}; "
            "let it return the network"
        )
    num_features = getattr(module, "num_features", None)
    if not isinstance(num_features, int) or num_features < 1:
        raise ConfigError(
            f"{where}: required an attribute num_features >= 1 (F of its output (B, F) or "
            f"(B, F, H, W)), got {num_features!r}; set it in the module's __init__"
        )
    return module, num_features


def check_weights(config: BackboneConfig) -> None:
    """Refuse `weights` that name nothing, without building or downloading anything.

    Args:
        config: The backbone; a relative path is looked up from the current folder.

    Raises:
        ConfigError: If they are neither none, nor a weight name of this network, nor a file.
    """
    match config:
        case ResNet18Config() | ResNet50Config():
            known = sorted(torchvision.models.get_model_weights(config.name).__members__)
            named = config.weights == "none" or config.weights in known
            if not named and not Path(config.weights).is_file():
                raise ConfigError(
                    f"model.backbone.weights: required none, one of {known}, or the path of a "
                    f"state dict, got {config.weights!r}, which is neither a name of {config.name} "
                    "nor a file"
                )
        case Conv4Config() | CustomBackboneConfig():
            return
        case _:
            assert_never(config)


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_RESNET_GROUPS, num_channels)


def _read_weights(config: ResNet18Config | ResNet50Config) -> dict[str, Tensor]:
    """Return the state dict that `weights` names: a torchvision weight name or a file."""
    check_weights(config)
    known = torchvision.models.get_model_weights(config.name)
    if config.weights in known.__members__:
        return _download(known[config.weights], config.weights)
    path = Path(config.weights)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen unrelated classes.
        raise ConfigError(
            f"model.backbone.weights: required a state dict saved with torch.save (tensors only), "
            f"got {path}, which cannot be read: {error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ConfigError(
            f"model.backbone.weights: required a state dict (names to tensors) in {path}, "
            f"got {type(state).__name__}; save model.state_dict() and nothing else"
        )
    return state


def _download(entry: Any, name: str) -> dict[str, Tensor]:
    """Return torchvision's weights from its cache folder, downloaded into it where missing."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
    try:
        state: dict[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.backbone.weights: required the torchvision weights {name}, got no download "
            f"of {entry.url} ({error}); fetch that address on a machine with a network and put "
            f"the file at {target}, or set model.backbone.weights to its path"
        ) from error
    return state


def _load(trunk: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict of the whole network, with or without its classifier."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        text = str(error)
        raise ConfigError(
            f"model.backbone.weights: required the parameters of this network, got other ones in "
            f"{source}: {text[:600]}{' ...' if len(text) > 600 else ''}"
        ) from error
