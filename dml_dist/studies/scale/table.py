"""The table of a study's points on disk: points.parquet, and points.csv with the same columns."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields

import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.errors import DataError
from dml_dist.files import open_atomic, write_text_atomic
from dml_dist.runs.scaling import ScaleFolder
from dml_dist.studies.scale.points import COLUMNS, ScalePoint

_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_SCHEMA = pa.schema(
    [(field.name, _TYPES.get(str(field.type), pa.string())) for field in fields(ScalePoint)]
)


def write_points(folder: ScaleFolder, points: Iterable[ScalePoint]) -> None:
    """Write all points; a reader sees the old tables or the new ones, each whole."""
    rows = [asdict(point) for point in points]
    with open_atomic(folder.points_path.with_suffix(".parquet")) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(folder.points_path.with_suffix(".csv"), text.getvalue())


def read_points(folder: ScaleFolder) -> list[ScalePoint]:
    """Return the points of a study; none if it has no table yet.

    Raises:
        DataError: If the table is damaged, or of another version.
    """
    path = folder.points_path.with_suffix(".parquet")
    if not path.is_file():
        return []
    try:
        return [ScalePoint(**row) for row in pq.read_table(path).to_pylist()]
    except (pa.ArrowException, TypeError) as error:
        raise DataError(
            f"{path} is damaged, or of another version of dml-dist ({error}); restore it from a "
            "copy, or measure the study again in another --run-dir"
        ) from None
