"""What a bundle says about its images: preprocessing steps, gallery rows, and its manifest."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dml_dist.config.data import CustomTransformConfig, ExifRule, StandardTransformConfig
from dml_dist.data.decode import decode_image
from dml_dist.data.transforms import build_transform
from dml_dist.export.bundle import write_gallery
from dml_dist.export.export import preprocessing
from tests.oracles_preprocessing import apply_steps

MEAN, STD = (0.1, 0.35, 0.6), (0.9, 0.5, 0.25)  # each number once


def picture(width: int, height: int, file_format: str) -> bytes:
    """Return a smooth picture as a file; a JPEG has a mark that it is to be turned."""
    noise = np.random.default_rng(width).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    file = io.BytesIO()
    image.save(file, file_format, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "fields"),
    [
        (90, 60, {"size": 32, "resize": 40}),  # shrunk to 60 x 40
        (60, 90, {"size": 32, "resize": 40}),
        (80, 80, {"size": 24}),  # nothing is cut off
        (20, 30, {"size": 40, "resize": 48}),  # enlarged
    ],
)
@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_the_written_steps_are_those_of_the_evaluation(
    width: int, height: int, fields: dict[str, Any], file_format: str, exif: ExifRule
) -> None:
    config = StandardTransformConfig(mean=MEAN, std=STD, flip=1.0, **fields)
    data = picture(width, height, file_format)
    expected = build_transform(config).evaluation(decode_image(data, "a picture", exif)).numpy()
    written = json.loads(json.dumps(preprocessing(config, exif)))
    found = apply_steps(written, data)
    # PIL and torchvision round differently after they resized: one level of 255 at most.
    level = 1.01 / 255 / np.array(STD)[:, None, None]
    assert (np.abs(found - expected) <= level).all()
    assert np.abs(found - expected).mean() < 0.2 * level.mean()


def test_a_custom_transform_is_named_without_steps() -> None:
    """Nobody but its author knows what it does."""
    found = preprocessing(CustomTransformConfig(target="mine:Views", options={"side": 5}), "ignore")
    assert found == {
        "exif": "ignore",
        "transform": {"name": "custom", "target": "mine:Views", "options": {"side": 5}},
    }


def test_every_column_of_the_gallery_has_its_values(tmp_path: Path) -> None:
    stored = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    write_gallery(
        tmp_path,
        stored,
        keys=["a", "b"],
        labels=np.array([7, 9]),
        super_classes=["birds", ""],
        tar_shards=["test-0.tar", "test-1.tar"],
        thumbnails=[b"image", None],
    )
    assert pq.read_table(tmp_path / "gallery.parquet").to_pydict() == {
        "key": ["a", "b"],
        "label": [7, 9],
        "super_class": ["birds", ""],
        "tar_shard": ["test-0.tar", "test-1.tar"],
        "thumbnail": [b"image", None],
    }
    index = faiss.read_index(str(tmp_path / "gallery.faiss"))
    assert (index.d, index.metric_type) == (3, faiss.METRIC_L2)
    np.testing.assert_array_equal(index.reconstruct_n(0, 2), stored.numpy())
