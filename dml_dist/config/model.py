"""Configuration of the network: backbone, pooling and embedding head."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import CustomSection, PositiveFloat, PositiveInt, Section


class Conv4Config(Section):
    """Four blocks of convolution, GroupNorm, ReLU; the first three halve the image."""

    name: Literal["conv4"] = "conv4"

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Channels of every block."""


class _ResNetConfig(Section):
    weights: str = "none"
    """`none`, a torchvision weight name (`IMAGENET1K_V1`), or the path of a state dict."""

    norm: Literal["batch", "group"] = "batch"
    """Normalisation layers; group needs `weights: none`."""

    freeze_batch_norm: bool = True
    """Batch normalisation uses the statistics of the weights and never updates them."""

    @model_validator(mode="after")
    def _check(self) -> _ResNetConfig:
        if self.norm == "group" and self.weights != "none":
            raise ValueError(
                f"norm: group needs weights: none, got weights: {self.weights}; "
                "the weights were trained with batch normalisation"
            )
        if self.norm == "batch" and self.weights == "none" and self.freeze_batch_norm:
            raise ValueError(
                "frozen batch normalisation statistics need trained weights, got weights: none; "
                "set norm: group, or freeze_batch_norm: false, or weights: IMAGENET1K_V1"
            )
        return self


class ResNet18Config(_ResNetConfig):
    """torchvision's ResNet-18 without its classifier (512 channels)."""

    name: Literal["resnet18"] = "resnet18"


class ResNet50Config(_ResNetConfig):
    """torchvision's ResNet-50 without its classifier (2,048 channels)."""

    name: Literal["resnet50"] = "resnet50"


class CustomBackboneConfig(CustomSection):
    """`target(**options)` gives a module with `num_features`: images to (B, F) or (B, F, H, W)."""

    name: Literal["custom"] = "custom"


BackboneConfig = Annotated[
    Conv4Config | ResNet18Config | ResNet50Config | CustomBackboneConfig,
    Field(discriminator="name"),
]


class ModelConfig(Section):
    """The embedding network."""

    backbone: BackboneConfig = Conv4Config()
    """The network that turns an image into a feature map."""

    pooling: Literal["avg", "max", "avg+max", "gem"] = "avg"
    """How a feature map becomes one vector; gem is the generalised mean with a learned power."""

    gem_power: PositiveFloat = 3.0
    """Start value of the power of `pooling: gem`."""

    layer_norm: bool = False
    """LayerNorm without learned parameters between pooling and the linear head."""

    embedding_size: PositiveInt = 128
    """D, the number of coordinates of an embedding."""

    channels_last: bool = False
    """Memory format of images and weights; pays on CUDA with convolutional networks."""
