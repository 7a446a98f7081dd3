"""Random access to the images in tar shards; every read is checked by its crc32."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from typing import Any

from dml_dist.data.index import Index
from dml_dist.errors import DataError

MAX_OPEN_FILES = 64
"""Tar shards that one reader keeps open, well below the usual limit of 1,024 descriptors."""


class ShardReader:
    """Reads the image bytes of index rows.

    A remote tar shard that is not in the cache is copied there first. Reads name their position, so
    that descriptors inherited from a forked parent do no harm; they are left out of pickles. One
    reader serves one thread.

    Args:
        index: Where each row's bytes are.
        max_open_files: Descriptors that are kept; the least recently used is closed.
    """

    def __init__(self, index: Index, max_open_files: int = MAX_OPEN_FILES) -> None:
        self.index = index
        self.max_open_files = max_open_files
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, row: int) -> bytes:
        """Return the bytes of one row's image.

        Raises:
            DataError: If the tar shard is missing, cannot be read or ends too early, or the bytes
                are not those that were indexed. It names the tar shard and the sample.
            RunError: If the server of a remote tar shard does not answer, or the cache is full.
        """
        index = self.index
        offset, length = int(index.offset[row]), int(index.length[row])
        try:
            data = _read_fully(self._descriptor(int(index.tar_shard[row])), length, offset)
        except OSError as error:
            raise DataError(
                f"{self.describe(row)} cannot be read: {error.strerror or error}; the index needs "
                f"all {len(index.tar_shards)} tar shards of {index.root}: restore the file, or "
                "index the folder again with `dml-dist data index`"
            ) from error
        if len(data) < length:
            raise DataError(
                f"{self.describe(row)} is cut off: its {length} bytes from offset {offset} "
                f"on, found {len(data)}; the tar shard is truncated, restore or import it again"
            )
        found, expected = zlib.crc32(data), int(index.crc32[row])
        if found != expected:
            advice = "restore the tar shard, or run `dml-dist data verify` to find all damage"
            if index.remote is not None:
                advice = "remove the copy, so that it is copied again"
            raise DataError(
                f"{self.describe(row)} is damaged: expected crc32 {expected:08x}, found "
                f"{found:08x} ({length} bytes at offset {offset}); {advice}"
            )
        return data

    def describe(self, row: int) -> str:
        """Return the name of a row for messages: its key and its tar shard."""
        name = self.index.tar_shards[int(self.index.tar_shard[row])]
        where = str(self.index.root / name)
        if self.index.remote is not None:
            where = f"{self.index.remote.folder.shown(name)} (copy: {where})"
        return f"sample {str(self.index.keys[row])!r} of {where}"

    def close(self) -> None:
        """Close all files; the next read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, tar_shard: int) -> int:
        descriptor = self._descriptors.get(tar_shard)
        if descriptor is not None:
            self._descriptors.move_to_end(tar_shard)
            return descriptor
        if len(self._descriptors) >= self.max_open_files:
            os.close(self._descriptors.popitem(last=False)[1])
        if self.index.remote is not None:
            descriptor = self.index.remote.open(tar_shard)
        else:
            path = self.index.root / self.index.tar_shards[tar_shard]
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[tar_shard] = descriptor
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _read_fully(descriptor: int, length: int, offset: int) -> bytes:
    """Read `length` bytes, or as many as there are; one call may return fewer than asked for."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
