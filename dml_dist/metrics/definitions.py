"""Retrieval metrics as other projects define them, named `project.metric`.

They are for comparison with published values. The ranking is ours: exact, ties by gallery row,
without the query itself. For a query with R other gallery rows of its class, n = R + 1 rows
of its class with itself, and rel(i), P(i) as in `metrics.ranking`:

    nir.map_1000        1/n sum_{i <= 1000} P(i) rel(i)
    nir.map_lim         1/n sum_{i <= 1023} P(i) rel(i)
    nir.map_c           1/n sum_{i <= n} P(i) rel(i)
        NonIsotropicProxyDML and Revisiting_Deep_Metric_Learning_PyTorch, metrics/mAP_1000.py,
        mAP_lim.py, mAP_c.py. The divisor counts the query, so perfect embeddings reach only
        R / n. A query alone in its class counts as 0.
    oml.cmc_at_K        1 when a hit is among the first K
    oml.precision_at_K  hits among the first K / min(K, R)
    oml.map_at_K        1/h sum_{i <= K} P(i) rel(i), h the hits among the first K; 0 without hits
        open-metric-learning 3, oml/functional/metrics.py. The divisor of map_at_K counts the hits
        found: a single hit, at rank 1, gives 1. A query alone in its class counts
        as 0. (Earlier versions divide map_at_K by min(K, R).)
    mlrc.precision_at_1, mlrc.r_precision, mlrc.map_at_r
        Musgrave et al., "A Metric Learning Reality Check", and pytorch-metric-learning,
        utils/accuracy_calculator.py: Recall@1, R-precision and MAP@R as we define them; a query
        alone in its class is not counted.

Legend: Q queries, K entries of a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dml_dist.metrics.ranking import (
    UNIT_BITS,
    first_hit,
    ranking_scores,
    sum_of_precisions,
    sum_units,
    to_units,
    top_hits,
)


@dataclass(frozen=True)
class Definition:
    """A project's definition of a metric.

    Attributes:
        name: `project.metric`.
        source: The project and file that define it.
        list_length: R (num_relevant) of queries, (Q,) -> length of the lists it needs, (Q,).
        scores: (relevant_QK, num_relevant_Q) -> the value of each query, in [0, 1], float64;
            K is at least every query's `list_length`, or the whole gallery.
        counts_lone: Whether a query alone in its class counts as 0, or not at all.
    """

    name: str
    source: str
    list_length: Callable[[np.ndarray], np.ndarray]
    scores: Callable[[np.ndarray, np.ndarray], np.ndarray]
    counts_lone: bool


@dataclass(frozen=True)
class DefinitionSum:
    """Sum of a metric over queries, in units of 2^-52; see `merge`."""

    num_queries: int
    units: int


_NIR = "NonIsotropicProxyDML, metrics/"
_OML = "open-metric-learning 3, oml/functional/metrics.py"
_MLRC = "pytorch-metric-learning, utils/accuracy_calculator.py"
_WITH_K = re.compile(r"oml\.(cmc|precision|map)_at_([1-9]\d*)")


def definition(name: str) -> Definition:
    """Return a definition by name.

    Raises:
        ValueError: If the name is unknown; lists the known ones.
    """
    if name in _FIXED:
        return _FIXED[name]
    if match := _WITH_K.fullmatch(name):
        return _OML_FORMS[match[1]](name, int(match[2]))
    known = [*_FIXED, *(f"oml.{form}_at_K" for form in _OML_FORMS)]
    raise ValueError(f"unknown metric {name!r}; use one of {', '.join(known)}")


def partial(
    defined: Definition, relevant_QK: np.ndarray, num_relevant_Q: np.ndarray
) -> DefinitionSum:
    """Return the sum over queries with R >= 1.

    Args:
        defined: The definition.
        relevant_QK: Whether each neighbor, nearest first, has the query's class, (Q, K) bool.
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
        defined: The definition.
        total: Sum over all queries with R >= 1, at least one.
        num_lone_queries: Queries with R = 0.
    """
    count = total.num_queries + (num_lone_queries if defined.counts_lone else 0)
    return total.units / (count << UNIT_BITS)


def _fixed_length(number: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda num_relevant_Q: np.full_like(num_relevant_Q, number)


def _top(relevant_QK: np.ndarray, number: int) -> np.ndarray:
    return top_hits(relevant_QK, np.full(len(relevant_QK), number))


def _nir(name: str, file: str, number: int | None) -> Definition:
    def list_length(num_relevant_Q: np.ndarray) -> np.ndarray:
        return num_relevant_Q + 1 if number is None else np.full_like(num_relevant_Q, number)

    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        counted_QK = top_hits(relevant_QK, list_length(num_relevant_Q))
        return sum_of_precisions(counted_QK) / (num_relevant_Q + 1)

    return Definition(name, _NIR + file, list_length, scores, counts_lone=True)


def _oml_cmc(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        return (first_hit(relevant_QK) < number).astype(np.float64)

    return Definition(name, _OML, _fixed_length(number), scores, counts_lone=True)


def _oml_precision(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        hits_Q = _top(relevant_QK, number).sum(axis=1)
        return hits_Q / np.minimum(num_relevant_Q, number)

    return Definition(name, _OML, _fixed_length(number), scores, counts_lone=True)


def _oml_map(name: str, number: int) -> Definition:
    def scores(relevant_QK: np.ndarray, num_relevant_Q: np.ndarray) -> np.ndarray:
        counted_QK = _top(relevant_QK, number)
        return sum_of_precisions(counted_QK) / np.maximum(1, counted_QK.sum(axis=1))

    return Definition(name, _OML, _fixed_length(number), scores, counts_lone=True)


def _num_relevant(num_relevant_Q: np.ndarray) -> np.ndarray:
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
        Definition("mlrc.precision_at_1", _MLRC, _fixed_length(1), _hit_at_1, counts_lone=False),
        Definition(
            "mlrc.r_precision",
            _MLRC,
            _num_relevant,
            lambda *a: ranking_scores(*a)[0],
            counts_lone=False,
        ),
        Definition(
            "mlrc.map_at_r",
            _MLRC,
            _num_relevant,
            lambda *a: ranking_scores(*a)[1],
            counts_lone=False,
        ),
    )
}


def definitions(names: Sequence[str]) -> tuple[Definition, ...]:
    """Return definitions by name.

    Raises:
        ValueError: As `definition`.
    """
    return tuple(definition(name) for name in names)
