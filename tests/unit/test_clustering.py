"""k-means against loops over rows; NMI, AMI and pairwise F1 against scikit-learn."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    adjusted_mutual_info_score,
    normalized_mutual_info_score,
    pair_confusion_matrix,
)

from dml_dist.evaluation.retrieval import evaluate
from dml_dist.metrics import cluster_agreement as metrics
from dml_dist.parallel.comm import Comm
from dml_dist.random_streams import Stream, generator_of
from dml_dist.search.exact import store_rows
from dml_dist.search.kmeans import Clusters, kmeans
from tests import oracles_clustering as oracle
from tests.retrieval_cases import cases

CASES = cases()


def _kmeans(x: np.ndarray, k: int, **changes: object) -> Clusters:
    options: dict[str, object] = {"seed": 3, "backend": "faiss", "memory_bytes": 1 << 26}
    rows = torch.from_numpy(x)
    return kmeans(rows, (len(x),), k, Comm.single(), **(options | changes))


def _first(count: int, k: int, seed: int) -> list[int]:
    """Repeat the draw of centres that a seed means."""
    generator = generator_of(Stream.KMEANS_CENTERS, seed)
    return generator.choice(count, k, replace=False).tolist()


@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "ties on a grid",
        "near-duplicates of other classes",
        "collapsed",
        "nearly collapsed, far from the origin",
        "rows of zeros",
        "one column",
        "two rows",
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_equals_a_loop_over_rows_for_both_backends_and_any_memory(name: str, share: float) -> None:
    x = CASES[name].embeddings[:50]
    k = max(1, int(share * len(x)))
    expected = oracle.kmeans(x, _first(len(x), k, 3))
    for options in (
        {"backend": "faiss"},
        {"backend": "torch"},
        {"backend": "torch", "memory_bytes": 3000},
    ):
        found = _kmeans(x, k, **options)
        assert (found.cluster_N.tolist(), found.num_iterations) == expected, options
        assert found.num_empty == k - len(set(expected[0]))


def test_one_cluster_and_as_many_as_rows() -> None:
    x = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    one = _kmeans(x, 1)
    assert not one.cluster_N.any()
    assert one.has_converged
    assert sorted(_kmeans(x, 30).cluster_N.tolist()) == list(range(30))
    for k in (0, 31):
        with pytest.raises(ValueError, match=r"1 \.\. 30, the number of rows"):
            _kmeans(x, k)


def test_more_clusters_than_distinct_rows_leave_the_others_empty() -> None:
    x = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    found = _kmeans(x, 8)
    assert found.has_converged
    assert found.num_empty == 5
    groups = found.cluster_N.view(3, 5)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique()) == 3


def test_an_empty_cluster_takes_the_farthest_row() -> None:
    # Centers are drawn as two equal rows: the second is empty until it takes row 5.
    x = np.array([[0.0], [0.0], [0.0], [0.0], [1.0], [9.0]], dtype=np.float32)
    seed = next(s for s in range(100) if sorted(_first(6, 2, s)) == [0, 1])
    found = _kmeans(x, 2, seed=seed)
    assert found.num_empty == 0
    assert found.cluster_N.tolist() == [0, 0, 0, 0, 0, 1]


def test_an_empty_cluster_does_not_take_the_only_row_of_another() -> None:
    """Centers 16, 13, 12, 12: the last one, empty, takes 24.

    The means are then 20, 13, 10 1/3 and 24, and 16 goes to 13: cluster 0 is empty. The row
    farthest from its centre is 7, the only one of cluster 2; so 16, the next one, is taken.
    """
    x = np.array([[7.0], [12.0], [12.0], [13.0], [16.0], [24.0]], dtype=np.float32)
    wanted = ([4, 3, 1, 2], [4, 3, 2, 1])
    seed = next(s for s in range(10_000) if _first(6, 4, s) in wanted)
    found = _kmeans(x, 4, seed=seed)
    assert found.cluster_N.tolist() == [2, 1, 1, 1, 0, 3]
    assert (found.num_iterations, found.has_converged, found.num_empty) == (3, True, 0)


def test_depends_on_the_seed_and_iterations_are_bounded() -> None:
    x = np.random.default_rng(1).standard_normal((200, 3)).astype(np.float32)
    assert torch.equal(_kmeans(x, 20).cluster_N, _kmeans(x, 20).cluster_N)
    assert not torch.equal(_kmeans(x, 20).cluster_N, _kmeans(x, 20, seed=4).cluster_N)
    short = _kmeans(x, 20, max_iterations=2)
    assert (short.num_iterations, short.has_converged) == (2, False)


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1e37])
def test_sums_neither_overflow_nor_vanish(scale: float) -> None:
    x = np.float32(scale) * np.random.default_rng(2).uniform(-1, 1, (40, 2)).astype(np.float32)
    expected = oracle.kmeans(x, _first(40, 4, 3))
    found = _kmeans(x, 4)
    assert (found.cluster_N.tolist(), found.num_iterations) == expected


def _tables() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    wide = rng.integers(0, 40, 400)
    return [
        (rng.integers(0, 20, 300), rng.integers(0, 30, 300)),
        (wide, np.where(rng.uniform(size=400) < 0.7, wide, rng.integers(0, 40, 400))),
        (np.zeros(50, dtype=np.int64), rng.integers(0, 5, 50)),
        (rng.integers(0, 5, 50), np.zeros(50, dtype=np.int64)),
        (np.zeros(9, dtype=np.int64), np.zeros(9, dtype=np.int64)),
        (np.arange(40), np.arange(40)),
        (np.arange(40), rng.integers(0, 6, 40)),
        (np.array([7]), np.array([3])),
    ]


@pytest.mark.parametrize("number", range(8))
def test_agrees_with_scikit_learn(number: int) -> None:
    classes, clusters = _tables()[number]
    table = metrics.partial(classes, clusters)
    arithmetic = normalized_mutual_info_score(classes, clusters)
    geometric = normalized_mutual_info_score(classes, clusters, average_method="geometric")
    assert metrics.normalized_mutual_information(table) == pytest.approx(arithmetic, abs=1e-12)
    assert metrics.geometric_nmi(table) == pytest.approx(geometric, abs=1e-12)
    adjusted = adjusted_mutual_info_score(classes, clusters)
    assert metrics.adjusted_mutual_information(table) == pytest.approx(adjusted, abs=1e-12)
    (_, only_cluster), (only_class, both) = pair_confusion_matrix(classes, clusters)
    scores = metrics.pair_scores(table)
    pairs = [
        both / (both + only_cluster) if both + only_cluster else 0.0,
        both / (both + only_class) if both + only_class else 0.0,
        2 * both / (2 * both + only_cluster + only_class) if both + only_cluster else 0.0,
    ]
    assert [scores.precision, scores.recall, scores.f1] == pytest.approx(pairs, abs=1e-15)


def test_expected_information_is_exact_for_many_rows() -> None:
    classes, clusters = [700, 1, 250, 50], [3, 997]
    exact = oracle.expected_information(classes, clusters)
    assert metrics._expected_information(classes, clusters) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_tables_merge_in_any_order(parts: int) -> None:
    classes, clusters = _tables()[0]
    whole = metrics.partial(classes, clusters)
    pieces = np.array_split(np.random.default_rng(parts).permutation(len(classes)), parts)
    merged = reduce(metrics.merge, [metrics.partial(classes[i], clusters[i]) for i in pieces])
    for name in ("class_E", "cluster_E", "count_E"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_evaluate_clusters_queries_and_gallery_together() -> None:
    case = CASES["query and gallery apart"]
    result = evaluate(
        case.embeddings, case.labels, roles=case.roles, extra=("nmi", "f1", "ami"), seed=3
    )
    stored = store_rows(torch.from_numpy(case.embeddings), "cosine").numpy()
    k = len(np.unique(case.labels))
    clusters, iterations = oracle.kmeans(stored, _first(len(stored), k, 3))
    found = result.as_dict()
    assert (found["num_clusters"], found["kmeans_iterations"]) == (k, iterations)
    assert found["kmeans_seed"] == 3
    expected = normalized_mutual_info_score(case.labels, clusters)
    assert found["nmi"] == pytest.approx(expected, abs=1e-12)
    expected = adjusted_mutual_info_score(case.labels, clusters)
    assert found["ami"] == pytest.approx(expected, abs=1e-12)
    (_, fp), (fn, tp) = pair_confusion_matrix(case.labels, clusters)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
