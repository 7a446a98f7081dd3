"""Which mined negatives violate the margin, against loops over pairs and triplets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dml_dist.losses.numerics import Statistics
from dml_dist.losses.pairs import AnchorBatch, AnchorLoss, Contrastive
from dml_dist.losses.pairs_margin import Margin
from dml_dist.losses.pairs_multi_similarity import MultiSimilarity
from dml_dist.losses.pairs_triplet import Triplet
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.pairs import anchor_objective
from tests.oracles_pairs import distance, drawn_negatives

LABELS = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 0, 2, 5])
NEIGHBORS = torch.tensor([[1, -1], [2, 5], [-1, -1], [0, 1], [0, 1], [-1, -1]])
"""Of classes 0 to 5, as hard class mining gives them."""


@pytest.mark.parametrize(
    "loss",
    [
        Contrastive(negative_margin=1.2),
        Triplet(margin=0.3),
        Triplet(margin=0.3, mining="semi_hard"),
        Triplet(margin=0.3, mining="hard"),
        Margin(beta=1.0),
        MultiSimilarity(),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{getattr(loss, 'mining', '')}",
)
def test_mined_negatives_are_counted(loss: AnchorLoss) -> None:
    """Every negative of a class that mining found near the anchor's, or the other way round."""
    x = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0)).double()
    plain = AnchorBatch(x, LABELS, 0, len(LABELS), seed=3)
    found = loss.anchor_partial(replace(plain, neighbors_Ch=NEIGHBORS))
    assert not {"mined_count", "mined_nonzero"} & loss.anchor_partial(plain).keys()
    counts = 0, 0
    for low in range(0, len(LABELS), 4):  # Parts add up.
        part = replace(plain, low=low, high=min(low + 4, len(LABELS)), neighbors_Ch=NEIGHBORS)
        own = loss.anchor_partial(part)
        counts = counts[0] + int(own["mined_nonzero"]), counts[1] + int(own["mined_count"])
    assert counts == (int(found["mined_nonzero"]), int(found["mined_count"]))

    near = NEIGHBORS.tolist()
    labels = LABELS.tolist()
    size = range(len(labels))
    mined = {
        (i, j)
        for i in size
        for j in size
        if labels[j] in near[labels[i]] or labels[i] in near[labels[j]]
    }
    d = [[float(distance(a, b)) for b in x] for a in x]
    match loss:
        case Contrastive():
            wanted = [d[a][n] < loss.negative_margin for a, n in mined]
        case Triplet():
            wanted = _mined_triplets(loss, d, labels, mined)
        case Margin():
            drawn = drawn_negatives(x, LABELS, seed=3, step=0)
            wanted = [d[a][n] < loss.beta + loss.margin for a, n in drawn if (a, n) in mined]
        case _:
            cosine = [[1 - value**2 / 2 for value in row] for row in d]
            wanted = []
            for a, n in mined:
                own = [cosine[a][p] for p in size if p != a and labels[p] == labels[a]]
                wanted.append(bool(own) and cosine[a][n] + 0.1 > min(own))
    assert len(wanted) == counts[1] > 0
    assert sum(wanted) == counts[0]


class Uncounted(Contrastive):
    """A custom loss without counts of mined negatives."""

    def anchor_partial(self, batch: AnchorBatch) -> Statistics:
        return super().anchor_partial(replace(batch, neighbors_Ch=None))


def test_a_loss_may_leave_the_counts_out() -> None:
    x = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))
    recorded = []
    for loss in (Contrastive(), Uncounted()):
        objective = anchor_objective(
            loss,
            num_classes=6,
            embedding_size=4,
            seed=0,
            comm=Comm.single(),
            dtype=torch.float32,
        )
        output = objective(x, LABELS, [len(x)], neighbors_Ch=NEIGHBORS)
        recorded.append(output.statistics.keys())
    assert recorded[0] - recorded[1] == {"active_mined"}


def _mined_triplets(
    loss: Triplet, d: list[list[float]], labels: list[int], mined: set[tuple[int, int]]
) -> list[bool]:
    found = []
    size = range(len(labels))
    for a in size:
        own = [
            (d[a][n] - d[a][p], n)
            for p in size
            for n in size
            if p != a
            and labels[p] == labels[a] != labels[n]
            and (loss.mining != "semi_hard" or d[a][p] < d[a][n] < d[a][p] + loss.margin)
        ]
        if loss.mining == "hard":
            own = [min(own)] if own else []
        found += [gap < loss.margin for gap, n in own if (a, n) in mined]
    return found
