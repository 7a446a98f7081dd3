"""The embedding network, and the kind of each of its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dml_dist.models.pooling import GeMPool

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


BatchNormStatistics = Literal["frozen", "synchronized", "per_rank"]


@dataclass(frozen=True)
class ParameterKind:
    """Kind of a parameter, which determines its learning rate and weight decay.

    Attributes:
        part: The backbone, or the head (everything after it).
        bias: Whether it is a bias (also of normalization layers).
        norm: Whether it belongs to a normalization layer, or is the power of GeM pooling, which
            weight decay should not change either.
    """

    part: Literal["backbone", "head"]
    bias: bool
    norm: bool


class EmbeddingModel(nn.Module):
    """Backbone, pooling, optional LayerNorm, optional linear head and batch normalization.

    Attributes:
        backbone: Images (B, 3, H, W) to features (B, F, h, w) or (B, F).
        pool: Feature maps to (B, F); skipped for features (B, F).
        norm: LayerNorm without learned parameters, or the identity.
        head: Linear layer to the embedding, or the identity.
        normalize: Batch normalization without weights of embeddings, or the identity.
        embedding_size: D, the embedding dimension.
        batch_norm: Statistics of the backbone's batch normalization in training. "frozen": its
            running ones, in evaluation mode; "synchronized": of all ranks
            (`parallel/batch_norm.py`); "per_rank": of the rank's own batch.
        has_own_buffers: Whether training may change buffers of other layers too.
        is_backbone_frozen: Whether the backbone is frozen for now, see `freeze_backbone`.
        channels_last: Memory format of the images given to the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pool: nn.Module,
        norm: nn.Module,
        head: nn.Module,
        normalize: nn.Module,
        *,
        embedding_size: int,
        batch_norm: BatchNormStatistics = "frozen",
        has_own_buffers: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool
        self.norm = norm
        self.head = head
        self.normalize = normalize
        self.embedding_size = embedding_size
        self.batch_norm = batch_norm
        self.has_own_buffers = has_own_buffers
        self.is_backbone_frozen = False
        self.channels_last = channels_last

    @property
    def normalize_statistics(self) -> BatchNormStatistics:
        """Statistics of `normalize` in training: it has no trained ones that could be frozen."""
        return "per_rank" if self.batch_norm == "per_rank" else "synchronized"

    @property
    def has_changing_buffers(self) -> bool:
        """Whether buffers diverge between ranks in training and have to be synchronized."""
        return any(
            self.batch_norm == "per_rank" if isinstance(layer, _BatchNorm) else self.has_own_buffers
            for part in (self.backbone, self.normalize)
            for layer in part.modules()
            for _ in layer.buffers(recurse=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings that are NOT normalized.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B, D) in the dtype of the parameters, float32 also under autocast: only the backbone
            runs in lower precision.
        """
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            embeddings: Tensor = self.normalize(self.head(self.norm(features)))
            return embeddings

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features of the backbone, (B, F), in the dtype of the parameters."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_backbone_frozen):
            features = self.backbone(images)
        # Pooling and head in full precision: distances are sensitive to their rounding.
        with torch.autocast(images.device.type, enabled=False):
            features = features.to(next(self.parameters()).dtype)
            return self.pool(features) if features.ndim == 4 else features

    def freeze_backbone(self, freeze: bool) -> None:
        """Freeze or unfreeze the backbone, for the warm-up of the head.

        Frozen, it gets no gradient, so no backward pass goes through it, and its batch
        normalization is in evaluation mode whatever `batch_norm` says, since running statistics
        must not change.
        """
        if freeze != self.is_backbone_frozen:
            self.is_backbone_frozen = freeze
            self.train(self.training)

    def train(self, mode: bool = True) -> EmbeddingModel:
        """Set the mode; frozen batch normalization stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm == "frozen" or self.is_backbone_frozen:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


class PooledFeatures(nn.Module):
    """The features that a network's head sees, as embeddings."""

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features of images (B, 3, H, W), (B, F)."""
        return self.model.features(images)


def freeze_affine(backbone: nn.Module) -> None:
    """Disable the gradients of scale and shift of all batch normalization layers."""
    for layer in backbone.modules():
        if isinstance(layer, _BatchNorm):
            layer.requires_grad_(False)


def parameter_kind(name: str, module: nn.Module) -> ParameterKind:
    """Return the kind of one parameter.

    Args:
        name: Its full name in an EmbeddingModel, as in `named_parameters()`.
        module: The module that owns it.
    """
    part, _, rest = name.partition(".")
    last = rest.rpartition(".")[2]
    return ParameterKind(
        part="backbone" if part == "backbone" else "head",
        bias=last == "bias" or last.endswith("_bias"),
        norm=isinstance(module, (*_NORMS, GeMPool)),
    )


def parameter_kinds(model: EmbeddingModel) -> dict[str, ParameterKind]:
    """Return the kind of every parameter, in the order of `named_parameters()`."""
    owners = dict(model.named_modules())
    return {
        name: parameter_kind(name, owners[name.rpartition(".")[0]])
        for name, _ in model.named_parameters()
    }
