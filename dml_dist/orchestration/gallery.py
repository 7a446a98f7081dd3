"""The retrieval gallery of a final evaluation: which queries, with which images."""

from __future__ import annotations

import numpy as np

from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.evaluation.retrieval import RetrievalResult
from dml_dist.report.gallery import GalleryNeighbor, GalleryQuery, choose_queries

NUM_QUERIES = 16
NUM_NEIGHBORS = 8


def gallery_queries(
    result: RetrievalResult, rows: np.ndarray, index: Index, seed: int
) -> list[GalleryQuery]:
    """Choose queries, half of them misses, and read their images and their neighbours'.

    Args:
        result: An evaluation that listed neighbours.
        rows: (N,) int64 index rows of the evaluated images, in their order.
        index: Where the images are.
        seed: Seed of the choice.
    """
    assert result.query_rows is not None
    assert result.neighbors is not None
    assert result.neighbor_distances is not None
    labels = index.label[rows]
    first_hit = labels[result.neighbors[:, 0]] == labels[result.query_rows]
    reader = ShardReader(index)

    def image(position: int) -> tuple[int, str, bytes]:
        row = int(rows[position])
        return row, index.class_names[index.label[row]], reader.read(row)

    queries = []
    for number in choose_queries(first_hit, NUM_QUERIES, seed):
        position = int(result.query_rows[number])
        listed = zip(result.neighbors[number], result.neighbor_distances[number], strict=True)
        neighbors = []
        for neighbor, distance in listed:
            if neighbor >= 0:
                row, class_name, data = image(int(neighbor))
                hit = bool(labels[neighbor] == labels[position])
                neighbors.append(GalleryNeighbor(row, class_name, float(distance), hit, data))
        row, class_name, data = image(position)
        queries.append(GalleryQuery(row, class_name, data, tuple(neighbors)))
    reader.close()
    return queries
