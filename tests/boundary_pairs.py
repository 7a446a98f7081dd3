"""A batch whose choices hang on the last bit, and what the exact form of the pair losses gives.

The reference takes distances of `torch.cdist` without a matrix product and sums of products, of
the whole batch, and plain autograd through dense formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.config.objective import (
    ContrastiveConfig,
    LossConfig,
    MultiSimilarityConfig,
    TripletConfig,
)

ROWS, DIM = 36, 48
LABELS = torch.arange(ROWS) // 3


def boundary_rows(dtype: torch.dtype) -> Tensor:
    """Return rows with equal distances up to rounding, duplicates and near-duplicates, (36, 48).

    Rows are rotations of one: distances depend on the number of places alone, but are summed in
    another order.
    """
    generator = torch.Generator().manual_seed(2)
    places = torch.arange(DIM, dtype=torch.float64)
    first = torch.cos(2 * torch.pi * places / DIM)
    first += 0.05 * torch.randn(DIM, generator=generator, dtype=torch.float64)
    x = torch.stack([first.roll(k) for k in range(ROWS)])
    x[15], x[16], x[24] = x[0], x[0], x[0]
    for row, size in ((18, 1e-3), (19, 1e-5), (27, 1e-7)):
        x[row] = x[3] + size * torch.randn(DIM, generator=generator, dtype=torch.float64)
    return x.to(dtype)


@dataclass(frozen=True)
class Expected:
    """A loss, its number of nonzero terms over all terms that count, and the gradient."""

    loss: Tensor
    active: Tensor
    gradient: Tensor


def exact_distances(x: Tensor) -> Tensor:
    """Return the distances of the normalized rows by differences, (G, G)."""
    unit = torch.nn.functional.normalize(x)
    return torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")


def exact_cosines(x: Tensor) -> Tensor:
    """Return the cosines of the rows, each summed by itself, (G, G)."""
    unit = torch.nn.functional.normalize(x)
    return (unit[:, None] * unit).sum(dim=2)


def boundary_losses(dtype: torch.dtype) -> tuple[LossConfig, ...]:
    """Return losses whose margins are distances, or differences of distances, of the batch."""
    x = boundary_rows(dtype)
    d, s = exact_distances(x), exact_cosines(x)
    one, two, five = float(d[6, 7]), float(d[6, 8]), float(d[6, 11])
    return (
        ContrastiveConfig(positive_margin=one, negative_margin=five),
        ContrastiveConfig(),
        TripletConfig(margin=five - one),
        TripletConfig(margin=0.3, mining="semi_hard"),
        TripletConfig(margin=five - two, mining="semi_hard", reduction="mean", squared=True),
        TripletConfig(margin=five - two, mining="hard"),
        MultiSimilarityConfig(epsilon=float(s[6, 8] - s[6, 11]), negative_scale=10.0),
    )


def expected(loss: LossConfig, dtype: torch.dtype) -> Expected:
    """Return what the exact form gives for the whole batch."""
    x = boundary_rows(dtype).requires_grad_()
    same = LABELS[:, None] == LABELS
    positive, negative = same & ~torch.eye(ROWS, dtype=torch.bool), ~same
    if isinstance(loss, ContrastiveConfig):
        d = exact_distances(x)
        pulls = (d - loss.positive_margin).relu()[positive]
        pushes = (loss.negative_margin - d).relu()[negative]
        value = pulls.sum() / (pulls > 0).sum() + pushes.sum() / (pushes > 0).sum()
        active = torch.stack([(pulls > 0).sum() / len(pulls), (pushes > 0).sum() / len(pushes)])
    elif isinstance(loss, TripletConfig):
        d = exact_distances(x)
        measured = d.square() if loss.squared else d
        kept = _kept_triplets(measured.detach(), positive, negative, loss)
        violations = measured[:, :, None] - measured[:, None] + loss.margin
        terms = violations.relu()[kept]
        number = (terms > 0).sum()
        value = terms.sum() / (number if loss.reduction == "nonzero" else len(terms))
        active = (number / len(terms))[None]
    else:
        assert isinstance(loss, MultiSimilarityConfig)
        assert loss.epsilon is not None
        s = exact_cosines(x)
        top = s.where(negative, -9).amax(dim=1, keepdim=True)
        bottom = s.where(positive, 9).amin(dim=1, keepdim=True)
        keep = positive & (s - loss.epsilon < top), negative & (s + loss.epsilon > bottom)
        scales = -loss.positive_scale, loss.negative_scale
        value = x.new_zeros(())
        for kept, scale in zip(keep, scales, strict=True):
            sums = ((scale * (s - loss.base)).exp() * kept).sum(dim=1)
            value = value + (sums.log1p() / abs(scale)).mean()
        active = (keep[0] | keep[1]).any(dim=1).float().mean()[None]
    value.backward()
    assert x.grad is not None
    return Expected(value.detach(), active, x.grad)


def _kept_triplets(d: Tensor, positive: Tensor, negative: Tensor, loss: TripletConfig) -> Tensor:
    kept = positive[:, :, None] & negative[:, None]
    if loss.mining == "semi_hard":
        kept &= (d[:, None] > d[:, :, None]) & (d[:, None] < d[:, :, None] + loss.margin)
    if loss.mining == "hard":
        far = torch.from_numpy(d.where(positive, -9).numpy().argmax(axis=1))
        near = torch.from_numpy(d.where(negative, 9).numpy().argmin(axis=1))
        hardest = torch.zeros_like(kept)
        hardest[torch.arange(ROWS), far, near] = True
        kept &= hardest
    return kept
