"""From a loss section of the configuration to the loss."""

from __future__ import annotations

from typing import assert_never

from torch import nn

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
from dml_dist.losses.forms import PairLoss, RoundsLoss, RowLoss
from dml_dist.losses.pairs import AnchorLoss, Contrastive
from dml_dist.losses.pairs_margin import Margin
from dml_dist.losses.pairs_multi_similarity import MultiSimilarity
from dml_dist.losses.pairs_triplet import Triplet
from dml_dist.losses.proxy_anchor import ProxyAnchor
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.soft_triple import SoftTriple
from dml_dist.losses.softmax import ArcFace, CosFace, NormalizedSoftmax

AnyLoss = RowLoss | RoundsLoss | AnchorLoss | PairLoss
"""Over sharded proxies, in one round or several; over pairs, by anchor or as a whole."""


def build_loss(config: LossConfig, num_classes: int) -> AnyLoss:
    """Return the loss of a configuration.

    Args:
        config: The loss section.
        num_classes: Training classes, C.

    Raises:
        ConfigError: If there are fewer than two classes, or a custom loss is not what it must be.
    """
    if num_classes < 2:
        raise ConfigError(
            f"loss {config.name}: required at least 2 training classes, got {num_classes}: "
            "a single class has no negatives; add classes, or hold out fewer for validation"
        )
    options = config.model_dump(exclude={"name"})
    match config:
        case ProxyNCAConfig():
            return ProxyNCA(num_classes, **options)
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
