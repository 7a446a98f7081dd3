"""The built-in glyphs data set: images of characters in matplotlib's fonts."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter, ImageFont

from dml_dist.config.data import GlyphsConfig
from dml_dist.data.datasets.glyph_classes import GlyphClass, font_path, glyph_classes
from dml_dist.data.sample import DatasetFacts, Sample, class_order
from dml_dist.data.split import num_train
from dml_dist.errors import ConfigError
from dml_dist.random_streams import Stream, generator_of

# Images are rendered at twice the size and downsampled.
_OVERSAMPLING = 2
_MAX_ROTATION_DEGREES = 12.0
_MAX_SHEAR = 0.15
_SCALES = (0.8, 1.2)
# As shares of the image's side:
_FONT_SIZE = 0.7
_MAX_SHIFT = 0.06
_MIN_EXTENT, _MAX_EXTENT = 0.25, 0.72


@dataclass(frozen=True)
class GlyphsImporter:
    """Glyph classes chosen and split by a seed; an image is drawn when it is read."""

    config: GlyphsConfig

    def samples(self) -> list[Sample]:
        """List the images of the chosen classes.

        Raises:
            ConfigError: If there are fewer classes than configured.
        """
        config = self.config
        train, test = self._classes()
        return [
            Sample(
                key=f"{glyph.codepoint:05x}-{number:04d}",
                class_name=glyph.name,
                split=split,
                source=GlyphSource(
                    glyph.codepoint, glyph.cuts, number, config.image_size, config.seed
                ),
                super_class=glyph.script,
            )
            for split, glyphs in (("train", train), ("test", test))
            for glyph in glyphs
            for number in range(config.images_per_class)
        ]

    def facts(self) -> DatasetFacts:
        """Return the class sizes from the configuration, without drawing an image."""
        train, test = self._classes()
        each = self.config.images_per_class
        return DatasetFacts({"test": (each,) * len(test), "train": (each,) * len(train)}, True)

    def _classes(self) -> tuple[list[GlyphClass], list[GlyphClass]]:
        """Return the training and the test classes, each in label order."""
        available = glyph_classes()
        wanted = self.config.num_classes
        if wanted > len(available):
            raise ConfigError(
                f"data.dataset.num_classes must be at most {len(available)}, the number of "
                f"differently shaped characters in matplotlib's fonts, but is {wanted}"
            )
        generator = generator_of(Stream.GLYPH_CLASSES, self.config.seed)
        order = generator.permutation(len(available))[:wanted]
        half = num_train(wanted, 0.5)
        by_name = {glyph.name: glyph for glyph in available}
        train, test = (
            [by_name[name] for name in class_order(available[at].name for at in part.tolist())]
            for part in (order[:half], order[half:])
        )
        return train, test


@dataclass(frozen=True)
class GlyphSource:
    """One drawing, a function of its fields alone."""

    codepoint: int
    cuts: tuple[str, ...]
    number: int
    image_size: int
    seed: int

    def read(self) -> tuple[bytes, str]:
        """Draw the image and return it as PNG."""
        generator = generator_of(Stream.GLYPH_DRAWING, self.seed, self.codepoint, self.number)
        cut = self.cuts[generator.integers(len(self.cuts))]
        # All glyphs use one font size, so that each font is loaded once; loading takes longer than
        # drawing.
        glyph = _render(self.codepoint, cut, round(_FONT_SIZE * self.image_size * _OVERSAMPLING))
        ink = _place(glyph, self.image_size, generator)
        pixels = _paint(ink, generator)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png", compress_level=3)
        return stream.getvalue(), "png"


@lru_cache(maxsize=64)
def _font(cut: str, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(cut), pixels, layout_engine=ImageFont.Layout.BASIC)


def _render(codepoint: int, cut: str, pixels: int) -> Image.Image:
    """Return the ink of a glyph at a font size, cropped to it."""
    mask = _font(cut, pixels).getmask(chr(codepoint), mode="L")
    return Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())


def _place(mask: Image.Image, image_size: int, generator: np.random.Generator) -> np.ndarray:
    """Fit, rotate, shear, scale, shift and blur a glyph to (S, S) float32 ink in [0, 1]."""
    side = image_size * _OVERSAMPLING
    angle = math.radians(generator.uniform(-_MAX_ROTATION_DEGREES, _MAX_ROTATION_DEGREES))
    shear = generator.uniform(-_MAX_SHEAR, _MAX_SHEAR)
    extent = max(mask.size)
    fitted = min(max(extent, _MIN_EXTENT * side), _MAX_EXTENT * side)
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
    ).reduce(_OVERSAMPLING)
    radius = generator.uniform(0.0, 0.02) * image_size
    return np.asarray(placed.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _paint(ink: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return dark ink on tinted paper with noise, (S, S, 3) uint8."""
    paper = generator.uniform(185, 245) + generator.uniform(-18, 18, size=3)
    color = generator.uniform(10, 80) + generator.uniform(-10, 30, size=3)
    noise = generator.normal(0.0, generator.uniform(2, 9), size=(*ink.shape, 3))
    image = paper + ink[:, :, None] * (color - paper) + noise
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
