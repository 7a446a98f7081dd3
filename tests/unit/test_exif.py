"""EXIF orientation: applied or ignored alike wherever images are read, and counted."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from dml_dist.config.data import ExifRule, FolderConfig, StandardTransformConfig
from dml_dist.data import decode
from dml_dist.data.batches import BatchRequest, ShardDataset
from dml_dist.data.build_index import build_index
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.decode import decode_image
from dml_dist.data.decoded_cache import DecodedCache
from dml_dist.data.image_check import inspect_image
from dml_dist.data.import_summary import read_summary
from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.data.statistics import contact_sheet
from dml_dist.data.transforms import build_transform
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.export.export import thumbnail
from dml_dist.report.gallery import _thumbnail
from tests.oracles_data import write_tar

WIDTH, HEIGHT = 48, 32


def photo(orientation: int, kind: str = "PNG", seed: int = 0, **options: Any) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def as_pil(data: bytes, exif: ExifRule) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(
            (ImageOps.exif_transpose(image) if exif == "apply" else image).convert("RGB")
        )


KINDS = ["PNG", "JPEG", "WEBP", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_orientation_is_applied_as_pil_does(
    kind: str, torchvision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torchvision:
        monkeypatch.setattr(decode, "_decode_torchvision", None)
    rules: tuple[ExifRule, ...] = ("apply", "ignore")
    for orientation in range(1, 9):
        data = photo(orientation, kind)
        assert inspect_image(data).orientation == orientation
        assert (inspect_image(data).width, inspect_image(data).height) == (WIDTH, HEIGHT)
        for exif in rules:
            image = decode_image(data, "here", exif).permute(1, 2, 0).numpy().astype(int)
            expected = as_pil(data, exif)
            assert image.shape == expected.shape
            assert np.abs(image - expected).max() <= (2 if kind == "JPEG" else 0)
    assert decode_image(photo(6, kind), "").shape == (3, WIDTH, HEIGHT)  # the default applies


@pytest.mark.parametrize("mark", [0, 9, 255])
def test_a_mark_without_meaning_turns_nothing(mark: int) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = photo(mark, kind)
        assert inspect_image(data).orientation == 1
        assert decode_image(data, "").shape == (3, HEIGHT, WIDTH)


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_damaged_exif_data_do_not_make_an_image_broken() -> None:
    good = photo(6, "JPEG")
    at = good.index(b"Exif\0\0") + 6
    for damage in (b"XX", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        data = good[:at] + damage + good[at + len(damage) :]
        assert inspect_image(data).width == WIDTH
        assert decode_image(data, "").shape[0] == 3


@pytest.fixture
def index(tmp_path: Path) -> Index:
    members: list[tuple[str, bytes]] = []
    for at in range(16):
        kind = ("JPEG", "PNG", "WEBP")[at % 3]
        members.append((f"k{at}.{kind.lower()}", photo(at % 8 + 1, kind, at)))
        members.append((f"k{at}.cls", str(at % 2).encode()))
    write_tar(tmp_path / "a.tar", members)
    return build_index(tmp_path, processes=1)


def test_index_and_import_count_them(index: Index, tmp_path: Path) -> None:
    summary = read_summary(index.root)
    assert summary is not None
    assert summary.num_turned == 14
    assert summary.lines(index.root)[0].startswith("14 images have an EXIF orientation; `data.exif")
    assert set(zip(index.width, index.height, strict=True)) == {(WIDTH, HEIGHT)}
    assert verify(index.root, processes=1).problems == []
    for at in range(8):
        path = tmp_path / "photos" / str(at % 2) / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(at + 1, "JPEG", at))
    importer = FolderImporter(FolderConfig(source=str(tmp_path / "photos")))
    for max_side in (None, 24):
        made = import_dataset(importer, tmp_path / f"out{max_side}", max_side=max_side, processes=1)
        found = read_summary(made.root)
        assert found is not None
        assert found.num_turned == 7
        reader = ShardReader(made)
        for row, key in enumerate(made.keys):
            data = (tmp_path / "photos" / f"{key}.jpg").read_bytes()
            image = decode_image(reader.read(row), "").permute(1, 2, 0).numpy().astype(int)
            expected = Image.fromarray(as_pil(data, "apply"))
            assert max(image.shape) == (max_side or WIDTH)
            expected = expected.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC)
            assert np.abs(image - np.asarray(expected)).mean() < 12


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_training_evaluation_and_the_decoded_cache_agree(index: Index, exif: ExifRule) -> None:
    index = dataclasses.replace(index, exif=exif)
    rows = np.arange(len(index))
    transform = build_transform(StandardTransformConfig(size=16, resize=20))
    request = BatchRequest(0, 0, rows)
    evaluated = ShardDataset(index, transform)[request].images
    reader = ShardReader(index)
    for row in rows.tolist():
        pixels = torch.from_numpy(as_pil(reader.read(row), exif)).permute(2, 0, 1)
        difference = (evaluated[row] - transform.evaluation(pixels)).abs().max()
        assert difference < 0.05  # two builds of libjpeg
    plain = ShardDataset(index, transform, seed=3)[request].images
    cache = DecodedCache(index, rows, 10**7)
    cached = ShardDataset(index, transform, seed=3, decoded=cache)
    for _ in range(2):
        assert torch.equal(cached[request].images, plain)
    assert all(cache.get(row) is not None for row in rows.tolist())


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_what_is_shown_is_what_the_network_sees(index: Index, exif: ExifRule) -> None:
    index = dataclasses.replace(index, exif=exif)
    data = photo(6, "JPEG")
    expected = as_pil(data, exif).astype(int)
    for shown in (thumbnail(data, exif), _thumbnail(data, 0, exif)[0]):
        found = as_pil(shown, "apply").astype(int)  # as a browser shows it
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 3
    sheet = contact_sheet(index, "train", num_classes=2, num_images=8, side=WIDTH, seed=0)
    upright = sum(bool((tile[:4] != tile[0, 0]).any()) for tiles in sheet.tiles for tile in tiles)
    assert upright == (8 if exif == "apply" else 0)
