"""Slow reference implementations of the losses over proxies, as in their papers: loops and masks.

Plain autograd through them gives the reference gradients. Proxy-NCA's softmax form with static
assignment is in `tests/oracles_losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dml_dist.random_streams import Stream, generator_of
from tests.oracles_losses import unit


def cosines(embeddings: Tensor, proxies: Tensor) -> list[list[Tensor]]:
    """Cosine of every sample and proxy."""
    units = [unit(p) for p in proxies]
    return [[(unit(x) * p).sum() for p in units] for x in embeddings]


def cross_entropy(logits: list[Tensor], label: int) -> Tensor:
    """-log softmax of one row."""
    return torch.stack(logits).logsumexp(0) - logits[label]


def normalized_softmax_oracle(
    embeddings: Tensor, labels: Tensor, proxies: Tensor, *, temperature: float = 0.05
) -> Tensor:
    """CE(cos / T, y)."""
    rows = cosines(embeddings, proxies)
    pairs = zip(rows, labels.tolist(), strict=True)
    return torch.stack([cross_entropy([c / temperature for c in r], y) for r, y in pairs]).mean()


def cosface_oracle(
    embeddings: Tensor, labels: Tensor, proxies: Tensor, *, scale: float = 64, margin: float = 0.35
) -> Tensor:
    """CE(s (cos - m [c = y]), y)."""
    terms = []
    for row, label in zip(cosines(embeddings, proxies), labels.tolist(), strict=True):
        logits = [scale * (cos - (margin if c == label else 0)) for c, cos in enumerate(row)]
        terms.append(cross_entropy(logits, label))
    return torch.stack(terms).mean()


def arcface_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    scale: float = 64,
    margin_degrees: float = 28.6,
) -> Tensor:
    """s cos(theta + m) for the own class, by angles; not differentiable at cos = +-1."""
    margin = math.radians(margin_degrees)
    terms = []
    for row, label in zip(cosines(embeddings, proxies), labels.tolist(), strict=True):
        theta = torch.acos(row[label])
        moved = torch.cos(theta + margin)
        if theta > math.pi - margin:
            moved = torch.cos(theta) - margin * math.sin(margin)
        logits = [scale * (moved if c == label else cos) for c, cos in enumerate(row)]
        terms.append(cross_entropy(logits, label))
    return torch.stack(terms).mean()


def soft_triple_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    scale: float = 20,
    margin: float = 0.01,
    centers_per_class: int = 10,
    gamma: float = 0.1,
) -> Tensor:
    """CE(la (q - m [c = y]), y), q_c = sum_k softmax_k(cos_ck / gamma) cos_ck."""
    terms = []
    for row, label in zip(cosines(embeddings, proxies), labels.tolist(), strict=True):
        relaxed = []
        for low in range(0, len(row), centers_per_class):
            own = torch.stack(row[low : low + centers_per_class])
            relaxed.append(((own / gamma).softmax(0) * own).sum())
        logits = [scale * (q - (margin if c == label else 0)) for c, q in enumerate(relaxed)]
        terms.append(cross_entropy(logits, label))
    return torch.stack(terms).mean()


def proxy_anchor_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    scale: float = 32,
    margin: float = 0.1,
    positives: str = "classes",
) -> Tensor:
    """Equation 4 of the paper; `samples` counts a proxy's positive term once for each sample."""
    rows = cosines(embeddings, proxies)
    pulls, pushes, counts = [], [], []
    for p in range(len(proxies)):
        own = [i for i, y in enumerate(labels.tolist()) if y == p]
        others = [i for i, y in enumerate(labels.tolist()) if y != p]
        if own:
            pull = sum(torch.exp(-scale * (rows[i][p] - margin)) for i in own)
            pulls.append(torch.log(1 + pull))
            counts.append(len(own))
        if others:
            push = sum(torch.exp(scale * (rows[i][p] + margin)) for i in others)
            pushes.append(torch.log(1 + push))
    weights = counts if positives == "samples" else [1] * len(counts)
    positive = sum(w * pull for w, pull in zip(weights, pulls, strict=True)) / sum(weights)
    negative = sum(pushes, start=embeddings.new_zeros(())) / len(proxies)
    return positive + negative


def nca_terms(
    row: list[Tensor],
    positive: int,
    negatives: Sequence[int],
    *,
    surrogate: str = "nca",
    denominator: str = "all",
    scale: float = 9.0,
    margin: float = 0.5,
    margin_reduction: str = "mean",
) -> Tensor:
    """One sample's term of Proxy-NCA, from squared distances D = 2 - 2 cos; scale is s_x s_p."""
    distances = [2 - 2 * cos for cos in row]
    if not negatives:
        return 0 * row[0]
    if surrogate == "margin":
        hinges = [(distances[positive] - distances[n] + margin).clamp_min(0) for n in negatives]
        total = sum(hinges[1:], start=hinges[0])
        return total / len(negatives) if margin_reduction == "mean" else total
    below = [*negatives, positive] if denominator == "all" else list(negatives)
    lowest = torch.stack([-scale * distances[n] for n in below]).logsumexp(0)
    return lowest + scale * distances[positive]


def weighted(terms: list[Tensor], labels: Tensor, class_weights: Sequence[float] | None) -> Tensor:
    """sum w_y l / sum w_y."""
    if class_weights is None:
        return torch.stack(terms).mean()
    weights = [float(class_weights[y]) for y in labels.tolist()]
    return sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)


def assigned_nca_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    proxies_per_class: int = 1,
    class_rows: Sequence[int] | None = None,
    class_weights: Sequence[float] | None = None,
    **surrogate: object,
) -> Tensor:
    """Proxy-NCA, static (nearest of the class's K) or fractional (the class's shared row)."""
    terms = []
    for row, label in zip(cosines(embeddings, proxies), labels.tolist(), strict=True):
        if class_rows is None:
            own = list(range(label * proxies_per_class, (label + 1) * proxies_per_class))
        else:
            own = [int(class_rows[label])]
        positive = max(own, key=lambda p: (row[p].item(), -p))
        negatives = [p for p in range(len(proxies)) if p not in own]
        terms.append(nca_terms(row, positive, negatives, **surrogate))  # type: ignore[arg-type]
    return weighted(terms, labels, class_weights)


def dynamic_nca_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    positives: str = "drawn",
    seed: int = 0,
    step: int = 0,
    class_weights: Sequence[float] | None = None,
    **surrogate: object,
) -> Tensor:
    """Proxy-NCA, dynamic: p(y) is the positive; a sample without y or negatives adds 0."""
    rows = cosines(embeddings, proxies)
    nearest = [max(range(len(row)), key=lambda p, row=row: (row[p].item(), -p)) for row in rows]
    uniforms = generator_of(Stream.DYNAMIC_POSITIVES, seed, step).random(len(rows))
    classes = labels.tolist()
    terms = []
    for i, row in enumerate(rows):
        # The others of the class, from the next one on.
        others = [(i + k) % len(rows) for k in range(1, len(rows))]
        mates = [z for z in others if classes[z] == classes[i]]
        if positives == "drawn" and mates:
            mates = [mates[int(uniforms[i] * len(mates))]]
        chosen = {nearest[z] for z in others if classes[z] != classes[i]}
        of_mates = [
            nca_terms(row, nearest[y], sorted(chosen - {nearest[y]}), **surrogate)  # type: ignore[arg-type]
            for y in mates
        ]
        terms.append(torch.stack(of_mates).mean() if mates else 0 * row[0])
    return weighted(terms, labels, class_weights)
