from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from dml_dist.config.data import CountsConfig, SOPShapeConfig
from dml_dist.data.datasets.official import official_facts
from dml_dist.data.datasets.sop import SOPImporter
from dml_dist.data.datasets.sop_shape import PairSource, SOPShapeImporter, class_sizes
from dml_dist.data.sample import Sample
from tests.unit.importer_suite import ImporterSuite

SMALL = SOPShapeConfig(
    train=CountsConfig(classes=26, images=140), test=CountsConfig(classes=25, images=130)
)


class TestSOPShapeAsImporter(ImporterSuite):
    def config(self, folder: Path) -> SOPShapeConfig:
        return SOPShapeConfig(
            train=CountsConfig(classes=13, images=40), test=CountsConfig(classes=12, images=30)
        )


def codepoints_of(samples: list[Sample], split: str) -> set[int]:
    return {
        codepoint
        for sample in samples
        if sample.split == split
        for codepoint in sample.source.codepoints
    }


def test_the_sizes_are_those_of_the_published_data_set() -> None:
    sizes = SOPShapeImporter(SOPShapeConfig()).facts().class_sizes
    published = official_facts(SOPImporter.official).class_sizes
    assert set(sizes) == set(published)
    for split, found in sizes.items():
        assert (len(found), sum(found)) == (len(published[split]), sum(published[split]))
        histogram = np.bincount(found)
        assert np.flatnonzero(histogram).tolist() == list(range(2, 13))
        assert (np.diff(histogram[2:]) < 0).all()  # fewer classes of each larger size
        half = len(found) // 2
        assert abs(np.mean(found[:half]) - np.mean(found[half:])) < 0.3  # in no order


@given(st.integers(1, 400), st.data())
def test_sizes_are_in_range_and_add_up(num_classes: int, data: st.DataObject) -> None:
    num_images = data.draw(st.integers(2 * num_classes + 1, 12 * num_classes))
    sizes = class_sizes(num_classes, num_images)
    assert len(sizes) == num_classes
    assert sizes.sum() == num_images
    assert sizes.min() >= 2
    assert sizes.max() <= 12


def test_no_character_is_in_both_splits() -> None:
    counts = CountsConfig(classes=1200, images=3000)
    samples = SOPShapeImporter(SOPShapeConfig(train=counts, test=counts)).samples()
    train, test = codepoints_of(samples, "train"), codepoints_of(samples, "test")
    assert min(len(train), len(test)) > 1000
    assert not train & test


def test_super_classes_are_in_both_splits_and_share_no_characters() -> None:
    samples = SOPShapeImporter(SMALL).samples()
    characters: dict[str, set[int]] = {}
    for sample in samples:
        assert sample.super_class is not None
        characters.setdefault(sample.super_class, set()).update(sample.source.codepoints)
    for split in ("train", "test"):
        assert {s.super_class for s in samples if s.split == split} == set(characters)
    assert len(characters) == 12
    assert sum(map(len, characters.values())) == len(set.union(*characters.values()))


def test_the_order_of_the_pair_is_a_different_class() -> None:
    def pixels(*codepoints: int) -> np.ndarray:
        source = PairSource(codepoints, ("DejaVuSans", "DejaVuSans"), 0, 32, 0)
        with Image.open(io.BytesIO(source.read()[0])) as image:
            assert image.size == (32, 32)
            return np.asarray(image.convert("L")).astype(int)

    wide_left, wide_right = pixels(ord("W"), ord("i")), pixels(ord("i"), ord("W"))
    middle = np.median(wide_left) - 40
    assert (wide_left < middle).sum() > 20
    assert (wide_left[:, 16:] < middle).sum() != (wide_right[:, 16:] < middle).sum()


def test_the_seed_chooses_classes_sizes_and_drawings() -> None:
    def drawn(seed: int) -> list[Sample]:
        return SOPShapeImporter(SMALL.model_copy(update={"seed": seed})).samples()

    one, other = drawn(0), drawn(1)
    assert one == drawn(0)
    assert not {s.class_name for s in one} & {s.class_name for s in other}
    facts = [SOPShapeImporter(SMALL.model_copy(update={"seed": s})).facts() for s in (0, 1)]
    assert facts[0] != facts[1]
    source = one[0].source
    assert source.read() == source.read()
    assert source.read() != PairSource(**(vars(source) | {"seed": 1})).read()
    assert source.read() != PairSource(**(vars(source) | {"number": 1})).read()


@pytest.mark.parametrize(("classes", "images"), [(11, 60), (100_001, 500_000), (20, 40), (20, 241)])
def test_sizes_out_of_range_are_refused(classes: int, images: int) -> None:
    with pytest.raises(ValidationError, match=f"test has {images} images of {classes} classes"):
        SOPShapeConfig(test=CountsConfig(classes=classes, images=images))
