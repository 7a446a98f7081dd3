"""Systematic batches: every batch that holds a class holds its representative.

Alternating projections (METHODS: Can, Gurbuz, Alatan) train on one problem after another. A problem
fixes one or several representatives of each class, and classes may be grouped into batches by the
learned embeddings (hard class mining). Both are passed to the plan as one explicit value,
`PlanState`, which takes effect at a step fixed in advance, so that a resumed run repeats it.
Everything else is drawn from the seed and that step, independent of the number of ranks and loader
workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dml_dist.random_streams import Stream, generator_of


@dataclass(frozen=True, eq=False)
class PlanState:
    """The state of a plan; classes are numbered in ascending order of labels.

    Attributes:
        problem: Number of the problem, from 0.
        first_step: First step of the state; it is valid until the next state's first step.
        representatives: (C, m) int64 index rows. A class of fewer than m images repeats them, or
            has -1 for those that are missing (`draw_representatives`).
        neighbors: (C, h) int64 nearest other classes of each class, nearest first, padded with -1;
            None without hard class mining.
    """

    problem: int
    first_step: int
    representatives: np.ndarray
    neighbors: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SystematicBatch:
    """One global batch.

    Attributes:
        rows: (P K,) int64 index rows, K rows of a class together, its representatives first.
        is_representative: (P K,) bool.
    """

    rows: np.ndarray
    is_representative: np.ndarray


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The training images, of which representatives are drawn.

    Attributes:
        rows: (n,) int64 index rows.
        labels: (n,) int64 label of each row; only order and equality matter.
        seed: Seed of all draws, >= 0.
    """

    rows: np.ndarray
    labels: np.ndarray
    seed: int

    @property
    def num_classes(self) -> int:
        """C, the number of different labels."""
        return len(self.class_sizes)

    @cached_property
    def class_of_row(self) -> np.ndarray:
        """The class of each row, numbered in ascending order of labels, (n,) int64."""
        return np.unique(self.labels, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def class_sizes(self) -> np.ndarray:
        """Number of rows of each class, (C,) int64."""
        return np.bincount(self.class_of_row)


@dataclass(frozen=True, eq=False)
class SystematicPlan(TrainingRows):
    """P different classes with K rows each, min(m, K - 1) of them representatives.

    Without neighbors, classes are visited round-robin, by one seeded permutation of all classes
    after another. With neighbors, the classes visited round-robin are seeds: each is followed by
    its nearest classes that the batch does not hold yet. The representatives of a class alternate,
    and its other rows step through a seeded cycle: all are used before any is used again.

    Where representatives are rows of a table, batches only follow the neighbors, and hold no
    representatives but by chance.

    Attributes:
        classes_per_batch: P, at most the number of classes.
        samples_per_class: K, >= 2 where batches hold representatives.
        holds_representatives: Whether batches hold them.
    """

    classes_per_batch: int
    samples_per_class: int
    holds_representatives: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches of one epoch, floor(n / (P K))."""
        return len(self.rows) // (self.classes_per_batch * self.samples_per_class)

    def batches(self, state: PlanState) -> Iterator[SystematicBatch]:
        """Yield the global batches of a state from its first step, without end."""
        classes = self._classes(state)
        others, first, sizes = self._cycles(state)
        num_visits = np.zeros(self.num_classes, dtype=np.int64)
        num_drawn = state.representatives.shape[1]
        num_held = min(num_drawn, self.samples_per_class - 1) if self.holds_representatives else 0
        num_others = self.samples_per_class - num_held
        for chosen in classes:
            visit = num_visits[chosen][:, None]
            num_visits[chosen] += 1
            place = (visit * num_held + np.arange(num_held)) % num_drawn
            representatives = state.representatives[chosen[:, None], place]
            # A class without other rows repeats its representatives instead.
            size = sizes[chosen][:, None]
            place = visit * num_others + np.arange(num_others)
            inside = first[chosen][:, None] + place % np.maximum(size, 1)
            repeated = state.representatives[chosen[:, None], place % num_drawn]
            rest = np.where(size > 0, others[np.minimum(inside, len(others) - 1)], repeated)
            held = np.ones_like(representatives, dtype=bool), np.tile(size == 0, num_others)
            yield SystematicBatch(
                np.concatenate([representatives, rest], axis=1).reshape(-1),
                np.concatenate(held, axis=1).reshape(-1),
            )

    def _cycles(self, state: PlanState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows beside representatives that are held, class by class in seeded order.

        Returns:
            Rows, (at least 1,); start and number of the rows of each class, each (C,).
        """
        generator = generator_of(Stream.SYSTEMATIC_ROWS, self.seed, state.first_step)
        others = generator.permutation(len(self.rows))
        if self.holds_representatives:
            others = others[~np.isin(self.rows[others], state.representatives)]
        others = others[np.argsort(self.class_of_row[others], kind="stable")]
        sizes = np.bincount(self.class_of_row[others], minlength=self.num_classes)
        rows = self.rows[others] if len(others) else np.full(1, -1, dtype=np.int64)
        return rows, np.cumsum(sizes) - sizes, sizes

    def _classes(self, state: PlanState) -> Iterator[np.ndarray]:
        """Yield the classes of every batch, (P,) int64, all different."""
        generator = generator_of(Stream.SYSTEMATIC_CLASSES, self.seed, state.first_step)
        waiting: deque[int] = deque()
        while True:
            chosen: dict[int, None] = {}
            passed: list[int] = []
            while len(chosen) < self.classes_per_batch:
                if not waiting:
                    waiting.extend(generator.permutation(self.num_classes).tolist())
                seed_class = waiting.popleft()
                if seed_class in chosen:
                    passed.append(seed_class)  # It is the first class of the next batch.
                    continue
                chosen[seed_class] = None
                if state.neighbors is not None:
                    for neighbor in state.neighbors[seed_class].tolist():
                        if neighbor >= 0 and len(chosen) < self.classes_per_batch:
                            chosen[neighbor] = None
            waiting.extendleft(reversed(passed))
            yield np.fromiter(chosen, dtype=np.int64, count=len(chosen))


def state_at(states: Sequence[PlanState], step: int) -> PlanState:
    """Return the state at a step: the last one that begins at or before it.

    Args:
        states: In ascending order of first steps.
        step: A step at or after the first state's.
    """
    found = [state for state in states if state.first_step <= step]
    if not found:
        raise ValueError(f"no state begins at step {step} or before")
    return found[-1]


def systematic_batches(
    plan: SystematicPlan, states: Sequence[PlanState], start_step: int, end_step: int
) -> Iterator[tuple[int, SystematicBatch]]:
    """Yield (step, global batch) from `start_step` to `end_step` - 1.

    `states` is read at every step, so a state appended while the iterator is at an earlier step
    takes effect.
    """
    current = state_at(states, start_step)
    batches = plan.batches(current)
    for _ in range(start_step - current.first_step):
        next(batches)
    for step in range(start_step, end_step):
        found = state_at(states, step)
        if found is not current:
            current, batches = found, plan.batches(found)
        yield step, next(batches)


@dataclass(frozen=True, eq=False)
class StatefulPlan:
    """A systematic plan with its states, for a sampler.

    Attributes:
        plan: The plan.
        states: In ascending order of first steps; read at every step (`systematic_batches`).
    """

    plan: SystematicPlan
    states: Sequence[PlanState]

    @property
    def rows(self) -> np.ndarray:
        """The rows that any batch may hold, (n,) int64."""
        return self.plan.rows

    def global_batches(self, start_step: int, end_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, (P K,) index rows) from `start_step` to `end_step` - 1."""
        for step, batch in systematic_batches(self.plan, self.states, start_step, end_step):
            yield step, batch.rows


def draw_representatives(
    rows: np.ndarray,
    labels: np.ndarray,
    *,
    seed: int,
    problem: int,
    number: int,
    repeats: bool = True,
) -> np.ndarray:
    """Draw images of every class, the same for any number of ranks.

    Args:
        rows: (n,) int64 index rows.
        labels: (n,) int64 label of each row.
        seed: The run's seed.
        problem: Number of the problem, from 0.
        number: m >= 1, images of each class.
        repeats: Whether a class of fewer than m images repeats them in the same order; otherwise
            -1 stands for each that is missing.

    Returns:
        (C, m) int64 rows, classes in ascending order of labels. The rows of a class are different
        but for repetitions.
    """
    _, class_of_row, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = generator_of(Stream.REPRESENTATIVES, seed, problem).permutation(len(rows))
    ordered = shuffled[np.argsort(class_of_row[shuffled], kind="stable")]
    first = np.cumsum(sizes) - sizes
    place = first[:, None] + np.arange(number) % sizes[:, None]
    drawn = rows[ordered[place]]
    return drawn if repeats else np.where(np.arange(number) < sizes[:, None], drawn, -1)
