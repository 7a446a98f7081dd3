"""Evaluation on several ranks: bitwise equal to one process, and the same error on all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dml_dist.errors import DataError
from dml_dist.evaluation.retrieval import RetrievalResult, evaluate
from dml_dist.parallel.comm import Comm
from dml_dist.runs.artifacts import SavedEmbeddings
from dml_dist.runtime.context import collect_embeddings
from dml_dist.search import cross_join, self_join
from dml_dist.topology import Topology
from tests.ranks import run_ranks
from tests.retrieval_cases import cases

RECALL_AT = (1, 2, 5, 20, 500)
OPTIONS: list[dict[str, Any]] = [
    {"distance": "cosine", "backend": "faiss", "memory_mb": 512.0},
    {"distance": "euclidean", "backend": "torch", "memory_mb": 0.12},
]
EVERYTHING: dict[str, Any] = {
    "extra": ("nmi", "nmi_geometric", "f1", "ami", "super_class_recall", "structure"),
    "definitions": ("nir.map_c", "oml.map_at_5"),
    "seed": 1,
}
SUPER_CLASSES = np.array(["", "animal", "plant", "a"])
# Shares of the rows: uneven, and one rank without any.
SHARES = {1: [(1.0,)], 2: [(0.3, 0.7)], 3: [(0.45, 0.0, 0.55)]}


def _bounds(count: int, shares: tuple[float, ...]) -> list[int]:
    return [0, *np.rint(np.cumsum(shares) * count).astype(int).tolist()]


def _comm(topology: Topology) -> Comm:
    return Comm.from_default_group() if topology.world_size > 1 else Comm.single()


def _summary(result: RetrievalResult) -> dict[str, Any]:
    assert result.neighbors is not None
    assert result.query_rows is not None
    return {
        **result.as_dict(),
        "query_rows": result.query_rows.tolist(),
        "neighbors": result.neighbors.tolist(),
        **{
            name: getattr(result.per_class, name).tobytes()
            for name in ("label", "num_images", "num_queries", "recall_at_1", "map_at_r")
        },
    }


def _all_cases(topology: Topology) -> dict[str, list[dict[str, Any]]]:
    comm = _comm(topology)
    if topology.world_size > 1:
        # Several chunks on every rank; rounds in which some ranks have none.
        self_join.CHUNK = cross_join.CHUNK = 16
    results: dict[str, list[dict[str, Any]]] = {}
    for name, case in cases().items():
        for shares in SHARES[topology.world_size]:
            bounds = _bounds(len(case.labels), shares)
            part = slice(bounds[topology.rank], bounds[topology.rank + 1])
            # Three ranks differ from two in how rounds go; how blocks go is seen with two.
            for options in OPTIONS[: 3 - max(1, topology.world_size - 1)]:
                result = evaluate(
                    case.embeddings[part],
                    case.labels[part],
                    roles=None if case.roles is None else case.roles[part],
                    recall_at=RECALL_AT,
                    neighbors=4,
                    comm=comm,
                    super_classes=SUPER_CLASSES[case.labels[part] % 4],
                    **options,
                    **EVERYTHING,
                )
                key = f"{name}, {options['distance']}"
                results.setdefault(key, []).append(_summary(result))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_equals_one_process_bitwise(world_size: int) -> None:
    expected = _all_cases(Topology())
    for rank, results in enumerate(run_ranks(_all_cases, world_size)):
        for key, listed in results.items():
            for result in listed:
                assert result == expected[key][0], (rank, key)


def _collected(topology: Topology) -> SavedEmbeddings | None:
    # Rank 1 has no row, and so does not know the width.
    count = 2 - topology.rank % 2 * 2
    x = np.full((count, 3 if count else 0), topology.rank, dtype=np.float32)
    rows = np.arange(count) + 10 * topology.rank
    return collect_embeddings(x, rows, rows * 2, _comm(topology))


def test_rank_0_collects_all_embeddings_in_rank_order() -> None:
    results = run_ranks(_collected, 3)
    assert results[1:] == [None, None]
    assert results[0] is not None
    assert results[0].embeddings.tolist() == [[0.0] * 3] * 2 + [[2.0] * 3] * 2
    assert results[0].rows.tolist() == [0, 1, 20, 21]
    assert results[0].labels.tolist() == [0, 2, 40, 42]


def _bad_row_on_rank_1(topology: Topology) -> str:
    x = np.eye(4, dtype=np.float32)
    if topology.rank == 1:
        x[3, 0] = np.nan
    with pytest.raises(DataError) as caught:
        evaluate(x, np.array([0, 0, 1, 1]), comm=_comm(topology))
    return str(caught.value)


def _widths_differ(topology: Topology) -> str:
    x = np.zeros((2, 3 + topology.rank), dtype=np.float32)
    with pytest.raises(DataError) as caught:
        evaluate(x, np.array([0, 0]), comm=_comm(topology))
    return str(caught.value)


def _nothing_to_count(topology: Topology) -> str:
    labels = np.arange(2) + 2 * topology.rank
    with pytest.raises(DataError) as caught:
        evaluate(np.eye(2, dtype=np.float32), labels, comm=_comm(topology))
    return str(caught.value)


def _errors(topology: Topology) -> list[str]:
    return [_bad_row_on_rank_1(topology), _widths_differ(topology), _nothing_to_count(topology)]


def test_an_error_is_raised_on_all_ranks() -> None:
    for bad_row, widths, nothing in run_ranks(_errors, 2):
        assert "rank 1" in bad_row
        assert "row 3, column 0" in bad_row
        assert "[(2, 3), (2, 4)]" in widths
        assert "4 queries" in nothing
