"""In-memory cache of decoded images, shared by the loader workers of a rank."""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from dml_dist.data.index import Index

_ALIGNED_BYTES = 8


class DecodedCache:
    """Cache of the first rows that fit into a memory limit; nothing is ever evicted.

    The memory is anonymous and shared with processes that are forked later; whichever of them
    decodes an image writes it for all. An image counts as written when its checksum agrees, so that
    two that write the same one, or one that reads while another writes, do no harm.

    Args:
        index: Gives the sizes of images.
        rows: (n,) index rows that may be asked for.
        max_bytes: Limit of all images together, > 0.
    """

    def __init__(self, index: Index, rows: np.ndarray, max_bytes: int) -> None:
        self._index = index
        num_bytes = 3 * index.width[rows].astype(np.int64) * index.height[rows]
        ends = np.cumsum(-(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES)
        count = int(np.searchsorted(ends, max_bytes, side="right"))
        total = int(ends[count - 1]) if count else 0
        self._place = np.full(len(index), -1, dtype=np.int64)
        self._place[rows[:count]] = np.concatenate([[0], ends[:count]])[:count]
        # Anonymous pages take no memory until they are written.
        self._memory = mmap.mmap(-1, max(total + (_ALIGNED_BYTES + 1) * len(index), 1))
        self._sums = np.frombuffer(self._memory, np.uint64, len(index))
        self._pixels = np.frombuffer(
            self._memory, np.uint8, total, offset=_ALIGNED_BYTES * len(index)
        )
        # Of images that EXIF turned a quarter, height and width are swapped.
        self._swapped = np.frombuffer(
            self._memory, np.bool_, len(index), offset=_ALIGNED_BYTES * len(index) + total
        )
        self.num_images = count
        """Images that there is room for."""

    def get(self, row: int) -> Tensor | None:
        """Return an image as it was decoded, (3, H, W) uint8, not to be written to; or None."""
        place, expected = self._place[row], self._sums[row]
        if place < 0 or not expected:
            return None
        height, width = int(self._index.height[row]), int(self._index.width[row])
        pixels = self._pixels[place : place + 3 * height * width]
        if _checksum(pixels) != expected:
            return None
        if self._swapped[row]:
            height, width = width, height
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)

    def put(self, row: int, image: Tensor) -> None:
        """Keep a decoded image, if it has a place and the size that the index says, or its turn."""
        place = self._place[row]
        height, width = int(self._index.height[row]), int(self._index.width[row])
        if place < 0 or image.shape not in ((3, height, width), (3, width, height)):
            return
        self._swapped[row] = image.shape != (3, height, width)
        pixels = self._pixels[place : place + 3 * height * width]
        pixels[:] = image.permute(1, 2, 0).reshape(-1).numpy()
        self._sums[row] = _checksum(pixels)


def _checksum(pixels: np.ndarray) -> int:
    """Return a number > 0 that nearly always tells different bytes apart."""
    whole = len(pixels) // _ALIGNED_BYTES * _ALIGNED_BYTES
    total = int(pixels[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (total + int(pixels[whole:].sum(dtype=np.uint64))) % 2**63 + 1
