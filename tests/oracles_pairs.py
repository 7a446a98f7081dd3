"""Slow reference implementations of the pair losses: loops over pairs and triplets.

Plain autograd through them gives the reference gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dml_dist.random_streams import Stream, generator_of
from tests.oracles_losses import unit


def distance(a: Tensor, b: Tensor) -> Tensor:
    """|n(a) - n(b)|; 0 without a gradient where the two are equal."""
    squared = ((unit(a) - unit(b)) ** 2).sum()
    return squared.sqrt() if float(squared.detach()) > 0 else squared * 0


def average(terms: Sequence[Tensor], reduction: str, like: Tensor) -> Tensor:
    """Mean over terms, or over those above zero; 0 when there are none."""
    kept = [term for term in terms if reduction == "mean" or float(term.detach()) > 0]
    if not kept:
        return sum(terms, like.sum() * 0)
    return torch.stack(kept).mean() + like.sum() * 0


def _flags(flags: Tensor | None, size: int) -> list[bool]:
    return [True] * size if flags is None else flags.tolist()


def contrastive_oracle(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    reduction: str = "nonzero",
    representatives: Tensor | None = None,
) -> Tensor:
    flags = _flags(representatives, len(labels))
    pulls, pushes = [], []
    for i, j in product(range(len(labels)), repeat=2):
        if i == j or not (flags[i] or flags[j]):
            continue
        d = distance(embeddings[i], embeddings[j])
        if labels[i] == labels[j]:
            pulls.append((d - positive_margin).clamp_min(0))
        else:
            pushes.append((negative_margin - d).clamp_min(0))
    return average(pulls, reduction, embeddings) + average(pushes, reduction, embeddings)


def triplet_oracle(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.1,
    mining: str = "all",
    squared: bool = False,
    swap: bool = False,
    smooth: bool = False,
    reduction: str = "nonzero",
    representatives: Tensor | None = None,
) -> Tensor:
    size = len(labels)
    flags = _flags(representatives, size)
    power = 2 if squared else 1
    d = [[distance(a, b) for b in embeddings] for a in embeddings]
    value = [[float(entry.detach()) for entry in row] for row in d]
    terms = []
    for a in range(size):
        found = []
        for p, n in product(range(size), repeat=2):
            if p == a or labels[p] != labels[a] or labels[n] == labels[a]:
                continue
            if not (flags[a] or flags[p] or flags[n]):
                continue
            near, far = value[a][p] ** power, value[a][n] ** power
            if mining == "semi_hard" and not near < far < near + margin:
                continue
            found.append((far - near, p, n))
        if mining == "hard" and found:
            # Ties: the lower positive, then the lower negative.
            found = [min(found)]
        for _, p, n in found:
            far = d[p][n] if swap and value[p][n] < value[a][n] else d[a][n]
            violation = d[a][p] ** power - far**power + margin
            terms.append(torch.log1p(violation.exp()) if smooth else violation.clamp_min(0))
    return average(terms, reduction, embeddings)


def weight_of(d: float, size: int, distance_cutoff: float) -> float:
    """1 / q(d) of Wu et al., d no smaller than the cutoff."""
    d = max(d, distance_cutoff)
    return 1.0 / (d ** (size - 2) * (1 - d * d / 4) ** ((size - 3) / 2))


def drawn_negatives(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance_cutoff: float = 0.5,
    loss_cutoff: float = 1.4,
    seed: int = 0,
    step: int = 0,
    representatives: Tensor | None = None,
) -> list[tuple[int, int]]:
    """(anchor, negative), one for each other row of the anchor's class: inverse of the sums."""
    size, dim = embeddings.shape
    flags = _flags(representatives, size)
    counts = [labels.tolist().count(label) for label in labels.tolist()]
    generator = generator_of(Stream.MINED_NEGATIVES, seed, step)
    numbers = generator.random((max(counts) - 1, size))
    chosen = []
    for a in range(size):
        negatives = [n for n in range(size) if labels[n] != labels[a] and (flags[a] or flags[n])]
        if not negatives:
            continue
        far = {n: float(distance(embeddings[a], embeddings[n]).detach()) for n in negatives}
        weights = {
            n: weight_of(far[n], dim, distance_cutoff) if far[n] < loss_cutoff else 0.0
            for n in negatives
        }
        if not any(weights.values()):
            weights = dict.fromkeys(negatives, 1.0)
        total = math.fsum(weights.values())
        for k in range(counts[a] - 1):
            left = numbers[k, a] * total
            for n in negatives:
                left -= weights[n]
                if left < 0:
                    break
            chosen.append((a, n))
    return chosen


def margin_oracle(
    embeddings: Tensor,
    labels: Tensor,
    betas: Tensor,
    *,
    margin: float = 0.2,
    nu: float = 0.0,
    reduction: str = "nonzero",
    representatives: Tensor | None = None,
    **draws: float,
) -> Tensor:
    flags = _flags(representatives, len(labels))
    beta = [betas.reshape(-1)[int(label) if betas.numel() > 1 else 0] for label in labels]
    terms = []
    for a, p in product(range(len(labels)), repeat=2):
        if a != p and labels[a] == labels[p] and (flags[a] or flags[p]):
            d = distance(embeddings[a], embeddings[p])
            terms.append((d - beta[a] + margin).clamp_min(0))
    for a, n in drawn_negatives(embeddings, labels, representatives=representatives, **draws):
        d = distance(embeddings[a], embeddings[n])
        terms.append((beta[a] - d + margin).clamp_min(0))
    return average(terms, reduction, embeddings) + nu * torch.stack(beta).mean()


def multi_similarity_oracle(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive_scale: float = 2.0,
    negative_scale: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    reduction: str = "mean",
    representatives: Tensor | None = None,
) -> Tensor:
    flags = _flags(representatives, len(labels))
    terms = []
    for i in range(len(labels)):
        others = [j for j in range(len(labels)) if j != i and (flags[i] or flags[j])]
        s = {j: (unit(embeddings[i]) * unit(embeddings[j])).sum() for j in others}
        positives = [j for j in others if labels[j] == labels[i]]
        negatives = [j for j in others if labels[j] != labels[i]]
        if epsilon is not None:
            value = {j: float(s[j].detach()) for j in others}
            top = max((value[j] for j in negatives), default=-math.inf)
            low = min((value[j] for j in positives), default=math.inf)
            positives = [j for j in positives if value[j] - epsilon < top]
            negatives = [j for j in negatives if value[j] + epsilon > low]
        pull = sum((torch.exp(-positive_scale * (s[j] - base)) for j in positives), s_zero(s))
        push = sum((torch.exp(negative_scale * (s[j] - base)) for j in negatives), s_zero(s))
        terms.append(torch.log1p(pull) / positive_scale + torch.log1p(push) / negative_scale)
    return average(terms, reduction, embeddings)


def s_zero(s: dict[int, Tensor]) -> Tensor:
    """A zero connected to the autograd graph."""
    return torch.stack(list(s.values())).sum() * 0 if s else torch.zeros((), dtype=torch.float64)
