"""Results of an evaluation in a run's folder: metrics, results per class, embeddings.

metrics.json, and metrics-SPLIT-CHECKPOINT.json of `dml-dist evaluate`:

    trained       metrics of the checkpoint on the evaluated split
    untrained     metrics of the untrained network on the test split
    features      those of its pooled features, before the head, if it has given weights
    validation    recorded metrics of the best validation
    checkpoint    folder and step of the checkpoint; at the end of a run also whether it is the best
    split         the evaluated split
    seconds       part of the run -> duration

Which metrics the metrics.json of a run holds depends on `evaluation.final`: `trained` and
`untrained` (and `features`) for full, `trained` for metrics, and `validation` for none, if the run
validates.
metrics-SPLIT-CHECKPOINT.json holds `trained` and `split`.

per_class.parquet, one row for each class of the evaluated images, in ascending order of labels:

    label         int64          label in the index
    class_name    string
    super_class   string, null   null when the class has none
    num_images    int64          evaluated images, queries and gallery
    num_queries   int64          counted queries: those with another gallery image of the class
    recall_at_1   float64        mean over the counted queries; NaN when there is none
    r_precision   float64        likewise
    map_at_r      float64        likewise

embeddings.npz: arrays `embeddings`, `rows` and `labels`, as in `SavedEmbeddings`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.errors import DataError
from dml_dist.files import open_atomic, read_json, write_json_atomic

# ---------------- metrics


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write the metrics of an evaluation, atomically."""
    write_json_atomic(path, metrics)


def read_metrics(path: Path) -> dict[str, Any]:
    """Return the metrics that `write_metrics` wrote; empty if there is no file.

    Raises:
        DataError: If the file is damaged.
    """
    if not path.is_file():
        return {}
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise DataError(
            f"The metrics in {path} are not a JSON object but {type(metrics).__name__}; "
            "evaluate the run again to replace the file"
        )
    return metrics


# ---------------- results per class


@dataclass(frozen=True, eq=False)
class PerClass:
    """Retrieval results of each class: arrays of length C, in ascending order of labels.

    Attributes:
        label: (C,) int64.
        num_images: (C,) int64, evaluated rows.
        num_queries: (C,) int64, counted queries.
        recall_at_1: (C,) float64 in [0, 1]; NaN for a class without a counted query.
        r_precision: (C,) float64, likewise.
        map_at_r: (C,) float64, likewise.
    """

    label: np.ndarray
    num_images: np.ndarray
    num_queries: np.ndarray
    recall_at_1: np.ndarray
    r_precision: np.ndarray
    map_at_r: np.ndarray

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.label)

    def worst_first(self) -> np.ndarray:
        """Return the positions of classes with a counted query, lowest Recall@1 first.

        Equal ones are ordered by MAP@R, then by label.
        """
        order = np.lexsort((self.label, self.map_at_r, self.recall_at_1))
        return order[self.num_queries[order] > 0]


@dataclass(frozen=True, eq=False)
class ClassTable:
    """Contents of per_class.parquet.

    Attributes:
        results: Results of C classes.
        names: Their names.
        super_classes: Their super-classes, None where there is none.
    """

    results: PerClass
    names: list[str]
    super_classes: list[str | None]

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def take(self, positions: np.ndarray) -> ClassTable:
        """Return the classes at some positions."""
        values = {
            field.name: getattr(self.results, field.name)[positions] for field in fields(PerClass)
        }
        return ClassTable(
            PerClass(**values),
            [self.names[at] for at in positions],
            [self.super_classes[at] for at in positions],
        )


def write_class_table(path: Path, table: ClassTable) -> None:
    """Write per_class.parquet, atomically; an empty super-class counts as none."""
    columns = {
        "label": pa.array(table.results.label, pa.int64()),
        "class_name": pa.array(table.names, pa.string()),
        "super_class": pa.array([name or None for name in table.super_classes], pa.string()),
        **{
            field.name: pa.array(getattr(table.results, field.name))
            for field in fields(PerClass)
            if field.name != "label"
        },
    }
    with open_atomic(path) as file:
        pq.write_table(pa.table(columns), file)


def read_class_table(path: Path) -> ClassTable:
    """Return the table that `write_class_table` wrote.

    Raises:
        DataError: If the file is missing or damaged, or a column is missing.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        values = {
            field.name: table[field.name].to_numpy(zero_copy_only=False)
            for field in fields(PerClass)
        }
        names = table["class_name"].to_pylist()
        super_classes = table["super_class"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"The results per class in {path} cannot be read: the file is missing or damaged "
            f"({error!r}); evaluate the run again to replace it"
        ) from None
    return ClassTable(PerClass(**values), names, super_classes)


# ---------------- embeddings


@dataclass(frozen=True, eq=False)
class SavedEmbeddings:
    """Embeddings of all ranks.

    Attributes:
        embeddings: (N, D) float32.
        rows: (N,) int64 index rows.
        labels: (N,) int64.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    labels: np.ndarray


def write_embeddings(path: Path, saved: SavedEmbeddings) -> None:
    """Write embeddings.npz, atomically."""
    with open_atomic(path) as file:
        np.savez(file, embeddings=saved.embeddings, rows=saved.rows, labels=saved.labels)


def read_embeddings(path: Path) -> SavedEmbeddings:
    """Return the embeddings that `write_embeddings` wrote.

    Raises:
        DataError: If the file is missing or damaged, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as values:
            saved = SavedEmbeddings(values["embeddings"], values["rows"], values["labels"])
        shapes = saved.embeddings.shape, saved.rows.shape, saved.labels.shape
        if len(shapes[0]) != 2 or shapes[1:] != (shapes[0][:1],) * 2:
            raise ValueError(f"embeddings, rows and labels have shapes {shapes}")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The embeddings in {path} cannot be read: the file is missing or damaged "
            f"({error!r}); evaluate the run again to replace it"
        ) from None
    return saved
