"""Batch plans over wide grids of sizes: exact epochs, balance, independence of the ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_dist.config.data import BalancedBatchesConfig, ShuffledBatchesConfig
from dml_dist.data.plans import (
    BatchPlan,
    build_plan,
    evaluation_batches,
    locate,
    rank_positions,
)
from dml_dist.errors import ConfigError, DmlDistError, TopologyError
from dml_dist.partition import all_bounds
from tests.oracles_plans import check_balanced_epoch, windows_of

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)
WORLD_SIZES = (1, 2, 3, 4, 8)


@st.composite
def tables(draw: st.DrawFn, *, max_classes: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw index rows with gaps, their labels with gaps, and their tar shards."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=max_classes))
    generator = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = generator.permutation(np.repeat(7 * np.arange(len(sizes)) + 3, sizes))
    num_rows = len(labels)
    rows = np.sort(generator.choice(3 * num_rows, num_rows, replace=False)).astype(np.int64)
    tar_shard = np.sort(generator.integers(0, draw(st.integers(1, 10)), num_rows))
    return rows, labels, tar_shard


def parts(plan: BatchPlan, epoch: int, world_size: int) -> list[np.ndarray]:
    """Return the global batches put together again from every rank's part."""
    return [
        np.concatenate(
            [
                batch[slice(*rank_positions(len(batch), world_size, rank))]
                for rank in range(world_size)
            ]
        )
        for batch in plan.epoch(epoch)
    ]


@given(
    table=tables(),
    batch=st.integers(2, 20),
    window=st.integers(1, 5),
    last=st.sampled_from(["keep", "drop"]),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 5),
)
@SETTINGS
def test_a_shuffled_epoch_reads_every_row_once_window_by_window(
    table: tuple[np.ndarray, np.ndarray, np.ndarray],
    batch: int,
    window: int,
    last: str,
    seed: int,
    epoch: int,
) -> None:
    rows, labels, tar_shard = table
    config = ShuffledBatchesConfig(window=window, last=last)

    def plan_for(world_size: int) -> BatchPlan:
        return build_plan(
            config,
            rows=rows,
            labels=labels,
            tar_shard=tar_shard,
            seed=seed,
            global_batch_size=batch,
            world_size=world_size,
        )

    if len(rows) < batch:
        with pytest.raises(ConfigError, match=f"{batch}.*{len(rows)}"):
            plan_for(1)
        return
    plan = plan_for(1)
    batches = plan.epoch(epoch)
    assert len(batches) == plan.steps_per_epoch
    whole, rest = divmod(len(rows), batch)
    sizes = [batch] * whole + ([rest] if rest and last == "keep" else [])
    assert [len(part) for part in batches] == sizes
    order = np.concatenate(batches)
    assert order.dtype == np.int64
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(rows.tolist())
    assert plan.coverage(epoch) == len(order) / len(rows)
    if last == "keep":
        assert sorted(order.tolist()) == rows.tolist()
        runs = windows_of(order, dict(zip(rows.tolist(), tar_shard.tolist(), strict=True)))
        # A window may look like several when its tar shards happen to be shuffled apart.
        assert max(len(run) for run in runs) <= window
    for world_size in WORLD_SIZES:
        if batch < world_size or (last == "keep" and 0 < rest < world_size):
            with pytest.raises(TopologyError, match=str(world_size)):
                plan_for(world_size)
            continue
        again = parts(plan_for(world_size), epoch, world_size)
        assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@given(
    table=tables(),
    num_classes=st.integers(2, 12),
    num_samples=st.integers(1, 6),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 5),
)
@SETTINGS
def test_a_balanced_epoch_visits_classes_and_rows_evenly(
    table: tuple[np.ndarray, np.ndarray, np.ndarray],
    num_classes: int,
    num_samples: int,
    seed: int,
    epoch: int,
) -> None:
    rows, labels, tar_shard = table
    config = BalancedBatchesConfig(classes_per_batch=num_classes, samples_per_class=num_samples)
    batch = num_classes * num_samples

    def plan_for(world_size: int) -> BatchPlan:
        return build_plan(
            config,
            rows=rows,
            labels=labels,
            tar_shard=tar_shard,
            seed=seed,
            global_batch_size=batch,
            world_size=world_size,
        )

    if len(rows) < batch or len(np.unique(labels)) < num_classes:
        with pytest.raises(ConfigError, match=r"\d"):
            plan_for(1)
        return
    plan = plan_for(1)
    batches = plan.epoch(epoch)
    assert len(batches) == plan.steps_per_epoch == len(rows) // batch
    label_of = dict(zip(rows.tolist(), labels.tolist(), strict=True))
    check_balanced_epoch(batches, label_of, num_classes, num_samples)
    seen = {row for part in batches for row in part.tolist()}
    assert plan.coverage(epoch) == len(seen) / len(rows)
    for world_size in (size for size in WORLD_SIZES if size <= batch):
        again = parts(plan_for(world_size), epoch, world_size)
        assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@given(rows=st.integers(0, 200), batch=st.integers(1, 60), world_size=st.sampled_from(WORLD_SIZES))
def test_evaluation_batches_cover_rows_once_in_order(
    rows: int, batch: int, world_size: int
) -> None:
    batches = evaluation_batches(rows, batch)
    assert [row for low, high in batches for row in range(low, high)] == list(range(rows))
    assert all(0 < high - low <= batch for low, high in batches)
    bounds = all_bounds(len(batches), world_size)
    assert [part for low, high in bounds for part in batches[low:high]] == batches


@given(step=st.integers(0, 10**9), steps_per_epoch=st.integers(1, 10**6))
@SETTINGS
def test_a_step_is_located_by_arithmetic(step: int, steps_per_epoch: int) -> None:
    epoch, place = locate(step, steps_per_epoch)
    assert epoch * steps_per_epoch + place == step
    assert 0 <= place < steps_per_epoch


@given(
    num_rows=st.integers(0, 40),
    num_classes=st.integers(1, 6),
    classes_per_batch=st.integers(2, 8),
    samples_per_class=st.integers(1, 5),
    difference=st.sampled_from([-1, 0, 0, 0, 5]),
    world_size=st.integers(1, 10),
)
@SETTINGS
def test_a_plan_that_is_built_can_be_read_and_others_are_refused(
    num_rows: int,
    num_classes: int,
    classes_per_batch: int,
    samples_per_class: int,
    difference: int,
    world_size: int,
) -> None:
    config = BalancedBatchesConfig(
        classes_per_batch=classes_per_batch, samples_per_class=samples_per_class
    )
    batch = difference + classes_per_batch * samples_per_class
    rows = np.arange(num_rows)
    labels = rows % num_classes

    def build() -> BatchPlan:
        return build_plan(
            config,
            rows=rows,
            labels=labels,
            tar_shard=rows // 7,
            seed=0,
            global_batch_size=batch,
            world_size=world_size,
        )

    possible = (
        batch == classes_per_batch * samples_per_class
        and world_size <= batch <= num_rows
        and len(np.unique(labels)) >= classes_per_batch
    )
    if possible:
        plan = build()
        assert [len(part) for part in plan.epoch(0)] == [batch] * (num_rows // batch)
    else:
        with pytest.raises(DmlDistError, match=r"\d"):
            build()
