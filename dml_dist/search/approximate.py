"""Approximate float32 distances with a proven error bound: they select candidates.

A gallery shard's rows are shifted by a center and scaled by a power of two before they are rounded
to float32 again, y = fl(s (x - m)). Neither changes which rows are near. The shift keeps the bound
small for embeddings far from the origin or close together; the scale keeps the squares in
float32's range. The approximate distance is a(q, g) = |y_q|^2 + |y_g|^2 - 2 y_q . y_g in any
order of summation.

Bound (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1; u = 2^-24):
each of the three sums of D products errs by at most D u / (1 - D u) times the sum of the absolute
products, in any order, fused or not. Together with the roundings of y, of the last two additions
and of thresholds to float32,

    |a(q, g) - s^2 d(q, g)| <= c (|y_q| + |y_g|)^2,     c = 1.05 (D + 16) u.

The factor 1.05 covers the second-order terms and 16 the roundings beside the sums.

Compared with a scaled threshold t, a row with |y_g| > |y_q| + sqrt(t) is farther than t whatever
its a, so (2 |y_q| + sqrt(t))^2 may replace the square: a single outlier in the gallery does not
loosen the bound of other rows. D 2^-120 is added for underflow. All of this needs true float32
products: no TF32, no bfloat16 (`full_precision`).

Legend: N gallery rows of this shard, Q queries, D embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.search.exact import chunks

_CENTER_SAMPLE = 1024


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Queries prepared for comparing approximate with scaled exact distances.

    Attributes:
        rows_QD: The queries' y, float32.
        square_Q: |y_q|^2, float64.
        norm_Q: |y_q|, float64.
    """

    rows_QD: Tensor
    square_Q: Tensor
    norm_Q: Tensor


class Approximation:
    """The shifted and scaled rows y of a gallery shard, and of queries against it.

    Attributes:
        rows_ND: y of the gallery rows, float32, (N, D).
        square_N: |y_g|^2, float32, (N,).
        scale_square: s^2, a power of two.
    """

    def __init__(self, stored_ND: Tensor, radius: float) -> None:
        """Shift and scale the stored rows of a shard.

        Args:
            stored_ND: Stored float32 rows, (N, D).
            radius: Upper bound on the norms of all stored rows, queries included.
        """
        num_rows, width = stored_ND.shape
        self._center_D = _center(stored_ND)
        # A power of two scales without rounding.
        self._scale = 2.0 ** -math.frexp(radius)[1] if radius > 0 else 1.0
        self._coefficient = 1.05 * (width + 16) * 2.0**-24
        self._underflow = width * 2.0**-120
        self.scale_square = self._scale**2
        self.rows_ND = self._shift(stored_ND)
        self.square_N = _square_norms(self.rows_ND).to(torch.float32)
        self._largest_norm = float(self.square_N.max()) ** 0.5 if num_rows else 0.0

    def of_queries(self, stored_QD: Tensor) -> Thresholds:
        """Return y of stored query rows, (Q, D), and its norms."""
        rows_QD = self._shift(stored_QD)
        square_Q = _square_norms(rows_QD)
        return Thresholds(rows_QD, square_Q, square_Q.sqrt())

    def bound(self, norm_Q: Tensor, scaled_distance_Q: Tensor) -> Tensor:
        """Return the bound on |a - s^2 d| for comparisons with a threshold.

        Args:
            norm_Q: |y_q|, (Q,) float64.
            scaled_distance_Q: The threshold s^2 t of each query, (Q,) float64, may be inf.
        """
        # |y_q| + |y_g| at most: by the largest norm of the shard, or by the module docstring.
        reach_Q = torch.minimum(
            norm_Q + self._largest_norm, 2.0 * norm_Q + scaled_distance_Q.sqrt()
        )
        return self._coefficient * reach_Q.square() + self._underflow

    def above(self, norm_Q: Tensor, approximate_Q: Tensor) -> Tensor:
        """Return an upper bound on s^2 d of rows whose a is at most `approximate_Q`, (Q,) float64.

        From (|y_g| - |y_q|)^2 <= s^2 d <= a + c (|y_q| + |y_g|)^2 follows
        |y_g| (1 - sqrt(c)) <= |y_q| (1 + sqrt(c)) + sqrt(a).
        """
        root = self._coefficient**0.5
        near_Q = approximate_Q.clamp(min=0.0).sqrt() + norm_Q * (1.0 + root)
        # root >= 1 needs D beyond 10^7; the inequality then gives no bound.
        other_Q = near_Q / (1.0 - root) if root < 1.0 else torch.full_like(near_Q, torch.inf)
        reach_Q = norm_Q + other_Q.clamp(max=self._largest_norm)
        return approximate_Q + self._coefficient * reach_Q.square() + self._underflow

    def partial_distances(
        self, rows_QD: Tensor, low: int, high: int, out: Tensor | None = None
    ) -> Tensor:
        """Return a(q, g) - |y_q|^2 for gallery rows low..high-1, (Q, high - low) float32."""
        return torch.addmm(
            self.square_N[None, low:high], rows_QD, self.rows_ND[low:high].T, alpha=-2.0, out=out
        )

    def _shift(self, stored_ND: Tensor) -> Tensor:
        shifted_ND = torch.empty_like(stored_ND)
        for low, high in chunks(len(stored_ND), stored_ND.shape[1], stored_ND.device):
            rows = stored_ND[low:high].to(torch.float64)
            shifted_ND[low:high] = (rows - self._center_D) * self._scale
        return shifted_ND


def _center(stored_ND: Tensor) -> Tensor:
    """Return the coordinatewise median of some evenly spaced rows, (D,) float64.

    The median is robust to outliers, and equals the rows exactly when all agree.
    """
    if not len(stored_ND):
        return torch.zeros(stored_ND.shape[1], dtype=torch.float64, device=stored_ND.device)
    sample_SD = stored_ND[:: -(-len(stored_ND) // _CENTER_SAMPLE)]
    return sample_SD.median(dim=0).values.to(torch.float64)


def _square_norms(rows_ND: Tensor) -> Tensor:
    """Return |y|^2, (N,) float64."""
    square_N = torch.empty(rows_ND.shape[0], dtype=torch.float64, device=rows_ND.device)
    for low, high in chunks(len(rows_ND), rows_ND.shape[1], rows_ND.device):
        square_N[low:high] = rows_ND[low:high].to(torch.float64).square().sum(dim=1)
    return square_N
