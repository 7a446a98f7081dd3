"""Configuration of the network: backbone, pooling and embedding head."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import CustomSection, PositiveFloat, PositiveInt, Section
from dml_dist.config.data import StandardTransformConfig, TransformConfig

PACKAGE = "package:"
"""Before the name of a Python package with a file of weights."""


class BatchNormConfig(Section):
    """Batch normalisation: source of the statistics, and whether scale and shift are trained.

    Only `per_rank` makes the result depend on the number of ranks.
    """

    statistics: Literal["frozen", "synchronized", "per_rank"] = "frozen"
    """Frozen: those of the weights, never updated. Synchronized: of the global batch, the same for
    any number of ranks. Per_rank: of each rank's own images; evaluation uses those of rank 0.
    """

    affine: Literal["trained", "frozen"] = "trained"
    """Scale and shift of each channel are trained, or stay as they are in the weights."""


class CustomBatchNormConfig(BatchNormConfig):
    """As for other backbones, but by default with the statistics of the global batch.

    It applies to layers of the classes BatchNorm1d, BatchNorm2d and BatchNorm3d.
    """

    statistics: Literal["frozen", "synchronized", "per_rank"] = "synchronized"
    """Frozen: those of the module as it was built, never updated. Synchronized: of the global
    batch. Per_rank: of each rank's own images; evaluation uses those of rank 0.
    """


class Conv4Config(Section):
    """Four blocks of convolution, normalisation, ReLU; the first three halve the resolution."""

    name: Literal["conv4"] = "conv4"

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Channels of every block."""

    norm: Literal["group", "batch"] = "group"
    """Normalisation layers."""

    batch_norm: CustomBatchNormConfig = CustomBatchNormConfig()
    """Statistics of batch normalisation, of the global batch or per rank; for `norm: batch`."""

    @property
    def normalization(self) -> BatchNormConfig | None:
        """The settings of batch normalisation, or None with group normalisation."""
        return self.batch_norm if self.norm == "batch" else None

    @model_validator(mode="after")
    def _check_norm(self) -> Conv4Config:
        if self.norm == "group" and self.batch_norm != CustomBatchNormConfig():
            raise ValueError("batch_norm needs norm: batch, got norm: group; leave batch_norm out")
        if "frozen" in (self.batch_norm.statistics, self.batch_norm.affine):
            raise ValueError(
                "frozen batch normalisation needs trained weights, which conv4 does not have; "
                "leave batch_norm out, or set batch_norm.statistics: per_rank"
            )
        return self


class _TorchvisionConfig(Section):
    weights: str = "none"
    """`none`, a torchvision weight name (`IMAGENET1K_V1`), the path of a state dict (torch.save or
    safetensors), or `package:NAME`, an installed Python package with one.
    """

    @property
    def normalization(self) -> BatchNormConfig | None:
        """The settings of batch normalisation, or None for a network without it."""
        return None


class _StochasticDepthConfig(_TorchvisionConfig):
    stochastic_depth: bool = True
    """Randomly skip residual blocks in training, at the network's default rates.

    Each rank samples for its own images, so the result depends on the number of ranks.
    """


class _BatchNormBackboneConfig(_TorchvisionConfig):
    batch_norm: BatchNormConfig = BatchNormConfig()
    """Statistics and affine parameters of batch normalisation."""

    @property
    def normalization(self) -> BatchNormConfig | None:
        """The settings of batch normalisation."""
        return self.batch_norm

    @model_validator(mode="after")
    def _check_frozen(self) -> _BatchNormBackboneConfig:
        batch_norm = self.normalization
        if batch_norm is None or self.weights != "none":
            return self
        group = "or norm: group, " if "norm" in type(self).model_fields else ""
        if batch_norm.statistics == "frozen":
            raise ValueError(
                "frozen batch normalisation statistics need trained weights, got weights: none; "
                f"set batch_norm.statistics: synchronized, {group}or weights: IMAGENET1K_V1"
            )
        if batch_norm.affine == "frozen":
            raise ValueError(
                "frozen affine parameters of batch normalisation need trained weights, got "
                f"weights: none; set batch_norm.affine: trained, {group}or weights: IMAGENET1K_V1"
            )
        return self


class ResNetConfig(_BatchNormBackboneConfig):
    """torchvision's ResNet without its classifier (512 channels up to 34, 2,048 from 50 on)."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"

    norm: Literal["batch", "group"] = "batch"
    """Normalisation layers; group needs `weights: none`."""

    @property
    def normalization(self) -> BatchNormConfig | None:
        """The settings of batch normalisation, or None with group normalisation."""
        return self.batch_norm if self.norm == "batch" else None

    @model_validator(mode="after")
    def _check_group(self) -> ResNetConfig:
        if self.norm == "group" and self.weights != "none":
            raise ValueError(
                f"norm: group needs weights: none, got weights: {self.weights}; "
                "the weights were trained with batch normalisation"
            )
        if self.norm == "group" and self.batch_norm != BatchNormConfig():
            raise ValueError("batch_norm needs norm: batch, got norm: group; leave batch_norm out")
        return self


class GoogLeNetConfig(_BatchNormBackboneConfig):
    """torchvision's GoogLeNet with batch normalisation, no auxiliary classifiers (1,024 channels).

    With `weights`, inputs normalised by ImageNet's mean and std (the default of `data.transform`)
    are rescaled to the range that those weights were trained with, as in torchvision.
    """

    name: Literal["googlenet"] = "googlenet"


class EfficientNetConfig(_BatchNormBackboneConfig, _StochasticDepthConfig):
    """torchvision's EfficientNet (v1 or v2) without its classifier (1,280 to 2,560 channels)."""

    name: Literal[
        "efficientnet_b0",
        "efficientnet_b1",
        "efficientnet_b2",
        "efficientnet_b3",
        "efficientnet_b4",
        "efficientnet_b5",
        "efficientnet_b6",
        "efficientnet_b7",
        "efficientnet_v2_s",
        "efficientnet_v2_m",
        "efficientnet_v2_l",
    ] = "efficientnet_b0"


class ConvNeXtConfig(_StochasticDepthConfig):
    """torchvision's ConvNeXt without its classifier (768 to 1,536 channels).

    The LayerNorm after the pooling is part of the classifier; `model.layer_norm` adds one.
    """

    name: Literal["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"] = (
        "convnext_tiny"
    )


class SwinConfig(_StochasticDepthConfig):
    """torchvision's Swin Transformer (v1 or v2) without its classifier (768 or 1,024 channels)."""

    name: Literal["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"] = "swin_t"


class ViTConfig(_TorchvisionConfig):
    """torchvision's Vision Transformer; its class token is the feature vector, without pooling.

    768-d with vit_b, 1,024-d with vit_l, 1,280-d with vit_h.
    """

    name: Literal["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"] = "vit_b_16"

    image_size: PositiveInt = 224
    """Side of the images in pixels, which `data.transform.size` must equal; a multiple of the side
    of a patch (the last number of the name). Weights need a fixed size, most of them 224.
    """

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return int(self.name.rpartition("_")[2])

    @model_validator(mode="after")
    def _check_patches(self) -> ViTConfig:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size of {self.name} must be a multiple of {self.patch_size}, the side of "
                f"its patches, got {self.image_size}"
            )
        return self


TorchvisionConfig = (
    ResNetConfig | GoogLeNetConfig | EfficientNetConfig | ConvNeXtConfig | SwinConfig | ViTConfig
)
"""Networks of torchvision."""


class TimmConfig(Section):
    """A network of timm (extra `timm`) without its classifier, never downloaded.

    Inputs normalised by ImageNet's mean and std (the default of `data.transform`) are rescaled to
    the mean and std of timm's data configuration, which the plan shows. Features are a map that
    `pooling` reduces, or the vectors of timm's own pooling where layers follow it (token pooling of
    Vision Transformers, ConvNeXt).
    """

    name: Literal["timm"] = "timm"

    model: str
    """Name of the network, one of timm.list_models(), with or without the tag of its weights."""

    weights: str = "none"
    """`none`, the path of a state dict (torch.save or safetensors), or `package:NAME` or
    `package:NAME/PATH`, one in an installed Python package.
    """

    batch_norm: BatchNormConfig = BatchNormConfig()
    """Statistics and affine parameters of batch normalisation, if it has any."""

    image_size: PositiveInt | None = None
    """Side of the images of a network for one size, which `data.transform.size` must equal (Vision
    Transformers, Swin); null is timm's for it.
    """

    @property
    def normalization(self) -> BatchNormConfig | None:
        """The settings of batch normalisation."""
        return self.batch_norm


class CustomBackboneConfig(CustomSection):
    """`target(**options)` is a module with `num_features`: images to (B, F) or (B, F, H, W)."""

    name: Literal["custom"] = "custom"

    batch_norm: CustomBatchNormConfig = CustomBatchNormConfig()
    """Settings of its batch normalisation layers, if any."""


BackboneConfig = Annotated[
    Conv4Config
    | ResNetConfig
    | GoogLeNetConfig
    | EfficientNetConfig
    | ConvNeXtConfig
    | SwinConfig
    | ViTConfig
    | TimmConfig
    | CustomBackboneConfig,
    Field(discriminator="name"),
]


class ModelConfig(Section):
    """The embedding network."""

    backbone: BackboneConfig = Conv4Config()
    """The network from an image to a feature map."""

    pooling: Literal["avg", "max", "avg+max", "gem"] = "avg"
    """How a feature map is reduced to a vector; gem is the generalised mean with a learned power.

    Ignored if the backbone returns vectors.
    """

    gem_power: PositiveFloat = 3.0
    """Initial power of `pooling: gem`."""

    layer_norm: bool = False
    """LayerNorm without learned parameters between pooling and the linear head."""

    head: Literal["linear", "none"] = "linear"
    """What follows: a linear layer, or nothing, so that the features are the embedding."""

    embedding_size: PositiveInt = 128
    """D, the dimension of an embedding."""

    normalize: Literal["none", "batch"] = "none"
    """Normalisation of embeddings, also with `head: none`: batch normalisation without weights
    spreads them from the first step on, which dynamic assignment needs. Its statistics are those of
    the global batch, or per rank if `backbone.batch_norm.statistics` is `per_rank`. Before the
    first step it changes nothing.
    """

    channels_last: bool = False
    """Memory format of images and weights; faster on CUDA, and on a CPU for networks of depthwise
    convolutions (EfficientNet-Lite0: 0.8 s a step instead of 1.1 s).
    """

    @model_validator(mode="after")
    def _check_pooling(self) -> ModelConfig:
        if isinstance(self.backbone, ViTConfig) and self.pooling != "avg":
            raise ValueError(
                f"pooling: {self.pooling} needs a feature map, got {self.backbone.name}, which "
                "returns its class token, a vector; leave pooling out"
            )
        return self


def check_images(backbone: BackboneConfig, transform: TransformConfig) -> None:
    """Raise ValueError if a transform gives images that the network does not take."""
    if not isinstance(transform, StandardTransformConfig):
        return
    # The positional embedding of a Vision Transformer has one size.
    side = backbone.image_size if isinstance(backbone, ViTConfig | TimmConfig) else None
    if side and transform.size != side:
        raise ValueError(
            f"data.transform.size must equal the image_size {side} of "
            f"model.backbone {backbone.name}, got {transform.size}"
        )
    fields = type(transform).model_fields
    changed = [key for key in ("mean", "std") if getattr(transform, key) != fields[key].default]
    if isinstance(backbone, TimmConfig) and changed:
        raise ValueError(
            f"data.transform.{changed[0]} must have its default with model.backbone timm, which "
            f"rescales its input to its own mean and std, got {getattr(transform, changed[0])}; "
            "leave mean and std out"
        )
