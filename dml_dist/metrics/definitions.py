"""Retrieval numbers as other projects define them, under names of the form `project.number`.

They are for comparison with published values; their ranking is ours: exact, ties by gallery row,
the query left out by its row. For a query with R other gallery rows of its class, n = R + 1 rows
of its class with itself, and rel(i), P(i) as in `metrics.retrieval`:

    nir.map_1000        1/n sum_{i <= 1000} P(i) rel(i)
    nir.map_lim         1/n sum_{i <= 1023} P(i) rel(i)
    nir.map_c           1/n sum_{i <= n} P(i) rel(i)
        NonIsotropicProxyDML and Revisiting_Deep_Metric_Learning_PyTorch, metrics/mAP_1000.py,
        mAP_lim.py, mAP_c.py. The divisor counts the query, so perfect embeddings reach R / n and
        no more. A query alone in its class counts as 0.
    oml.cmc_at_K        1 when a hit is among the first K
    oml.precision_at_K  hits among the first K / min(K, R)
    oml.map_at_K        1/h sum_{i <= K} P(i) rel(i), h the hits among the first K; 0 without hits
        open-metric-learning 3, oml/functional/metrics.py. The divisor of map_at_K counts hits that
        were found: one hit of many, at the first place, gives 1. A query alone in its class counts
        as 0. (Earlier versions divide map_at_K by min(K, R).)
    mlrc.precision_at_1, mlrc.r_precision, mlrc.map_at_r
        Musgrave et al., "A Metric Learning Reality Check", and pytorch-metric-learning,
        utils/accuracy_calculator.py: Recall@1, R-precision and MAP@R as we define them; a query
        alone in its class is not counted.

Legend: Q queries, K places of a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dml_dist.metrics.ranking import (
    UNIT_BITS,
    first_hit,
    first_places,
    ranking_scores,
    sum_of_precisions,
    sum_units,
    to_units,
)


@dataclass(frozen=True)
class Definition:
    """How a project computes a number.

    Attributes:
        name: `project.number`.
        source: The project and file that define it.
        places: R (num_relevant) of queries, (Q,) -> places of their lists that it looks at.
        scores: (relevant_QK, num_relevant_Q) -> its value for each query, in [0, 1], float64;
            K is at least every query's `places`, or the whole gallery.
        counts_lone: Whether a query alone in its class counts, as 0.
    """

    name: str
    source: str
    places: Callable[[np.ndarray], np.ndarray]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]
    counts_lone: bool


@dataclass(frozen=True)
class DefinitionSum:
    """A number's sum over queries, in units of 2^-52; two of them merge by `merge`."""

    num_queries: int
    units: int


_NIR = "NonIsotropicProxyDML, metrics/"
_OML = "open-metric-learning 3, oml/functional/metrics.py"
_MLRC = "pytorch-metric-learning, utils/accuracy_calculator.py"
_WITH_K = re.compile(r"oml\.(cmc|precision|map)_at_([1-9]\d*)")


def definition(name: str) -> Definition:
    """Return a definition by its name.

    Raises:
        ValueError: If there is none of this name; lists those there are.
    """
    if name in _FIXED:
        return _FIXED[name]
    if match := _WITH_K.fullmatch(name):
        return _OML_FORMS[match[1]](name, int(match[2]))
    known = [*_FIXED, *(f"oml.{form}_at_K" for form in _OML_FORMS)]
    raise ValueError(f"required one of {', '.join(known)}, got {name!r}")


def partial(
    defined: Definition, relevant_QK: np.ndarray, num_relevant_Q: np.ndarray
) -> DefinitionSum:
    """Return the sum over queries with R >= 1.

    Args:
        defined: What to compute.
        relevant_QK: Whether each neighbour, nearest first, has the query's class, (Q, K) bool.
        num_relevant_Q: R, (Q,) int64, each >= 1.
    """
    scores_Q = defined.scores(relevant_QK, num_relevant_Q)
    return DefinitionSum(len(num_relevant_Q), sum_units(to_units(scores_Q)))


def merge(a: DefinitionSum, b: DefinitionSum) -> DefinitionSum:
    """Return the sum over two disjoint sets of queries."""
    return DefinitionSum(a.num_queries + b.num_queries, a.units + b.units)


def finish(defined: Definition, total: DefinitionSum, num_lone_queries: int) -> float:
    """Return the mean.

    Args:
        defined: What was computed.
        total: Over all queries with R >= 1, at least one.
        num_lone_queries: Queries with R = 0.
    """
    count = total.num_queries + (num_lone_queries if defined.counts_lone else 0)
    return total.units / (count << UNIT_BITS)


def _places(number: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda num_relevant_Q: np.full_like(num_relevant_Q, number)


def _first(relevant_QK: np.ndarray, number: int) -> np.ndarray:
    return first_places(relevant_QK, np.full(len(relevant_QK), number))


def _nir(name: str, file: str, number: int | None) -> Definition:
    def places(num_relevant_Q: np.ndarray) -> np.ndarray:
        return num_relevant_Q + 1 if number is None else np.full_like(num_relevant_Q, number)

    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        counted_QK = first_places(relevant_QK, places(num_relevant_Q))
        return sum_of_precisions(counted_QK) / (num_relevant_Q + 1)

    return Definition(name, _NIR + file, places, scores, counts_lone=True)


def _oml_cmc(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        return (first_hit(relevant_QK) < number).astype(np.float64)

    return Definition(name, _OML, _places(number), scores, counts_lone=True)


def _oml_precision(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        hits_Q = _first(relevant_QK, number).sum(axis=1)
        return hits_Q / np.minimum(num_relevant_Q, number)

    return Definition(name, _OML, _places(number), scores, counts_lone=True)


def _oml_map(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        counted_QK = _first(relevant_QK, number)
        return sum_of_precisions(counted_QK) / np.maximum(1, counted_QK.sum(axis=1))

    return Definition(name, _OML, _places(number), scores, counts_lone=True)


def _same(num_relevant_Q: np.ndarray) -> np.ndarray:
    return num_relevant_Q


def _hit_at_1(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
    return relevant_QK[:, 0].astype(np.float64)


_OML_FORMS: dict[str, Callable[[str, int], Definition]] = {
    "cmc": _oml_cmc,
    "precision": _oml_precision,
    "map": _oml_map,
}

_FIXED: dict[str, Definition] = {
    entry.name: entry
    for entry in (
        _nir("nir.map_1000", "mAP_1000.py", 1000),
        _nir("nir.map_lim", "mAP_lim.py", 1023),
        _nir("nir.map_c", "mAP_c.py", None),
        Definition("mlrc.precision_at_1", _MLRC, _places(1), _hit_at_1, counts_lone=False),
        Definition(
            "mlrc.r_precision", _MLRC, _same, lambda *a: ranking_scores(*a)[0], counts_lone=False
        ),
        Definition(
            "mlrc.map_at_r", _MLRC, _same, lambda *a: ranking_scores(*a)[1], counts_lone=False
        ),
    )
}


def definitions(names: Sequence[str]) -> tuple[Definition, ...]:
    """Return definitions by their names.

    Raises:
        ValueError: As `definition`.
    """
    return tuple(definition(name) for name in names)
