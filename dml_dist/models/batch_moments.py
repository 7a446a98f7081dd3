"""Mergeable count, mean and squared deviation per channel: partial, merge, finish.

Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
(1979), equation 2.1: sums of squared deviations from each part's own mean merge without
cancellation, unlike sums of squares if the mean is large against the standard deviation.

Legend: N rows (images), C channels, P positions of a feature map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of some values of each channel; all float64.

    Attributes:
        count: 0-d, number of values per channel.
        mean_C: Mean of each channel.
        deviation_C: Sum of squared deviations from that mean.
    """

    count: Tensor
    mean_C: Tensor
    deviation_C: Tensor


def partial(x_NCP: Tensor) -> Moments:
    """Return the moments of one part of a batch.

    Args:
        x_NCP: (N, C, P), float32 or float64; N P >= 1.
    """
    count = x_NCP.shape[0] * x_NCP.shape[2]
    # Two passes are 3x faster than torch.var_mean over these dimensions (float32, CPU).
    rough_C = x_NCP.mean(dim=(0, 2))
    centered_NCP = x_NCP - rough_C[:, None]
    # The rounding error of the float32 mean; both results below are corrected by it.
    shift_C = centered_NCP.mean(dim=(0, 2)).to(torch.float64)
    square_C = centered_NCP.square_().sum(dim=(0, 2)).to(torch.float64)
    return Moments(
        torch.tensor(float(count), dtype=torch.float64, device=x_NCP.device),
        rough_C.to(torch.float64) + shift_C,
        (square_C - count * shift_C.square()).clamp_min(0.0),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two disjoint parts."""
    count = a.count + b.count
    shift_C = b.mean_C - a.mean_C
    return Moments(
        count,
        a.mean_C + shift_C * (b.count / count),
        a.deviation_C + b.deviation_C + shift_C.square() * (a.count * b.count / count),
    )


def finish(total: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance (divided by count) and unbiased variance (by count - 1), (C,) each."""
    variance_C = total.deviation_C / total.count
    return total.mean_C, variance_C, total.deviation_C / (total.count - 1)


def pack(moments: Moments) -> Tensor:
    """Pack moments into one row, (1, 1 + 2 C), for communication."""
    return torch.cat([moments.count[None], moments.mean_C, moments.deviation_C])[None]


def unpack(row: Tensor) -> Moments:
    """Return the moments in a packed row, (1 + 2 C,)."""
    mean_C, deviation_C = row[1:].chunk(2)
    return Moments(row[0], mean_C, deviation_C)
