"""Decoded images kept in memory: the same bits, within the limit, for all loader workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dml_dist.data import batches
from dml_dist.data.batches import BatchRequest, ShardDataset
from dml_dist.data.decode import decode_image
from dml_dist.data.decoded_cache import DecodedCache
from dml_dist.data.index import Index
from dml_dist.data.loader import train_loader
from dml_dist.data.reader import ShardReader
from dml_dist.topology import Topology
from tests.unit.test_loader import BALANCED, STANDARD, assert_same, load, plan_of
from tests.unit.tiny_shards import make_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("shards"))


def decode(index: Index, row: int) -> torch.Tensor:
    return decode_image(ShardReader(index).read(row), "")


def test_images_come_back_as_they_were_decoded(index: Index) -> None:
    cache = DecodedCache(index, np.arange(len(index)), 10**6)
    assert cache.num_images == len(index)
    for row in range(len(index)):
        assert cache.get(row) is None
        cache.put(row, decode(index, row))
    for row in range(len(index)):
        image, expected = cache.get(row), decode(index, row)
        assert image is not None
        assert torch.equal(image, expected)
        assert image.stride() == expected.stride()


def test_the_first_rows_that_fit_are_kept(index: Index) -> None:
    rows = np.array([7, 3, 11])
    size = int(3 * index.width[7] * index.height[7])
    for limit, kept in ((size - 1, 0), (size + 8, 1), (3 * size, 2), (10**6, 3)):
        cache = DecodedCache(index, rows, limit)
        for row in range(len(index)):
            cache.put(row, decode(index, row))
        assert cache.num_images == kept
        assert [row for row in range(len(index)) if cache.get(row) is not None] == sorted(
            rows[:kept].tolist()
        )


def test_incomplete_or_resized_entries_are_not_returned(index: Index) -> None:
    cache = DecodedCache(index, np.arange(len(index)), 10**6)
    cache.put(1, decode(index, 1))
    cache._pixels[int(cache._place[1]) + 100] ^= 1
    assert cache.get(1) is None
    cache.put(2, decode(index, 2)[:, 1:])
    assert cache.get(2) is None
    black = torch.zeros_like(decode(index, 3))
    cache.put(3, black)
    assert torch.equal(cache.get(3), black)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bits(index: Index, workers: int) -> None:
    for limit_mb in (1, 0):
        cached = train_loader(
            index,
            plan_of(index, BALANCED),
            STANDARD,
            seed=0,
            topology=Topology(),
            start_step=0,
            end_step=8,
            workers=workers,
            prefetch=2,
            decoded_cache_mb=limit_mb,
        )
        assert (cached.dataset.decoded is not None) is (limit_mb > 0)
        for _ in range(2):
            assert_same(cached, load(index, config=BALANCED))


def test_an_image_is_decoded_once_by_all_loader_workers(index: Index) -> None:
    cache = DecodedCache(index, np.arange(len(index)), 10**6)
    first = ShardDataset(index, STANDARD, 0, cache)
    request = BatchRequest(0, 0, np.arange(8))
    expected = first[request]
    assert isinstance(expected, batches.Batch)

    def fail(*arguments: Any) -> bytes:
        raise AssertionError("read again")

    second = ShardDataset(index, STANDARD, 0, cache)
    second._reader.read = fail  # type: ignore[method-assign]
    again = second[request]
    assert isinstance(again, batches.Batch)
    assert torch.equal(again.images, expected.images)


class Spoiling:
    """A transform that writes into its image."""

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        view = image[:, :16, :16].float()
        image.zero_()
        return view

    def evaluation(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :16, :16].float()


def test_in_place_transform_does_not_change_the_cache(index: Index, tmp_path: Path) -> None:
    dataset = ShardDataset(index, Spoiling(), 0, DecodedCache(index, np.arange(len(index)), 10**6))
    request = BatchRequest(0, 0, np.arange(8))
    views = [dataset[request].images for _ in range(3)]  # type: ignore[union-attr]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
    assert views[0].any()
