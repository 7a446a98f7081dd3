"""Drawing of characters: an outline of a font, placed and painted at random."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter, ImageFont

from dml_dist.data.datasets.glyph_classes import font_path

OVERSAMPLING = 2
"""Images are rendered at this multiple of their size and downsampled."""

_MAX_ROTATION_DEGREES = 12.0
_MAX_SHEAR = 0.15
_SCALES = (0.8, 1.2)
_MAX_SHIFT = 0.06  # as a share of the image's side


@lru_cache(maxsize=64)
def _font(cut: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(cut), pixels, layout_engine=ImageFont.Layout.BASIC)


def render(codepoint: int, cut: str, pixels: int) -> Image.Image:
    """Return the ink of a glyph at a font size, cropped to it."""
    mask = _font(cut, pixels).getmask(chr(codepoint), mode="L")
    return Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())


def place(
    mask: Image.Image,
    image_size: int,
    extents: tuple[float, float],
    generator: np.random.Generator,
) -> np.ndarray:
    """Fit, rotate, shear, scale, shift and blur ink to an image.

    Args:
        mask: The ink, cropped to it.
        image_size: S, in pixels.
        extents: Smallest and largest length of the fitted ink, as shares of S.
        generator: Draws everything else.

    Returns:
        (S, S) float32 ink in [0, 1].
    """
    side = image_size * OVERSAMPLING
    angle = math.radians(generator.uniform(-_MAX_ROTATION_DEGREES, _MAX_ROTATION_DEGREES))
    shear = generator.uniform(-_MAX_SHEAR, _MAX_SHEAR)
    extent = max(mask.size)
    low, high = extents
    fitted = min(max(extent, low * side), high * side)
    scale = generator.uniform(*_SCALES) * fitted / extent
    shift_xy = generator.uniform(-_MAX_SHIFT, _MAX_SHIFT, size=2) * side
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = scale * rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    # PIL takes the inverse map, from output to input pixels; the centers map to each other.
    inverse = np.linalg.inv(forward)
    middle_in = np.array(mask.size) / 2
    origin = middle_in - inverse @ (side / 2 + shift_xy)
    (a, b), (d, e) = inverse.tolist()
    placed = mask.transform(
        (side, side),
        Image.Transform.AFFINE,
        (a, b, origin[0], d, e, origin[1]),
        resample=Image.Resampling.BILINEAR,
    ).reduce(OVERSAMPLING)
    radius = generator.uniform(0.0, 0.02) * image_size
    return np.asarray(placed.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def paint(ink: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return dark ink on tinted paper with noise, (S, S, 3) uint8."""
    paper = generator.uniform(185, 245) + generator.uniform(-18, 18, size=3)
    color = generator.uniform(10, 80) + generator.uniform(-10, 30, size=3)
    noise = generator.normal(0.0, generator.uniform(2, 9), size=(*ink.shape, 3))
    image = paper + ink[:, :, None] * (color - paper) + noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
