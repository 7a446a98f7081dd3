"""Reading of CSV and parquet tables with every column as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dml_dist.errors import DataError

_SHOWN = 5


def read_table(path: Path) -> pa.Table:
    """Read a table with a header; all columns become strings, empty fields "".

    A label such as 007 keeps its zeros.

    Raises:
        DataError: If the file is missing, of another kind, damaged, or without rows.
    """
    if not path.is_file():
        raise DataError(f"the table {path} does not exist; check the path")
    kind = path.suffix.lower()
    if kind not in (".csv", ".parquet"):
        raise DataError(f"a table must be a .csv or .parquet file, got {path}")
    try:
        names = _csv_names(path) if kind == ".csv" else pq.read_schema(path).names
        names = [name.strip() for name in names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"{path}: a table must have one column of each name, it has more than one of "
                f"{', '.join(map(repr, twice))}; rename or remove the others"
            )
        table = _read_csv(path) if kind == ".csv" else pq.read_table(path, partitioning=None)
        columns = [_as_text(column) for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]}: {error}") from error
    if not table.num_rows:
        raise DataError(f"{path} has a header and no rows; a table needs at least one")
    return pa.table(columns, names=names)


def refuse(rule: str, wrong: Sequence[str], separator: str = ", ") -> None:
    """Raise a DataError that names the rule and the first of what breaks it, if anything does."""
    if wrong:
        more = f"{separator}and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(f"{rule}: {separator.join(wrong[:_SHOWN])}{more}")


def _csv_names(path: Path) -> list[str]:
    with pa_csv.open_csv(path) as reader:
        names: list[str] = reader.schema.names
    return names


def _read_csv(path: Path) -> pa.Table:
    return pa_csv.read_csv(
        path,
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(_csv_names(path), pa.string()), strings_can_be_null=False
        ),
    )


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.string()).fill_null("")
