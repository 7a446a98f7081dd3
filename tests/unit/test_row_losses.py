"""Losses over class proxies in one process: loops, finite differences, pytorch-metric-learning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as peers
from torch import Tensor

import dml_dist
from dml_dist.config.load import parse_config
from dml_dist.config.objective import (
    ArcFaceConfig,
    CosFaceConfig,
    NormalizedSoftmaxConfig,
    ProxyNCAConfig,
    SoftTripleConfig,
)
from dml_dist.config.objective import ProxyAnchorConfig as AnchorConfig
from dml_dist.errors import ConfigError
from dml_dist.losses.build_loss import build_loss
from dml_dist.losses.proxy_anchor import ProxyAnchor
from dml_dist.losses.soft_triple import SoftTriple
from dml_dist.losses.softmax import ArcFace, CosFace, NormalizedSoftmax
from tests import oracles_row_losses as oracles

Loss = Callable[..., Tensor]


def _nca_oracle(*leaves: Tensor, **options: Any) -> Tensor:
    return oracles.assigned_nca_oracle(*leaves, **options)


@dataclass(frozen=True)
class Case:
    """A loss with its oracle and options; `own` are options of ours only."""

    name: str
    loss: Loss
    oracle: Loss
    options: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    rows: int = 5

    def value(self, *leaves: Tensor, memory_mb: float = 64.0) -> Tensor:
        """The loss of (embeddings, labels, proxies)."""
        return self.loss(*leaves, logit_memory_mb=memory_mb, **self.options, **self.own)

    def expected(self, *leaves: Tensor) -> Tensor:
        """The oracle's."""
        return self.oracle(*leaves, **self.options)


MARGIN = {"surrogate": "margin"}
SHARED = torch.tensor([1, 0, 2, 1, 0])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25, 1.5], dtype=torch.float64)
CASES = [
    Case("softmax", dml_dist.normalized_softmax_loss, oracles.normalized_softmax_oracle),
    Case("cosface", dml_dist.cosface_loss, oracles.cosface_oracle, {"scale": 16.0}),
    Case("arcface", dml_dist.arcface_loss, oracles.arcface_oracle, {"scale": 16.0}),
    Case("arcface, 85", dml_dist.arcface_loss, oracles.arcface_oracle, {"margin_degrees": 85.0}),
    Case(
        "soft triple",
        dml_dist.soft_triple_loss,
        oracles.soft_triple_oracle,
        {"centers_per_class": 3, "margin": 0.2},
        rows=15,
    ),
    Case("anchor", dml_dist.proxy_anchor_loss, oracles.proxy_anchor_oracle),
    Case(
        "anchor, samples",
        dml_dist.proxy_anchor_loss,
        oracles.proxy_anchor_oracle,
        {"positives": "samples", "scale": 8.0, "margin": 0.3},
    ),
    Case("margin", dml_dist.proxy_nca_loss, _nca_oracle, MARGIN),
    Case(
        "margin, three, sum",
        dml_dist.proxy_nca_loss,
        _nca_oracle,
        MARGIN | {"proxies_per_class": 3, "margin": 1.5, "margin_reduction": "sum"},
        rows=15,
    ),
    Case("shared", dml_dist.proxy_nca_loss, _nca_oracle, {"class_rows": SHARED}, rows=3),
    Case(
        "shared, margin, weights",
        dml_dist.proxy_nca_loss,
        _nca_oracle,
        MARGIN | {"class_rows": SHARED, "class_weights": WEIGHTS},
        rows=3,
    ),
    Case(
        "weights",
        dml_dist.proxy_nca_loss,
        _nca_oracle,
        {"class_weights": WEIGHTS, "denominator": "negatives"},
    ),
    Case("dynamic", dml_dist.dynamic_proxy_nca_loss, oracles.dynamic_nca_oracle),
    Case(
        "dynamic, negatives",
        dml_dist.dynamic_proxy_nca_loss,
        oracles.dynamic_nca_oracle,
        {"denominator": "negatives"},
    ),
    Case("dynamic, margin", dml_dist.dynamic_proxy_nca_loss, oracles.dynamic_nca_oracle, MARGIN),
    Case(
        "dynamic, margin, sum",
        dml_dist.dynamic_proxy_nca_loss,
        oracles.dynamic_nca_oracle,
        MARGIN | {"margin_reduction": "sum"},
    ),
    Case(
        "dynamic, all positives",
        dml_dist.dynamic_proxy_nca_loss,
        oracles.dynamic_nca_oracle,
        {"positives": "all", "denominator": "negatives"},
    ),
    Case(
        "dynamic, another draw",
        dml_dist.dynamic_proxy_nca_loss,
        oracles.dynamic_nca_oracle,
        {"seed": 3, "step": 8},
    ),
]
IDS = [case.name for case in CASES]


def _leaves(case: Case, rows: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    p = torch.randn(case.rows, 4, generator=generator, dtype=dtype)
    labels = torch.tensor([0, 3, 3, 4, 1, 0, 3])[:rows]
    return [x.requires_grad_(), labels, p.requires_grad_()]


def _gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [leaves[0], leaves[2]]))


def _same(case: Case, leaves: list[Tensor], memory_mb: float = 64.0, rtol: float = 1e-10) -> None:
    value, expected = case.value(*leaves, memory_mb=memory_mb), case.expected(*leaves)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    for actual, reference in zip(
        _gradients(value, leaves), _gradients(expected, leaves), strict=True
    ):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, reference, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("memory_mb", [1e-9, 5 * 7 * 8 / 2**20, 64.0], ids=["row", "few", "all"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_loops(case: Case, memory_mb: float) -> None:
    _same(case, _leaves(case), memory_mb)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_class_repeated_rows_and_zero_rows(case: Case) -> None:
    leaves = _leaves(case)
    with torch.no_grad():
        leaves[0][2] = leaves[0][1]
        leaves[0][4] = 0
    if "arcface" not in case.name:  # The oracle's angle of 90 degrees is rounded differently.
        _same(case, leaves)
    leaves[1] = torch.full_like(leaves[1], 2)
    if "dynamic" in case.name:  # No other class: no negatives, no term.
        assert case.value(*leaves).item() == 0
    _same(case, leaves)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradcheck(case: Case) -> None:
    leaves = _leaves(case, rows=4)
    assert torch.autograd.gradcheck(
        lambda x, p: case.value(x, leaves[1], p, memory_mb=1e-4), (leaves[0], leaves[2])
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_float32_and_half_precision(case: Case) -> None:
    exact = _leaves(case)
    with torch.no_grad():  # Values that bfloat16 holds.
        exact[0].copy_(exact[0].bfloat16())
    expected = case.expected(*exact)
    wanted = _gradients(expected, exact)
    half = [exact[0].detach().bfloat16().requires_grad_(), exact[1], exact[2].detach().float()]
    half[2].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = case.value(*half)
        found = _gradients(value, half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for actual, reference, tolerance in zip(found, wanted, (1e-2, 1e-4), strict=True):
        assert (actual.double() - reference).norm() <= tolerance * reference.norm() + 1e-6


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_extreme_scales_stay_finite_and_inputs_unchanged(case: Case) -> None:
    leaves = _leaves(case, dtype=torch.float32)
    with torch.no_grad():
        leaves[0][1] *= 1e18
        leaves[0][2] *= 1e-20
        leaves[2][0] *= 1e-20
    before = [leaf.detach().clone() for leaf in leaves]
    own = {"scale": 1e4} if "scale" in case.options or "arc" in case.name else {}
    if case.loss in (dml_dist.proxy_nca_loss, dml_dist.dynamic_proxy_nca_loss):
        own = {"embedding_scale": 1e3}
    value = case.loss(*leaves, **{**case.options, **own})
    assert all(x.isfinite().all() for x in (value, *_gradients(value, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nan_is_propagated(case: Case) -> None:
    leaves = _leaves(case)
    with torch.no_grad():
        leaves[0][1] = torch.nan
    assert case.value(*leaves).isnan()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arcface_has_finite_gradients_at_its_own_proxy(sign: float, dtype: torch.dtype) -> None:
    proxies = torch.eye(4, dtype=dtype).requires_grad_()
    x = (sign * torch.eye(4, dtype=dtype)[:2] * 3).requires_grad_()
    margin = math.radians(28.6)
    loss = dml_dist.arcface_loss(x, torch.tensor([0, 1]), proxies, scale=4.0)
    target = math.cos(margin) if sign > 0 else -1 - margin * math.sin(margin)
    expected = math.log(3 + math.exp(4 * target)) - 4 * target
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, proxies]))


def test_positives_of_samples_weigh_classes_by_their_size() -> None:
    """Two proxies on axes, by hand: class 0 has three samples at 90 degrees, class 1 one at 0."""
    proxies = torch.eye(2, dtype=torch.float64)
    x = torch.tensor([[0.0, 1.0]] * 4, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1])
    first, second = math.log(1 + 3), math.log(1 + math.exp(-1))
    negative = (math.log(1 + 1) + math.log(1 + 3 * math.e)) / 2
    options = {"scale": 1.0, "margin": 0.0}
    of_classes = dml_dist.proxy_anchor_loss(x, labels, proxies, **options)
    assert of_classes.item() == pytest.approx((first + second) / 2 + negative, rel=1e-12)
    of_samples = dml_dist.proxy_anchor_loss(x, labels, proxies, positives="samples", **options)
    assert of_samples.item() == pytest.approx((3 * first + second) / 4 + negative, rel=1e-12)


PEERS: list[tuple[str, Any, str, Loss, int]] = [
    ("softmax", peers.NormalizedSoftmaxLoss(20, 8), "W", dml_dist.normalized_softmax_loss, 1),
    ("cosface", peers.CosFaceLoss(20, 8), "W", dml_dist.cosface_loss, 1),
    ("arcface", peers.ArcFaceLoss(20, 8), "W", dml_dist.arcface_loss, 1),
    ("anchor", peers.ProxyAnchorLoss(20, 8), "proxies", dml_dist.proxy_anchor_loss, 1),
    ("soft triple", peers.SoftTripleLoss(20, 8), "fc", dml_dist.soft_triple_loss, 10),
]


@pytest.mark.parametrize(
    ("peer", "name", "loss", "per_class"), [p[1:] for p in PEERS], ids=[p[0] for p in PEERS]
)
def test_equals_pytorch_metric_learning(peer: Any, name: str, loss: Loss, per_class: int) -> None:
    """The same formulas and defaults there; it has no averaging of positives over samples, no
    margin surrogate, no fractional and no dynamic assignment. Its ArcFace has no gradient at
    cos = +-1."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(32, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    p = torch.randn(20 * per_class, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(20, (32,), generator=generator)
    turned = name != "proxies"
    setattr(peer, name, torch.nn.Parameter((p.T if turned else p).clone()))
    p.requires_grad_()
    value, expected = loss(x, labels, p), peer(x, labels)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    found = torch.autograd.grad(value, [x, p])
    wanted = torch.autograd.grad(expected, [x, getattr(peer, name)])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        found[1], wanted[1].T if turned else wanted[1], rtol=1e-8, atol=1e-12
    )


def test_defaults_of_config_and_of_the_losses_are_the_same() -> None:
    pairs: list[tuple[Any, Any]] = [
        (AnchorConfig(), ProxyAnchor()),
        (SoftTripleConfig(), SoftTriple()),
        (NormalizedSoftmaxConfig(), NormalizedSoftmax()),
        (CosFaceConfig(), CosFace()),
        (ArcFaceConfig(), ArcFace()),
    ]
    for config, loss in pairs:
        assert build_loss(config, 3) == loss


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ({"name": "cosface", "margin": 1.5}, "<= 1, got 1.5"),
        ({"name": "arcface", "margin_degrees": 120.0}, "<= 90, got 120.0"),
        ({"name": "proxy_anchor", "margin": -0.1}, ">= 0 and <= 1, got -0.1"),
        ({"name": "soft_triple", "gamma": 0.0}, "> 0, got 0.0"),
        ({"name": "proxy_nca", "surrogate": "margin", "margin": 4.0}, "< 4, got 4.0"),
        ({"name": "proxy_nca", "margin": 0.2}, "margin 0.2 needs surrogate: margin"),
        (
            {"name": "proxy_nca", "surrogate": "margin", "proxy_scale": 8.0},
            "proxy_scale 8.0 needs surrogate: nca",
        ),
        (
            {"name": "proxy_nca", "assignment": "fractional", "proxy_share": 2.0},
            "proxy_share of at most 1",
        ),
        (
            {"name": "proxy_nca", "assignment": "dynamic", "proxies_per_class": 2},
            "proxies_per_class 2 needs assignment: static",
        ),
        (
            {"name": "proxy_nca", "assignment": "dynamic", "label_smoothing": 0.1},
            "got assignment: dynamic",
        ),
        (
            {"name": "proxy_nca", "positives": "all"},
            "positives all needs assignment: dynamic",
        ),
        ({"name": "proxy_nca", "use_labels": False}, "use_labels"),
    ],
)
def test_settings_outside_their_range_are_rejected(loss: dict[str, Any], text: str) -> None:
    values = {
        "name": "run",
        "data": {"path": "unused"},
        "loss": loss,
        "train": {"global_batch_size": 8, "epochs": 1},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(values, [])
    assert text in str(caught.value)


def test_settings_of_older_run_folders_are_read() -> None:
    older = '{"name": "proxy_nca", "use_labels": true, "revive_dead": false}'
    assert ProxyNCAConfig.model_validate_json(older) == ProxyNCAConfig(revive_dead=False)
    older = '{"name": "proxy_nca", "assignment": "static", "dead_after_steps": 1000}'
    assert ProxyNCAConfig.model_validate_json(older) == ProxyNCAConfig()


def test_class_sizes_and_proxies_that_are_missing() -> None:
    weighting = ProxyNCAConfig(class_weighting="inverse_frequency")
    with pytest.raises(ConfigError, match="image count of each of the 5 training classes"):
        build_loss(weighting, 5)
    fractional = ProxyNCAConfig(assignment="fractional", proxy_share=0.1)
    with pytest.raises(ConfigError, match=r"proxy_share 0\.1 of 10 classes is 1"):
        build_loss(fractional, 10)
