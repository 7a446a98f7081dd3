"""Properties of the losses over drawn shapes: shard-count-free, associative, invariant."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dml_dist.losses.forms import ProxyShard, Round, RoundsLoss, RowLoss, rounds_of
from dml_dist.losses.numerics import Statistics, merge_statistics
from dml_dist.losses.proxy_anchor import ProxyAnchor
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA
from dml_dist.losses.proxy_nca_functions import proxy_nca_loss
from dml_dist.losses.proxy_nca_margin import ProxyNCAMargin
from dml_dist.losses.soft_triple import SoftTriple
from dml_dist.losses.softmax import ArcFace
from tests.custom_examples import HardNegativeSoftmax

AnyRowLoss = RowLoss | RoundsLoss

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[AnyRowLoss, Tensor, Tensor, Tensor, int]:
    """A row loss with embeddings, labels and proxies, and the number of classes."""
    num_classes = draw(st.integers(2, 9))
    per_class = draw(st.integers(1, 3))
    rows = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    memory = draw(st.sampled_from([1e-9, 1e-3, 64.0]))
    kind = draw(st.sampled_from(["nca", "margin", "dynamic", "anchor", "triple", "arc", "custom"]))
    surrogate = draw(st.sampled_from(["nca", "margin"]))
    denominator = draw(st.sampled_from(["all", "negatives"]))
    loss: RowLoss | RoundsLoss = HardNegativeSoftmax()
    if kind == "nca":
        loss = ProxyNCA(
            num_classes,
            denominator,
            embedding_scale=draw(st.floats(0.5, 6)),
            proxies_per_class=per_class,
            label_smoothing=draw(st.sampled_from([0.0, 0.2])) if denominator == "all" else 0.0,
            logit_memory_mb=memory,
        )
    elif kind == "margin":
        loss = ProxyNCAMargin(num_classes, 0.7, proxies_per_class=per_class, logit_memory_mb=memory)
    elif kind == "dynamic":
        loss = DynamicProxyNCA(
            num_classes,
            surrogate,
            denominator,
            positives=draw(st.sampled_from(["drawn", "all"])),
            logit_memory_mb=memory,
        )
    elif kind == "anchor":
        loss = ProxyAnchor(8.0, positives=draw(st.sampled_from(["classes", "samples"])))
    elif kind == "triple":
        loss = SoftTriple(logit_memory_mb=memory, centers_per_class=per_class)
    elif kind == "arc":
        loss = ArcFace(8.0, memory, margin_degrees=draw(st.sampled_from([0.0, 30.0, 90.0])))
    per_class = loss.proxies_per_class
    embeddings = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    proxies = torch.randn(num_classes * per_class, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    return loss, embeddings, labels, proxies, num_classes


def _shards(
    loss: AnyRowLoss, proxies: Tensor, num_classes: int, cuts: list[int]
) -> list[tuple[Tensor, ProxyShard]]:
    bounds = [0, *cuts, num_classes]
    k = loss.proxies_per_class
    return [
        (proxies[low * k : high * k], ProxyShard(num_classes, low, high, k))
        for low, high in pairwise(bounds)
    ]


def _total(
    loss: AnyRowLoss, x: Tensor, labels: Tensor, shards: list[tuple[Tensor, ProxyShard]]
) -> Statistics:
    """The statistics of all rounds, merged over shards from the left."""
    total: Statistics = {}
    for round_ in rounds_of(loss):
        known = {name: value.detach() for name, value in total.items()}
        partials = [round_.partial(x, labels, *shard, known) for shard in shards]
        total |= reduce(lambda a, b: merge_statistics(a, b, round_.merges), partials)
    return total


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@SETTINGS
@given(problem=problems(), data=st.data())
def test_any_partition_of_the_classes_gives_the_dense_loss_and_gradients(
    problem: tuple[AnyRowLoss, Tensor, Tensor, Tensor, int], data: st.DataObject
) -> None:
    loss, x, labels, proxies, num_classes = problem
    cuts = sorted(data.draw(st.sets(st.integers(1, num_classes - 1))))
    found = []
    for chosen in ([], cuts):
        leaves = x.clone().requires_grad_(), proxies.clone().requires_grad_()
        total = _total(loss, leaves[0], labels, _shards(loss, leaves[1], num_classes, chosen))
        value = loss.finish(total)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for dense, sharded in zip(*found, strict=True):
        _close(sharded, dense)


@SETTINGS
@given(problem=problems(), data=st.data())
def test_merge_is_associative_and_commutative(
    problem: tuple[AnyRowLoss, Tensor, Tensor, Tensor, int], data: st.DataObject
) -> None:
    loss, x, labels, proxies, num_classes = problem
    cuts = sorted(data.draw(st.sets(st.integers(1, num_classes - 1))))
    shards = _shards(loss, proxies, num_classes, cuts)
    order = data.draw(st.permutations(range(len(shards))))
    known: Statistics = {}
    for round_ in rounds_of(loss):
        partials = [round_.partial(x, labels, *shard, known) for shard in shards]

        def merge(a: Statistics, b: Statistics, how: Round = round_) -> Statistics:
            return merge_statistics(a, b, how.merges)

        forward = reduce(merge, partials)
        shuffled = [partials[place] for place in order]
        backward = reduce(lambda a, b: merge(b, a), reversed(shuffled))
        for name in round_.merges:
            _close(backward[name], forward[name])
        known |= {name: value.detach() for name, value in forward.items()}


@SETTINGS
@given(problem=problems(), seed=st.integers(0, 2**16))
def test_invariant_to_lengths_and_orders(
    problem: tuple[AnyRowLoss, Tensor, Tensor, Tensor, int], seed: int
) -> None:
    loss, x, labels, proxies, num_classes = problem
    if isinstance(loss, DynamicProxyNCA):  # What is drawn follows the order of the rows.
        loss = replace(loss, positives="all")
    generator = torch.Generator().manual_seed(seed)
    k = loss.proxies_per_class

    def value(x: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
        return loss.finish(_total(loss, x, labels, _shards(loss, proxies, num_classes, [])))

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
    problem: tuple[AnyRowLoss, Tensor, Tensor, Tensor, int],
) -> None:
    _, x, labels, proxies, num_classes = problem
    k = len(proxies) // num_classes
    both = [
        proxy_nca_loss(x, labels, proxies, denominator=form, proxies_per_class=k)
        for form in ("negatives", "all")
    ]
    assert both[0] <= both[1]
    assert both[1] > 0
