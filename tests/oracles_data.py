"""Small data sets and damage for the tests of data."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dml_dist.data.sample import DatasetFacts, Sample, facts_of


def encoded_image(seed: int, kind: str = "png", size: tuple[int, int] = (9, 7)) -> bytes:
    """Return an encoded image of noise; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_images(root: Path, names: Sequence[str]) -> None:
    """Write one image file for each path, in the format of its extension."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        extension = path.suffix[1:].lower()
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(extension, extension)
        path.write_bytes(encoded_image(seed, kind))


@dataclass(frozen=True)
class NoiseSource:
    """An image of noise; reading it kills the process if `kill_switch` exists."""

    seed: int
    # Not in repr, as it is no part of the image.
    kill_switch: str = field(default="", repr=False)

    def read(self) -> tuple[bytes, str]:
        if self.kill_switch and os.path.exists(self.kill_switch):
            os.kill(os.getpid(), signal.SIGKILL)
        return encoded_image(self.seed), "png"


@dataclass(frozen=True)
class ListImporter:
    """An importer of given samples."""

    listed: tuple[Sample, ...]

    def samples(self) -> tuple[Sample, ...]:
        return self.listed

    def facts(self) -> DatasetFacts:
        return facts_of(self.listed)


def noise_importer(
    num_images: int = 40, num_classes: int = 5, kill_at: int = -1, kill_switch: str = ""
) -> ListImporter:
    """Images of noise in classes c0, c1, ...; classes of even number train."""
    return ListImporter(
        tuple(
            Sample(
                key=f"n/{at:04d}",
                class_name=f"c{at % num_classes}",
                split="test" if at % num_classes % 2 else "train",
                source=NoiseSource(at, kill_switch if at == kill_at else ""),
                super_class="even" if at % 2 == 0 else None,
                role="query" if at % 3 == 0 else "both",
            )
            for at in range(num_images)
        )
    )


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """Write a tar file with tarfile alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def folder_bytes(root: Path) -> Mapping[str, bytes]:
    """Return the content of every file below a folder, by relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip_byte(path: Path, position: int) -> None:
    """Change one byte of a file."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(position)
        value: Any = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 0x55]))
