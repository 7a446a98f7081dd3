"""Lists by joins equal brute force, for any chunks; which queries are unresolved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dml_dist.evaluation.retrieval import evaluate
from dml_dist.search import cross_join, self_join
from dml_dist.search.approximate import Approximation
from dml_dist.search.self_join import SelfJoin
from tests.oracles_retrieval import exact_distances, retrieval, stored
from tests.retrieval_cases import cases

CASES = cases()
RECALL_AT = (1, 2, 5, 20, 500)


@pytest.fixture(params=[7, 32, 4096])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a chunk in both joins."""
    monkeypatch.setattr(self_join, "CHUNK", request.param)
    monkeypatch.setattr(cross_join, "CHUNK", request.param)
    return request.param


def _join(x: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = torch.from_numpy(x)
    radius = float(np.abs(x).max()) * x.shape[1] ** 0.5
    join = SelfJoin(rows, torch.arange(len(x)) + 100, Approximation(rows, radius), k)
    lists, is_unresolved = join.run(int(k.max()))
    return lists.distance_QK.numpy(), lists.row_QK.numpy() - 100, is_unresolved


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.roles is None])
def test_lists_are_those_of_brute_force(name: str) -> None:
    x = stored(CASES[name].embeddings, "euclidean")
    k = np.minimum(1 + np.arange(len(x)) % 6, len(x) - 1)
    k[3::11] = 0
    distances, rows, is_unresolved = _join(x, k)
    exact = exact_distances(x)
    for query in np.flatnonzero(~is_unresolved & (k > 0)):
        order = sorted((exact[query, g], g) for g in range(len(x)) if g != query)
        expected = order[: k[query]]
        found = zip(distances[query], rows[query], strict=True)
        assert list(found)[: k[query]] == expected, query
    if name in ("normal", "lone classes", "near-duplicates of other classes"):
        assert not is_unresolved.any()


@pytest.mark.usefixtures("chunk")
def test_collapsed_rows_are_unresolved_and_keep_no_candidates() -> None:
    x = np.ones((150, 3), dtype=np.float32)
    x[:5] = np.arange(5)[:, None]
    rows = torch.from_numpy(x)
    k = np.full(150, 4)
    join = SelfJoin(rows, torch.arange(150), Approximation(rows, 7.0), k)
    _, is_unresolved = join.run(4)
    assert is_unresolved[5:].all()
    assert sum(kept.num_sorted for kept in join._kept) <= 5 * (2 * 4 + self_join.SLACK)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.roles is None])
def test_metrics_equal_brute_force(name: str, distance: str) -> None:
    case = CASES[name]
    expected = retrieval(case.embeddings, case.labels, recall_at=RECALL_AT, distance=distance)
    found = evaluate(
        case.embeddings, case.labels, recall_at=RECALL_AT, distance=distance, neighbors=7
    )
    for key, value in found.as_dict().items():
        assert value == pytest.approx(expected[key], abs=1e-12), key
    for query, listed in zip(found.query_rows, found.neighbors, strict=True):
        ranking = expected["rankings"][query][:7]
        assert listed.tolist() == [*ranking, *[-1] * (len(listed) - len(ranking))]


def test_joins_and_blocks_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 150, 900)
    labels[:120] = 7  # A class too large for a join's lists.
    x = (rng.standard_normal((1000, 24))[labels] + 1.1 * rng.standard_normal((900, 24))).astype(
        "f4"
    )
    results = []
    made = []
    make = cross_join.SelfJoin.run

    def run(join: SelfJoin, num_neighbors: int) -> object:
        made.append(num_neighbors)
        return make(join, num_neighbors)

    monkeypatch.setattr(cross_join.SelfJoin, "run", run)
    for memory_mb in (512.0, 0.5):
        results.append(evaluate(x, labels, recall_at=RECALL_AT, neighbors=5, memory_mb=memory_mb))
    assert made == [max(np.bincount(labels)[8:].max() - 1, 8)]  # 0.5 MiB is not enough for a join.
    assert results[0].as_dict() == results[1].as_dict()
    np.testing.assert_array_equal(results[0].neighbors, results[1].neighbors)
    np.testing.assert_array_equal(results[0].neighbor_distances, results[1].neighbor_distances)
