"""Metrics as other projects define them, against loops written from their definitions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dml_dist.config.base import DEFINITION
from dml_dist.errors import ConfigError
from dml_dist.evaluation.retrieval import evaluate
from dml_dist.metrics import definitions
from tests.oracles_retrieval import retrieval
from tests.retrieval_cases import Case, cases

CASES = cases()
NAMES = (
    "nir.map_1000",
    "nir.map_lim",
    "nir.map_c",
    "oml.cmc_at_1",
    "oml.cmc_at_7",
    "oml.precision_at_3",
    "oml.precision_at_200",
    "oml.map_at_5",
    "oml.map_at_200",
    "mlrc.precision_at_1",
    "mlrc.r_precision",
    "mlrc.map_at_r",
)


def _expected(case: Case) -> dict[str, float]:
    """Return every metric by a loop over full rankings; lone queries count as the project does."""
    roles = case.roles
    whole = retrieval(case.embeddings, case.labels, recall_at=(1,), distance="cosine", roles=roles)
    sums = dict.fromkeys(NAMES, 0.0)
    for query, ranking in whole["rankings"].items():
        hits = [int(case.labels[g] == case.labels[query]) for g in ranking]
        count = sum(hits)

        def average(limit: int, divisor: float, hits: list[int] = hits) -> float:
            found, total = 0, 0.0
            for place, hit in enumerate(hits[:limit], start=1):
                found += hit
                total += hit * found / place
            return total / divisor

        sums["nir.map_1000"] += average(1000, count + 1)
        sums["nir.map_lim"] += average(1023, count + 1)
        sums["nir.map_c"] += average(count + 1, count + 1)
        sums["oml.cmc_at_1"] += hits[0]
        sums["oml.cmc_at_7"] += any(hits[:7])
        sums["oml.precision_at_3"] += sum(hits[:3]) / min(3, count)
        sums["oml.precision_at_200"] += sum(hits[:200]) / min(200, count)
        sums["oml.map_at_5"] += average(5, max(1, sum(hits[:5])))
        sums["oml.map_at_200"] += average(200, max(1, sum(hits[:200])))
        sums["mlrc.precision_at_1"] += hits[0]
        sums["mlrc.r_precision"] += sum(hits[:count]) / count
        sums["mlrc.map_at_r"] += average(count, count)
    counted, lone = whole["num_queries"], whole["num_lone_queries"]
    return {
        name: total / (counted if name.startswith("mlrc") else counted + lone)
        for name, total in sums.items()
    }


@pytest.mark.parametrize(
    "name", ["normal", "ties on a grid", "collapsed", "lone classes", "mixed roles", "one class"]
)
def test_equal_a_loop_over_full_rankings(name: str) -> None:
    case = CASES[name]
    found = evaluate(case.embeddings, case.labels, roles=case.roles, definitions=NAMES)
    assert found.definitions == pytest.approx(_expected(case), abs=1e-12)
    assert list(found.definitions) == list(NAMES)
    assert set(NAMES) <= set(found.as_dict())


def test_longer_lists_do_not_change_our_own_metrics() -> None:
    case = CASES["normal"]
    plain = evaluate(case.embeddings, case.labels).as_dict()
    both = evaluate(case.embeddings, case.labels, definitions=["nir.map_1000"]).as_dict()
    assert {key: both[key] for key in plain} == plain


def test_what_perfect_embeddings_reach() -> None:
    labels = np.repeat(np.arange(6), 4)
    x = np.eye(6, dtype=np.float32)[labels]
    found = evaluate(x, labels, definitions=["nir.map_1000", "oml.map_at_2", "mlrc.map_at_r"])
    assert found.definitions == {"nir.map_1000": 0.75, "oml.map_at_2": 1.0, "mlrc.map_at_r": 1.0}


def test_musgrave_equals_ours_bitwise() -> None:
    case = CASES["lone classes"]
    found = evaluate(
        case.embeddings,
        case.labels,
        recall_at=(1,),
        definitions=["mlrc.precision_at_1", "mlrc.r_precision", "mlrc.map_at_r"],
    )
    ours = [found.recall_at_k[1], found.r_precision, found.map_at_r]
    assert list(found.definitions.values()) == ours


def test_unknown_names_are_rejected_with_the_known_ones() -> None:
    case = CASES["normal"]
    for name in ("nir.map", "oml.map_at_0", "oml.map_at_k", "map_1000", "oml.map_at_5 "):
        with pytest.raises(ConfigError, match=r"nir\.map_1000.*oml\.map_at_K") as caught:
            evaluate(case.embeddings, case.labels, definitions=[name])
        assert repr(name) in str(caught.value)
        assert not re.match(DEFINITION, name)


def test_the_configuration_accepts_all_registered_names() -> None:
    assert set(definitions._FIXED) <= set(NAMES)
    for name in NAMES:
        assert re.match(DEFINITION, name)
        assert definitions.definition(name).name == name
        assert definitions.definition(name).source
