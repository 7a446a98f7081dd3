"""Loaders on faults: damaged samples, dead and blocked loader workers, wrong transforms."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dml_dist.config.data import StandardTransformConfig
from dml_dist.data import loader as loader_module
from dml_dist.data.batches import PlanSampler, ShardDataset
from dml_dist.data.index import Index
from dml_dist.data.loader import Batch, worker_death
from dml_dist.data.reader import ShardReader
from dml_dist.data.transforms import StandardTransform
from dml_dist.errors import ConfigError, DataError, RunError
from dml_dist.topology import Topology
from tests.unit.test_loader import BATCH, STANDARD, assert_same, load, plan_of
from tests.unit.tiny_shards import make_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return make_index(tmp_path_factory.mktemp("shards"))


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
def test_blocked_loader_worker_ends_the_run(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "LIMIT_SECONDS", 1.0)
    transform = Act(lambda: time.sleep(600), after=0)
    with pytest.raises(RunError, match=r"The 1 loader workers returned no batch within 1 s"):
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


class Dark(StandardTransform):
    """A transform that changes what the standard one makes."""

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        return torch.zeros_like(super().train(image, generator))


def test_a_subclass_of_the_standard_transform_is_asked(index: Index) -> None:
    transform = Dark(StandardTransformConfig(size=8))
    for batch in load(index, transform=transform, workers=0, end=2):
        assert (batch.images == 0).all()
