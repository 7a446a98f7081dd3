"""Sums of terms with fitted coefficients, and how far points determine them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog, nnls


@dataclass(frozen=True, eq=False)
class Fit:
    """Coefficients of a sum of terms.

    Attributes:
        names: Of the terms.
        rows: Terms of the fitted points, each divided by the measured value, (points, terms).
        coefficients: Fitted, (terms,).
    """

    names: tuple[str, ...]
    rows: np.ndarray
    coefficients: np.ndarray

    @classmethod
    def to(cls, terms: Sequence[Mapping[str, float]], measured: Sequence[float]) -> Fit:
        """Fit non-negative coefficients by least squares of the relative errors."""
        names = tuple(terms[0])
        rows = np.array([[term[name] for name in names] for term in terms])
        rows = rows / np.asarray(measured)[:, None]
        scale = np.maximum(rows.max(axis=0), 1e-300)
        scaled, _ = nnls(rows / scale, np.ones(len(rows)))
        return cls(names, rows, scaled / scale)

    def parts(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Return what each term contributes."""
        return {
            name: float(coefficient * terms[name])
            for name, coefficient in zip(self.names, self.coefficients, strict=True)
        }

    def bounds(self, terms: Mapping[str, float]) -> tuple[float, float]:
        """Return the least and largest sum over all coefficients that fit the points as well.

        The points may not tell two terms apart, such as those of a study of classes alone: the
        bounds are then as far apart as the terms allow. Terms that are zero at all points keep
        their coefficient, 0.
        """
        scale = self.rows.max(axis=0)
        known = scale > 0
        matrix = self.rows[:, known] / scale[known]
        fitted = matrix @ (self.coefficients * scale)[known]
        weights = np.array([terms[name] for name in self.names])[known] / scale[known]
        size = weights.max(initial=0.0)
        if size == 0:
            return 0.0, 0.0
        ends = []
        for sign in (1, -1):
            # A band instead of equality, whose rows rounding would make contradict each other.
            found = linprog(
                sign * weights / size,
                A_ub=np.vstack([matrix, -matrix]),
                b_ub=np.concatenate([fitted + 1e-6, 1e-6 - fitted]),
            )
            ends.append(sign * found.fun * size if found.success else math.nan)
        middle = sum(self.parts(terms).values())
        return float(np.nanmin([ends[0], middle])), float(np.nanmax([ends[1], middle]))
