"""Reading and checking the columns of index.parquet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.errors import DataError

NUMBERS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
    "width": np.int32,
    "height": np.int32,
    "label": np.int64,
}
TEXTS = ("key", "tar_shard", "extension", "class", "super_class", "split", "role")


def read_table(path: Path) -> pa.Table:
    """Read the file and check that all columns are there and full.

    Raises:
        DataError: If it is missing, damaged, empty or incomplete.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist; create it with `dml-dist data index {path.parent}` for "
            "existing tar shards, or with `dml-dist data import` for images"
        )
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise unusable(path, f"it cannot be read as parquet ({error})") from error
    missing = [name for name in (*TEXTS, *NUMBERS) if name not in table.column_names]
    if missing:
        raise unusable(path, f"the columns {', '.join(missing)} are missing")
    if not table.num_rows:
        raise unusable(path, "it has no rows")
    for name in (*TEXTS, *NUMBERS):
        if table[name].null_count:
            raise unusable(path, f"the column {name} has {table[name].null_count} empty values")
    return table


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """Return the metadata of the file's schema.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        return pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise unusable(path, f"it cannot be read as parquet ({error})") from error


def unusable(path: Path, why: str) -> DataError:
    """Return the error for an index that cannot be used, with advice."""
    return DataError(f"{path}: {why}; rebuild it with `dml-dist data index {path.parent}`")


def numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return a column of whole numbers in its type of `NUMBERS`, (N,)."""
    try:
        column = table[name].cast(pa.from_numpy_dtype(NUMBERS[name]))
    except pa.ArrowException as error:
        raise unusable(path, f"the column {name} does not hold whole numbers ({error})") from error
    return _values(column)


def plain(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return a column of texts, (N,) str objects."""
    try:
        column = table[name].cast(pa.string())
    except pa.ArrowException as error:
        raise unusable(path, f"the column {name} does not hold text ({error})") from error
    return np.array(column.to_pylist(), dtype=object)


def codes(table: pa.Table, name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct texts of a column (str objects) and each row's position in them."""
    column = table[name]
    try:
        if not pa.types.is_dictionary(column.type):
            column = column.cast(pa.string()).dictionary_encode()
        column = column.cast(pa.dictionary(pa.int32(), pa.string()))
    except pa.ArrowException as error:
        raise unusable(path, f"the column {name} does not hold text ({error})") from error
    whole = column.unify_dictionaries().combine_chunks()
    chunk = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    texts = np.array(chunk.dictionary.to_pylist(), dtype=object)
    return texts, _values(chunk.indices)


def _values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the numbers of a column without empty values, (N,)."""
    # Their `to_numpy` imports pandas, 0.2 s.
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return np.concatenate([np.from_dlpack(chunk) for chunk in chunks])


def class_names(
    labels: np.ndarray, names: np.ndarray, codes: np.ndarray, path: Path
) -> tuple[str, ...]:
    """Return the class name of every label; labels and names must match one to one."""
    used = np.unique(labels)
    if used[0] != 0 or used[-1] != len(used) - 1:
        raise unusable(path, f"labels must be 0..{len(used) - 1} without gaps, got {used[-1]}")
    name_of = np.zeros(len(used), dtype=np.int64)
    name_of[labels] = codes
    wrong = np.flatnonzero(name_of[labels] != codes)
    if wrong.size:
        label = int(labels[wrong[0]])
        both = sorted({str(names[codes[wrong[0]]]), str(names[name_of[label]])})
        raise unusable(path, f"label {label} has two class names, {both[0]!r} and {both[1]!r}")
    if len(np.unique(name_of)) != len(used):
        raise unusable(path, "one class name has two labels")
    return tuple(str(name) for name in names[name_of])
