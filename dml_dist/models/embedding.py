"""The embedding network, and what kind of parameter each of its parameters is."""

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
    """What decides the learning rate and weight decay of a parameter.

    Attributes:
        part: The backbone, or the head (everything after it).
        bias: Whether it is added to a layer's output (also of normalisation layers).
        norm: Whether it belongs to a normalisation layer, or is the power of GeM pooling, which
            weight decay would pull away from its meaning just the same.
    """

    part: Literal["backbone", "head"]
    bias: bool
    norm: bool


class EmbeddingModel(nn.Module):
    """Backbone, pooling, optional LayerNorm and linear head.

    Attributes:
        backbone: Images (B, 3, H, W) to features (B, F, h, w) or (B, F).
        pool: Feature maps to (B, F); not used for features (B, F).
        norm: LayerNorm without learned parameters, or the identity.
        head: Linear layer to the embedding.
        batch_norm: Whose statistics batch normalisation takes in training. "frozen": its running
            ones, which it never updates, because it stays in evaluation mode; "synchronized": all
            ranks' (`parallel/batch_norm.py`); "per_rank": its own rank's.
        has_own_buffers: Whether training may change buffers of other layers too.
        holds_backbone: The same for the time being, see `hold_backbone`.
        channels_last: Memory format of the images given to the backbone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pool: nn.Module,
        norm: nn.Module,
        head: nn.Linear,
        *,
        batch_norm: BatchNormStatistics = "frozen",
        has_own_buffers: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = pool
        self.norm = norm
        self.head = head
        self.batch_norm = batch_norm
        self.has_own_buffers = has_own_buffers
        self.holds_backbone = False
        self.channels_last = channels_last

    @property
    def embedding_size(self) -> int:
        """D, the number of coordinates of an embedding."""
        return self.head.out_features

    @property
    def has_changing_buffers(self) -> bool:
        """Whether training changes buffers differently on each rank, so that they are shared."""
        return any(
            self.batch_norm == "per_rank" if isinstance(layer, _BatchNorm) else self.has_own_buffers
            for layer in self.backbone.modules()
            for _ in layer.buffers(recurse=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings that are NOT normalised.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B, D) in the dtype of the head, float32 also under autocast: only the backbone runs
            in lower precision.
        """
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            if features.ndim == 4:
                features = self.pool(features)
            embeddings: Tensor = self.head(self.norm(features))
            return embeddings

    def hold_backbone(self, hold: bool) -> None:
        """Begin or end the warm-up, in which the backbone stays as it is.

        Its batch normalisation then is in evaluation mode, whatever `batch_norm` says: the
        running statistics are part of what must not change. Gradients are the caller's.
        """
        if hold != self.holds_backbone:
            self.holds_backbone = hold
            self.train(self.training)

    def train(self, mode: bool = True) -> EmbeddingModel:
        """Set the mode; frozen batch normalisation stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm == "frozen" or self.holds_backbone:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def freeze_affine(backbone: nn.Module) -> None:
    """Leave scale and shift of all batch normalisation as they are: they get no gradient."""
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
