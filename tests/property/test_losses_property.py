"""Properties of the losses over drawn shapes: shard-count-free, associative, invariant."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_dist.losses.forms import ProxyShard, RowLoss
from dml_dist.losses.numerics import Statistics, merge_statistics
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.proxy_nca_functions import proxy_nca_loss
from tests.custom_examples import HardNegativeSoftmax

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[RowLoss, Tensor, Tensor, Tensor, int]:
    """A row loss with embeddings, labels and proxies, and the number of classes."""
    num_classes = draw(st.integers(2, 9))
    per_class = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if draw(st.booleans()):
        denominator = draw(st.sampled_from(["all", "negatives"]))
        loss: RowLoss = ProxyNCA(
            num_classes,
            denominator,
            embedding_scale=draw(st.floats(0.5, 6)),
            proxies_per_class=per_class,
            label_smoothing=draw(st.sampled_from([0.0, 0.2])) if denominator == "all" else 0.0,
            logit_memory_mb=draw(st.sampled_from([1e-9, 1e-3, 64.0])),
        )
    else:
        per_class, loss = 1, HardNegativeSoftmax()
    embeddings = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    proxies = torch.randn(num_classes * per_class, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    return loss, embeddings, labels, proxies, num_classes


def _partials(
    loss: RowLoss, x: Tensor, labels: Tensor, proxies: Tensor, num_classes: int, cuts: list[int]
) -> list[Statistics]:
    bounds = [0, *cuts, num_classes]
    k = loss.proxies_per_class
    return [
        loss.partial(x, labels, proxies[low * k : high * k], ProxyShard(num_classes, low, high, k))
        for low, high in pairwise(bounds)
    ]


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@SETTINGS
@given(problem=problems(), data=st.data())
def test_any_cut_of_the_classes_gives_the_dense_loss_and_gradients(
    problem: tuple[RowLoss, Tensor, Tensor, Tensor, int], data: st.DataObject
) -> None:
    loss, x, labels, proxies, num_classes = problem
    cuts = sorted(data.draw(st.sets(st.integers(1, num_classes - 1))))
    found = []
    for chosen in ([], cuts):
        leaves = x.clone().requires_grad_(), proxies.clone().requires_grad_()
        partials = _partials(loss, leaves[0], labels, leaves[1], num_classes, chosen)
        total = reduce(lambda a, b: merge_statistics(a, b, loss.merges), partials)
        value = loss.finish(total)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for dense, sharded in zip(*found, strict=True):
        _close(sharded, dense)


@SETTINGS
@given(problem=problems(), data=st.data())
def test_merge_is_associative_and_commutative(
    problem: tuple[RowLoss, Tensor, Tensor, Tensor, int], data: st.DataObject
) -> None:
    loss, x, labels, proxies, num_classes = problem
    cuts = sorted(data.draw(st.sets(st.integers(1, num_classes - 1))))
    partials = _partials(loss, x, labels, proxies, num_classes, cuts)
    order = data.draw(st.permutations(range(len(partials))))

    def merge(a: Statistics, b: Statistics) -> Statistics:
        return merge_statistics(a, b, loss.merges)

    forward = reduce(merge, partials)
    shuffled = [partials[place] for place in order]
    backward = reduce(lambda a, b: merge(b, a), reversed(shuffled))
    for name in loss.merges:
        _close(backward[name], forward[name])


@SETTINGS
@given(problem=problems(), seed=st.integers(0, 2**16))
def test_lengths_and_orders_do_not_matter(
    problem: tuple[RowLoss, Tensor, Tensor, Tensor, int], seed: int
) -> None:
    loss, x, labels, proxies, num_classes = problem
    generator = torch.Generator().manual_seed(seed)
    k = loss.proxies_per_class

    def value(x: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
        return loss.finish(_partials(loss, x, labels, proxies, num_classes, [])[0])

    expected = value(x, labels, proxies)
    stretch = torch.rand(len(x), 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    _close(value(x * stretch, labels, proxies), expected)
    stretch = torch.rand(len(proxies), 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    _close(value(x, labels, proxies * stretch), expected)
    rows = torch.randperm(len(x), generator=generator)
    _close(value(x[rows], labels[rows], proxies), expected)
    classes = torch.randperm(num_classes, generator=generator)
    moved = proxies.reshape(num_classes, k, -1)[classes].reshape(proxies.shape)
    _close(value(x, classes.argsort()[labels], moved), expected)


@SETTINGS
@given(problem=problems())
def test_the_paper_form_is_not_above_the_softmax_form(
    problem: tuple[RowLoss, Tensor, Tensor, Tensor, int],
) -> None:
    _, x, labels, proxies, num_classes = problem
    k = len(proxies) // num_classes
    both = [
        proxy_nca_loss(x, labels, proxies, denominator=form, proxies_per_class=k)
        for form in ("negatives", "all")
    ]
    assert both[0] <= both[1]
    assert both[1] > 0
