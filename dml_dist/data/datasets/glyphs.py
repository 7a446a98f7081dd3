"""The built-in glyphs data set: images of characters in matplotlib's fonts."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from dml_dist.config.data import GlyphsConfig
from dml_dist.data.datasets.glyph_classes import GlyphClass, glyph_classes
from dml_dist.data.datasets.glyph_drawing import OVERSAMPLING, paint, place, render
from dml_dist.data.sample import DatasetFacts, Sample, class_order
from dml_dist.data.split import num_train
from dml_dist.errors import ConfigError
from dml_dist.random_streams import Stream, generator_of

# As shares of the image's side:
_FONT_SIZE = 0.7
_EXTENTS = (0.25, 0.72)


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
        glyph = render(self.codepoint, cut, round(_FONT_SIZE * self.image_size * OVERSAMPLING))
        ink = place(glyph, self.image_size, _EXTENTS, generator)
        pixels = paint(ink, generator)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png", compress_level=3)
        return stream.getvalue(), "png"
