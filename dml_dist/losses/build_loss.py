"""From a loss section of the configuration to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from dml_dist.config.custom import load_target
from dml_dist.config.objective import (
    ArcFaceConfig,
    ContrastiveConfig,
    CosFaceConfig,
    CustomLossConfig,
    LossConfig,
    MarginConfig,
    MultiSimilarityConfig,
    NormalizedSoftmaxConfig,
    ProxyAnchorConfig,
    ProxyNCAConfig,
    SoftTripleConfig,
    TripletConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.losses.class_weights import class_weights, fractional_rows
from dml_dist.losses.forms import PairLoss, RoundsLoss, RowLoss
from dml_dist.losses.pairs import AnchorLoss, Contrastive
from dml_dist.losses.pairs_margin import Margin
from dml_dist.losses.pairs_multi_similarity import MultiSimilarity
from dml_dist.losses.pairs_triplet import Triplet
from dml_dist.losses.proxy_anchor import ProxyAnchor
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA
from dml_dist.losses.proxy_nca_margin import ProxyNCAMargin
from dml_dist.losses.soft_triple import SoftTriple
from dml_dist.losses.softmax import ArcFace, CosFace, NormalizedSoftmax

AnyLoss = RowLoss | RoundsLoss | AnchorLoss | PairLoss
"""Over sharded proxies, in one round or several; over pairs, by anchor or as a whole."""


def build_loss(
    config: LossConfig,
    num_classes: int,
    *,
    class_sizes: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AnyLoss:
    """Return the loss of a configuration.

    Args:
        config: The loss section.
        num_classes: Training classes, C.
        class_sizes: Images of each training class; needed for weights of classes.
        seed: Seed of what a loss draws once: the map of fractional assignment.
        device: Where maps and weights of classes are kept.

    Raises:
        ConfigError: If there are fewer than two classes or proxies, class sizes are missing, or a
            custom loss is not what it must be.
    """
    if num_classes < 2:
        raise ConfigError(
            f"loss {config.name}: required at least 2 training classes, got {num_classes}: "
            "a single class has no negatives; add classes, or hold out fewer for validation"
        )
    # What a table draws is no matter of the formula.
    options = config.model_dump(exclude={"name", "negatives_share"})
    match config:
        case ProxyNCAConfig():
            return _proxy_nca(config, num_classes, class_sizes, seed, device)
        case ProxyAnchorConfig():
            return ProxyAnchor(**options)
        case SoftTripleConfig():
            return SoftTriple(**options)
        case NormalizedSoftmaxConfig():
            return NormalizedSoftmax(1.0 / config.temperature, config.logit_memory_mb)
        case CosFaceConfig():
            return CosFace(**options)
        case ArcFaceConfig():
            return ArcFace(**options)
        case ContrastiveConfig():
            return Contrastive(**options)
        case TripletConfig():
            return Triplet(**options)
        case MarginConfig():
            return Margin(**options)
        case MultiSimilarityConfig():
            return MultiSimilarity(**options)
        case CustomLossConfig():
            return _custom_loss(config)
        case _:
            assert_never(config)


def _proxy_nca(
    config: ProxyNCAConfig,
    num_classes: int,
    class_sizes: Sequence[int] | None,
    seed: int,
    device: torch.device | str,
) -> RowLoss | RoundsLoss:
    """Return the form of Proxy-NCA that surrogate and assignment name."""
    weights: Tensor | None = None
    if config.class_weighting != "none":
        if class_sizes is None or len(class_sizes) != num_classes:
            raise ConfigError(
                f"loss.class_weighting {config.class_weighting}: required the number of images of "
                f"each of the {num_classes} training classes, got "
                f"{None if class_sizes is None else len(class_sizes)}; give class_sizes"
            )
        weights = class_weights(config.class_weighting, class_sizes, config.effective_number_beta)
        weights = weights.to(device)
    units, rows = num_classes, None
    if config.assignment != "static":
        units = int(config.proxy_share * num_classes + 0.5)
        if units < 2:
            raise ConfigError(
                f"loss.proxy_share: required at least 2 proxies, got {config.proxy_share} of "
                f"{num_classes} classes, which is {units}; raise it"
            )
    memory = {"logit_memory_mb"}
    nca = {"denominator", "embedding_scale", "proxy_scale"}
    if config.assignment == "dynamic":
        return DynamicProxyNCA(
            units,
            **config.model_dump(include=memory | nca | {"surrogate", "margin", "use_labels"}),
            reduction=config.margin_reduction,
            class_weights=weights,
        )
    if config.assignment == "fractional":
        rows = fractional_rows(num_classes, units, seed).to(device)
    if config.surrogate == "margin":
        return ProxyNCAMargin(
            units,
            **config.model_dump(include=memory | {"margin", "proxies_per_class"}),
            reduction=config.margin_reduction,
            class_rows=rows,
            class_weights=weights,
        )
    return ProxyNCA(
        units,
        **config.model_dump(include=memory | nca | {"proxies_per_class", "label_smoothing"}),
        class_rows=rows,
        class_weights=weights,
    )


def _custom_loss(config: CustomLossConfig) -> AnyLoss:
    """Call the user's target with its options, and look at what came of it."""
    where = f"loss.target {config.target}"
    target = load_target(config.target)
    try:
        loss = target(**config.options)
    except Exception as error:  # User code: whatever it raises is told as a message.
        raise ConfigError(
            f"{where}: required a class or function that takes the options "
            f"{sorted(config.options)} and returns a loss, got {type(error).__name__}: {error}"
        ) from error
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError(
            f"{where}: required a loss without parameters, got a module with "
            f"{[name for name, _ in loss.named_parameters()]}: nothing would optimize them; "
            "use the row form, whose proxies are optimized"
        )
    if isinstance(loss, RowLoss | RoundsLoss) or (not hasattr(loss, "partial") and callable(loss)):
        return loss
    members = ("proxies_per_class", "merges", "partial", "finish", "statistics")
    missing = [name for name in members if not hasattr(loss, name)]
    raise ConfigError(
        f"{where}: required a loss of row form (with {', '.join(members)}) or a callable of pair "
        f"form (embeddings, labels -> 0-d tensor), got {type(loss).__name__} without "
        f"{', '.join(missing)}; see dml_dist/losses/forms.py"
    )
