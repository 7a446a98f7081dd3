"""Chooses the queries and classes of a retrieval gallery, and reads their images."""

from __future__ import annotations

import numpy as np

from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.evaluation.retrieval import RetrievalResult
from dml_dist.report.gallery import (
    Gallery,
    GalleryClass,
    GalleryNeighbor,
    GalleryQuery,
    choose_queries,
)

NUM_QUERIES = 16
NUM_NEIGHBORS = 8
NUM_WORST = 6
NUM_BEST = 3
QUERIES_PER_CLASS = 2
CLASS_NEIGHBORS = 6
"""Neighbors of a query in the list of classes, which has more queries."""


def gallery_of(result: RetrievalResult, rows: np.ndarray, index: Index, seed: int) -> Gallery:
    """Choose queries, half of them misses, and the worst and best classes.

    Args:
        result: An evaluation with lists of neighbors.
        rows: (N,) int64 index rows of the evaluated images, in their order.
        index: The data set with the images.
        seed: Seed of the choice.
    """
    assert result.query_rows is not None
    assert result.neighbors is not None
    labels = index.label[rows]
    query_labels = labels[result.query_rows]
    first_hit = labels[result.neighbors[:, 0]] == query_labels
    reader = _Reader(result, rows, index)
    chosen = choose_queries(first_hit, NUM_QUERIES, seed)
    queries = tuple(reader.query(int(number), NUM_NEIGHBORS) for number in chosen)
    order = result.per_class.label[result.per_class.worst_first()].tolist()
    worst, best = order[:NUM_WORST], order[NUM_WORST:][::-1][:NUM_BEST]
    classes = []
    for label in (*worst, *best):
        own = np.flatnonzero(query_labels == label)
        some = own[choose_queries(first_hit[own], QUERIES_PER_CLASS, seed, label)]
        classes.append(
            GalleryClass(
                class_name=index.class_names[label],
                recall_at_1=float(first_hit[own].mean()),
                num_queries=len(own),
                worst=label in worst,
                queries=tuple(reader.query(int(number), CLASS_NEIGHBORS) for number in some),
            )
        )
    reader.close()
    return Gallery(queries, tuple(classes))


class _Reader:
    """Reads queries and their neighbors, each image once."""

    def __init__(self, result: RetrievalResult, rows: np.ndarray, index: Index) -> None:
        self._result = result
        self._rows = rows
        self._index = index
        self._reader = ShardReader(index)
        self._images: dict[int, bytes] = {}

    def query(self, number: int, num_neighbors: int) -> GalleryQuery:
        """Return the counted query of a number, with its nearest images."""
        result = self._result
        assert result.query_rows is not None
        assert result.neighbors is not None
        assert result.neighbor_distances is not None
        row, class_name, image = self._image(int(result.query_rows[number]))
        found = []
        for position, distance in zip(
            result.neighbors[number][:num_neighbors],
            result.neighbor_distances[number][:num_neighbors],
            strict=True,
        ):
            if position >= 0:
                other, name, data = self._image(int(position))
                hit = bool(self._index.label[other] == self._index.label[row])
                found.append(GalleryNeighbor(other, name, float(distance), hit, data))
        return GalleryQuery(row, class_name, image, tuple(found))

    def close(self) -> None:
        """Close the tar shards."""
        self._reader.close()

    def _image(self, position: int) -> tuple[int, str, bytes]:
        row = int(self._rows[position])
        if row not in self._images:
            self._images[row] = self._reader.read(row)
        return row, self._index.class_names[self._index.label[row]], self._images[row]
