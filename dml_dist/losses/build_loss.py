"""Build a loss from its configuration section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from dml_dist.config.custom import call_target
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
"""A loss over sharded proxies (one or several rounds) or over pairs (by anchor or whole batch)."""


def build_loss(
    config: LossConfig,
    num_classes: int,
    *,
    class_sizes: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AnyLoss:
    """Build the loss that a configuration section describes.

    Args:
        config: The loss section.
        num_classes: Training classes, C.
        class_sizes: Images of each training class; needed for class weights.
        seed: Seed of the class-to-proxy map of fractional assignment, and of the positives that
            dynamic assignment draws.
        device: Device of the class-to-proxy map and the class weights.

    Raises:
        ConfigError: If there are fewer than two classes or proxies, class sizes are missing, or a
            custom loss does not fit either interface of `losses/forms.py`.
    """
    if num_classes < 2:
        raise ConfigError(
            f"loss {config.name} needs at least 2 training classes for negatives, but the training "
            f"split has {num_classes}; add classes, or hold out fewer for validation"
        )
    # negatives_share is a setting of the proxy table's sampling, not of the formula.
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
    """Return the Proxy-NCA variant for the configured surrogate and assignment."""
    weights: Tensor | None = None
    if config.class_weighting != "none":
        if class_sizes is None or len(class_sizes) != num_classes:
            raise ConfigError(
                f"loss.class_weighting {config.class_weighting} needs the image count of each of "
                f"the {num_classes} training classes, but class_sizes has "
                f"{'no entries' if class_sizes is None else f'{len(class_sizes)} entries'}; "
                "pass one size per class"
            )
        weights = class_weights(config.class_weighting, class_sizes, config.effective_number_beta)
        weights = weights.to(device)
    units, rows = num_classes, None
    if config.assignment != "static":
        units = int(config.proxy_share * num_classes + 0.5)
        if units < 2:
            raise ConfigError(
                f"loss.proxy_share {config.proxy_share} of {num_classes} classes is {units}, but "
                f"{config.assignment} assignment needs at least 2 proxies; raise it"
            )
    memory = {"logit_memory_mb"}
    nca = {"denominator", "embedding_scale", "proxy_scale"}
    if config.assignment == "dynamic":
        return DynamicProxyNCA(
            units,
            **config.model_dump(include=memory | nca | {"surrogate", "margin", "positives"}),
            reduction=config.margin_reduction,
            class_weights=weights,
            seed=seed,
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
    """Call the user's target with its options, and validate the result."""
    where = f"loss.target {config.target}"
    try:
        loss = call_target(config.target, options=config.options)
    except ConfigError:
        raise
    except Exception as error:  # User code may raise anything.
        raise ConfigError(
            f"{where} failed when called with the options {sorted(config.options)}: "
            f"{type(error).__name__}: {error}; it must accept loss.options and return a loss"
        ) from error
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError(
            f"{where} returned a module with the parameters "
            f"{[name for name, _ in loss.named_parameters()]}, which no optimizer would update; "
            "use the row form, whose proxies are optimized"
        )
    if isinstance(loss, RowLoss | RoundsLoss) or (not hasattr(loss, "partial") and callable(loss)):
        return loss
    members = ("proxies_per_class", "merges", "partial", "finish", "statistics")
    missing = [name for name in members if not hasattr(loss, name)]
    raise ConfigError(
        f"{where} returned {type(loss).__name__}, which lacks {', '.join(missing)}; a custom loss "
        f"is either of row form (with {', '.join(members)}) or a callable of pair form "
        "(embeddings, labels -> 0-d tensor), see dml_dist/losses/forms.py"
    )
