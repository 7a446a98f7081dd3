"""A small data set of noise images in plain tar files, made without the package's own writer."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dml_dist.data.index import Index


def encode(pixels: np.ndarray, file_format: str) -> bytes:
    """Encode (H, W, 3) uint8 pixels."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, file_format)
    return out.getvalue()


def make_index(
    root: Path,
    *,
    num_images: int = 40,
    num_classes: int = 8,
    per_tar_shard: int = 10,
    sizes: tuple[int, ...] = (24, 31),
    seed: int = 0,
    encoded: Sequence[bytes] = (),
) -> Index:
    """Write tar files of random PNG and JPEG images, or of given JPEGs; return their index."""
    generator = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    names = [f"train-{number:03d}.tar" for number in range(-(-num_images // per_tar_shard))]
    columns: dict[str, list] = {"offset": [], "length": [], "crc32": [], "extension": []}
    for number, name in enumerate(names):
        with tarfile.open(root / name, "w") as archive:
            for row in range(number * per_tar_shard, min(num_images, (number + 1) * per_tar_shard)):
                side = sizes[row % len(sizes)]
                extension = "jpg" if encoded or row % 2 else "png"
                if encoded:
                    data = encoded[row]
                else:
                    pixels = generator.integers(0, 256, (side, side + row % 3, 3), dtype=np.uint8)
                    data = encode(pixels, {"png": "PNG", "jpg": "JPEG"}[extension])
                member = tarfile.TarInfo(f"image-{row}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
                columns["length"].append(len(data))
                columns["crc32"].append(zlib.crc32(data))
                columns["extension"].append(extension)
        with tarfile.open(root / name) as archive:
            columns["offset"] += [member.offset_data for member in archive]
    rows = np.arange(num_images)
    width = np.array([sizes[row % len(sizes)] for row in rows], dtype=np.int32)
    text = np.full(num_images, "", dtype=object)
    return Index(
        root=root,
        tar_shards=tuple(names),
        keys=np.array([f"image-{row}" for row in rows], dtype=object),
        tar_shard=(rows // per_tar_shard).astype(np.int32),
        offset=np.array(columns["offset"], dtype=np.int64),
        length=np.array(columns["length"], dtype=np.int64),
        crc32=np.array(columns["crc32"], dtype=np.uint32),
        extension=np.array(columns["extension"], dtype=object),
        width=width + (rows % 3).astype(np.int32),
        height=width,
        label=(rows % num_classes).astype(np.int64),
        class_names=tuple(f"class {label}" for label in range(num_classes)),
        super_class=text,
        split=np.where(rows % num_classes < 6, "train", "test").astype(object),
        role=np.full(num_images, "both", dtype=object),
    )
