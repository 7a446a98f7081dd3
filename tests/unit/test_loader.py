"""Loaders: the same bits for any number of loader workers and ranks, and clean ends on faults."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dml_dist.config.data import (
    BalancedBatchesConfig,
    BatchesConfig,
    ShuffledBatchesConfig,
    StandardTransformConfig,
)
from dml_dist.data import loader as loader_module
from dml_dist.data.batches import PlanSampler, ShardDataset
from dml_dist.data.decode import decode_image
from dml_dist.data.index import Index
from dml_dist.data.loader import Batch, BatchLoader, evaluation_loader, train_loader, worker_death
from dml_dist.data.plans import BatchPlan, build_plan
from dml_dist.data.reader import ShardReader
from dml_dist.data.transforms import Transform, build_transform
from dml_dist.errors import ConfigError, DataError, RunError
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


def test_another_seed_gives_other_views(index: Index) -> None:
    images = [
        ShardDataset(index, STANDARD, seed)[
            next(iter(PlanSampler(plan_of(index), Topology(), start_step=0, end_step=1)))
        ].images  # type: ignore[union-attr]
        for seed in (0, 1)
    ]
    assert not torch.equal(*images)


def test_the_global_generator_of_torch_is_left_alone(index: Index) -> None:
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


# ---------------------------------------------------------------- faults


class Act:
    """A transform that does something when a training step's image comes in a loader worker."""

    def __init__(self, action: Callable[[], Any], *, after: int) -> None:
        self.action = action
        self.after = after
        self.count = 0

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        self.count += 1
        if self.count > self.after:
            self.action()
        return torch.full((3, 2, 2), float(torch.get_num_threads()))

    def evaluation(self, image: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, 2, 2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after loader workers often, and wait a short time for them to end."""
    monkeypatch.setattr(loader_module, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)


def assert_no_children() -> None:
    """Loader workers end at once, without waiting for a garbage collection."""
    deadline = time.monotonic() + 10.0
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_ends_training_with_its_name(tmp_path: Path, workers: int) -> None:
    index = make_index(tmp_path)
    plan = plan_of(index)
    row = int(plan.epoch(0)[2][5])
    path = index.root / index.tar_shards[index.tar_shard[row]]
    with open(path, "r+b") as file:
        file.seek(int(index.offset[row]))
        file.write(b"\0\0\0\0")
    with pytest.raises(DataError) as direct:
        ShardReader(index).read(row)
    batches = iter(load(index, workers=workers))
    assert [next(batches).step, next(batches).step] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == str(direct.value)
    assert "Traceback" not in str(caught.value)
    assert f"'image-{row}' of {path}" in str(caught.value)
    assert_no_children()


def killed(index: Index) -> Exception:
    """Load with a loader worker that dies in its third batch; return the error that comes of it."""
    transform = Act(lambda: os.kill(os.getpid(), signal.SIGKILL), after=2 * BATCH)
    with pytest.raises(RunError) as caught:
        list(load(index, transform=transform, workers=1))
    return caught.value


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_killed_loader_worker_ends_the_run(index: Index, in_thread: bool) -> None:
    """Ray calls the training function in a thread."""
    handler = signal.getsignal(signal.SIGCHLD)
    errors: list[Exception] = []
    if in_thread:
        thread = threading.Thread(target=lambda: errors.append(killed(index)), daemon=True)
        thread.start()
        thread.join(60.0)
    else:
        errors.append(killed(index))
    assert "one died" in str(errors[0])
    assert "data.loader_workers" in str(errors[0])
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert_no_children()


@pytest.mark.parametrize(
    ("error", "dead"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (RuntimeError("CUDA out of memory"), False),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
    ],
)
def test_errors_that_mean_a_dead_loader_worker_are_known(error: Exception, dead: bool) -> None:
    assert isinstance(worker_death(error), RunError) == dead


@pytest.mark.usefixtures("impatient")
def test_a_loader_worker_that_stays_ends_the_run(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "LIMIT_SECONDS", 1.0)
    transform = Act(lambda: time.sleep(600), after=0)
    with pytest.raises(RunError, match=r"within 1 s, got none from 1 loader workers"):
        list(load(index, transform=transform, workers=1))
    assert_no_children()


@pytest.mark.usefixtures("impatient")
def test_a_slow_batch_is_waited_for(index: Index) -> None:
    transform = Act(lambda: time.sleep(0.05), after=BATCH)
    assert len(list(load(index, transform=transform, workers=1, end=2))) == 2


def raise_timeout() -> None:
    raise RuntimeError("the transform's own server timed out")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_custom_transform_is_passed_on(index: Index, workers: int) -> None:
    transform = Act(raise_timeout, after=BATCH)
    with pytest.raises(RuntimeError, match="own server timed out") as caught:
        list(load(index, transform=transform, workers=workers))
    assert "in raise_timeout" in "".join(traceback.format_exception(caught.value))
    assert_no_children()


class Uneven:
    """A transform that forgets to make images equal."""

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        return image.float()

    def evaluation(self, image: torch.Tensor) -> torch.Tensor:
        return image


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_different_shape_are_refused(index: Index, workers: int) -> None:
    with pytest.raises(ConfigError, match=r"one shape.*image-\d+.*image-\d+"):
        list(load(index, transform=Uneven(), workers=workers))


def test_loader_workers_use_one_thread(index: Index) -> None:
    torch.set_num_threads(2)
    transform = Act(lambda: None, after=0)
    for batch in load(index, transform=transform, workers=2, end=2):
        assert (batch.images == 1.0).all()


def test_an_abandoned_loader_leaves_no_process(index: Index) -> None:
    batches = iter(load(index, workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert_no_children()


def test_datasets_can_be_pickled(index: Index) -> None:
    """Where there is no fork, loader workers receive the data set as a pickle."""
    dataset = ShardDataset(index, STANDARD, seed=0)
    request = next(iter(PlanSampler(plan_of(index), Topology(), start_step=0, end_step=1)))
    batch = dataset[request]
    again = pickle.loads(pickle.dumps(dataset))[request]
    assert isinstance(batch, Batch)
    assert_same([batch], [again])
