"""Slow reference implementations of the losses: loops over samples and proxies, as in their papers.

Plain autograd through them gives the reference gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12); a zero vector stays zero."""
    length = (x * x).sum() if bool((x == 0).all()) else (x * x).sum().sqrt()
    return x / length.clamp_min(1e-12)


def proxy_nca_oracle(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    *,
    denominator: str = "all",
    embedding_scale: float = 3.0,
    proxy_scale: float = 3.0,
    proxies_per_class: int = 1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean over samples, from squared distances of scaled unit vectors.

    |x - p|^2 is written as s_x^2 + s_p^2 - 2 x . p, which also says what a zero vector gets.
    """
    num_classes = len(proxies) // proxies_per_class
    scaled = [proxy_scale * unit(p) for p in proxies]
    terms = []
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        x = embedding_scale * unit(embedding)
        own, others = [], []
        for row, p in enumerate(scaled):
            similarity = -(embedding_scale**2 + proxy_scale**2 - 2 * (x * p).sum())
            (own if row // proxies_per_class == label else others).append(similarity)
        nearest = own[0]
        for similarity in own[1:]:
            if similarity > nearest:
                nearest = similarity
        if denominator == "negatives":
            terms.append(torch.stack(others).logsumexp(0) - nearest)
            continue
        log_total = torch.stack([nearest, *others]).logsumexp(0)
        share = label_smoothing / ((num_classes - 1) * proxies_per_class)
        term = (1 - label_smoothing) * (log_total - nearest)
        for similarity in others:
            term = term + share * (log_total - similarity)
        terms.append(term)
    return torch.stack(terms).mean()


def hard_negative_softmax_oracle(
    embeddings: Tensor, labels: Tensor, proxies: Tensor, *, scale: float, margin: float
) -> Tensor:
    """Reference of tests/custom_examples.py: HardNegativeSoftmax."""
    terms = []
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        cosines = torch.stack([(unit(embedding) * unit(p)).sum() for p in proxies])
        others = torch.cat([cosines[:label], cosines[label + 1 :]])
        softmax_term = (scale * cosines).logsumexp(0) - scale * cosines[label]
        terms.append(softmax_term + (others.max() - cosines[label] + margin).clamp_min(0))
    return torch.stack(terms).mean()


def contrastive_pairs_oracle(embeddings: Tensor, labels: Tensor, *, margin: float) -> Tensor:
    """Reference of tests/custom_examples.py: ContrastivePairs."""
    total, count = embeddings.new_zeros(()), 0
    for i in range(len(embeddings)):
        for j in range(i + 1, len(embeddings)):
            squared = ((unit(embeddings[i]) - unit(embeddings[j])) ** 2).sum()
            same = bool(labels[i] == labels[j])
            total = total + (squared if same else (margin - squared).clamp_min(0))
            count += 1
    return total / max(1, count)
