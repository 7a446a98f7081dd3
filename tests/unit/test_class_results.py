"""Recall by super-class, results of each class, and the files of a final evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dml_dist.errors import ConfigError, DataError
from dml_dist.evaluation.retrieval import evaluate
from dml_dist.parallel.comm import Comm
from dml_dist.runs.artifacts import (
    ClassTable,
    read_class_table,
    read_embeddings,
    write_class_table,
    write_embeddings,
)
from dml_dist.runtime.context import collect_embeddings
from dml_dist.search import gallery_shard as gallery
from tests.oracles_retrieval import retrieval
from tests.retrieval_cases import cases

CASES = cases()
RECALL_AT = (1, 2, 5, 20, 500)


def _super_classes(labels: np.ndarray) -> np.ndarray:
    """Give classes one of three super-classes or none."""
    return np.array(["", "animal", "plant", "a"])[np.abs(labels) % 4]


@pytest.mark.parametrize("large", [256, 2])
@pytest.mark.parametrize("name", ["normal", "ties on a grid", "collapsed", "mixed roles"])
@pytest.mark.parametrize("memory_mb", [64.0, 0.05])
def test_super_class_recall_equals_brute_force(
    name: str, memory_mb: float, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "_LARGE_CLASS", large)
    case = CASES[name]
    supers = _super_classes(case.labels)
    whole = retrieval(
        case.embeddings, case.labels, recall_at=(1,), distance="cosine", roles=case.roles
    )
    counted = {q: ranking for q, ranking in whole["rankings"].items() if supers[q]}
    expected = {
        k: sum(any(supers[g] == supers[q] for g in ranking[:k]) for q, ranking in counted.items())
        / len(counted)
        for k in RECALL_AT
    }
    found = evaluate(
        case.embeddings,
        case.labels,
        roles=case.roles,
        recall_at=RECALL_AT,
        memory_mb=memory_mb,
        extra=["super_class_recall"],
        super_classes=supers,
    )
    assert found.super_class_recall_at_k == expected
    assert found.as_dict()["super_class_recall_at_20"] == expected[20]
    assert found.recall_at_k[1] == whole["recall_at_1"]


def test_super_classes_that_lists_miss_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    # The super-class of rows 0 and 59 is the farthest of 60 rows: no list of 8 holds it. Row 1 is
    # as far from row 0 as from row 2, and row 0 comes first.
    monkeypatch.setattr(gallery, "_LARGE_CLASS", 0)
    x = np.arange(60, dtype=np.float32)[:, None]
    labels = np.r_[0, np.repeat(np.arange(1, 30), 2), 0]
    supers = np.where(labels == 0, "rare", "common")
    found = evaluate(
        x,
        labels,
        distance="euclidean",
        recall_at=(1, 58, 59),
        extra=["super_class_recall"],
        super_classes=supers,
    )
    assert found.super_class_recall_at_k == {1: 57 / 60, 58: 58 / 60, 59: 1.0}


def test_without_super_classes_there_is_no_metric() -> None:
    case = CASES["normal"]
    for supers in (None, [""] * len(case.labels)):
        found = evaluate(
            case.embeddings, case.labels, extra=["super_class_recall"], super_classes=supers
        )
        assert not [key for key in found.as_dict() if "super" in key]


def test_bad_options_are_named() -> None:
    case = CASES["normal"]
    with pytest.raises(ConfigError, match=r"nmi.*super_class_recall.*'v_measure'"):
        evaluate(case.embeddings, case.labels, extra=["v_measure"])
    with pytest.raises(DataError, match=r"super-class for each of 90 .*\(2,\)"):
        evaluate(case.embeddings, case.labels, super_classes=["a", "b"])


@pytest.mark.parametrize(
    "name", ["normal", "lone classes", "mixed roles", "wide and negative labels"]
)
def test_results_of_each_class_are_those_of_its_queries(name: str) -> None:
    case = CASES[name]
    roles = np.full(len(case.labels), "both") if case.roles is None else case.roles
    found = evaluate(case.embeddings, case.labels, roles=roles, recall_at=(1,)).per_class
    assert found.label.tolist() == sorted(set(case.labels.tolist()))
    for i, label in enumerate(found.label):
        of_class = case.labels == label
        assert found.num_images[i] == of_class.sum()
        # Queries of other classes are left out; the gallery stays whole.
        part = np.where(of_class, roles, np.where(roles == "query", "", "gallery"))
        kept = part != ""
        try:
            alone = retrieval(
                case.embeddings[kept],
                case.labels[kept],
                recall_at=(1,),
                distance="cosine",
                roles=list(part[kept]),
            )
        except ZeroDivisionError:
            assert found.num_queries[i] == 0
            assert np.isnan([found.recall_at_1[i], found.r_precision[i], found.map_at_r[i]]).all()
            continue
        assert found.num_queries[i] == alone["num_queries"]
        assert found.recall_at_1[i] == alone["recall_at_1"]
        assert found.r_precision[i] == pytest.approx(alone["r_precision"], abs=1e-14)
        assert found.map_at_r[i] == pytest.approx(alone["map_at_r"], abs=1e-14)


def test_worst_classes_first() -> None:
    case = CASES["lone classes"]
    found = evaluate(case.embeddings, case.labels).per_class
    order = found.worst_first()
    assert len(order) == np.count_nonzero(found.num_queries)
    keys = [(found.recall_at_1[i], found.map_at_r[i], found.label[i]) for i in order]
    assert keys == sorted(keys)


def test_the_file_of_classes_holds_what_was_written(tmp_path: Path) -> None:
    result = evaluate(CASES["lone classes"].embeddings, CASES["lone classes"].labels).per_class
    names = [f"class {label}" for label in result.label]
    supers = ["", None, *["s"] * (len(result) - 2)]
    write_class_table(tmp_path / "c.parquet", ClassTable(result, names, supers))
    again = read_class_table(tmp_path / "c.parquet")
    for name in ("label", "num_images", "num_queries", "recall_at_1", "r_precision", "map_at_r"):
        np.testing.assert_array_equal(getattr(again.results, name), getattr(result, name))
        assert getattr(again.results, name).dtype == getattr(result, name).dtype
    assert (again.names, again.super_classes) == (names, [None, None, *supers[2:]])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="evaluate the run again"):
        read_class_table(tmp_path / "c.parquet")


def test_the_file_of_embeddings_holds_what_was_written(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    saved = collect_embeddings(x, np.arange(5) + 10, np.arange(5) % 2, Comm.single())
    assert saved is not None
    write_embeddings(tmp_path / "e.npz", saved)
    assert [path.name for path in tmp_path.iterdir()] == ["e.npz"]
    again = read_embeddings(tmp_path / "e.npz")
    np.testing.assert_array_equal(again.embeddings, x)
    assert again.rows.tolist() == [10, 11, 12, 13, 14]
    assert again.labels.tolist() == [0, 1, 0, 1, 0]
    (tmp_path / "e.npz").write_bytes(b"PK cut")
    with pytest.raises(DataError, match="evaluate the run again"):
        read_embeddings(tmp_path / "e.npz")


def test_too_many_embeddings_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dml_dist.runtime.context.LARGEST_BYTES", 59)
    x, rows = np.zeros((5, 3), dtype=np.float32), np.arange(5)
    assert collect_embeddings(x, rows, rows, Comm.single()) is None
