"""Image transforms: random views in training, one fixed view in evaluation."""

from __future__ import annotations

import math
import platform
from typing import Protocol, assert_never, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dml_dist.config.custom import call_target
from dml_dist.config.data import (
    CustomTransformConfig,
    StandardTransformConfig,
    TransformConfig,
)
from dml_dist.errors import ConfigError

# Of a longer image the evaluation takes the middle: 2 x 4000 pixels would become 224 x 448,000.
_MAX_ASPECT = 8

# Elsewhere torchvision, whose pixels ours are, goes through float32 and rounds.
_HAS_BILINEAR_BYTES = torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
) or platform.machine() in ("aarch64", "arm64")


class Transform(Protocol):
    """An image transform; picklable, without state between calls."""

    def train(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return a random view of an image.

        Args:
            image: (3, H, W) uint8.
            generator: The only source of randomness: it is named by the seed, the global step and
                the position in the global batch, never by the image.

        Returns:
            (3, H', W') float32, the same shape for all images.
        """
        ...

    def evaluation(self, image: Tensor) -> Tensor:
        """Return the one view of an image, (3, H', W') float32, the same shape for all images."""
        ...


class StandardTransform:
    """Random resized crop and flip in training, resize and centre crop in evaluation.

    Resizing is bilinear or bicubic with antialiasing and works on uint8; images smaller than the
    crop are enlarged. Channels are then scaled to (value / 255 - mean) / std.
    """

    def __init__(self, config: StandardTransformConfig) -> None:
        self.config = config
        self._mode = config.resize_mode
        self._mean = 255.0 * torch.tensor(config.mean).view(3, 1, 1)
        self._std = 255.0 * torch.tensor(config.std).view(3, 1, 1)

    def train(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return a random crop of the image, (3, size, size) float32, flipped or not."""
        return self.normalize(self.train_pixels(image, generator))

    def evaluation(self, image: Tensor) -> Tensor:
        """Return the middle of the image, (3, size, size) float32."""
        return self.normalize(self.evaluation_pixels(image))

    def train_pixels(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Return what `train` normalises, (3, size, size) uint8."""
        config = self.config
        flip = generator.random() < config.flip
        height, width = image.shape[-2:]
        top, left, crop_height, crop_width = draw_crop(
            height, width, config.crop_scale, config.crop_ratio, generator
        )
        view = image[:, top : top + crop_height, left : left + crop_width]
        view = self._resize(view, (config.size, config.size))
        return view.flip(-1) if flip else view

    def evaluation_pixels(self, image: Tensor) -> Tensor:
        """Return what `evaluation` normalises, (3, size, size) uint8."""
        size, image = self.config.size, _without_ends(image)
        height, width = image.shape[-2:]
        shorter = self.config.resize or size
        longer = int(shorter * max(height, width) / min(height, width))
        image = self._resize(image, (shorter, longer) if height <= width else (longer, shorter))
        top, left = (round((side - size) / 2) for side in image.shape[-2:])
        return image[:, top : top + size, left : left + size]

    def _resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what torchvision's `resize` does, which takes 10 us longer.

        It is not imported: that takes as long as importing torch, in every dry run.
        """
        if image.shape[-2:] == size:
            return image
        if _HAS_BILINEAR_BYTES or self._mode == "bicubic":
            return interpolate(image[None], size, mode=self._mode, antialias=True)[0]
        levels = interpolate(image[None].float(), size, mode=self._mode, antialias=True)[0]
        return levels.round_().to(torch.uint8)

    def normalize(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """Return (pixels / 255 - mean) / std of (3, H, W) uint8 pixels, (3, H, W) float32.

        Args:
            pixels: Decoded or resized, planes first or channels side by side.
            out: Where the result goes, if given.
        """
        if out is None:
            # Planes first: three times as fast for what follows as the decoders' order.
            out = torch.empty(pixels.shape)
        return torch.sub(pixels, self._mean, out=out).div_(self._std)


def _without_ends(image: Tensor) -> Tensor:
    """Return the middle of an image that is far longer than wide, others as they are.

    What is cut off is outside of the centre crop, whose side is the shorter one's at most.
    """
    height, width = image.shape[-2:]
    longest = _MAX_ASPECT * min(height, width)
    # An even number of pixels goes, so that the middle stays where it is.
    cut_rows, cut_columns = (max(0, side - longest) // 2 for side in (height, width))
    return image[:, cut_rows : height - cut_rows, cut_columns : width - cut_columns]


def draw_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop, by the rule of torchvision's RandomResizedCrop.

    The share of the area is uniform in `scale` and the logarithm of width / height uniform in
    `ratio`; after ten boxes that do not fit, the largest centred box of an allowed ratio.

    Returns:
        (top, left, crop height, crop width) in pixels, inside the image, at least 1 x 1.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for share, log_ratio, down, right in generator.random((10, 4)).tolist():
        target = area * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(log_low + (log_high - log_low) * log_ratio)
        crop_width = round(math.sqrt(target * aspect))
        crop_height = round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            # down and right are below 1, so that the box stays inside the image.
            top = int(down * (height - crop_height + 1))
            left = int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        crop_width = max(1, round(height * ratio[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def build_transform(config: TransformConfig) -> Transform:
    """Return the transform of the section `data.transform`.

    Raises:
        ConfigError: If a custom target cannot be loaded, or lacks `train` or `evaluation`.
    """
    match config:
        case StandardTransformConfig():
            return StandardTransform(config)
        case CustomTransformConfig():
            return _build_custom(config)
        case _:
            assert_never(config)


def _build_custom(config: CustomTransformConfig) -> Transform:
    try:
        transform = call_target(config.target, options=config.options)
    except TypeError as error:
        raise ConfigError(
            f"data.transform: {config.target} could not be called with options "
            f"{config.options}: {error}"
        ) from error
    for method in ("train", "evaluation"):
        if not callable(getattr(transform, method, None)):
            raise ConfigError(
                f"data.transform: {config.target} must give an object with methods "
                "train(image, generator) and evaluation(image), "
                f"but its {type(transform).__name__} has no {method}"
            )
    return cast(Transform, transform)
