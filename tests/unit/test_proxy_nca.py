"""Proxy-NCA of one process: against loops, finite differences and pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import ProxyNCALoss
from torch import Tensor

from dml_dist.config.objective import CustomLossConfig, ProxyNCAConfig
from dml_dist.errors import ConfigError
from dml_dist.losses.build_loss import build_loss
from dml_dist.losses.chunks import chunk_rows
from dml_dist.losses.forms import RowLoss
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.proxy_nca_functions import proxy_nca_loss
from tests.oracles_losses import proxy_nca_oracle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"denominator": "negatives"},
    {"label_smoothing": 0.1},
    {"proxies_per_class": 3},
    {"proxies_per_class": 3, "denominator": "negatives", "embedding_scale": 1.0},
    {"proxies_per_class": 2, "label_smoothing": 0.3, "proxy_scale": 5.0},
]


def _inputs(
    rows: int = 6, classes: int = 5, per_class: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(rows, 4, generator=generator, dtype=dtype).requires_grad_()
    proxies = torch.randn(classes * per_class, 4, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    return embeddings, labels, proxies.requires_grad_()


def _gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("memory_mb", [1e-9, 6 * 8 * 8 / 2**20, 64.0], ids=["row", "three", "all"])
def test_equals_loops(options: dict[str, Any], memory_mb: float) -> None:
    embeddings, labels, proxies = _inputs(per_class=options.get("proxies_per_class", 1))
    loss = proxy_nca_loss(embeddings, labels, proxies, logit_memory_mb=memory_mb, **options)
    expected = proxy_nca_oracle(embeddings, labels, proxies, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = _gradients(loss, embeddings, proxies)
    wanted = _gradients(expected, embeddings, proxies)
    for actual, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    embeddings, labels, proxies = _inputs(rows=3, per_class=options.get("proxies_per_class", 1))
    assert torch.autograd.gradcheck(
        lambda x, p: proxy_nca_loss(x, labels, p, logit_memory_mb=1e-4, **options),
        (embeddings, proxies),
    )


def test_equals_pytorch_metric_learning() -> None:
    """The same formula there: one proxy a class, denominator all, softmax_scale = s_x s_p."""
    embeddings, labels, proxies = _inputs(rows=32, classes=20)
    peer = ProxyNCALoss(20, 4, softmax_scale=6.0)
    peer.proxies = torch.nn.Parameter(proxies.detach().clone())
    loss = proxy_nca_loss(embeddings, labels, proxies, embedding_scale=2.0, proxy_scale=3.0)
    expected = peer(embeddings, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    found = _gradients(loss, embeddings, proxies)
    wanted = _gradients(expected, embeddings, peer.proxies)
    for actual, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-8, atol=1e-12)


def _separated(noise: float, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """A batch that a trained network would give: embeddings close to their proxies."""
    generator = torch.Generator().manual_seed(2)
    proxies = F.normalize(torch.randn(50, 32, generator=generator))
    labels = torch.arange(40)
    embeddings = proxies[:40] + noise * torch.randn(40, 32, generator=generator)
    return embeddings, labels, proxies, scale**0.5


@pytest.mark.parametrize("scale", [16.0, 32.0])
def test_tiny_losses_keep_their_float32_gradients(scale: float) -> None:
    embeddings, labels, proxies, root = _separated(0.02, scale)
    scales = {"embedding_scale": root, "proxy_scale": root}

    def gradient(dtype: torch.dtype, dense: bool) -> Tensor:
        x = embeddings.to(dtype).requires_grad_()
        p = proxies.to(dtype)
        if dense:
            loss = F.cross_entropy(2 * scale * F.normalize(x) @ F.normalize(p).T, labels)
        else:
            loss = proxy_nca_loss(x, labels, p, **scales)
        return _gradients(loss, x)[0]

    exact = gradient(torch.float64, dense=True)
    assert _error(gradient(torch.float64, dense=False), exact) < 1e-7
    own, plain = (_error(gradient(torch.float32, dense), exact) for dense in (False, True))
    assert own < 1e-4
    assert plain > 100 * own, "the plain form is what this one is measured against"


@pytest.mark.parametrize("denominator", ["all", "negatives"])
def test_positive_whose_softmax_underflows_keeps_its_gradient(denominator: str) -> None:
    x = torch.tensor([[1.0, 0.01]], requires_grad=True)
    proxies = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    loss = proxy_nca_loss(
        x, torch.tensor([0]), proxies, denominator=denominator, embedding_scale=32.0, proxy_scale=1
    )
    assert loss.item() == pytest.approx(128, rel=1e-3)
    exact = x.detach().double().requires_grad_()
    reference = proxy_nca_oracle(
        exact, torch.tensor([0]), proxies.double(), embedding_scale=32.0, proxy_scale=1.0
    )
    (found,), (expected,) = _gradients(loss, x), _gradients(reference, exact)
    assert found.norm() > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_huge_scales_neither_overflow_nor_underflow() -> None:
    embeddings, labels, proxies = _inputs(dtype=torch.float32)
    for sign in (1.0, -1.0):
        loss = proxy_nca_loss(sign * embeddings, labels, proxies, embedding_scale=1e3)
        found = _gradients(loss, embeddings, proxies)
        assert all(torch.isfinite(value).all() for value in (loss, *found))


def test_bf16_autocast_runs_in_float32_forward_and_backward() -> None:
    embeddings, labels, proxies = _inputs(rows=16, classes=9, dtype=torch.float32)
    half = embeddings.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = proxy_nca_loss(half, labels, proxies)
        found = _gradients(loss, half, proxies)
    assert loss.dtype == torch.float32
    same = half.detach().float().requires_grad_()
    expected = proxy_nca_loss(same, labels, proxies)
    wanted = _gradients(expected, same, proxies)
    assert torch.equal(loss, expected)
    assert torch.equal(found[0], wanted[0].bfloat16())
    assert torch.equal(found[1], wanted[1])


def test_zero_rows_and_zero_proxies_are_finite() -> None:
    embeddings, labels, proxies = _inputs()
    with torch.no_grad():
        embeddings[2] = 0
        proxies[labels[0]] = 0
    loss = proxy_nca_loss(embeddings, labels, proxies, label_smoothing=0.1)
    expected = proxy_nca_oracle(embeddings, labels, proxies, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found = _gradients(loss, embeddings, proxies)
    wanted = _gradients(expected, embeddings, proxies)
    for actual, reference in zip(found, wanted, strict=True):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_below_the_smallest_length_are_divided_by_a_constant(dtype: torch.dtype) -> None:
    embeddings, labels, proxies = _inputs(dtype=dtype)
    with torch.no_grad():
        proxies[labels[0]] *= 1e-13
        proxies[labels[1]] *= 1e-11
    loss = proxy_nca_loss(embeddings, labels, proxies)
    exact, table = (leaf.detach().double().requires_grad_() for leaf in (embeddings, proxies))
    logits = 18 * F.normalize(exact) @ F.normalize(table).T
    wanted = _gradients(F.cross_entropy(logits, labels), exact, table)
    for actual, reference in zip(_gradients(loss, embeddings, proxies), wanted, strict=True):
        # Row by row: the gradients of the short ones are 1e11 times those of the others.
        for row, expected in zip(actual, reference, strict=True):
            assert _error(row, expected) < (1e-4 if dtype == torch.float32 else 1e-10)


def test_nan_is_propagated() -> None:
    embeddings, labels, proxies = _inputs()
    with torch.no_grad():
        proxies[labels[0]] = torch.nan
    assert proxy_nca_loss(embeddings, labels, proxies).isnan()


def test_equal_proxies_of_a_class_leave_the_gradient_to_the_lower_row() -> None:
    embeddings, _, proxies = _inputs(rows=1, per_class=2)
    with torch.no_grad():
        proxies[5] = proxies[4]
    loss = proxy_nca_loss(embeddings, torch.tensor([2]), proxies, proxies_per_class=2)
    _, gradient = _gradients(loss, embeddings, proxies)
    assert gradient[4].norm() > 0
    assert gradient[5].norm() == 0


def test_gradient_of_the_table_is_written_once() -> None:
    """The gradient becomes `.grad` as it is, so that memory holds it once."""
    embeddings, labels, proxies = _inputs()
    kept: list[int] = []
    proxies.register_hook(lambda gradient: kept.append(gradient.data_ptr()))
    proxy_nca_loss(embeddings, labels, proxies).backward()
    assert proxies.grad is not None
    assert kept == [proxies.grad.data_ptr()]


def test_chunks_fit_their_memory() -> None:
    queries = torch.zeros(256, 8)
    for memory_mb in (0.01, 1.0, 8.0):
        rows = chunk_rows(queries, memory_mb)
        assert 2 * (rows + 1) * 256 * 4 <= max(memory_mb * 2**20, 2 * 2 * 256 * 4)
        assert 2 * (rows + 3) * 256 * 4 >= memory_mb * 2**20
    assert chunk_rows(queries, 1e-9) == 1
    assert chunk_rows(queries, 1e6) < 1e5, "a CPU chunk stays within the caches"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": [0, 1, 5]}, r"labels are 0 \.\. 5, outside the class ids 0 \.\. 4"),
        ({"labels": [0, -1, 4]}, r"labels are -1 \.\. 4"),
        ({"labels": [0, 1]}, r"must have shape \(3,\) and dtype int64, but have \(2,\)"),
        ({"proxies": (5, 3)}, r"have the shapes \(3, 4\) and \(5, 3\)"),
        ({"proxies_per_class": 2}, "5, is not a multiple of proxies_per_class 2"),
        ({"label_smoothing": 0.1, "denominator": "negatives"}, "needs denominator 'all'"),
        (
            {"proxies": (1, 4), "labels": [0, 0, 0]},
            "at least 2 classes .* num_classes is 1",
        ),
    ],
)
def test_wrong_arguments_are_rejected(change: dict[str, Any], text: str) -> None:
    labels = torch.tensor(change.pop("labels", [0, 1, 4]))
    proxies = torch.ones(change.pop("proxies", (5, 4)))
    with pytest.raises(ValueError, match=text):
        proxy_nca_loss(torch.ones(3, 4), labels, proxies, **change)


class NeitherForm:
    """Neither a row nor a pair form."""

    merges = ()
    partial = None


def pair_with_parameters() -> torch.nn.Module:
    """A pair form with parameters."""
    return torch.nn.Linear(2, 1)


def test_build_passes_all_options() -> None:
    config = ProxyNCAConfig(
        denominator="all",
        embedding_scale=2.0,
        proxy_scale=5.0,
        proxies_per_class=2,
        label_smoothing=0.1,
        logit_memory_mb=3.0,
    )
    assert build_loss(config, 7) == ProxyNCA(7, "all", 2.0, 5.0, 2, 0.1, 3.0)
    assert isinstance(build_loss(config, 7), RowLoss)


def test_defaults_of_config_and_of_the_function_are_the_same() -> None:
    assert build_loss(ProxyNCAConfig(), 3) == ProxyNCA(3)


def test_custom_interfaces_are_distinguished() -> None:
    row = CustomLossConfig(target="tests.custom_examples:HardNegativeSoftmax")
    pair = CustomLossConfig(target="tests.custom_examples:ContrastivePairs")
    assert isinstance(build_loss(row, 3), RowLoss)
    assert not isinstance(build_loss(pair, 3), RowLoss)


@pytest.mark.parametrize(
    ("config", "num_classes", "text"),
    [
        (ProxyNCAConfig(), 1, "needs at least 2 training classes .* has 1"),
        (
            CustomLossConfig(
                target="tests.custom_examples:ContrastivePairs", options={"margn": 1.0}
            ),
            3,
            "failed when called with the options .'margn'.: TypeError",
        ),
        (
            CustomLossConfig(target="tests.unit.test_proxy_nca:NeitherForm"),
            3,
            "returned NeitherForm, which lacks proxies_per_class, finish, statistics",
        ),
        (
            CustomLossConfig(target="tests.unit.test_proxy_nca:pair_with_parameters"),
            3,
            "returned a module with the parameters .'weight', 'bias'.",
        ),
    ],
)
def test_losses_that_cannot_be_built(config: Any, num_classes: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build_loss(config, num_classes)
