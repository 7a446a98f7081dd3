from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_dist.config.data import GlyphsConfig
from dml_dist.data.datasets.glyph_classes import FAMILIES, glyph_classes
from dml_dist.data.datasets.glyphs import GlyphsImporter, GlyphSource
from dml_dist.errors import ConfigError
from tests.unit.importer_suite import ImporterSuite


class TestGlyphsAsImporter(ImporterSuite):
    def config(self, folder: Path) -> GlyphsConfig:
        return GlyphsConfig(num_classes=9, images_per_class=3)


def decoded(source: GlyphSource) -> np.ndarray:
    data, extension = source.read()
    assert extension == "png"
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def test_thousands_of_classes_of_different_shape() -> None:
    classes = glyph_classes()
    assert len(classes) > 3000
    by_name = {glyph.name: glyph for glyph in classes}
    assert len(by_name) == len(classes)
    assert "LATIN CAPITAL LETTER A" in by_name
    assert "GREEK CAPITAL LETTER ALPHA" not in by_name
    assert "CYRILLIC CAPITAL LETTER A" not in by_name
    assert "GREEK CAPITAL LETTER OMEGA" in by_name
    assert by_name["GREEK CAPITAL LETTER OMEGA"].script == "GREEK"
    assert by_name["HEBREW LETTER ALEF"].script == "HEBREW"
    assert {"LATIN", "GREEK", "CYRILLIC", "ARABIC", "ARMENIAN", "GEORGIAN"} <= {
        glyph.script for glyph in classes
    }
    cuts = {cut for family in FAMILIES.values() for cut in family}
    assert len(cuts) == 16
    for glyph in classes:
        assert unicodedata.category(chr(glyph.codepoint))[0] in "LNS"
        assert glyph.cuts
        assert set(glyph.cuts) <= cuts
    assert len(by_name["LATIN CAPITAL LETTER A"].cuts) == 16


def test_half_of_the_classes_trains_and_no_class_is_in_both() -> None:
    samples = GlyphsImporter(GlyphsConfig(num_classes=21, images_per_class=2)).samples()
    train = {sample.class_name for sample in samples if sample.split == "train"}
    test = {sample.class_name for sample in samples if sample.split == "test"}
    assert (len(train), len(test)) == (11, 10)
    assert not train & test
    assert len(samples) == 42


def test_the_seed_chooses_classes_and_drawings() -> None:
    def named(seed: int) -> set[str]:
        config = GlyphsConfig(num_classes=50, images_per_class=2, seed=seed)
        return {sample.class_name for sample in GlyphsImporter(config).samples()}

    assert named(0) == named(0)
    assert len(named(0) & named(1)) < 25
    omega = GlyphSource(0x3A9, ("DejaVuSans", "STIXGeneral"), 0, 32, 0)
    assert np.array_equal(decoded(omega), decoded(omega))
    others = [GlyphSource(0x3A9, omega.cuts, 1, 32, 0), GlyphSource(0x3A9, omega.cuts, 0, 32, 1)]
    for other in others:
        assert not np.array_equal(decoded(omega), decoded(other))


@pytest.mark.parametrize("size", [16, 32, 80])
def test_drawings_are_dark_ink_inside_tinted_paper(size: int) -> None:
    classes = glyph_classes()
    for glyph in classes[:: len(classes) // 60]:
        image = decoded(GlyphSource(glyph.codepoint, glyph.cuts, 0, size, 0))
        assert image.shape == (size, size, 3)
        paper = np.median(image.reshape(-1, 3), axis=0)
        assert paper.min() > 150
        dark = image.mean(axis=2) < paper.mean() - 40
        # Ink is there, is no speck, does not fill the image, and is away from the corners.
        assert 4 <= dark.sum() < 0.5 * size * size, glyph
        corner = size // 16
        assert not dark[:corner, :corner].any()
        assert not dark[-corner:, -corner:].any()


def test_more_classes_than_there_are_is_an_error_with_the_number() -> None:
    with pytest.raises(ConfigError, match=rf"at most {len(glyph_classes())}, .* is 90000"):
        GlyphsImporter(GlyphsConfig(num_classes=90000)).facts()
