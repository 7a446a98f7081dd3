"""Arrays that a run keeps of its final evaluation: results of each class, and embeddings.

per_class.parquet, one row a class of the evaluated images, in rising order of labels:

    label         int64          label in the index
    class_name    string
    super_class   string, null   null when the class has none
    num_images    int64          evaluated images, queries and gallery
    num_queries   int64          counted queries: with another gallery image of the class
    recall_at_1   float64        mean over the counted queries; NaN when there is none
    r_precision   float64        likewise
    map_at_r      float64        likewise
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.errors import DataError
from dml_dist.files import open_atomic


@dataclass(frozen=True, eq=False)
class PerClass:
    """Retrieval results of each class; arrays of equal length C, rising by label.

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

        Equal ones stand by MAP@R, then by label.
        """
        order = np.lexsort((self.label, self.map_at_r, self.recall_at_1))
        return order[self.num_queries[order] > 0]


def write_per_class(
    path: Path, result: PerClass, class_names: Sequence[str], super_classes: Sequence[str | None]
) -> None:
    """Write per_class.parquet, at once or not at all.

    Args:
        path: The file.
        result: C classes.
        class_names: Their names, in the order of `result`.
        super_classes: Their super-classes, likewise; None or "" when there is none.
    """
    columns = {
        "label": pa.array(result.label, pa.int64()),
        "class_name": pa.array(list(class_names), pa.string()),
        "super_class": pa.array([name or None for name in super_classes], pa.string()),
        **{
            field.name: pa.array(getattr(result, field.name))
            for field in fields(result)
            if field.name != "label"
        },
    }
    with open_atomic(path) as file:
        pq.write_table(pa.table(columns), file)


def read_per_class(path: Path) -> tuple[PerClass, list[str], list[str | None]]:
    """Return what `write_per_class` wrote: results, class names, super-classes.

    Raises:
        DataError: If the file is missing, damaged or incomplete.
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
            f"required the results of each class, got {path}, which cannot be read ({error}); "
            "evaluate the run again"
        ) from None
    return PerClass(**values), names, super_classes


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
    """Write embeddings.npz, at once or not at all."""
    with open_atomic(path) as file:
        np.savez(file, embeddings=saved.embeddings, rows=saved.rows, labels=saved.labels)


def read_embeddings(path: Path) -> SavedEmbeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        DataError: If the file is missing, damaged or another one.
    """
    try:
        with np.load(path, allow_pickle=False) as values:
            return SavedEmbeddings(values["embeddings"], values["rows"], values["labels"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"required embeddings of an evaluation, got {path}, which cannot be read ({error}); "
            "evaluate the run again"
        ) from None
