"""The index of a data set: index.parquet in the folder of the tar shards, one row per image.

Columns of index.parquet: key, tar_shard (file name relative to the folder), offset and length of
the image's bytes in that file, crc32 of these bytes, extension, width, height, label (0..C-1 over
the whole data set), class, super_class ("" when none), split, role. Images are read by position,
so nothing has to parse tar files after this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.config.data import ExifRule
from dml_dist.data import index_table
from dml_dist.data.sample import ROLES
from dml_dist.errors import DataError
from dml_dist.files import open_atomic

if TYPE_CHECKING:
    from dml_dist.data.cache import ShardCache
    from dml_dist.data.remote import RemoteFolder

INDEX_NAME = "index.parquet"
# What an import keeps in its folder until the index is written.
PROGRESS_FOLDER = ".import"
_DIGEST = b"dml_dist.import"
_DESCRIPTION = b"dml_dist.description"
_SKIPPED = b"dml_dist.skipped"


class RemoteTarShards(Protocol):
    """What readers of an index use of its `remote_shards.RemoteShards`.

    A protocol, because `remote_shards` imports this module.
    """

    folder: RemoteFolder
    cache: ShardCache
    needed: np.ndarray

    def has(self, tar_shard: int) -> bool: ...
    def lease(self, tar_shard: int) -> None: ...
    def release(self, tar_shard: int) -> None: ...
    def lease_all(
        self, tar_shards: Iterable[int], progress: Callable[[int], None] = ...
    ) -> None: ...
    def open(self, tar_shard: int) -> int: ...
    def require_room(self, tar_shards: Sequence[int] | np.ndarray, why: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Index:
    """All images of a data set; arrays of equal length N, one row per image."""

    root: Path
    """The folder of the tar shards; of remote ones, where they are in the cache."""

    tar_shards: tuple[str, ...]
    """File names of the tar shards relative to `root`, rising."""

    keys: np.ndarray
    """(N,) str objects, unique."""

    tar_shard: np.ndarray
    """(N,) int32 indices into `tar_shards`."""

    offset: np.ndarray
    """(N,) int64, first byte of the image in its tar shard."""

    length: np.ndarray
    """(N,) int64, bytes of the encoded image."""

    crc32: np.ndarray
    """(N,) uint32 checksum of these bytes."""

    extension: np.ndarray
    """(N,) str objects: "jpg", "png", ..."""

    width: np.ndarray
    """(N,) int32 pixels of the image as stored, before it is turned by its EXIF orientation."""

    height: np.ndarray
    """(N,) int32 pixels, likewise."""

    label: np.ndarray
    """(N,) int64 in 0..C-1, every one of them used."""

    class_names: tuple[str, ...]
    """Label -> name, C of them."""

    super_class: np.ndarray
    """(N,) str objects, "" when none."""

    split: np.ndarray
    """(N,) str objects."""

    role: np.ndarray
    """(N,) str objects: both, query or gallery."""

    exif: ExifRule = "apply"
    """Whether images are turned by their EXIF orientation when they are read; not in the file."""

    remote: RemoteTarShards | None = None
    """Copies tar shards into `root`; None for a local folder."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split, (n,) int64, rising.

        Raises:
            DataError: If no image belongs to it.
        """
        rows = np.flatnonzero(self.split == split)
        if not rows.size:
            splits = ", ".join(sorted(set(self.split.tolist())))
            raise DataError(
                f"{self.root / INDEX_NAME}: no image belongs to the split {split!r}; "
                f"it has the splits {splits}"
            )
        return rows


def write_index(
    index: Index, *, digest: str = "", description: str = "", skipped: Sequence[str] = ()
) -> None:
    """Write index.parquet into the index's folder atomically.

    Args:
        index: What to write.
        digest: Identifies the import that made the shards; empty for shards of other programs.
        description: Describes what was imported; empty when unknown.
        skipped: Keys of broken images that the tar shards hold and the index does not.
    """
    label = pa.array(index.label.astype(np.int32))
    columns: dict[str, pa.Array] = {
        "key": pa.array(index.keys, pa.string()),
        "tar_shard": pa.DictionaryArray.from_arrays(
            pa.array(index.tar_shard), pa.array(index.tar_shards, pa.string())
        ),
        "offset": pa.array(index.offset),
        "length": pa.array(index.length),
        "crc32": pa.array(index.crc32),
        "extension": pa.array(index.extension, pa.string()).dictionary_encode(),
        "width": pa.array(index.width),
        "height": pa.array(index.height),
        "label": pa.array(index.label),
        "class": pa.DictionaryArray.from_arrays(label, pa.array(index.class_names, pa.string())),
        "super_class": pa.array(index.super_class, pa.string()).dictionary_encode(),
        "split": pa.array(index.split, pa.string()).dictionary_encode(),
        "role": pa.array(index.role, pa.string()).dictionary_encode(),
    }
    metadata = {_DIGEST: digest.encode(), _DESCRIPTION: description.encode()}
    if skipped:
        metadata[_SKIPPED] = json.dumps(list(skipped)).encode()
    table = pa.table(columns).replace_schema_metadata(metadata)
    with open_atomic(index.root / INDEX_NAME) as file:
        pq.write_table(table, file, compression="zstd")


def read_index(root: Path, *, check_shards: bool = True) -> Index:
    """Read index.parquet of a folder and check that it can be used.

    Args:
        root: Folder of tar shards.
        check_shards: Also check that every tar shard is there and long enough.

    Raises:
        DataError: If it is missing, damaged, inconsistent, or does not match the tar shards.
    """
    path = root / INDEX_NAME
    if not path.exists() and (root / PROGRESS_FOLDER).exists():
        raise DataError(
            f"{path} does not exist, because an import into {root} was not finished; run the "
            "import again, finished tar shards are kept"
        )
    table = index_table.read_table(path)
    numbers = {name: index_table.numbers(table, name, path) for name in index_table.NUMBERS}
    texts = {
        name: index_table.codes(table, name, path) for name in index_table.TEXTS if name != "key"
    }
    names, codes = texts["tar_shard"]
    # In the order of their names, whatever order the dictionary of the file has.
    tar_shards, position = np.unique(names.astype(str), return_inverse=True)
    index = Index(
        root=root,
        tar_shards=tuple(tar_shards.tolist()),
        keys=index_table.plain(table, "key", path),
        tar_shard=position.reshape(-1)[codes].astype(np.int32),
        class_names=index_table.class_names(numbers["label"], *texts["class"], path),
        remote=None,
        exif="apply",
        **numbers,
        **{
            name: texts[name][0][texts[name][1]]
            for name in ("extension", "super_class", "split", "role")
        },
    )
    _check_values(index, path)
    if check_shards:
        _check_shards(index)
    return index


def import_digest(root: Path) -> str | None:
    """Return the digest given to `write_index`, None when the folder has no index."""
    if not (root / INDEX_NAME).exists():
        return None
    return _metadata(root, _DIGEST)


def import_description(root: Path) -> str:
    """Return the description given to `write_index`, "" when it is unknown or there is no index."""
    return _metadata(root, _DESCRIPTION) if (root / INDEX_NAME).exists() else ""


def skipped_keys(root: Path) -> frozenset[str]:
    """Return the keys given to `write_index` as skipped."""
    return frozenset(json.loads(_metadata(root, _SKIPPED) or "[]"))


def bytes_needed(index: Index) -> np.ndarray:
    """Return the size that each tar shard must have at least, (num_tar_shards,) int64."""
    needed = np.zeros(len(index.tar_shards), dtype=np.int64)
    np.maximum.at(needed, index.tar_shard, index.offset + index.length)
    return needed


def _metadata(root: Path, name: bytes) -> str:
    return index_table.read_metadata(root / INDEX_NAME).get(name, b"").decode()


def _check_values(index: Index, path: Path) -> None:
    for name in index.tar_shards:
        # A name is opened, and that of a remote folder also written, so it must stay below `root`.
        # Links are followed: folders on several disks are joined by them.
        parts = name.split("/")
        if any(not part or part.startswith(".") or "\0" in part for part in parts):
            raise index_table.unusable(
                path,
                f"it names the tar shard {name!r}, which is not a path below the folder, without "
                "'..' and hidden parts",
            )
    if len(set(index.keys.tolist())) != len(index):
        raise index_table.unusable(path, "keys must be unique, some occur twice")
    unknown = set(index.role.tolist()) - set(ROLES)
    if unknown:
        raise index_table.unusable(
            path, f"role must be one of {', '.join(ROLES)}, got {min(unknown)!r}"
        )
    for name, smallest in (("offset", 0), ("length", 1), ("width", 1), ("height", 1)):
        if getattr(index, name).min() < smallest:
            raise index_table.unusable(
                path, f"the column {name} must be at least {smallest} everywhere"
            )


def _check_shards(index: Index) -> None:
    for name, size in zip(index.tar_shards, bytes_needed(index).tolist(), strict=True):
        path = index.root / name
        if not path.is_file():
            raise DataError(
                f"{path} is listed in {INDEX_NAME} but does not exist; restore it, or index the "
                f"remaining tar shards with `dml-dist data index {index.root}`"
            )
        if path.stat().st_size < size:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, but {INDEX_NAME} needs {size}: the "
                f"file is truncated or was replaced; copy or import it again "
                f"(`dml-dist data verify {index.root}` lists all damage)"
            )
