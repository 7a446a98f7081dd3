"""Results of each class on the report page: their distribution, and the weakest classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dml_dist.report.figures import Colors, Picture, draw_picture, new_axes, whole_numbers
from dml_dist.report.formatting import format_metric
from dml_dist.runs.artifacts import ClassTable, read_class_table
from dml_dist.runs.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LISTED = 10
"""Length of the list of the weakest classes."""


@dataclass(frozen=True)
class ClassRow:
    """A row of the list of the weakest classes, formatted."""

    name: str
    super_class: str | None
    num_images: int
    recall_at_1: str
    map_at_r: str


def read_class_results(run_dir: Path) -> ClassTable | None:
    """Return the classes with a counted query in a run's per_class.parquet.

    None when there is no file or no such class.

    Raises:
        DataError: If the file is damaged.
    """
    path = RunFolder(run_dir).per_class
    if not path.is_file():
        return None
    table = read_class_table(path)
    return table.take(np.flatnonzero(table.results.num_queries > 0)) or None


def weakest_rows(table: ClassTable) -> list[ClassRow]:
    """Return the classes with the lowest R@1, the weakest first."""
    results = table.results
    return [
        ClassRow(
            table.names[at],
            table.super_classes[at],
            int(results.num_images[at]),
            format_metric("recall_at_1", float(results.recall_at_1[at])),
            format_metric("map_at_r", float(results.map_at_r[at])),
        )
        for at in results.worst_first()[:NUM_LISTED]
    ]


def draw_classes(table: ClassTable) -> Picture:
    """Draw the distribution of R@1 over the classes."""
    recall = table.results.recall_at_1
    count, num_zero, num_full = len(table), int((recall == 0).sum()), int((recall == 1).sum())
    caption = (
        f"R@1 of {count:,} test classes. In {num_full:,} of them ({num_full / count:.1%}) "
        f"every query hits, in {num_zero:,} ({num_zero / count:.1%}) none does; the median class "
        f"has {float(np.median(recall)):.1%}, the mean (line) is {recall.mean():.1%}."
    )
    return draw_picture("classes", caption, partial(_draw, table))


def _draw(table: ClassTable, colors: Colors) -> Figure:
    figure, axes = new_axes(colors, "R@1 of a class (%)", "classes")
    recall = table.results.recall_at_1
    # Bins centered on the values that classes of about ten queries can have.
    step = 10 if np.median(table.results.num_queries) <= 12 else 5
    centers = np.arange(0, 101, step)
    counts = np.bincount(np.rint(100 * recall / step).astype(np.int64))
    counts = np.pad(counts, (0, len(centers) - len(counts)))
    axes.bar(centers, counts, width=0.86 * step, color=colors["recall"])
    axes.axvline(100 * recall.mean(), color=colors["map"], linewidth=1.4)
    axes.set_xlim(-0.5 * step, 100 + 0.5 * step)
    axes.set_xticks(range(0, 101, 20))
    whole_numbers(axes.yaxis)
    return figure
