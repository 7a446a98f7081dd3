"""Non-isotropy regularisation: how well a flow explains embeddings by their proxies.

Roth, Vinyals, Akata, CVPR 2022. With (z, log_det) = flow(x, p_y) (`losses/flow.py`),

    nll(x) = |z|^2 / 2 - log_det              the Gaussian's constant dropped

The paper minimises the mean of nll (link `nll`), the released code the mean of exp(nll) (link
`exp`). The exponential of an NLL overflows, so above `MAX_EXPONENT` it goes on along its tangent,
e^60 (1 + nll - 60): such a row keeps a finite gradient, and its share is recorded.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Link = Literal["nll", "exp"]

MAX_EXPONENT = 60.0
"""Where `exp` becomes its tangent; e^60 is far from the end of float32."""


def negative_log_likelihood(z_GD: Tensor, log_det_G: Tensor) -> Tensor:
    """Return |z|^2 / 2 - log_det of each row, (G,)."""
    return z_GD.square().sum(dim=1) / 2 - log_det_G


def linked(nll_G: Tensor, link: Link) -> Tensor:
    """Return what is minimised for each row, (G,): nll, or its exponential."""
    if link == "nll":
        return nll_G
    capped_G = nll_G.clamp_max(MAX_EXPONENT)
    # The clamp's gradient is 0 beyond the cap, so the second term alone has one there.
    beyond_G = (nll_G - MAX_EXPONENT).clamp_min(0.0)
    return capped_G.exp() + math.exp(MAX_EXPONENT) * beyond_G


def continued_linearly(nll_G: Tensor, link: Link) -> Tensor:
    """Return for each row whether the tangent stands for its exponential, (G,) bool."""
    if link == "nll":
        return torch.zeros_like(nll_G, dtype=torch.bool)
    return nll_G > MAX_EXPONENT
