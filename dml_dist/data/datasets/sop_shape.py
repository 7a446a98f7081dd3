"""Drawn stand-ins of Stanford Online Products: as many images, classes and super-classes.

A class is an ordered pair of characters. A super-class is a range of code points, so its classes
share characters and those of others do not. Half of the characters of each super-class are drawn
for training and the other half for testing: no character is in both.

The numbers of images per class are an approximation, not the histogram of the data set: they fall
steadily from 2 to 12 and add up to the number of images.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dml_dist.config.data import CountsConfig, SOPShapeConfig
from dml_dist.data.datasets.glyph_classes import GlyphClass, glyph_classes
from dml_dist.data.datasets.glyph_drawing import OVERSAMPLING, paint, place, render
from dml_dist.data.sample import DatasetFacts, Sample
from dml_dist.partition import all_bounds
from dml_dist.random_streams import Stream, generator_of

NUM_SUPER_CLASSES = 12
_SPLITS = ("train", "test")
_SMALLEST, _LARGEST = 2, 12  # images of a class
# As shares of the image's side:
_FONT_SIZE = 0.45
_GAP = 0.04
_EXTENTS = (0.25, 0.9)
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class SOPShapeImporter:
    """Pairs of characters chosen and split by a seed; an image is drawn when it is read."""

    config: SOPShapeConfig

    def samples(self) -> list[Sample]:
        """List the images of all classes."""
        super_classes = _super_classes(self.config.seed)
        return [sample for split in _SPLITS for sample in self._samples_of(split, super_classes)]

    def facts(self) -> DatasetFacts:
        """Return the class sizes from the configuration, without drawing an image."""
        sizes = {split: tuple(self._draw_sizes(split)[0].tolist()) for split in _SPLITS}
        return DatasetFacts(sizes, exact=True)

    def _draw_sizes(self, split: str) -> tuple[np.ndarray, np.random.Generator]:
        """Return the sizes of a split's classes in label order, and what draws its pairs."""
        counts: CountsConfig = getattr(self.config, split)
        generator = generator_of(Stream.GLYPH_CLASSES, self.config.seed, _SPLITS.index(split))
        return generator.permutation(class_sizes(counts.classes, counts.images)), generator

    def _samples_of(self, split: str, super_classes: list[_SuperClass]) -> Iterator[Sample]:
        config = self.config
        sizes, generator = self._draw_sizes(split)
        ranges = all_bounds(len(sizes), NUM_SUPER_CLASSES)
        for super_class, (low, high) in zip(super_classes, ranges, strict=True):
            glyphs = super_class.glyphs[split]
            pairs = np.sort(generator.choice(len(glyphs) ** 2, high - low, replace=False))
            for pair, size in zip(pairs.tolist(), sizes[low:high].tolist(), strict=True):
                first, second = (glyphs[at] for at in divmod(pair, len(glyphs)))
                class_name = f"{first.codepoint:05x}-{second.codepoint:05x}"
                for number, (one, other) in enumerate(generator.random((size, 2)).tolist()):
                    source = PairSource(
                        (first.codepoint, second.codepoint),
                        (_pick(first.cuts, one), _pick(second.cuts, other)),
                        number,
                        config.image_size,
                        config.seed,
                    )
                    key = f"{class_name}-{number:02d}"
                    yield Sample(key, class_name, split, source, super_class.name)


@dataclass(frozen=True)
class PairSource:
    """One drawing of two characters, a function of its fields alone."""

    codepoints: tuple[int, int]
    cuts: tuple[str, str]
    number: int
    image_size: int
    seed: int

    def read(self) -> tuple[bytes, str]:
        """Draw the image and return it as JPEG."""
        generator = generator_of(Stream.GLYPH_DRAWING, self.seed, *self.codepoints, self.number)
        side = self.image_size * OVERSAMPLING
        left, right = (
            render(codepoint, cut, round(_FONT_SIZE * side))
            for codepoint, cut in zip(self.codepoints, self.cuts, strict=True)
        )
        gap = round(_GAP * side)
        height = max(left.height, right.height)
        both = Image.new("L", (left.width + gap + right.width, height))
        both.paste(left, (0, (height - left.height) // 2))
        both.paste(right, (left.width + gap, (height - right.height) // 2))
        ink = place(both, self.image_size, _EXTENTS, generator)
        stream = io.BytesIO()
        Image.fromarray(paint(ink, generator)).save(stream, "jpeg", quality=_JPEG_QUALITY)
        return stream.getvalue(), "jpg"


def class_sizes(num_classes: int, num_images: int) -> np.ndarray:
    """Return the numbers of images of classes, ascending from 2 to 12.

    They are the steps between roundings of a convex curve that ends at `num_images`, whose slope
    grows from 2 to 12 with a power of the position.
    """
    above = num_images / num_classes - _SMALLEST
    position = np.arange(num_classes + 1) / num_classes
    curve = _SMALLEST * position + above * position ** ((_LARGEST - _SMALLEST) / above)
    return np.diff(np.rint(curve * num_classes).astype(np.int64))


@dataclass(frozen=True)
class _SuperClass:
    name: str
    glyphs: dict[str, list[GlyphClass]]
    """Split -> its characters by code point."""


def _super_classes(seed: int) -> list[_SuperClass]:
    """Divide all characters into super-classes, and those of each into splits."""
    available = glyph_classes()
    generator = generator_of(Stream.GLYPH_CLASSES, seed, len(_SPLITS))
    found = []
    for low, high in all_bounds(len(available), NUM_SUPER_CLASSES):
        glyphs = available[low:high]
        halves = np.array_split(generator.permutation(len(glyphs)), len(_SPLITS))
        found.append(
            _SuperClass(
                f"U+{glyphs[0].codepoint:04X} to U+{glyphs[-1].codepoint:04X}",
                {
                    split: [glyphs[at] for at in np.sort(half).tolist()]
                    for split, half in zip(_SPLITS, halves, strict=True)
                },
            )
        )
    return found


def _pick(cuts: tuple[str, ...], position: float) -> str:
    return cuts[int(position * len(cuts))]
