"""Loaders: the same bits for any number of loader workers and ranks, and clean ends on faults."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from dml_dist.config.data import (
    BalancedBatchesConfig,
    BatchesConfig,
    ShuffledBatchesConfig,
    StandardTransformConfig,
)
from dml_dist.data.batches import PlanSampler, ShardDataset
from dml_dist.data.decode import decode_image
from dml_dist.data.index import Index
from dml_dist.data.loader import Batch, BatchLoader, evaluation_loader, train_loader
from dml_dist.data.plans import BatchPlan, build_plan
from dml_dist.data.reader import ShardReader
from dml_dist.data.transforms import Transform, build_transform
from dml_dist.topology import Topology
from tests.unit.tiny_shards import make_index

SHUFFLED = ShuffledBatchesConfig(window=2)
BALANCED = BalancedBatchesConfig(classes_per_batch=4, samples_per_class=2)
STANDARD = build_transform(StandardTransformConfig(size=16))
BATCH = 8


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("shards"))


def plan_of(index: Index, config: BatchesConfig = SHUFFLED) -> BatchPlan:
    rows = index.rows("train")
    return build_plan(
        config,
        rows=rows,
        labels=index.label[rows],
        tar_shard=index.tar_shard[rows],
        seed=0,
        global_batch_size=BATCH,
        world_size=1,
    )


def load(
    index: Index,
    *,
    config: BatchesConfig = SHUFFLED,
    transform: Transform = STANDARD,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    end: int = 8,
    workers: int = 0,
) -> BatchLoader:
    return train_loader(
        index,
        plan_of(index, config),
        transform,
        seed=0,
        topology=Topology(rank=rank, world_size=world_size),
        start_step=start,
        end_step=end,
        workers=workers,
        prefetch=2,
    )


def assert_same(left: Iterable[Batch], right: Iterable[Batch]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.step == b.step
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)
        assert a.images.stride() == b.images.stride()


def test_a_batch_holds_what_the_plan_asks_for(index: Index) -> None:
    plan = plan_of(index)
    batches = list(load(index, end=7))
    assert [batch.step for batch in batches] == list(range(7))
    assert plan.steps_per_epoch == 3
    for batch in batches:
        rows = plan.epoch(batch.step // 3)[batch.step % 3]
        assert batch.rows.tolist() == rows.tolist()
        assert batch.labels.tolist() == index.label[rows].tolist()
        assert batch.images.shape == (BATCH, 3, 16, 16)
        assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("config", [SHUFFLED, BALANCED])
def test_loader_workers_and_ranks_do_not_change_a_bit(index: Index, config: BatchesConfig) -> None:
    reference = list(load(index, config=config))
    for workers in (1, 3):
        assert_same(load(index, config=config, workers=workers), reference)
    for world_size in (2, 3, 8):
        ranks = [
            list(load(index, config=config, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        together = [
            Batch(
                torch.cat([part.images for part in parts]),
                torch.cat([part.labels for part in parts]),
                torch.cat([part.rows for part in parts]),
                parts[0].step,
            )
            for parts in zip(*ranks, strict=True)
        ]
        assert_same(together, reference)


def test_a_resumed_loader_gives_the_tail(index: Index) -> None:
    reference = list(load(index))
    for start in (1, 4, 8):
        resumed = load(index, start=start, workers=1)
        assert len(resumed) == 8 - start
        assert_same(resumed, reference[start:])


def test_a_row_drawn_twice_gets_a_fresh_view(index: Index) -> None:
    config = BalancedBatchesConfig(classes_per_batch=1 + 1, samples_per_class=4)
    plan = build_plan(
        config,
        rows=np.arange(8),
        labels=np.array([0, 0, 0, 0, 0, 0, 0, 1]),
        tar_shard=np.zeros(8),
        seed=0,
        global_batch_size=8,
        world_size=1,
    )
    (batch,) = train_loader(
        index,
        plan,
        STANDARD,
        seed=0,
        topology=Topology(),
        start_step=0,
        end_step=1,
        workers=0,
        prefetch=1,
    )
    views = batch.images[batch.rows == 7]
    assert len(views) == 4
    assert len({view.numpy().tobytes() for view in views}) == 4


class OneImage:
    """A plan that asks for the same image at every position of every step."""

    steps_per_epoch = 2

    def epoch(self, epoch: int) -> list[np.ndarray]:
        return [np.full(3, 7), np.full(3, 7)]

    def coverage(self, epoch: int) -> float:
        return 0.0


class DrawnNumber:
    """A custom transform whose training view is a number that it draws."""

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        return torch.full((3, 1, 1), generator.random(), dtype=torch.float32)

    def evaluation(self, image: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, 1, 1)


@pytest.mark.parametrize("transform", [STANDARD, DrawnNumber()], ids=["standard", "custom"])
def test_views_differ_between_steps_and_positions(index: Index, transform: Transform) -> None:
    """Two epochs of two steps, on one rank and on three: 12 views of one image, all different."""
    views = {}
    for world_size in (1, 3):
        views[world_size] = [
            (batch.step, view.numpy().tobytes())
            for rank in range(world_size)
            for batch in train_loader(
                index,
                OneImage(),
                transform,
                seed=0,
                topology=Topology(rank=rank, world_size=world_size),
                start_step=0,
                end_step=4,
                workers=0,
                prefetch=1,
            )
            for view in batch.images
        ]
        assert len(views[world_size]) == 12
        assert len({view for _, view in views[world_size]}) == 12
    assert sorted(views[1]) == sorted(views[3])


def test_another_seed_gives_other_views(index: Index) -> None:
    images = [
        ShardDataset(index, STANDARD, seed)[
            next(iter(PlanSampler(plan_of(index), Topology(), start_step=0, end_step=1)))
        ].images  # type: ignore[union-attr]
        for seed in (0, 1)
    ]
    assert not torch.equal(*images)


def test_global_torch_generator_is_unchanged(index: Index) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(load(index, end=2, workers=workers))
        list(load(index, end=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


class CountingPlan:
    """A plan that notes which epochs were computed."""

    steps_per_epoch = 3

    def __init__(self) -> None:
        self.computed: list[int] = []

    def epoch(self, epoch: int) -> list[np.ndarray]:
        self.computed.append(epoch)
        return [np.arange(4) + 4 * step for step in range(3)]

    def coverage(self, epoch: int) -> float:
        return 1.0


def test_epochs_are_computed_one_at_a_time_when_they_are_reached() -> None:
    plan = CountingPlan()
    requests = iter(PlanSampler(plan, Topology(rank=1, world_size=2), start_step=4, end_step=9))
    assert plan.computed == []
    first = next(requests)
    assert plan.computed == [1]
    assert (first.step, first.first_position, first.rows.tolist()) == (4, 2, [6, 7])
    next(requests)
    assert plan.computed == [1]
    assert len(list(requests)) == 3
    assert plan.computed == [1, 2]


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_reads_every_row_once_in_whole_batches(
    index: Index, world_size: int, workers: int
) -> None:
    rows = index.rows("train")[::-1][:23].copy()
    parts = [
        list(
            evaluation_loader(
                index,
                rows,
                STANDARD,
                batch_size=5,
                topology=Topology(rank=rank, world_size=world_size),
                workers=workers if rank == 0 else 0,
                prefetch=2,
            )
        )
        for rank in range(world_size)
    ]
    batches = [batch for part in parts for batch in part]
    assert [batch.step for batch in batches] == list(range(5))
    assert [len(batch.rows) for batch in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([batch.rows for batch in batches]).tolist() == rows.tolist()
    reader = ShardReader(index)
    for batch in batches:
        assert batch.labels.tolist() == index.label[batch.rows.numpy()].tolist()
        for row, image in zip(batch.rows.tolist(), batch.images, strict=True):
            assert torch.equal(image, STANDARD.evaluation(decode_image(reader.read(row), "")))


def test_evaluation_of_nothing_gives_nothing(index: Index) -> None:
    empty = evaluation_loader(
        index,
        np.arange(0),
        STANDARD,
        batch_size=5,
        topology=Topology(),
        workers=2,
        prefetch=2,
    )
    assert len(empty) == 0
    assert list(empty) == []
