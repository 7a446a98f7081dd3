"""Retrieval metrics of arrays against brute force, and their independence of how they are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dml_dist.errors import ConfigError, DataError
from dml_dist.evaluation.retrieval import RetrievalResult, evaluate
from tests.oracles_retrieval import exact_distances, retrieval, stored
from tests.retrieval_cases import Case, cases

CASES = cases()
RECALL_AT = (1, 2, 5, 20, 500)
VARIANTS = [
    {"backend": "faiss", "memory_mb": 512.0},
    {"backend": "torch", "memory_mb": 512.0},
    {"backend": "faiss", "memory_mb": 0.2},
    {"backend": "torch", "memory_mb": 0.05},
]


def _evaluate(case: Case, **options: object) -> RetrievalResult:
    return evaluate(case.embeddings, case.labels, roles=case.roles, **options)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force_for_both_backends_and_any_memory(name: str, distance: str) -> None:
    case = CASES[name]
    expected = retrieval(
        case.embeddings, case.labels, recall_at=RECALL_AT, distance=distance, roles=case.roles
    )
    rankings = expected.pop("rankings")
    distances = exact_distances(stored(case.embeddings, distance))
    first = None
    for variant in VARIANTS:
        result = _evaluate(case, recall_at=RECALL_AT, distance=distance, neighbors=7, **variant)
        for key, value in result.as_dict().items():
            if key in ("r_precision", "map_at_r"):
                assert abs(value - expected[key]) <= 1e-12, (variant, key)
            else:
                assert value == expected[key], (variant, key)
        first = first or result.as_dict()
        assert result.as_dict() == first, variant
        assert result.query_rows.tolist() == sorted(rankings)
        listed_distances = distances[result.query_rows[:, None], result.neighbors]
        listed_distances[result.neighbors < 0] = np.inf
        np.testing.assert_array_equal(result.neighbor_distances, listed_distances)
        for row, listed in zip(result.query_rows, result.neighbors, strict=True):
            assert [g for g in listed if g >= 0] == rankings[int(row)][: len(listed)][:7]


def test_results_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1500, 48)).astype(np.float32)
    labels = rng.integers(0, 200, 1500)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(evaluate(x, labels, recall_at=(1, 10, 100)).as_dict())
    assert results[0] == results[1]


def test_self_exclusion_is_by_row_not_by_rank() -> None:
    """Twins of another class push half of the queries out of the first entry of their own list."""
    rng = np.random.default_rng(0)
    twins = np.repeat(rng.standard_normal((40, 8)), 2, axis=0).astype(np.float32)
    labels = (np.arange(80) % 2) * 40 + rng.permutation(40).repeat(2) // 2
    result = evaluate(twins, labels, recall_at=(1, 2))
    assert result.recall_at_k[1] == 0.0
    # Dropping the first hit would let every second query find itself.
    by_place = 0
    for q in range(80):
        distances = ((twins[q].astype(np.float64) - twins) ** 2).sum(1)
        by_place += labels[np.lexsort((np.arange(80), distances))[1]] == labels[q]
    assert by_place == 40


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_embeddings_follow_the_row_order_rule(value: float) -> None:
    labels = np.array([5, 3, 3, 5, 3, 9, 9])
    result = evaluate(np.full((7, 4), value, dtype=np.float32), labels, recall_at=(1, 2, 3))
    # Row 0 finds rows 1, 2, 3; row 1 finds 0, 2, 3; row 2 finds 0, 1, 3; others find 0, 1, 2.
    assert result.recall_at_k == {1: 1 / 7, 2: 4 / 7, 3: 5 / 7}


def test_lone_queries_are_not_counted_but_stay_in_the_gallery() -> None:
    x = np.array([[0.0], [1.0], [0.4]], dtype=np.float32)
    result = evaluate(x, np.array([1, 1, 2]), distance="euclidean", recall_at=(1, 2))
    assert (result.num_queries, result.num_lone_queries, result.num_gallery) == (2, 1, 3)
    assert result.recall_at_k == {1: 0.0, 2: 1.0}


def test_queries_are_compared_with_gallery_rows_only() -> None:
    x = np.array([[0.0], [0.1], [5.0], [0.2]], dtype=np.float32)
    labels = np.array([1, 1, 1, 2])
    roles = ["query", "query", "gallery", "gallery"]
    result = evaluate(x, labels, roles=roles, distance="euclidean", recall_at=(1, 2))
    assert (result.num_queries, result.num_gallery) == (2, 2)
    assert result.recall_at_k == {1: 0.0, 2: 1.0}


def test_agrees_with_pytorch_metric_learning_on_data_without_ties() -> None:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    rng = np.random.default_rng(1)
    labels = np.concatenate([rng.integers(0, 40, 300), [1000, 1001]])
    centers = rng.standard_normal((1002, 16))
    x = (centers[labels] + 1.2 * rng.standard_normal((302, 16))).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels))
    ours = evaluate(x, labels)
    assert ours.num_lone_queries >= 2
    assert ours.recall_at_k[1] == pytest.approx(theirs["precision_at_1"], abs=1e-12)
    assert ours.r_precision == pytest.approx(theirs["r_precision"], abs=1e-9)
    assert ours.map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)


def test_inputs_may_be_tensors_of_other_types_and_are_not_changed() -> None:
    case = CASES["normal"]
    x = torch.from_numpy(case.embeddings).to(torch.bfloat16).requires_grad_()
    before = x.detach().clone()
    labels = torch.from_numpy(case.labels).to(torch.int32)
    result = evaluate(x, labels)
    expected = evaluate(before.to(torch.float32).numpy(), case.labels)
    assert result.as_dict() == expected.as_dict()
    assert torch.equal(x, before)


def test_names_of_records_and_seconds_of_stages() -> None:
    result = _evaluate(CASES["normal"], recall_at=(1, 10))
    assert list(result.as_dict()) == [
        "recall_at_1",
        "recall_at_10",
        "r_precision",
        "map_at_r",
        "num_queries",
        "num_gallery",
        "num_lone_queries",
    ]
    assert set(result.seconds) == {"prepare", "list", "count", "cluster", "total"}
    assert result.neighbors is None


def _rows(**changes: object) -> dict[str, object]:
    rows: dict[str, object] = {
        "embeddings": np.eye(4, dtype=np.float32),
        "labels": np.array([0, 0, 1, 1]),
    }
    return {**rows, **changes}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int8, np.uint64])
def test_whole_numbers_are_labels_of_any_type(kind: type[np.generic]) -> None:
    x = np.random.default_rng(3).standard_normal((8, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 3, 2, 1, 0])
    assert evaluate(x, labels.astype(kind)).as_dict() == evaluate(x, labels).as_dict()


def _spoilt(value: float) -> np.ndarray:
    x = np.eye(4, dtype=np.float32)
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"embeddings": _spoilt(np.nan)}, DataError, ["nan", "row 2", "column 1"]),
        ({"embeddings": _spoilt(-np.inf)}, DataError, ["-inf", "row 2", "column 1"]),
        ({"embeddings": np.eye(4) * 1e300}, DataError, ["1e+300", "row 0"]),
        ({"embeddings": np.eye(4, dtype=np.int64)}, DataError, ["floating", "int64"]),
        ({"embeddings": np.zeros(4, dtype=np.float32)}, DataError, ["(4,)"]),
        ({"labels": np.array([0, 0, 1])}, DataError, ["4", "(3,)"]),
        ({"labels": np.array([0.0, 0.5, 1.0, 1.0])}, DataError, ["label 0.5", "row 1", "int64"]),
        ({"labels": np.array([0, 0, np.nan, 1])}, DataError, ["label nan", "row 2"]),
        ({"labels": np.array([np.inf, 0, 0, 1])}, DataError, ["label inf", "row 0"]),
        ({"labels": np.array([1e300, 0, 0, 1])}, DataError, ["label 1e+300", "row 0"]),
        ({"labels": np.array([0, 0, 1, 2**24 + 2], np.float32)}, DataError, ["row 3", "int64"]),
        ({"labels": np.array(["0", "0", "1", "1"])}, DataError, ["integer", "<U1"]),
        ({"labels": [0, 0, None, 1]}, DataError, ["integer", "object"]),
        ({"labels": np.array([0, 0, 2**63, 1], dtype=np.uint64)}, DataError, ["9223372036"]),
        ({"labels": np.arange(4)}, DataError, ["4 queries", "4 gallery rows"]),
        ({"roles": ["query"] * 4}, DataError, ["4 queries", "0 gallery rows"]),
        ({"roles": ["gallery"] * 4}, DataError, ["0 queries", "4 gallery rows"]),
        ({"roles": ["both", "both", "probe", "both"]}, DataError, ["'probe'", "row 2"]),
        ({"roles": ["both"]}, DataError, ["4", "1"]),
        ({"recall_at": ()}, ConfigError, ["recall_at", "[]"]),
        ({"recall_at": (0, 1)}, ConfigError, ["recall_at", "[0, 1]"]),
        ({"distance": "manhattan"}, ConfigError, ["cosine", "euclidean", "'manhattan'"]),
        ({"backend": "annoy"}, ConfigError, ["faiss", "torch", "'annoy'"]),
        ({"memory_mb": 0.0}, ConfigError, ["memory_mb", "0.0"]),
        ({"neighbors": -1}, ConfigError, ["neighbors", "-1"]),
    ],
)
def test_bad_input_is_named(
    changes: dict[str, object], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        evaluate(**_rows(**changes))
    for word in words:
        assert word in str(caught.value)


def test_no_rows_at_all() -> None:
    with pytest.raises(DataError, match="0 queries"):
        evaluate(np.zeros((0, 8), dtype=np.float32), np.zeros(0, dtype=np.int64))


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name, case in CASES.items():
        x = torch.from_numpy(case.embeddings)
        options = {"roles": case.roles, "recall_at": RECALL_AT, "neighbors": 7}
        results = [evaluate(x.to(device), case.labels, **options) for device in ("cpu", "cuda")]
        assert results[0].as_dict() == results[1].as_dict(), name
        np.testing.assert_array_equal(results[0].neighbors, results[1].neighbors, name)
