"""Measures of the embedding distribution, against loops over pairs and cases worked by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from dml_dist.metrics.structure import embedding_structure


def draw(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("num_rows", [30, 1100])
def test_against_loops(num_rows: int) -> None:
    rows = draw(num_rows, 5)
    labels = np.random.default_rng(1).integers(0, 9, num_rows) * 7 - 3
    pairs = list(combinations(range(num_rows), 2))
    gaps = {pair: float(np.linalg.norm(rows[pair[0]] - rows[pair[1]])) for pair in pairs}
    intra = np.mean([gap for (a, b), gap in gaps.items() if labels[a] == labels[b]])
    centres = [rows[labels == label].mean(axis=0) for label in np.unique(labels)]
    inter = np.mean([np.linalg.norm(a - b) for a, b in combinations(centres, 2)])
    found = embedding_structure(rows, labels)
    assert found.intra_distance == pytest.approx(intra, rel=1e-10)
    assert found.inter_distance == pytest.approx(inter, rel=1e-10)
    assert found.density == pytest.approx(intra / inter, rel=1e-10)
    potential = np.mean([math.exp(-2 * gap**2) for gap in gaps.values()])
    assert found.uniformity == pytest.approx(math.log(potential), rel=1e-10)


def test_spectral_decay_by_hand() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4.
    rows = np.diag([3.0, 1.0])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert embedding_structure(rows, np.array([0, 1])).spectral_decay == pytest.approx(expected)
    even = embedding_structure(np.eye(4), np.arange(4))
    assert even.spectral_decay == pytest.approx(0.0, abs=1e-12)
    one_direction = embedding_structure(np.tile([1.0, 0.0], (5, 1)), np.arange(5))
    assert 10 < one_direction.spectral_decay < math.inf


def test_without_pairs() -> None:
    alone = embedding_structure(draw(4, 3), np.arange(4))
    assert math.isnan(alone.intra_distance)
    assert math.isnan(alone.density)
    one_class = embedding_structure(draw(4, 3), np.zeros(4))
    assert math.isnan(one_class.inter_distance)
    one_row = embedding_structure(draw(1, 3), np.zeros(1))
    assert math.isnan(one_row.uniformity)
