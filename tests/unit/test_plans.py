"""Batch plans: dependence on seed and epoch, sizes of real data sets, fixed values, refusals."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from dml_dist.config.data import BalancedBatchesConfig, BatchesConfig, ShuffledBatchesConfig
from dml_dist.data.plans import BatchPlan, build_plan
from dml_dist.errors import ConfigError, TopologyError

SHUFFLED = ShuffledBatchesConfig(window=2)
BALANCED = BalancedBatchesConfig(classes_per_batch=4, samples_per_class=3)


def plan_of(config: BatchesConfig, num_rows: int = 100, **changes: Any) -> BatchPlan:
    rows = np.arange(num_rows)
    arguments = {
        "rows": rows,
        "labels": rows % 10,
        "tar_shard": rows // 10,
        "seed": 0,
        "global_batch_size": 12,
        "world_size": 1,
        **changes,
    }
    return build_plan(config, **arguments)


def flat(batches: list[np.ndarray]) -> list[int]:
    return np.concatenate(batches).tolist()


@pytest.mark.parametrize("config", [SHUFFLED, BALANCED])
def test_an_epoch_is_a_function_of_seed_and_epoch(config: BatchesConfig) -> None:
    plan = plan_of(config)
    assert flat(plan.epoch(3)) == flat(plan.epoch(3)) == flat(plan_of(config).epoch(3))
    assert flat(plan.epoch(3)) != flat(plan.epoch(4))
    # The product of seed and epoch would give the same streams here.
    assert flat(plan_of(config, seed=2).epoch(3)) != flat(plan_of(config, seed=3).epoch(2))
    assert flat(plan_of(config, seed=0).epoch(1)) != flat(plan_of(config, seed=0).epoch(2))


def test_the_meaning_of_a_seed_does_not_change() -> None:
    assert flat(plan_of(SHUFFLED).epoch(1))[:8] == [69, 60, 10, 19, 15, 63, 61, 16]
    assert flat(plan_of(BALANCED).epoch(1))[:8] == [6, 46, 86, 92, 42, 82, 48, 8]


def test_dropped_rows_differ_between_epochs() -> None:
    plan = plan_of(SHUFFLED)
    dropped = [frozenset(range(100)) - frozenset(flat(plan.epoch(epoch))) for epoch in range(20)]
    assert all(len(rows) == 100 % 12 for rows in dropped)
    assert len(frozenset().union(*dropped)) > 30


def test_shuffling_leaves_no_order_behind() -> None:
    """A row's place in an epoch is uniform: its mean over many epochs is the middle."""
    plan = plan_of(ShuffledBatchesConfig(window=3), global_batch_size=10)
    places = np.empty((400, 100))
    for epoch in range(400):
        places[epoch, flat(plan.epoch(epoch))] = np.arange(100)
    deviation = np.abs(places.mean(axis=0) - 49.5) / (100 / np.sqrt(12 * 400))
    assert deviation.max() < 4.5


def test_sizes_of_a_real_data_set_take_a_fraction_of_a_second() -> None:
    generator = np.random.default_rng(0)
    classes = 11_318
    extra = generator.integers(0, classes, 59_551 - 2 * classes)
    labels = np.concatenate([np.arange(classes), np.arange(classes), extra])
    plan = plan_of(
        BalancedBatchesConfig(classes_per_batch=64, samples_per_class=2),
        59_551,
        labels=labels,
        global_batch_size=128,
    )
    start = time.process_time()
    batches = np.stack(plan.epoch(0))
    assert time.process_time() - start < 0.5  # It takes 0.02 s.
    assert batches.shape == (59_551 // 128, 128)
    in_batch = np.sort(labels[batches[:, ::2]], axis=1)
    assert (np.diff(in_batch, axis=1) > 0).all()
    assert (labels[batches[:, ::2]] == labels[batches[:, 1::2]]).all()
    assert plan.coverage(0) > 0.8


def test_a_class_smaller_than_k_repeats_inside_the_batch() -> None:
    labels = np.array([0, 1, 1, *([2] * 9)])
    plan = plan_of(
        BalancedBatchesConfig(classes_per_batch=3, samples_per_class=4), 12, labels=labels
    )
    (batch,) = plan.epoch(0)
    of_class = {label: batch[labels[batch] == label].tolist() for label in range(3)}
    assert of_class[0] == [0] * 4
    assert sorted(of_class[1]) == [1, 1, 2, 2]
    assert len(set(of_class[2])) == 4


def test_the_rows_of_a_class_are_used_up_before_one_repeats() -> None:
    plan = plan_of(
        BalancedBatchesConfig(classes_per_batch=5, samples_per_class=2), global_batch_size=10
    )
    assert plan.coverage(0) == 1.0
    assert sorted(flat(plan.epoch(0))) == list(range(100))


@pytest.mark.parametrize(
    ("config", "changes", "error", "words"),
    [
        (SHUFFLED, {"world_size": 13}, TopologyError, ["global_batch_size 12", "13"]),
        (SHUFFLED, {"num_rows": 5}, ConfigError, ["batch_size 12", "there are 5 training images"]),
        (
            ShuffledBatchesConfig(last="keep"),
            {"world_size": 5},
            TopologyError,
            ["at least 5 images", "100 training images", "leave 4", "drop"],
        ),
        (
            BALANCED,
            {"labels": np.arange(100) % 3},
            ConfigError,
            ["classes_per_batch 4", "there are 3"],
        ),
        (BALANCED, {"global_batch_size": 16}, ConfigError, ["4 x", "3 = 12", "16"]),
    ],
)
def test_impossible_plans_are_refused_with_the_numbers(
    config: BatchesConfig, changes: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        plan_of(config, **changes)
    for word in words:
        assert word in str(caught.value)


def test_arrays_of_different_length_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="100 rows, 3 labels"):
        plan_of(SHUFFLED, labels=np.arange(3))
