"""How Ray Tune is asked and told, without a cluster."""

from __future__ import annotations

import json
import math
import pickle
import time
from typing import Any

import pytest

from dml_dist.config.launch import LaunchConfig
from dml_dist.errors import TopologyError
from dml_dist.orchestration import ray_tune
from dml_dist.orchestration.ray_tune import PRUNED, Outcome, Payload
from dml_dist.runtime.signals import StopRequest

FINISHED = "FINISHED"
"""Ray's `Searcher.FINISHED`; Ray must not be imported before `cluster` has set its environment."""


class Queue:
    """Trials 0, 1, ...; values below 0.5 are to be pruned."""

    def __init__(self, total: int) -> None:
        self.left = list(range(total))
        self.reports: list[tuple[int, int, float]] = []
        self.ends: list[tuple[int, Outcome | None]] = []
        self.restarts: list[tuple[int, int]] = []

    def next(self) -> tuple[int, Payload] | None:
        number = self.left.pop(0) if self.left else None
        return None if number is None else (number, {"rate": 0.1 * number})

    def restarted(self, number: int, starts: int) -> None:
        self.restarts.append((number, starts))

    def report(self, number: int, step: int, value: float) -> bool:
        self.reports.append((number, step, value))
        return value < 0.5

    def end(self, number: int, outcome: Outcome | None) -> None:
        self.ends.append((number, outcome))


class Board:
    """Stands for the actor's handle: `board.prune.remote(number)`."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.prune = self

    def remote(self, number: int) -> None:
        self.asked.append(number)


def searcher_of(
    queue: Queue, board: Any = None, stop: StopRequest | None = None, deadline: float = math.inf
) -> Any:
    return ray_tune._searcher(queue, board or Board(), stop or StopRequest(), deadline)


def test_searcher_asks_and_tells_the_queue() -> None:
    queue, board = Queue(2), Board()
    searcher = searcher_of(queue, board)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert (first["number"], json.loads(first["payload"])) == (0, {"rate": 0.0})
    assert (second["number"], json.loads(second["payload"])) == (1, {"rate": 0.1})
    assert searcher.suggest("c") == FINISHED

    searcher.on_trial_result("b", {"step": 10, "value": 0.75})
    searcher.on_trial_result("a", {"step": 10, "value": 0.25})
    searcher.on_trial_result("a", {"outcome": "{}"})  # The last report holds no value.
    assert queue.reports == [(1, 10, 0.75), (0, 10, 0.25)]
    assert board.asked == [0]

    searcher.on_trial_complete("b", {"outcome": json.dumps({"state": "complete"})})
    searcher.on_trial_complete("a", {"step": 10, "value": 0.25}, error=True)
    assert queue.ends == [(1, {"state": "complete"}), (0, None)]


def test_a_trial_without_an_outcome_has_died() -> None:
    queue = Queue(2)
    searcher = searcher_of(queue)
    for trial in ("a", "b"):
        searcher.suggest(trial)
    searcher.on_trial_complete("a", None)
    searcher.on_trial_complete("b", {"step": 4, "value": 1.0})
    assert queue.ends == [(0, None), (1, None)]


def test_a_process_that_died_is_told() -> None:
    queue = Queue(2)
    searcher = searcher_of(queue)
    for trial in ("a", "b"):
        searcher.suggest(trial)
        searcher.on_trial_result(trial, {"begun": True})
    searcher.on_trial_result("a", {"step": 1, "value": 1.0})
    assert queue.restarts == []
    searcher.on_trial_result("a", {"begun": True})
    searcher.on_trial_result("a", {"begun": True})
    assert queue.restarts == [(0, 2), (0, 3)]


def test_nothing_begins_after_a_stop_or_the_deadline() -> None:
    queue, stop = Queue(2), StopRequest()
    stop.reason = "SIGTERM"
    assert searcher_of(queue, stop=stop).suggest("a") == FINISHED
    assert searcher_of(queue, deadline=time.monotonic() - 1).suggest("a") == FINISHED
    assert queue.left == [0, 1]


def test_tune_saves_no_trials() -> None:
    # A queue holds a storage and locks, which cannot be pickled; Tune pickles its searcher.
    copy = pickle.loads(pickle.dumps(searcher_of(Queue(1))))
    assert type(copy).__name__ == "Searcher"


def test_a_pruned_trial_is_told_before_any_other_reason() -> None:
    board = ray_tune._StopBoard()
    assert board.reason(3) is None
    board.prune(3)
    assert (board.reason(3), board.reason(4)) == (PRUNED, None)
    board.stop_all("SIGTERM")
    assert (board.reason(3), board.reason(4)) == (PRUNED, "SIGTERM")


@pytest.mark.parametrize(
    ("launch", "parallel", "cluster", "expected"),
    [
        ({}, None, {"CPU": 4.0}, 4),
        ({}, 2, {"CPU": 4.0}, 2),
        ({"cpus_per_rank": 2.0}, None, {"CPU": 5.0}, 2),
        ({"launcher": "ray", "num_workers": 2}, None, {"CPU": 5.0}, 2),
        # Two times two ranks, but no room for what drives them.
        ({"launcher": "ray", "num_workers": 2}, None, {"CPU": 4.0}, 1),
        ({"launcher": "ray", "num_workers": 2}, None, {"CPU": 64.0, "GPU": 6.0}, 3),
        ({}, None, {"CPU": 64.0, "GPU": 8.0}, 8),
        # Asked for: processes share GPUs.
        ({}, 16, {"CPU": 64.0, "GPU": 8.0}, 16),
        ({"use_gpu": "no"}, None, {"CPU": 64.0, "GPU": 8.0}, 64),
    ],
)
def test_as_many_trials_as_the_cluster_holds(
    launch: dict[str, Any],
    parallel: int | None,
    cluster: dict[str, float],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: cluster)
    settings = LaunchConfig(address="head:6379", **launch)
    assert ray_tune._concurrency(settings, parallel) == expected


@pytest.mark.parametrize(
    ("launch", "parallel", "message"),
    [
        ({"launcher": "ray", "num_workers": 4}, None, "a trial of 4.01 CPUs cannot be placed"),
        ({}, 5, "5 trials at a time of 1 CPUs each cannot be placed"),
    ],
)
def test_trials_that_the_cluster_cannot_hold(
    launch: dict[str, Any], parallel: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(TopologyError, match="4 CPUs and 0 GPUs") as caught:
        ray_tune._concurrency(LaunchConfig(address="head:6379", **launch), parallel)
    assert message in str(caught.value)


def test_a_cluster_on_this_machine_holds_all_trials() -> None:
    launch = LaunchConfig(launcher="ray", num_workers=2)
    local = ray_tune._local_cluster(launch, 3)
    assert local.num_workers * local.cpus_per_rank >= 3 * 2 + 0.03
    joined = LaunchConfig(launcher="ray", num_workers=2, address="head:6379")
    assert ray_tune._local_cluster(joined, 3) is joined
