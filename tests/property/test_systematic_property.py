"""Systematic batches over wide grids: what every batch and every problem must hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_dist.data.systematic import (
    PlanState,
    SystematicPlan,
    draw_representatives,
    state_at,
    systematic_batches,
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[SystematicPlan, int]:
    """Return a plan and the number of representatives of a class."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    labels = np.repeat(np.arange(len(sizes)) * 3 + 5, sizes)
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    order = generator.permutation(len(labels))
    plan = SystematicPlan(
        rows=generator.choice(1000, size=len(labels), replace=False),
        labels=labels[order],
        seed=draw(st.integers(0, 2**40)),
        classes_per_batch=draw(st.integers(2, len(sizes))),
        samples_per_class=draw(st.integers(2, 5)),
    )
    return plan, draw(st.integers(1, 4))


def make_state(plan: SystematicPlan, number: int, problem: int = 0, first: int = 0) -> PlanState:
    drawn = draw_representatives(
        plan.rows, plan.labels, seed=plan.seed, problem=problem, number=number
    )
    return PlanState(problem, first, drawn)


def make_neighbors(plan: SystematicPlan, number: int) -> np.ndarray:
    """Return neighbours on a ring: class c is next to c + 1, c + 2, ..."""
    classes = np.arange(plan.num_classes)
    return (classes[:, None] + 1 + np.arange(min(number, plan.num_classes - 1))) % plan.num_classes


@settings(max_examples=150, deadline=None)
@given(plans())
def test_batches_hold_classes_with_their_representatives(drawn: tuple[SystematicPlan, int]) -> None:
    plan, number = drawn
    state = make_state(plan, number)
    class_of = dict(zip(plan.rows.tolist(), plan.class_of_row.tolist(), strict=True))
    for batch in islice(plan.batches(state), 30):
        classes = np.array([class_of[row] for row in batch.rows.tolist()])
        classes = classes.reshape(plan.classes_per_batch, plan.samples_per_class)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == plan.classes_per_batch
        held = batch.is_representative.reshape(classes.shape)
        for row_of_class, mask, label in zip(
            batch.rows.reshape(classes.shape), held, classes[:, 0], strict=True
        ):
            own = set(state.representatives[label].tolist())
            assert {row in own for row in row_of_class[mask].tolist()} == {True}
            assert not own & set(row_of_class[~mask].tolist())
            alone = set(plan.rows[plan.class_of_row == label].tolist()) <= own
            expected = min(number, plan.samples_per_class - 1)
            assert mask.sum() == (plan.samples_per_class if alone else expected)


@settings(max_examples=50, deadline=None)
@given(plans())
def test_batches_without_representatives_hold_every_image(
    drawn: tuple[SystematicPlan, int],
) -> None:
    """Rows of a table leave batches as they are; missing ones are no images."""
    plan, number = drawn
    plan = replace(plan, holds_representatives=False)
    missing = draw_representatives(
        plan.rows, plan.labels, seed=plan.seed, problem=0, number=number, repeats=False
    )
    present = missing >= 0
    assert (present.sum(axis=1) == np.minimum(plan.class_sizes, number)).all()
    assert len(np.unique(missing[present])) == present.sum()
    state = make_state(plan, number)
    assert (state.representatives[present] == missing[present]).all()
    batches = list(islice(plan.batches(PlanState(0, 0, missing)), 60))
    rows = np.concatenate([batch.rows for batch in batches])
    visits = 60 * plan.classes_per_batch // plan.num_classes
    if visits * plan.samples_per_class >= plan.class_sizes.max():
        assert set(rows.tolist()) == set(plan.rows.tolist())
    assert not any(batch.is_representative.any() for batch in batches)


@settings(max_examples=80, deadline=None)
@given(plans())
def test_classes_take_turns_and_rows_are_all_used(drawn: tuple[SystematicPlan, int]) -> None:
    plan, number = drawn
    state = make_state(plan, number)
    num_batches = 40
    batches = list(islice(plan.batches(state), num_batches))
    rows = np.concatenate([batch.rows for batch in batches])
    class_of = dict(zip(plan.rows.tolist(), plan.class_of_row.tolist(), strict=True))
    visits = (
        np.bincount([class_of[row] for row in rows.tolist()], minlength=plan.num_classes)
        // plan.samples_per_class
    )
    assert visits.max() - visits.min() <= 2  # A class that was passed comes one batch later.
    others = rows[~np.concatenate([batch.is_representative for batch in batches])]
    for label in range(plan.num_classes):
        own = set(state.representatives[label].tolist())
        pool = set(plan.rows[plan.class_of_row == label].tolist()) - own
        if not pool:
            continue
        seen = [row for row in others.tolist() if class_of[row] == label]
        for low in range(0, len(seen) - len(pool) + 1, len(pool)):
            assert set(seen[low : low + len(pool)]) == pool


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 4))
def test_seeds_bring_their_nearest_classes(drawn: tuple[SystematicPlan, int], h: int) -> None:
    plan, number = drawn
    drawn_rows = make_state(plan, number).representatives
    neighbors = make_neighbors(plan, h)
    state = PlanState(0, 0, drawn_rows, neighbors)
    class_of = dict(zip(plan.rows.tolist(), plan.class_of_row.tolist(), strict=True))
    seen: set[int] = set()
    for batch in islice(plan.batches(state), 40):
        classes = [class_of[row] for row in batch.rows[:: plan.samples_per_class].tolist()]
        assert len(set(classes)) == plan.classes_per_batch
        seen |= set(classes)
        expected, rest = [], list(classes)
        while len(expected) < plan.classes_per_batch:
            seed_class = rest[0]
            expected.append(seed_class)
            for neighbor in neighbors[seed_class].tolist():
                if neighbor not in expected and len(expected) < plan.classes_per_batch:
                    expected.append(neighbor)
            rest = [label for label in classes if label not in expected]
            if not rest:
                break
        assert classes == expected
    assert seen == set(range(plan.num_classes))


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(0, 20), st.lists(st.integers(1, 9), max_size=3))
def test_resumed_at_any_step(
    drawn: tuple[SystematicPlan, int], start: int, lengths: list[int]
) -> None:
    plan, number = drawn
    first_steps = np.cumsum([0, *lengths]).tolist()
    states = [make_state(plan, number, k, first) for k, first in enumerate(first_steps)]
    whole = list(systematic_batches(plan, states, 0, 25))
    resumed = list(systematic_batches(plan, states, start, 25))
    assert [step for step, _ in whole] == list(range(25))
    for (step, one), (again, two) in zip(whole[start:], resumed, strict=True):
        assert step == again
        assert np.array_equal(one.rows, two.rows)


def test_orders_of_classes_and_rows_differ_between_states_and_seeds() -> None:
    """Even where the representatives are the same, as after a search for near classes."""
    labels = np.repeat(np.arange(12), 8)
    classes: list[list[int]] = []
    others: list[list[list[int]]] = []
    for seed, first in ((3, 0), (3, 7), (4, 0)):
        plan = SystematicPlan(np.arange(96), labels, seed, 6, 2)
        state = PlanState(0, first, np.arange(0, 96, 8)[:, None])
        rows = np.concatenate([batch.rows for batch in islice(plan.batches(state), 20)])
        classes.append((rows[::2] // 8).tolist())
        others.append([[row for row in rows[1::2] if row // 8 == c][:7] for c in range(12)])
    for other in (1, 2):
        assert classes[0] != classes[other]
        # Of 7! orders, two of 12 classes would hardly be equal by chance.
        assert sum(a != b for a, b in zip(others[0], others[other], strict=True)) >= 11


def test_a_state_that_is_appended_is_taken_up() -> None:
    labels = np.repeat(np.arange(8), 6)
    plan = SystematicPlan(np.arange(48), labels, 3, 4, 3)
    states = [make_state(plan, 1)]
    batches = systematic_batches(plan, states, 0, 20)
    seen = [next(batches) for _ in range(5)]
    states.append(make_state(plan, 1, problem=1, first=8))
    seen += list(batches)
    for step, batch in seen:
        own = states[0 if step < 8 else 1].representatives
        assert set(batch.rows[batch.is_representative].tolist()) <= set(own.ravel().tolist())
    assert not np.array_equal(states[0].representatives, states[1].representatives)


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 5))
def test_representatives(drawn: tuple[SystematicPlan, int], problem: int) -> None:
    plan, number = drawn
    found = draw_representatives(
        plan.rows, plan.labels, seed=plan.seed, problem=problem, number=number
    )
    assert found.shape == (plan.num_classes, number)
    for label, rows in enumerate(found.tolist()):
        own = set(plan.rows[plan.class_of_row == label].tolist())
        assert set(rows) <= own
        assert len(set(rows)) == min(number, len(own))


def test_representatives_are_drawn_evenly() -> None:
    rows, labels = np.arange(40), np.repeat(np.arange(10), 4)
    counts = np.zeros(40, dtype=int)
    for problem in range(400):
        counts[draw_representatives(rows, labels, seed=0, problem=problem, number=1)] += 1
    # 400 draws of a quarter each: 100 expected, standard deviation 8.7.
    assert counts.min() > 60
    assert counts.max() < 140


def test_states_follow_each_other() -> None:
    states = [
        PlanState(k, first, np.zeros((2, 1), dtype=np.int64)) for k, first in [(0, 2), (1, 5)]
    ]
    assert [state_at(states, step).problem for step in (2, 4, 5, 9)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="no state begins at step 1 or before"):
        state_at(states, 1)
