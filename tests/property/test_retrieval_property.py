"""Properties of retrieval metrics: brute force on ties, shards, permutations, rising K."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dml_dist.evaluation.retrieval import evaluate
from dml_dist.metrics import ranking as metrics
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.neighbors import Neighbors, merge_neighbors
from tests.oracles_retrieval import retrieval

# Timings vary on a machine that is shared; examples are the same in every run.
FAST = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def small_sets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows with small integer coordinates, so that many distances tie."""
    count = draw(st.integers(2, 24))
    width = draw(st.integers(1, 5))
    values = st.lists(st.integers(-2, 2), min_size=count * width, max_size=count * width)
    x = np.array(draw(values), dtype=np.float32).reshape(count, width)
    labels = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))
    names = st.sampled_from(["both", "both", "query", "gallery"])
    return x, np.array(labels), draw(st.lists(names, min_size=count, max_size=count))


def _has_a_pair(labels: np.ndarray, roles: list[str]) -> bool:
    return any(
        q != g and labels[q] == labels[g] and roles[q] != "gallery" and roles[g] != "query"
        for q in range(len(labels))
        for g in range(len(labels))
    )


@FAST
@given(small_sets(), st.sampled_from(["cosine", "euclidean"]), st.sampled_from([0.01, 64.0]))
def test_equals_brute_force(
    rows: tuple[np.ndarray, np.ndarray, list[str]], distance: str, memory_mb: float
) -> None:
    x, labels, roles = rows
    assume(_has_a_pair(labels, roles))
    recall_at = (1, 2, 3, 7, 30)
    result = evaluate(
        x, labels, roles=roles, recall_at=recall_at, distance=distance, memory_mb=memory_mb
    ).as_dict()
    expected = retrieval(x, labels, recall_at=recall_at, distance=distance, roles=roles)
    for key, value in result.items():
        assert abs(value - expected[key]) <= (1e-12 if key in ("r_precision", "map_at_r") else 0), (
            key
        )


@FAST
@given(small_sets())
def test_recall_increases_with_k_up_to_one(rows: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    x, labels, _ = rows
    assume(_has_a_pair(labels, ["both"] * len(labels)))
    result = evaluate(x, labels, recall_at=range(1, 26))
    values = [result.recall_at_k[k] for k in range(1, 26)]
    assert values == sorted(values)
    assert values[len(x) - 2] == 1.0
    assert 0.0 <= result.map_at_r <= result.r_precision <= 1.0


@FAST
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_order_of_rows_and_names_of_classes_do_not_matter_without_ties(
    seed: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 7)).astype(np.float32)
    labels = rng.integers(0, count // 2, count)
    labels[:2] = 0
    order = rng.permutation(count)
    names = rng.permutation(count) * 10**12 - 10**13
    first = evaluate(x, labels, recall_at=(1, 3, 9)).as_dict()
    assert evaluate(x[order], labels[order], recall_at=(1, 3, 9)).as_dict() == first
    assert evaluate(x, names[labels], recall_at=(1, 3, 9)).as_dict() == first


@FAST
@given(small_sets(), st.lists(st.integers(0, 24), max_size=4), st.integers(1, 12), st.randoms())
def test_lists_merge_to_the_same_for_any_shards_in_any_order(
    rows: tuple[np.ndarray, np.ndarray, list[str]],
    cuts: list[int],
    num_neighbors: int,
    random: object,
) -> None:
    x, labels = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
    every = torch.arange(len(x))
    queries = Queries(x, every, labels)

    def part(low: int, high: int) -> Neighbors:
        shard = GalleryShard(
            x[low:high],
            every[low:high],
            labels[low:high],
            radius=5.0,
            backend="torch",
            memory_bytes=1 << 20,
        )
        return shard.nearest(queries, num_neighbors)

    bounds = sorted({0, len(x), *(cut % (len(x) + 1) for cut in cuts)})
    parts = [part(low, high) for low, high in pairwise(bounds)]
    random.shuffle(parts)
    merged = reduce(lambda a, b: merge_neighbors([a, b], num_neighbors), parts)
    whole = part(0, len(x))
    assert torch.equal(merged.row_QK, whole.row_QK)
    assert torch.equal(merged.distance_QK, whole.distance_QK)


@FAST
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5))
def test_sums_do_not_depend_on_order_width_or_cuts(seed: int, count: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    num_relevant = rng.integers(1, 9, count)
    relevant = rng.uniform(size=(count, 8)) < 0.4
    rank = metrics.first_hit(relevant)

    def partial(index: np.ndarray, free_places: int) -> metrics.RetrievalSums:
        listed = np.pad(relevant[index], ((0, 0), (0, free_places)))
        return metrics.RetrievalSums(
            len(index),
            metrics.recall_partial(rank[index], (1, 4)),
            *metrics.ranking_partial(listed, num_relevant[index]),
        )

    whole = partial(np.arange(count), 0)
    pieces = np.array_split(rng.permutation(count), parts)
    assert reduce(metrics.merge, [partial(piece, 3) for piece in pieces]) == whole
