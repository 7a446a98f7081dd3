"""Access to tar shards behind a URL through the disk cache.

A shard's place in the cache follows from the full URL of its folder and from the positions and
crc32 of all images in the index, so that folders of one name, or a folder whose shards were
replaced, are never mixed up. A shard becomes visible in the cache when its size is right and every
image in it has the crc32 of the index.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dml_dist.config.data import CacheConfig
from dml_dist.data.cache import ShardCache
from dml_dist.data.index import INDEX_NAME, Index, bytes_needed, read_index
from dml_dist.data.remote import IncompleteCopyError, RemoteFolder
from dml_dist.errors import ConfigError, DataError
from dml_dist.files import make_own_folder, write_bytes_atomic
from dml_dist.urls import local_path

CONNECTIONS = 4
"""Tar shards that one process copies at the same time."""


def open_index(location: str, cache: CacheConfig) -> Index:
    """Read the index of a local or remote folder of tar shards.

    Of a remote folder only the index is copied, each time again; its tar shards are copied when
    they are leased or read.

    Args:
        location: A path, or any fsspec URL.
        cache: Where tar shards of a URL are kept.

    Raises:
        ConfigError: If the URL's protocol is unknown or its library is not installed, or the cache
            cannot be written.
        DataError: If the index is missing, damaged, inconsistent, or does not match tar shards that
            are here.
        RunError: If the server does not answer.
    """
    folder = local_path(location)
    if folder is not None:
        return read_index(folder)
    remote = RemoteFolder(location, retries=cache.retries, timeout_seconds=cache.timeout_seconds)
    shards = ShardCache(
        Path(cache.folder).expanduser().absolute(),
        int(cache.max_gb * 10**9),
        untouched=frozenset({INDEX_NAME}),
    )
    data = io.BytesIO()
    remote.copy(INDEX_NAME, data, size=remote.size(INDEX_NAME))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / INDEX_NAME).write_bytes(data.getvalue())
        try:
            index = read_index(Path(name), check_shards=False)
        except DataError as error:
            raise DataError(
                f"{remote.shown(INDEX_NAME)} cannot be used; a copy of it says: {error}"
            ) from error
    root = shards.folder / f"{_digest(location.rstrip('/').encode())}-{_contents(index)}"
    try:
        make_own_folder(root)
    except OSError as error:
        raise ConfigError(
            f"the folder {root} of the cache cannot be used ({error.strerror or error}); choose "
            "another data.cache.folder, of your own"
        ) from error
    write_bytes_atomic(root / INDEX_NAME, data.getvalue())
    index = replace(index, root=root)
    return replace(index, remote=RemoteShards(remote, shards, index))


class RemoteShards:
    """The tar shards of one remote folder.

    Args:
        folder: The remote folder.
        cache: The disk cache.
        index: The folder's index; its root is their folder in the cache.
    """

    def __init__(self, folder: RemoteFolder, cache: ShardCache, index: Index) -> None:
        self.folder = folder
        self.cache = cache
        self.index = index
        self.needed = bytes_needed(index)
        order = np.argsort(index.tar_shard, kind="stable")
        bounds = np.searchsorted(index.tar_shard[order], np.arange(len(index.tar_shards) + 1))
        self._sizes: dict[int, int | None] = {}
        self._rows = [order[low:end] for low, end in itertools.pairwise(bounds)]

    def path(self, tar_shard: int) -> Path:
        """Return the path of a tar shard in the cache."""
        return self.index.root / self.index.tar_shards[tar_shard]

    def has(self, tar_shard: int) -> bool:
        """Tell whether a tar shard is in the cache now."""
        return self.cache.has(self.path(tar_shard))

    def lease(self, tar_shard: int) -> None:
        """Copy a tar shard into the cache if it is not there, and keep it there until `release`.

        Raises:
            DataError: If it is missing, may not be read, or is not what was indexed.
            RunError: If the server does not answer, or the cache has no space.
        """
        self.cache.lease(
            self.path(tar_shard),
            lambda: self._size(tar_shard),
            lambda target: self._copy(tar_shard, target),
        )

    def release(self, tar_shard: int) -> None:
        """Give up one lease."""
        self.cache.release(self.path(tar_shard))

    def lease_all(
        self, tar_shards: Iterable[int], progress: Callable[[int], None] = lambda tar_shard: None
    ) -> None:
        """Lease several tar shards, some at the same time; all of them or, on an error, none.

        Args:
            tar_shards: Which.
            progress: Called with each that is there, in this thread.

        Raises:
            DmlDistError: As `lease`; copies that have not begun are dropped then.
        """
        wanted = list(tar_shards)
        held: list[int] = []
        missing = []
        try:
            for tar_shard in wanted:
                if not self.has(tar_shard):
                    missing.append(tar_shard)
                    continue
                self.lease(tar_shard)
                held.append(tar_shard)
                progress(tar_shard)
            with ThreadPoolExecutor(min(CONNECTIONS, len(missing) or 1)) as threads:
                coming = {threads.submit(self.lease, tar_shard): tar_shard for tar_shard in missing}
                try:
                    for future in as_completed(coming):
                        future.result()
                        progress(coming[future])
                finally:
                    threads.shutdown(cancel_futures=True)
                    held += [
                        tar_shard
                        for future, tar_shard in coming.items()
                        if not future.cancelled() and future.exception() is None
                    ]
        except BaseException:
            for tar_shard in held:
                self.release(tar_shard)
            raise

    def open(self, tar_shard: int) -> int:
        """Return a descriptor to read a tar shard by, after copying it if it is not there.

        The descriptor stays good when the tar shard leaves the cache.
        """
        try:
            return os.open(self.path(tar_shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.lease(tar_shard)
            try:
                return os.open(self.path(tar_shard), os.O_RDONLY | os.O_CLOEXEC)
            finally:
                self.release(tar_shard)

    def require_room(self, tar_shards: Sequence[int] | np.ndarray, why: str) -> None:
        """Refuse a cache that cannot hold some tar shards at once.

        Args:
            tar_shards: Which.
            why: What needs them, for the message.

        Raises:
            DataError: If they are larger than the cache, with the sizes.
        """
        size, limit = int(self.needed[tar_shards].sum()), self.cache.max_bytes
        if size > limit:
            raise DataError(
                f"{why} needs {len(tar_shards)} tar shards of {self.folder.shown()} at once, "
                f"{size / 1e9:,.3f} GB, but data.cache.max_gb is {limit / 1e9:,.3f}; raise it to "
                f"at least {size / 1e9 * 1.01:,.3f}, or choose shuffled batches of a small "
                "data.batches.window"
            )

    def _size(self, tar_shard: int) -> int:
        name, needed = self.index.tar_shards[tar_shard], int(self.needed[tar_shard])
        size = self.folder.size(name)
        if size is not None and size < needed:
            raise DataError(
                f"{self.folder.shown(name)} has {size} bytes, but {INDEX_NAME} needs {needed}: the "
                "file is truncated or was replaced; upload the right one"
            )
        self._sizes[tar_shard] = size
        return needed if size is None else size

    def _copy(self, tar_shard: int, target: BinaryIO) -> None:
        name = self.index.tar_shards[tar_shard]
        checked = 0

        def check() -> None:
            nonlocal checked
            checked += 1
            # A wrong checksum may be a fault of the transfer, so one more copy is tried.
            wrong = self._damaged(tar_shard, target.fileno())
            if wrong is None:
                return
            what = f"key {wrong!r} does not have the crc32 of {INDEX_NAME}"
            if checked == 1:
                raise IncompleteCopyError(what)
            raise DataError(
                f"{self.folder.shown(name)} was copied twice and {what}: it is damaged or was "
                "replaced; upload the right one, or index the folder again on the server"
            )

        self.folder.copy(name, target, size=self._sizes[tar_shard], check=check)

    def _damaged(self, tar_shard: int, descriptor: int) -> str | None:
        """Return the key of the first image that has not the crc32 of the index, None if all do."""
        index = self.index
        for row in self._rows[tar_shard].tolist():
            data = os.pread(descriptor, int(index.length[row]), int(index.offset[row]))
            if zlib.crc32(data) != int(index.crc32[row]):
                return str(index.keys[row])
        return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _contents(index: Index) -> str:
    columns = (index.tar_shard, index.offset, index.length, index.crc32)
    return _digest("\n".join(index.tar_shards).encode() + b"".join(c.tobytes() for c in columns))
