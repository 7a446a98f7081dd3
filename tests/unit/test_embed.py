"""Embedding batches: order, types, and the modes of the network's modules afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dml_dist.evaluation.embed import embed


@dataclass(frozen=True, eq=False)
class _Batch:
    images: Tensor
    labels: Tensor
    rows: Tensor


def _batches() -> list[_Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        _Batch(
            torch.randn(size, 3, 4, 4, generator=generator),
            torch.arange(low, low + size) % 3,
            torch.arange(low, low + size),
        )
        for low, size in ((10, 4), (14, 3))
    ]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model.train()
    model[2].eval()
    return model


def test_embeds_in_evaluation_mode_and_restores_every_module() -> None:
    model = _model()
    batches = _batches()
    seen: list[int] = []
    embeddings, labels, rows = embed(model, iter(batches), device="cpu", progress=seen.append)
    assert [module.training for module in model] == [True, True, False, True]
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(batch.images) for batch in batches])
    np.testing.assert_array_equal(embeddings, expected.numpy())
    assert (embeddings.dtype, labels.dtype, rows.dtype) == (np.float32, np.int64, np.int64)
    assert rows.tolist() == list(range(10, 17))
    assert labels.tolist() == [row % 3 for row in range(10, 17)]
    assert seen == [4, 7]


def test_modes_are_restored_after_an_error() -> None:
    model = _model()
    broken = _Batch(torch.zeros(2, 3, 5, 5), torch.zeros(2), torch.zeros(2))
    with pytest.raises(RuntimeError):
        embed(model, [broken], device="cpu")
    assert [module.training for module in model] == [True, True, False, True]


def test_autocast_computes_in_bfloat16_and_gives_float32() -> None:
    model = _model()
    plain, _, _ = embed(model, _batches(), device="cpu")
    cast, _, _ = embed(model, _batches(), device="cpu", precision=torch.bfloat16)
    assert cast.dtype == np.float32
    assert 0 < np.abs(cast - plain).max() < 0.1


def test_images_are_cast_to_the_type_of_the_model() -> None:
    model = _model().double()
    found, _, _ = embed(model, _batches(), device="cpu")
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(batch.images.double()) for batch in _batches()])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.float().numpy())
    plain, _, _ = embed(nn.Flatten(), _batches(), device="cpu")
    assert plain.shape == (7, 48)


def test_no_batches_give_no_rows() -> None:
    embeddings, labels, rows = embed(_model(), [], device="cpu")
    assert (embeddings.shape, labels.shape, rows.shape) == ((0, 0), (0,), (0,))
