"""Decoding of every image that tar shards hold, in parallel, to find the broken ones."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dml_dist.data.image_check import inspect_image
from dml_dist.data.pool import run_tasks
from dml_dist.errors import DataError

# A second of work or less, so that progress shows and cores share one large tar shard.
_IMAGES_PER_TASK = 128


@dataclass(frozen=True)
class StoredImage:
    """What decoding an image found."""

    crc32: int
    width: int
    height: int

    orientation: int
    """EXIF orientation 1..8; 1 is upright."""

    damage: str | None
    """Why it cannot be decoded; its size is unknown then."""


@dataclass(frozen=True)
class _Task:
    path: Path

    places: tuple[tuple[int, int], ...]
    """Offset and length of images."""


def inspect_images(
    root: Path,
    tar_shards: Sequence[str],
    offset: np.ndarray,
    length: np.ndarray,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[StoredImage]:
    """Read and decode images.

    Args:
        root: Folder of the tar shards.
        tar_shards: File name of each image, N of them; those of one file stand together.
        offset: (N,) first byte of each image in its file.
        length: (N,) bytes of each image.
        processes: Number of processes; None takes one for each CPU core.
        progress: Called with (images decoded, N).

    Returns:
        What was found, in the order of the images.
    """
    ends = [at for at in range(1, len(tar_shards)) if tar_shards[at] != tar_shards[at - 1]]
    tasks, starts = [], []
    for low, high in zip([0, *ends], [*ends, len(tar_shards)], strict=True):
        for start in range(low, high, _IMAGES_PER_TASK):
            part = slice(start, min(start + _IMAGES_PER_TASK, high))
            places = zip(offset[part].tolist(), length[part].tolist(), strict=True)
            tasks.append(_Task(root / tar_shards[start], tuple(places)))
            starts.append(start)
    found: dict[int, list[StoredImage]] = {}
    done = 0
    for at, images in run_tasks(_inspect, tasks, processes):
        found[starts[at]] = images
        done += len(images)
        if progress is not None:
            progress(done, len(tar_shards))
    return [image for start in starts for image in found[start]]


def _inspect(task: _Task) -> list[StoredImage]:
    images = []
    with open(task.path, "rb") as file:
        for offset, length in task.places:
            data = os.pread(file.fileno(), length, offset)
            crc32 = zlib.crc32(data)
            try:
                if len(data) < length:
                    raise DataError(f"truncated: the tar file ends after {len(data)} bytes of it")
                facts = inspect_image(data)
                image = StoredImage(crc32, facts.width, facts.height, facts.orientation, None)
            except DataError as error:
                image = StoredImage(crc32, 0, 0, 1, str(error))
            images.append(image)
    return images
