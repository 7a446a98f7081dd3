"""Non-isotropy regularization: the likelihood of embeddings given their proxies, under a flow.

Roth, Vinyals, Akata, CVPR 2022. With (z, log_det) = flow(x, p_y) (`losses/flow.py`),

    nll(x) = |z|^2 / 2 - log_det              without the Gaussian's constant

The paper minimizes the mean of nll (link `nll`), the released code the mean of exp(nll) (link
`exp`). The exponential would overflow, so above `MAX_EXPONENT` it is continued by its tangent,
e^60 (1 + nll - 60): such rows keep a finite gradient, and their fraction is recorded.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Link = Literal["nll", "exp"]

MAX_EXPONENT = 60.0
"""Where `exp` becomes its tangent; e^60 = 1e26 is far below the float32 maximum."""


def negative_log_likelihood(z_GD: Tensor, log_det_G: Tensor) -> Tensor:
    """Return |z|^2 / 2 - log_det of each row, (G,)."""
    return z_GD.square().sum(dim=1) / 2 - log_det_G


def linked(nll_G: Tensor, link: Link) -> Tensor:
    """Return the minimized value of each row, (G,): nll, or its exponential."""
    if link == "nll":
        return nll_G
    capped_G = nll_G.clamp_max(MAX_EXPONENT)
    # Above the cap the clamp has gradient 0, so only the linear term has one.
    excess_G = (nll_G - MAX_EXPONENT).clamp_min(0.0)
    return capped_G.exp() + math.exp(MAX_EXPONENT) * excess_G


def continued_linearly(nll_G: Tensor, link: Link) -> Tensor:
    """Return which rows use the tangent instead of the exponential, (G,) bool."""
    if link == "nll":
        return torch.zeros_like(nll_G, dtype=torch.bool)
    return nll_G > MAX_EXPONENT
