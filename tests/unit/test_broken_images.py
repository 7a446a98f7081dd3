"""Indexing and verification decode every image and list the broken ones."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image, features

from dml_dist.config.data import CacheConfig
from dml_dist.data import stored_images
from dml_dist.data.build_index import build_index
from dml_dist.data.image_check import inspect_image
from dml_dist.data.index import read_index, write_index
from dml_dist.data.remote_shards import open_index
from dml_dist.data.verify import verify, verify_remote
from dml_dist.errors import DataError
from tests.oracles_data import encoded_image, write_tar


def photo(size: tuple[int, int] = (90, 61), mode: str = "RGB", **options: Any) -> bytes:
    """Return a JPEG of soft noise."""
    noise = np.random.default_rng(size[0]).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, options.pop("kind", "JPEG"), **options)
    return stream.getvalue()


JPEGS = {
    "baseline": photo(),
    "large": photo((640, 427), quality=95),
    "grey": photo(mode="L"),
    "CMYK": photo(mode="CMYK"),
    "progressive": photo(progressive=True),
    "large and progressive": photo((500, 400), progressive=True),
    "restart markers": photo(restart_marker_blocks=2),
    "restart rows": photo(restart_marker_rows=1, subsampling=0),
    "optimized": photo(optimize=True, quality=30),
    "metadata behind": photo() + b"metadata of a phone" * 40,
}


def scan_start(data: bytes) -> int:
    at = data.index(b"\xff\xda") + 2
    return at + int.from_bytes(data[at : at + 2], "big")


def test_an_empty_image_is_broken() -> None:
    with pytest.raises(DataError, match="0 bytes"):
        inspect_image(b"")


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_cut_before_an_end_marker_is_found(kind: str) -> None:
    data = JPEGS[kind]
    assert inspect_image(data).height > 0
    begin, end = scan_start(data), data.rindex(b"\xff\xd9")
    for share in (0.0, 0.2, 0.5, 0.8, 0.97):
        cut = data[: begin + int(share * (end - begin))] + b"\xff\xd9"
        with pytest.raises(DataError, match="cannot be decoded"):
            inspect_image(cut)
    # At restart markers nothing is half read.
    for marker in re.finditer(rb"\xff[\xd0-\xd7]", data[begin:end]):
        with pytest.raises(DataError, match="cannot be decoded"):
            inspect_image(data[: begin + marker.start()] + b"\xff\xd9")


def test_whole_scans_may_not_be_missing() -> None:
    data = photo(progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    for at in scans[1:]:
        tables = data.rfind(b"\xff\xc4", 0, at)  # The Huffman table of a scan stands before it.
        with pytest.raises(DataError, match="cannot be decoded"):
            inspect_image(data[:tables] + b"\xff\xd9")


BROKEN = {
    "cut.jpg": JPEGS["large"][:9000] + b"\xff\xd9",
    "half.jpg": JPEGS["large"][:9000],
    "half.png": photo(kind="PNG")[:4000],
    "closed.png": photo(kind="PNG")[:4000] + photo(kind="PNG")[-12:],
    "half.webp": photo(kind="WEBP")[:700],
    "half.gif": photo(kind="GIF")[:1500],
    "half.bmp": photo(kind="BMP")[:4000],
    "half.tif": photo(kind="TIFF", compression="tiff_lzw")[:4000],
    "half.jp2": photo(kind="JPEG2000")[:2000],
    "text.png": b"404 not found",
}
if features.check("avif"):
    BROKEN["half.avif"] = photo(kind="AVIF")[:500]


def shards(root: Path) -> Path:
    for number, names in enumerate((sorted(BROKEN)[:5], sorted(BROKEN)[5:])):
        members = []
        for at, name in enumerate(names):
            key, _, extension = name.partition(".")
            label = str(at % 3).encode()
            members += [(f"{key}-{extension}.{extension}", BROKEN[name])]
            members += [(f"{key}-{extension}.cls", label)]
            good = f"good{number}{at}"
            members += [(f"{good}.png", encoded_image(at)), (f"{good}.cls", label)]
        write_tar(root / f"{number}.tar", members)
    return root


def keys() -> list[str]:
    return sorted(name.replace(".", "-") for name in BROKEN)


def test_indexing_lists_every_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_images, "_IMAGES_PER_TASK", 5)
    with pytest.raises(DataError, match=f"must be readable, {len(BROKEN)} are not") as caught:
        build_index(shards(tmp_path), processes=1)
    lines = str(caught.value).splitlines()[1:-1]
    assert sorted(line.split("'")[1] for line in lines) == keys()
    assert not (tmp_path / "index.parquet").exists()


def test_broken_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    index = build_index(shards(tmp_path), on_broken="skip", processes=1)
    assert len(index) == len(BROKEN)
    assert all(key.startswith("good") for key in index.keys)
    with open(tmp_path / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["key"] for row in rows) == keys()
    assert all(row["reason"][:6] in ("0.tar:", "1.tar:") for row in rows)
    report = verify(tmp_path, processes=1)
    assert report.problems == []
    assert report.notes == [
        f"{len(BROKEN)} broken images were left out of the index when it was made"
    ]
    write_tar(tmp_path / "0.tar", [("a.png", BROKEN["half.png"]), ("a.cls", b"1")])
    (tmp_path / "1.tar").unlink()
    with pytest.raises(DataError, match="none of 1 images can be decoded"):
        build_index(tmp_path, on_broken="skip", processes=1)


def test_verification_decodes_what_an_older_index_took_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards(tmp_path)
    with monkeypatch.context() as patch:
        facts = inspect_image(encoded_image(0))
        patch.setattr(stored_images, "inspect_image", lambda data: facts)
        build_index(tmp_path, processes=1)
    problems = verify(tmp_path, processes=1).problems
    assert sorted(line.split("'")[1] for line in problems) == keys()
    assert read_index(tmp_path).width.min() == 9


def test_verification_compares_the_size(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", encoded_image(0)), ("a.cls", b"1")])
    index = build_index(tmp_path, processes=1)
    index.width[0] = 8
    write_index(index)
    assert verify(tmp_path, processes=1).problems == [
        "a.tar: key 'a': index.parquet says 8 x 7 pixels, the image has 9 x 7"
    ]


def test_verification_of_a_url_decodes_too(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    build_index(root, on_broken="skip", processes=1)
    store = fsspec.filesystem("memory")
    store.put(str(root), "/broken", recursive=True)
    index = open_index("memory://broken", CacheConfig(folder=str(tmp_path / "cache")))
    report = verify_remote(index)
    assert report.problems == []
    assert report.notes == verify(root, processes=1).notes
    index.width[3] += 1
    expected = "says 10 x 7 pixels, the image has 9 x 7"
    assert [line[-len(expected) :] for line in verify_remote(index).problems] == [expected]
