"""Measures of the distribution of embeddings, on which regularizers act.

Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric
Learning", ICML 2020 (density, spectral decay); Wang and Isola, "Understanding Contrastive
Representation Learning through Alignment and Uniformity on the Hypersphere", ICML 2020.

    intra            mean distance of two different rows of a class
    inter            mean distance of the mean rows of two different classes
    density          intra / inter: the embedding-space density; higher: more spread within classes
    spectral_decay   rho = KL(uniform || s), s the singular values of the rows divided by their
                     sum; lower: more directions are used
    uniformity       log mean exp(-2 |x - y|^2) over pairs of different rows; lower: more uniform

Distances are Euclidean, in float64. Shape legend: N rows, D embedding size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

_BLOCK = 1024


@dataclass(frozen=True)
class Structure:
    """The measures of the module docstring; NaN if there is no pair to measure."""

    intra_distance: float
    inter_distance: float
    density: float
    spectral_decay: float
    uniformity: float

    def as_dict(self) -> dict[str, float]:
        """Return the measures by name."""
        return asdict(self)


def embedding_structure(embeddings_ND: np.ndarray, labels_N: np.ndarray) -> Structure:
    """Return the measures of some rows; O(N^2 D) time, O(N) memory beyond the rows.

    Args:
        embeddings_ND: Rows, (N, D), N >= 1, normalized if distances are.
        labels_N: Their classes, (N,); only equality matters.
    """
    rows_ND = np.asarray(embeddings_ND, dtype=np.float64)
    _, class_N = np.unique(labels_N, return_inverse=True)
    squares_N = (rows_ND**2).sum(axis=1)
    intra_sum = potential_sum = 0.0
    num_intra = 0
    for low in range(0, len(rows_ND), _BLOCK):
        own = slice(low, low + _BLOCK)
        square_AN = squares_N[own, None] + squares_N - 2.0 * rows_ND[own] @ rows_ND.T
        square_AN = np.maximum(square_AN, 0.0)
        index_A = np.arange(len(square_AN))
        same_AN = class_N[own, None] == class_N
        same_AN[index_A, low + index_A] = False
        intra_sum += float(np.sqrt(square_AN[same_AN]).sum())
        num_intra += int(same_AN.sum())
        potential_sum += float(np.exp(-2.0 * square_AN).sum())
        potential_sum -= float(np.exp(-2.0 * square_AN[index_A, low + index_A]).sum())
    num_pairs = len(rows_ND) * (len(rows_ND) - 1)
    intra = intra_sum / num_intra if num_intra else math.nan
    inter = _mean_distance_of_centers(rows_ND, class_N)
    return Structure(
        intra_distance=intra,
        inter_distance=inter,
        density=intra / inter if inter > 0 else math.nan,
        spectral_decay=_spectral_decay(rows_ND),
        uniformity=math.log(potential_sum / num_pairs) if potential_sum > 0 else math.nan,
    )


def _mean_distance_of_centers(rows_ND: np.ndarray, class_N: np.ndarray) -> float:
    counts_C = np.bincount(class_N)
    centers_CD = np.zeros((len(counts_C), rows_ND.shape[1]))
    np.add.at(centers_CD, class_N, rows_ND)
    centers_CD /= counts_C[:, None]
    total = 0.0
    for index, center_D in enumerate(centers_CD):
        differences = centers_CD[index + 1 :] - center_D
        total += float(np.sqrt((differences**2).sum(axis=1)).sum())
    num_pairs = len(counts_C) * (len(counts_C) - 1) // 2
    return total / num_pairs if num_pairs else math.nan


def _spectral_decay(rows_ND: np.ndarray) -> float:
    values = np.linalg.svd(rows_ND, compute_uv=False)
    if not values.sum() > 0:
        return math.nan
    # An unused direction would give infinity; its singular value counts as float64's resolution.
    fraction = np.maximum(values / values.sum(), np.finfo(np.float64).eps)
    uniform = 1.0 / len(fraction)
    return float((uniform * np.log(uniform / fraction)).sum())
