"""Results of each class: read from a run's folder, drawn as a distribution, the weakest listed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dml_dist.errors import DataError
from dml_dist.report.figures import Colors, Picture, draw_picture, new_axes, whole_numbers
from dml_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LISTED = 10
"""Classes in the list of the weakest."""

_COLUMNS = ("label", "num_images", "num_queries", "recall_at_1", "map_at_r")


@dataclass(frozen=True, eq=False)
class ClassResults:
    """Results of the classes that have a query that counts; arrays of equal length C.

    Attributes:
        names: Class names.
        super_classes: Their super-classes, None where there is none.
        labels: (C,) int64, rising.
        num_images: (C,) int64.
        num_queries: (C,) int64, >= 1.
        recall_at_1: (C,) float64 in [0, 1].
        map_at_r: (C,) float64 in [0, 1].
    """

    names: list[str]
    super_classes: list[str | None]
    labels: np.ndarray
    num_images: np.ndarray
    num_queries: np.ndarray
    recall_at_1: np.ndarray
    map_at_r: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def weakest(self, count: int = NUM_LISTED) -> np.ndarray:
        """Return the positions of the classes with the lowest R@1, then MAP@R, in this order."""
        return np.lexsort((self.map_at_r, self.recall_at_1))[:count]


def read_class_results(run_dir: Path) -> ClassResults | None:
    """Return per_class.parquet of a run's folder, None when there is none.

    Raises:
        DataError: If it is damaged.
    """
    path = RunFolder(run_dir).per_class
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
        values = {name: table[name].to_numpy(zero_copy_only=False) for name in _COLUMNS}
        names, super_classes = table["class_name"].to_pylist(), table["super_class"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(
            f"required the results of each class, got {path}, which is damaged ({error!r}); "
            "evaluate the run again to write it anew"
        ) from None
    counted = np.flatnonzero(values["num_queries"] > 0)
    return ClassResults(
        [names[at] for at in counted],
        [super_classes[at] for at in counted],
        labels=values.pop("label")[counted],
        **{name: column[counted] for name, column in values.items()},
    )


def draw_classes(results: ClassResults) -> Picture:
    """Draw how R@1 is distributed over the classes."""
    none, all_ = (int((results.recall_at_1 == value).sum()) for value in (0.0, 1.0))
    middle = float(np.median(results.recall_at_1))
    caption = (
        f"R@1 of {len(results):,} test classes. In {all_:,} of them ({all_ / len(results):.1%}) "
        f"every query hits, in {none:,} ({none / len(results):.1%}) none does; the median class "
        f"has {middle:.1%}, the mean (line) is {results.recall_at_1.mean():.1%}."
    )
    return draw_picture("classes", caption, partial(_draw, results))


def _draw(results: ClassResults, colors: Colors) -> Figure:
    figure, axes = new_axes(colors, "R@1 of a class (%)", "classes")
    # Bars stand over the values that classes of some ten queries can have.
    step = 10 if np.median(results.num_queries) <= 12 else 5
    centers = np.arange(0, 101, step)
    counts = np.bincount(np.rint(100 * results.recall_at_1 / step).astype(np.int64))
    counts = np.pad(counts, (0, len(centers) - len(counts)))
    axes.bar(centers, counts, width=0.86 * step, color=colors["recall"])
    axes.axvline(100 * results.recall_at_1.mean(), color=colors["map"], linewidth=1.4)
    axes.set_xlim(-0.5 * step, 100 + 0.5 * step)
    axes.set_xticks(range(0, 101, 20))
    whole_numbers(axes.yaxis)
    return figure
