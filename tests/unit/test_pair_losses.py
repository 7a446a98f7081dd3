"""Pair losses in one process: against loops, pytorch-metric-learning and numeric gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor

import dml_dist
from dml_dist.config.objective import LossConfig
from dml_dist.losses.build_loss import build_loss
from dml_dist.losses.miners import distance_weights, draw_weighted
from dml_dist.losses.pair_distances import pair_distances
from dml_dist.losses.pairs import AnchorBatch, AnchorLoss, contrastive_loss
from dml_dist.losses.pairs_margin import margin_loss
from dml_dist.losses.pairs_multi_similarity import multi_similarity_loss
from dml_dist.losses.pairs_triplet import triplet_loss
from tests.boundary_pairs import boundary_rows, exact_distances
from tests.largest_tensor import LargestTensor
from tests.oracles_pairs import (
    contrastive_oracle,
    drawn_negatives,
    margin_oracle,
    multi_similarity_oracle,
    triplet_oracle,
)

LABELS = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 0, 2, 5])
REPRESENTATIVES = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0]).bool()


def rows(*, ties: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return embeddings; with ties there are equal rows, within a class and across."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LABELS), 4, generator=generator, dtype=torch.float64)
    if ties:
        x[4], x[7], x[9] = x[0], x[6], x[1]
    return x.to(dtype)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def check(loss: Callable[..., Tensor], oracle: Callable[..., Tensor]) -> None:
    """Compare value and gradient, with all rows and with representatives."""
    nobody = torch.zeros_like(REPRESENTATIVES)
    for flags, ties in ((None, True), (REPRESENTATIVES, True), (None, False), (nobody, False)):
        x = rows(ties=ties)
        found = with_gradient(lambda x, f=flags: loss(x, LABELS, is_representative_B=f), x)
        wanted = with_gradient(lambda x, f=flags: oracle(x, LABELS, representatives=f), x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["nonzero", "mean"])
def test_contrastive_equals_loops(reduction: Any) -> None:
    for margins in ((0.0, 0.5), (0.2, 1.3), (-0.2, 2.0)):
        options = dict(zip(("positive_margin", "negative_margin"), margins, strict=True))
        check(
            lambda *a, o=options, **k: contrastive_loss(*a, **o, **k, reduction=reduction),
            lambda *a, o=options, **k: contrastive_oracle(*a, **o, **k, reduction=reduction),
        )


@pytest.mark.parametrize("mining", ["all", "semi_hard", "hard"])
def test_triplet_equals_loops(mining: Any) -> None:
    for squared, swap, smooth in ((False,) * 3, (True, False, True), (True, True, False)):
        options: dict[str, Any] = {
            "margin": 0.4,
            "mining": mining,
            "squared": squared,
            "swap": swap,
            "smooth": smooth,
            "reduction": "mean" if swap else "nonzero",
        }
        check(
            lambda *a, o=options, **k: triplet_loss(*a, **o, **k, triplet_memory_mb=2e-3),
            lambda *a, o=options, **k: triplet_oracle(*a, **o, **k),
        )


@pytest.mark.parametrize("reduction", ["nonzero", "mean"])
def test_margin_equals_loops(reduction: Any) -> None:
    of_classes = torch.tensor([1.0, 0.8, 1.2, 0.9, 1.1, 1.2], dtype=torch.float64)
    for betas in (torch.tensor(1.1, dtype=torch.float64), of_classes):
        options: dict[str, Any] = {"nu": 0.3, "seed": 4, "step": 2, "reduction": reduction}
        check(
            lambda x, y, b=betas, o=options, **k: margin_loss(x, y, b, **o, **k),
            lambda x, y, b=betas, o=options, **k: margin_oracle(x, y, b, **o, **k),
        )
        grads = []
        for function in (margin_loss, margin_oracle):
            leaf = betas.clone().requires_grad_()
            function(rows(), LABELS, leaf, **options).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("reduction", ["nonzero", "mean"])
def test_multi_similarity_equals_loops(epsilon: float | None, reduction: Any) -> None:
    options: dict[str, Any] = {"epsilon": epsilon, "reduction": reduction}
    check(
        lambda *a, **k: multi_similarity_loss(*a, **options, **k),
        lambda *a, **k: multi_similarity_oracle(*a, **options, **k),
    )


def same_as_library(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    found, wanted = (with_gradient(f, rows(ties=False)) for f in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_contrastive_equals_library() -> None:
    for reduction, reducer in (
        ("nonzero", reducers.AvgNonZeroReducer()),
        ("mean", reducers.MeanReducer()),
    ):
        theirs = losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.3, reducer=reducer)
        same_as_library(
            lambda x, r=reduction: contrastive_loss(
                x, LABELS, positive_margin=0.2, negative_margin=1.3, reduction=r
            ),
            lambda x, f=theirs: f(x, LABELS),
        )


def test_triplet_equals_library() -> None:
    """Its `hard` miner is another: all triplets with d_an < d_ap. Ours is its BatchHardMiner."""
    for squared, swap, smooth in product([False, True], repeat=3):
        measure = distances.LpDistance(power=2 if squared else 1)
        theirs = losses.TripletMarginLoss(0.3, swap=swap, smooth_loss=smooth, distance=measure)
        for mining, miner in (
            ("all", lambda x, y: None),
            ("semi_hard", miners.TripletMarginMiner(0.3, "semihard", distance=measure)),
            ("hard", miners.BatchHardMiner(distance=measure)),
        ):
            options: dict[str, Any] = {"squared": squared, "swap": swap, "smooth": smooth}
            same_as_library(
                lambda x, m=mining, o=options: triplet_loss(x, LABELS, margin=0.3, mining=m, **o),
                lambda x, f=theirs, m=miner: f(x, LABELS, m(x, LABELS)),
            )


def test_margin_equals_library_on_its_triplets() -> None:
    """Its loss is one of triplets: without an anchor's negative its positives do not count.

    With nu it weighs beta by triplets. So: the drawn triplets, no nu, no anchor without negative,
    and a beta that float32 holds.
    """
    x = rows(ties=False)
    anchors, drawn = zip(*drawn_negatives(x, LABELS, seed=4, step=2), strict=True)
    others = [
        p for a, y in enumerate(LABELS) for p, z in enumerate(LABELS) if p != a and bool(y == z)
    ]
    triplets = tuple(torch.tensor(part) for part in (anchors, others, drawn))
    theirs = losses.MarginLoss(margin=0.2, beta=1.125)
    same_as_library(
        lambda x: margin_loss(x, LABELS, 1.125, seed=4, step=2),
        lambda x: theirs(x, LABELS, triplets),
    )


def test_multi_similarity_equals_library() -> None:
    theirs = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    same_as_library(
        lambda x: multi_similarity_loss(x, LABELS), lambda x: theirs(x, LABELS, miner(x, LABELS))
    )
    same_as_library(
        lambda x: multi_similarity_loss(x, LABELS, epsilon=None), lambda x: theirs(x, LABELS)
    )


CONFIGS: tuple[dict[str, Any], ...] = (
    {"name": "contrastive", "negative_margin": 1.3},
    {"name": "triplet", "margin": 0.4},
    {"name": "triplet", "mining": "semi_hard", "margin": 0.6, "swap": True, "squared": True},
    {"name": "triplet", "mining": "hard", "smooth": True},
    {"name": "margin", "beta_form": "fixed"},
    {"name": "multi_similarity"},
)


def built(values: dict[str, Any]) -> AnchorLoss:
    config = TypeAdapter(LossConfig).validate_python(values)
    loss = build_loss(config, num_classes=6)
    assert isinstance(loss, AnchorLoss)
    return loss


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_numeric_gradients(values: dict[str, Any]) -> None:
    loss = built(values)

    def function(x: Tensor) -> Tensor:
        return loss.finish(loss.anchor_partial(AnchorBatch(x, LABELS, 0, len(LABELS))))

    assert torch.autograd.gradcheck(function, rows(ties=False).requires_grad_())


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_any_partition_gives_the_same(values: dict[str, Any]) -> None:
    """Any partition of the anchors, even with empty parts, equals all anchors together."""
    loss = built(values)
    whole = loss.anchor_partial(AnchorBatch(rows(), LABELS, 0, 11, REPRESENTATIVES))
    for cuts in ([0, 4, 4, 11], [0, 1, 11], list(range(12))):
        parts = [
            loss.anchor_partial(AnchorBatch(rows(), LABELS, low, high, REPRESENTATIVES))
            for low, high in pairwise(cuts)
        ]
        assert set(whole) == set(loss.merges)
        for name, value in whole.items():
            total = torch.stack([part[name] for part in parts]).sum()
            torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("values", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "labels", [[0, 0, 0], [0, 1, 2], [0]], ids=["one class", "no positive", "one row"]
)
def test_finite_without_pairs(values: dict[str, Any], labels: list[int]) -> None:
    loss = built(values)
    x = torch.zeros(len(labels), 4, dtype=torch.float64)
    x[1:] = 1.0

    def function(x: Tensor) -> Tensor:
        batch = AnchorBatch(x, torch.tensor(labels, dtype=torch.int64), 0, len(labels))
        return loss.finish(loss.anchor_partial(batch))

    value, gradient = with_gradient(function, x)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if len(labels) < 2:
        assert (float(value), float(gradient.abs().sum())) == (0.0, 0.0)


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_memory_of_a_part(values: dict[str, Any]) -> None:
    """60 of 240 rows as anchors: no tensor has more than 60 x 240 elements, forward or backward."""
    if values["name"] == "triplet":
        values = {**values, "triplet_memory_mb": 0.1}
    x = torch.randn(240, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(240) % 12
    loss = built(values)
    with LargestTensor() as largest:
        loss.finish(loss.anchor_partial(AnchorBatch(x, labels, 60, 120))).backward()
    assert largest.elements <= 60 * 240


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_of_distances_are_within_their_bound(dtype: torch.dtype) -> None:
    """Near pairs have the bits of the exact form, others differ by less than the callback is told.

    Also under bf16 autocast, which must not reach the product.
    """
    rows = boundary_rows(dtype)
    x, exact = torch.nn.functional.normalize(rows), exact_distances(rows)
    told = []

    def open_choices(distances: Tensor, errors: Tensor) -> Tensor:
        told.append(((distances - exact).abs(), errors.clone()))
        return exact > 1.5

    with torch.autocast("cpu", torch.bfloat16):
        found = pair_distances(x, x, open_choices)
    ((differences, errors),) = told
    assert bool((differences <= errors).all())
    assert float(differences.max()) > 0
    near = exact < 0.09
    for made_again in (near, exact > 1.5):
        assert int(made_again.sum()) > len(x)
        assert torch.equal(found[made_again], exact[made_again])


def test_collapsed_rows_have_exact_distances() -> None:
    rows = 1 + 1e-3 * torch.randn(30, 8)
    x = torch.nn.functional.normalize(rows)
    found = pair_distances(x, x, lambda distances, errors: distances < 0)
    assert torch.equal(found, exact_distances(rows))


def test_near_rows_keep_their_gradient_in_float32() -> None:
    """A distance of 1e-5 among rows of length 1: a matrix product would lose most digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator))
    x[1] = x[0] + 1e-5 * x[2]
    difference = x[0].double() - x[1].double()
    expected = (difference / difference.norm()).float()
    leaf = x.requires_grad_()
    pair_distances(leaf, leaf)[0, 1].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf.grad[1], -expected, rtol=1e-4, atol=1e-5)


def test_half_precision_is_converted_to_float32() -> None:
    x = rows(dtype=torch.bfloat16)
    for function in (contrastive_loss, triplet_loss, margin_loss, multi_similarity_loss):
        assert function(x, LABELS).dtype == torch.float32


def test_negatives_are_drawn_by_their_weights() -> None:
    """Frequencies of many draws against the weights, within four standard deviations."""
    away = torch.tensor([[0.3, 0.6, 0.9, 1.2, 1.5, 0.7]], dtype=torch.float64)
    negative = torch.tensor([[True, True, True, True, True, False]])
    cutoffs: dict[str, float] = {"distance_cutoff": 0.5, "loss_cutoff": 1.4}
    weights = distance_weights(away, negative, 5, **cutoffs)
    assert weights[0, 4:].tolist() == [0.0, 0.0]
    expected = torch.tensor([0.5, 0.6, 0.9, 1.2], dtype=torch.float64)
    expected = expected**-3 * (1 - expected**2 / 4) ** -1
    torch.testing.assert_close(weights[0, :4], expected / expected.max())
    numbers = (torch.arange(20_000, dtype=torch.float64) + 0.5)[None] / 20_000
    counts = draw_weighted(weights, numbers)[0].bincount(minlength=6)
    shares = weights[0] / weights[0].sum()
    torch.testing.assert_close(counts.double() / 20_000, shares, rtol=0, atol=1e-3)
    only_far = distance_weights(away + 1.2, negative, 5, **cutoffs)
    assert only_far.tolist() == negative.double().tolist()


def test_zero_weights_are_never_drawn() -> None:
    weights = torch.tensor([[0.0, 1e-300, 0.0, 0.1, 0.2, 0.0]], dtype=torch.float64)
    numbers = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert draw_weighted(weights, numbers).tolist() == [[1, 4]]


def test_draws_change_with_seed_and_step() -> None:
    x = torch.randn(64, 4, dtype=torch.float64)
    labels = torch.arange(64) % 8
    values = {
        float(margin_loss(x, labels, seed=seed, step=step)) for seed in (0, 1) for step in (0, 1)
    }
    assert len(values) == 4
    assert margin_loss(x, labels, seed=1) == margin_loss(x, labels, seed=1)


def test_functions_are_exported() -> None:
    assert dml_dist.triplet_loss is triplet_loss
    assert dml_dist.contrastive_loss is contrastive_loss
    assert dml_dist.margin_loss is margin_loss
    assert dml_dist.multi_similarity_loss is multi_similarity_loss


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "contrastive", "negative_margin": 2.5}, "less than or equal to 2"),
        ({"name": "contrastive", "positive_margin": 0.6}, "below negative_margin, got 0.6 and 0.5"),
        ({"name": "triplet", "margin": 2.5}, "margin must be at most 2, .* got 2.5"),
        ({"name": "triplet", "margin": 4.5, "squared": True}, "at most 4, .* got 4.5"),
        ({"name": "triplet", "margin": 0, "mining": "semi_hard"}, "semi_hard needs margin > 0"),
        ({"name": "margin", "margin": 1.0}, "got 0.2 and 2.2 from beta 1.2 and margin 1.0"),
        ({"name": "margin", "distance_cutoff": 1.5}, "below loss_cutoff, got 1.5 and 1.4"),
        ({"name": "margin", "nu": 0.1, "beta_form": "fixed"}, "nu 0.1 needs beta_form"),
        ({"name": "multi_similarity", "epsilon": 0.0}, "greater than 0"),
    ],
)
def test_settings_out_of_range_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(LossConfig).validate_python(values)


def test_wrong_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match="embeddings must be a matrix"):
        contrastive_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="is_representative must have shape"):
        triplet_loss(rows(), LABELS, is_representative_B=REPRESENTATIVES[:3])
    with pytest.raises(ValueError, match=r"labels are 0 \.\. 5, outside the class ids 0 \.\. 1"):
        margin_loss(rows(), LABELS, torch.ones(2))
