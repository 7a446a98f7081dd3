"""Losses between a batch and a table in one process: the library, memory, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as library

from dml_dist.config.objective import (
    ContrastiveConfig,
    LossConfig,
    MarginConfig,
    MultiSimilarityConfig,
    ProxyNCAConfig,
    TripletConfig,
)
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.losses.numerics import normalize_rows
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.representatives import RepresentativeObjective, TableForm
from tests.largest_tensor import LargestTensor

LABELS = torch.tensor([0, 0, 4, 2, 1, 4, 3, 0])
SIZE = 5


def objective_of(loss: LossConfig, num_classes: int, **form: Any) -> RepresentativeObjective:
    objective = build_objective(
        loss,
        num_classes=num_classes,
        embedding_size=SIZE,
        seed=0,
        comm=Comm.single(),
        dtype=torch.float64,
        table=TableForm(**form),
    )
    assert isinstance(objective, RepresentativeObjective)
    return objective


def test_contrastive_equals_library() -> None:
    """With `ref_emb`, which knows neither missing rows nor images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LABELS), SIZE, generator=generator, dtype=torch.float64)
    table = torch.randn(5, 3, SIZE, generator=generator, dtype=torch.float64)
    objective = objective_of(
        ContrastiveConfig(positive_margin=0.2, negative_margin=1.3),
        5,
        rows_per_class=3,
        in_batch_weight=0.1,
    )
    objective.rewrite(table, torch.arange(15).view(5, 3))
    ours = x.clone().requires_grad_()
    images = torch.arange(100, 108)
    found = objective(ours, LABELS, [len(x)], image_rows_B=images).loss
    found.backward()
    theirs, rows = x.clone().requires_grad_(), table.view(15, SIZE).clone().requires_grad_()
    loss = library.ContrastiveLoss(pos_margin=0.2, neg_margin=1.3)
    classes = torch.arange(15) // 3
    wanted = loss(theirs, LABELS, ref_emb=rows, ref_labels=classes) + 0.1 * loss(theirs, LABELS)
    wanted.backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(objective.rows.grad, rows.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        ContrastiveConfig(negative_margin=1.3),
        TripletConfig(),
        TripletConfig(mining="semi_hard"),
        TripletConfig(mining="hard"),
        MultiSimilarityConfig(),
    ],
    ids=lambda loss: f"{loss.name} {getattr(loss, 'mining', '')}",
)
def test_distances_to_all_rows_are_never_held(loss: LossConfig) -> None:
    """The distances of 200 images to 2000 rows are never held together."""
    generator = torch.Generator().manual_seed(0)
    objective = objective_of(loss, 500, rows_per_class=4, in_batch_weight=0.0, memory_mb=4.0)
    table = torch.randn(500, 4, SIZE, generator=generator)
    objective.rewrite(table, torch.arange(2000).view(500, 4))
    x = torch.randn(200, SIZE, generator=generator).requires_grad_()
    labels = torch.randint(500, (200,), generator=generator)
    images = torch.arange(2000, 2200)
    with LargestTensor() as largest:
        objective(x, labels, [200], image_rows_B=images).loss.backward()
    assert largest.elements <= 200 * 200


@pytest.mark.parametrize("size", [1, 3, 64, 512])
def test_normalized_rows_do_not_depend_on_their_chunk(size: int) -> None:
    """What the choice of the same pairs on any number of ranks rests on."""
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    whole = normalize_rows(x)
    for low, high in ((0, 1), (3, 20), (39, 40)):
        assert torch.equal(normalize_rows(x[low:high]), whole[low:high])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ProxyNCAConfig(), "triplet and multi_similarity, but the section loss gives ProxyNCA"),
        (MarginConfig(), "but the section loss gives Margin. Choose one of these losses"),
        (TripletConfig(swap=True), "loss.swap is true: .* Set loss.swap: false"),
    ],
    ids=["proxies", "margin", "swap"],
)
def test_losses_without_the_form_are_refused(loss: LossConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_of(loss, 5, rows_per_class=2)


def test_a_table_needs_a_class_for_each_rank() -> None:
    options = {"num_classes": 2, "embedding_size": SIZE, "seed": 0, "table": TableForm(4)}
    with pytest.raises(TopologyError, match="there are 2 training classes and 3 ranks"):
        build_objective(TripletConfig(), comm=Comm.planned(3), **options)
    planned = build_objective(TripletConfig(), comm=Comm.planned(2), **options)
    assert planned.proxy_rows() == (4, 4)
    assert planned.traffic([3, 3]).total > 0


def test_rows_of_another_shape_are_refused() -> None:
    objective = objective_of(TripletConfig(), 5, rows_per_class=2)
    with pytest.raises(ValueError, match=r"5 classes of 2 rows, each of 5 values, but .* \(5, 3"):
        objective.rewrite(torch.zeros(5, 3, SIZE), torch.zeros(5, 3, dtype=torch.int64))
