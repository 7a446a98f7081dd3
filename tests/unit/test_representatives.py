"""Greedy k-center and nearest classes against loops over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.parallel.comm import Comm
from dml_dist.search.representatives import k_center, nearest_classes


def unit(values: np.ndarray) -> np.ndarray:
    """Return rows of length 1, as they are stored."""
    values = values.astype(np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return (values / np.where(norms > 0, norms, 1)).astype(np.float32).astype(np.float64)


def k_center_loop(pool: np.ndarray, number: int) -> list[int]:
    rows = unit(pool)
    picked = [0]
    while len(picked) < number:
        gaps = [min(((row - rows[p]) ** 2).sum() for p in picked) for row in rows]
        picked.append(int(np.argmax(gaps)))
    return picked


def nearest_loop(embeddings: np.ndarray, number: int) -> list[list[int]]:
    rows = unit(embeddings)
    result = []
    for own in range(len(rows)):
        gaps = [
            (min(((a - b) ** 2).sum() for a in rows[own] for b in rows[other]), other)
            for other in range(len(rows))
            if other != own
        ]
        names = [other for _, other in sorted(gaps)[:number]]
        result.append(names + [-1] * (number - len(names)))
    return result


def draw(*shape: int, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("number", [1, 2, 5, 7])
def test_k_center(number: int) -> None:
    pools = draw(6, 7, 4)
    found = k_center(pools, number)
    assert found.tolist() == [k_center_loop(pool, number) for pool in pools.numpy()]


def test_k_center_ties_go_to_the_lower_index() -> None:
    # Rows 1 and 2 are equally far from row 0, and equal to each other.
    pool = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.1]]])
    assert k_center(pool, 3).tolist() == [[0, 1, 3]]


def test_k_center_takes_no_image_twice_and_no_place_without_one() -> None:
    pools = draw(4, 5, 3)
    pools[1, 3] = pools[1, 2] = pools[1, 1]  # Duplicates of an image are other images.
    is_image = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = k_center(pools, 4, is_image.bool())
    assert found[0].tolist() == k_center_loop(pools[0].numpy(), 4)
    assert found[1].tolist() == [0, 1, 2, 3]
    assert found[2:].tolist() == [[0, 1, -1, -1], [0, -1, -1, -1]]


@pytest.mark.parametrize(
    ("classes", "rows", "number"), [(9, 1, 3), (9, 3, 4), (3, 2, 4), (2, 1, 1)]
)
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_nearest_classes(classes: int, rows: int, number: int, backend: str) -> None:
    embeddings = draw(classes, rows, 5)
    found = nearest_classes(embeddings, number, Comm.single(), backend=backend)
    assert found.tolist() == nearest_loop(embeddings.numpy(), number)


def test_nearest_classes_with_ties() -> None:
    embeddings = draw(8, 2, 3).round()
    embeddings[5] = embeddings[1]
    embeddings[6, 0] = embeddings[1, 1]
    embeddings[2] = 0.0
    found = nearest_classes(embeddings, 5, Comm.single())
    assert found.tolist() == nearest_loop(embeddings.numpy(), 5)
