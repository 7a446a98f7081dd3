"""The index beside the tar shards: one parquet file, one row an image.

Columns of index.parquet: key, tar_shard (file name relative to the folder), offset and length of
the image's bytes in that file, crc32 of these bytes, extension, width, height, label (0..C-1 over
the whole data set), class, super_class ("" when none), split, role. Images are read by position,
so nothing has to parse tar files after this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.data.sample import ROLES
from dml_dist.errors import DataError

INDEX_NAME = "index.parquet"
_NUMBERS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
    "width": np.int32,
    "height": np.int32,
    "label": np.int64,
}
_TEXTS = ("key", "tar_shard", "extension", "class", "super_class", "split", "role")
_DIGEST = b"dml_dist.import"


@dataclass(frozen=True, eq=False)
class Index:
    """All images of a data set; arrays of equal length N, one row an image."""

    root: Path
    """The folder of the tar shards."""

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
    """(N,) int32 pixels."""

    height: np.ndarray
    """(N,) int32 pixels."""

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


def write_index(index: Index, *, digest: str = "") -> None:
    """Write index.parquet into the index's folder, at once or not at all.

    Args:
        index: What to write.
        digest: Identifies the import that made the shards; empty for shards made elsewhere.
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
    table = pa.table(columns).replace_schema_metadata({_DIGEST: digest.encode()})
    final = index.root / INDEX_NAME
    temporary = index.root / f".{INDEX_NAME}.{os.getpid()}"
    pq.write_table(table, temporary, compression="zstd")
    replace_file(temporary, final)


def read_index(root: Path, *, check_shards: bool = True) -> Index:
    """Read index.parquet of a folder and check that it can be used.

    Args:
        root: Folder of tar shards.
        check_shards: Also check that every tar shard is there and long enough.

    Raises:
        DataError: If it is missing, damaged, inconsistent, or does not match the tar shards.
    """
    path = root / INDEX_NAME
    table = _read_table(path)
    numbers = {name: _numbers(table, name, path) for name in _NUMBERS}
    texts = {name: _codes(table, name, path) for name in _TEXTS if name != "key"}
    keys = _plain(table, "key", path)
    class_names = _class_names(numbers["label"], *texts["class"], path)
    names, shard_codes = texts["tar_shard"]
    tar_shards, position = np.unique(names.astype(str), return_inverse=True)
    index = Index(
        root=root,
        tar_shards=tuple(tar_shards.tolist()),
        keys=keys,
        tar_shard=position.reshape(-1)[shard_codes].astype(np.int32),
        class_names=class_names,
        **{name: numbers[name] for name in _NUMBERS},
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
    path = root / INDEX_NAME
    if not path.exists():
        return None
    metadata = _read_table(path).schema.metadata or {}
    return metadata.get(_DIGEST, b"").decode()


def replace_file(temporary: Path, final: Path) -> None:
    """Move a finished file to its name so that it survives a crash of the machine whole."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_table(path: Path) -> pa.Table:
    if not path.exists():
        raise DataError(
            f"{path} is required and does not exist; for tar shards made elsewhere run "
            f"`dml-dist data index {path.parent}`, for images `dml-dist data import`"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _unusable(path, f"it cannot be read as parquet ({error})") from error
    missing = [name for name in (*_TEXTS, *_NUMBERS) if name not in table.column_names]
    if missing:
        raise _unusable(path, f"the columns {', '.join(missing)} are missing")
    if not table.num_rows:
        raise _unusable(path, "it has no rows")
    for name in (*_TEXTS, *_NUMBERS):
        if table[name].null_count:
            raise _unusable(path, f"the column {name} has {table[name].null_count} empty values")
    return table


def _unusable(path: Path, why: str) -> DataError:
    return DataError(f"{path}: {why}; make it anew with `dml-dist data index {path.parent}`")


def _numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    try:
        column = table[name].cast(pa.from_numpy_dtype(_NUMBERS[name]))
    except pa.ArrowException as error:
        raise _unusable(path, f"the column {name} does not hold whole numbers ({error})") from error
    return np.array(column.to_numpy())


def _plain(table: pa.Table, name: str, path: Path) -> np.ndarray:
    try:
        column = table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise _unusable(path, f"the column {name} does not hold text ({error})") from error
    return np.array(column.to_numpy(zero_copy_only=False), dtype=object)


def _codes(table: pa.Table, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct texts of a column (str objects) and each row's position in them."""
    column = table[name]
    try:
        if not pa.types.is_dictionary(column.type):
            column = column.cast(pa.string()).dictionary_encode()
        column = column.cast(pa.dictionary(pa.int32(), pa.string()))
    except pa.ArrowException as error:
        raise _unusable(path, f"the column {name} does not hold text ({error})") from error
    whole = column.unify_dictionaries().combine_chunks()
    chunk = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    texts = np.array(chunk.dictionary.to_pylist(), dtype=object)
    return texts, chunk.indices.to_numpy()


def _class_names(
    labels: np.ndarray, names: np.ndarray, codes: np.ndarray, path: Path
) -> tuple[str, ...]:
    """Return the class name of every label; labels and names must match one to one."""
    used = np.unique(labels)
    if used[0] != 0 or used[-1] != len(used) - 1:
        raise _unusable(path, f"labels must be 0..{len(used) - 1} without gaps, got {used[-1]}")
    name_of = np.zeros(len(used), dtype=np.int64)
    name_of[labels] = codes
    wrong = np.flatnonzero(name_of[labels] != codes)
    if wrong.size:
        label = int(labels[wrong[0]])
        both = sorted({str(names[codes[wrong[0]]]), str(names[name_of[label]])})
        raise _unusable(path, f"label {label} has two class names, {both[0]!r} and {both[1]!r}")
    if len(np.unique(name_of)) != len(used):
        raise _unusable(path, "one class name has two labels")
    return tuple(str(name) for name in names[name_of])


def _check_values(index: Index, path: Path) -> None:
    if len(set(index.keys.tolist())) != len(index):
        raise _unusable(path, "keys must be unique, some occur twice")
    unknown = set(index.role.tolist()) - set(ROLES)
    if unknown:
        raise _unusable(path, f"role must be one of {', '.join(ROLES)}, got {min(unknown)!r}")
    for name, smallest in (("offset", 0), ("length", 1), ("width", 1), ("height", 1)):
        if getattr(index, name).min() < smallest:
            raise _unusable(path, f"the column {name} must be at least {smallest} everywhere")


def _check_shards(index: Index) -> None:
    needed = np.zeros(len(index.tar_shards), dtype=np.int64)
    np.maximum.at(needed, index.tar_shard, index.offset + index.length)
    for name, size in zip(index.tar_shards, needed.tolist(), strict=True):
        path = index.root / name
        if not path.is_file():
            raise DataError(
                f"{path} is named by {INDEX_NAME} and does not exist; restore it, or "
                f"index what is there with `dml-dist data index {index.root}`"
            )
        if path.stat().st_size < size:
            raise DataError(
                f"{path}: {INDEX_NAME} needs {size} bytes, the file has {path.stat().st_size}: it "
                f"is truncated or another one; copy or import it again "
                f"(`dml-dist data verify {index.root}` lists all damage)"
            )
