"""Exact search over one gallery shard: the reference distance, the bound, lists and counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.errors import ConfigError
from dml_dist.evaluation.retrieval import evaluate
from dml_dist.losses.numerics import full_precision
from dml_dist.search import exact, propose
from dml_dist.search import gallery_shard as gallery
from dml_dist.search.approximate import Approximation
from dml_dist.search.exact import pair_distances, store_rows
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.neighbors import NO_ROW, Neighbors
from dml_dist.search.propose import Proposals, resolve_backend
from tests.oracles_retrieval import exact_distances, stored, tree_sum


def _normal(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _shard(x: Tensor, rows: Tensor | None = None, **options: object) -> GalleryShard:
    rows = torch.arange(len(x)) if rows is None else rows
    settings = {"radius": 1e3, "backend": "torch", "memory_bytes": 1 << 24}
    return GalleryShard(x, rows, rows % 7, **{**settings, **options})


def _all_queries(x: Tensor) -> Queries:
    rows = torch.arange(len(x))
    return Queries(x, rows, rows % 7)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 12, 33])
def test_distance_is_the_binary_tree_in_float64(width: int) -> None:
    x = _normal(12, width)
    query, row = torch.cartesian_prod(torch.arange(12), torch.arange(12)).T
    distances = pair_distances(x, query, x, row).view(12, 12)
    np.testing.assert_array_equal(distances.numpy(), exact_distances(x.numpy()))


def test_distance_bits_do_not_depend_on_chunks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _normal(300, 100)
    query, row = torch.randint(0, 300, (2, 5000), generator=torch.Generator().manual_seed(1))
    expected = pair_distances(x, query, x, row)
    assert torch.equal(expected, pair_distances(x, row, x, query))
    for elements, threads in ((1, 1), (3000, 2), (1 << 22, 2)):
        monkeypatch.setitem(exact._CHUNK_ELEMENTS, "cpu", elements)
        torch.set_num_threads(threads)
        assert torch.equal(expected, pair_distances(x, query, x, row))


def test_tree_sum_of_no_coordinates_is_zero() -> None:
    assert exact.tree_sum(torch.zeros(3, 0, dtype=torch.float64)).tolist() == [0.0] * 3


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_stored_rows(distance: exact.Distance) -> None:
    x = _normal(40, 11).to(torch.float64)
    x[3] = 0.0
    before = x.clone()
    rows = store_rows(x, distance)
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), stored(x.numpy(), distance))
    assert torch.equal(x, before)
    assert rows[3].abs().max() == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e25])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_error_bound_holds(scale: float, offset: float) -> None:
    x = (_normal(400, 64) + offset) * scale
    shard = Approximation(x, float(x.to(torch.float64).norm(dim=1).max()))
    queries = shard.of_queries(x[:50])
    with full_precision(torch.device("cpu")):
        partial = shard.partial_distances(queries.rows_QD, 0, 400)
    approximate = partial.to(torch.float64) + queries.square_Q[:, None]
    query, row = torch.cartesian_prod(torch.arange(50), torch.arange(400)).T
    true = pair_distances(x, query, x, row).view(50, 400) * shard.scale_square
    bound = shard.bound(queries.norm_Q, torch.full_like(queries.norm_Q, torch.inf))
    assert ((approximate - true).abs() <= bound[:, None]).all()
    # It must also be tight: small compared with the distances that it separates.
    assert bound.max() < 1e-3 * true.median()


def test_equal_rows_are_shifted_to_exactly_zero() -> None:
    x = torch.full((1000, 5), 0.1)
    assert Approximation(x, 1.0).rows_ND.abs().max() == 0


def test_an_outlier_does_not_widen_the_bound_of_others() -> None:
    x = _normal(200, 16)
    x[7] *= 1e6
    shard = Approximation(x, float(x.norm(dim=1).max()))
    queries = shard.of_queries(x[10:20])
    near = torch.full((10,), 30.0 * shard.scale_square, dtype=torch.float64)
    assert (shard.bound(queries.norm_Q, near) < 0.2 * near).all()


def test_low_matmul_precision_of_the_caller_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    x, labels = rng.standard_normal((300, 64)), rng.integers(0, 30, 300)
    expected = evaluate(x, labels, backend="torch", recall_at=(1, 50)).as_dict()
    torch.set_float32_matmul_precision("medium")
    try:
        result = evaluate(x, labels, backend="torch", recall_at=(1, 50)).as_dict()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert result == expected


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("width", [2, 64])
def test_autocast_around_an_evaluation_changes_nothing(width: int, distance: str) -> None:
    labels = np.arange(600) % 30
    rng = np.random.default_rng(6)
    x = 5.0 + rng.standard_normal((30, width))[labels] + 0.1 * rng.standard_normal((600, width))
    options = {"backend": "torch", "distance": distance, "neighbors": 10, "recall_at": (1, 50)}
    expected = evaluate(x, labels, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = evaluate(x, labels, **options)
    assert result.as_dict() == expected.as_dict()
    np.testing.assert_array_equal(result.neighbors, expected.neighbors)


def _brute_force(x: Tensor, rows: Tensor, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of all rows against a gallery of some, by a full sort."""
    distances = exact_distances(x.numpy())[:, rows.numpy()]
    listed_rows = np.full((len(x), num_neighbors), NO_ROW)
    listed = np.full((len(x), num_neighbors), np.inf)
    for q in range(len(x)):
        order = [n for n in np.lexsort((rows.numpy(), distances[q])) if rows[n] != q][
            :num_neighbors
        ]
        listed_rows[q, : len(order)] = rows.numpy()[order]
        listed[q, : len(order)] = distances[q, order]
    return listed, listed_rows


def _assert_lists(found: Neighbors, x: Tensor, rows: Tensor) -> None:
    distances, listed_rows = _brute_force(x, rows, found.row_QK.shape[1])
    np.testing.assert_array_equal(found.row_QK.numpy(), listed_rows)
    np.testing.assert_array_equal(found.distance_QK.numpy(), distances)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("num_neighbors", [1, 9, 200])
def test_lists_of_a_shard_that_holds_some_of_the_rows(backend: str, num_neighbors: int) -> None:
    x = torch.cat([_normal(60, 6), _normal(60, 6).round()])
    rows = torch.arange(30, 110, 2)
    shard = _shard(x[rows], rows, backend=backend)
    _assert_lists(shard.nearest(_all_queries(x), num_neighbors), x, rows)


@pytest.mark.parametrize("memory_bytes", [1 << 9, 1 << 24])
def test_results_are_exact_with_useless_candidates(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int
) -> None:
    def first_rows(
        rows: Approximation, queries: object, num_candidates: int, *_: object
    ) -> Proposals:
        position = torch.arange(num_candidates).expand(len(x), num_candidates)
        return Proposals(position, torch.full((len(x),), -torch.inf, dtype=torch.float64))

    x = torch.cat([_normal(30, 6), _normal(30, 6).round()])
    monkeypatch.setattr(gallery, "propose", first_rows)
    shard = _shard(x, memory_bytes=memory_bytes)
    _assert_lists(shard.nearest(_all_queries(x), 4), x, torch.arange(60))


@pytest.mark.parametrize("memory_bytes", [1 << 9, 1 << 24])
def test_nearest_of_the_class_and_counts_of_closer_rows(memory_bytes: int) -> None:
    x = torch.cat([_normal(35, 6), _normal(35, 3).round() @ torch.ones(3, 6)])
    queries = _all_queries(x)
    shard = _shard(x, memory_bytes=memory_bytes)
    nearest = shard.nearest_of_class(queries)
    limits = nearest.distance_QK[:, 0], nearest.row_QK[:, 0]
    closer = shard.count_closer(queries, *limits, limit=70)
    _, ranking = _brute_force(x, torch.arange(70), 69)
    for q in range(70):
        place = int(np.flatnonzero(ranking[q] % 7 == q % 7)[0])
        assert int(nearest.row_QK[q, 0]) == ranking[q, place]
        assert int(closer[q]) == place
    capped = shard.count_closer(queries, *limits, limit=4)
    assert torch.equal(capped.clamp(max=4), closer.clamp(max=4))


def test_an_empty_shard_lists_nothing_and_counts_nothing() -> None:
    x = _normal(5, 4)
    shard = _shard(x[:0], torch.zeros(0, dtype=torch.int64))
    queries = _all_queries(x)
    for found in (shard.nearest(queries, 3), shard.nearest_of_class(queries)):
        assert (found.row_QK == NO_ROW).all()
        assert found.distance_QK.isinf().all()
    counted = shard.count_closer(queries, torch.ones(5, dtype=torch.float64), torch.arange(5), 9)
    assert counted.tolist() == [0] * 5


# In the last one a block of products is narrower than the list of candidates.
@pytest.mark.parametrize("memory_bytes", [1 << 24, 1 << 15])
def test_both_backends_return_the_nearest_rows(memory_bytes: int) -> None:
    x = _normal(5000, 16)
    shard = Approximation(x, float(x.norm(dim=1).max()))
    queries = shard.of_queries(x[:100])
    expected = torch.cdist(x[:100].double(), x.double()).topk(20, largest=False)[1]
    for backend in ("faiss", "torch"):
        found = propose.propose(shard, queries, 30, backend, memory_bytes)
        assert (expected[:, :, None] == found.position_QK[:, None, :]).any(dim=2).all()
        assert found.farthest_Q.isfinite().all()


def test_auto_is_faiss_on_a_cpu_and_torch_elsewhere_or_without_faiss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "faiss"
    assert resolve_backend("auto", torch.device("cuda")) == "torch"
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert resolve_backend("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ConfigError, match="install faiss-gpu or faiss-cpu"):
        resolve_backend("faiss", torch.device("cpu"))


def test_the_oracle_adds_as_documented() -> None:
    values = [np.float64(v) for v in (1e16, 1.0, -1e16, 1.0, 3.0)]
    # Padded to 8: (1e16 + 3) + -1e16 = 4 (1e16 + 3 rounds to 1e16 + 4), and 1 + 1.
    assert tree_sum(values) == 6.0
