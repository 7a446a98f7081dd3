"""The course of alternating projections, step by step, against steps and weights worked by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.config.projections import ProjectionsConfig
from dml_dist.data.systematic import PlanState, SystematicPlan, draw_representatives
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.train.projections import ProjectionInputs, Projections
from tests.training_setup import small_config
from tests.unit.test_representatives import k_center_loop, nearest_loop

CLASSES, IMAGES, SEED = 6, 5, 11
ROWS = np.arange(CLASSES * IMAGES)
PLAN = SystematicPlan(ROWS, ROWS // IMAGES, SEED, 3, 2)


@dataclass
class Course:
    """Projections driven as the training loop does it, without training.

    After `s` updates the model's weights have grown by `s`, and row r has the embedding of row r of
    `embeddings(s)`.
    """

    config: ProjectionsConfig
    scores: Mapping[int, float] = field(default_factory=dict)
    model: EmbeddingModel = field(
        default_factory=lambda: build_model(small_config().model, seed=0, dtype=torch.float64)
    )
    made: int = 0
    prepared: list[PlanState] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.projections = self.fresh()
        self.projections.begin(self.model)
        self.prepared += self.projections.states

    def fresh(self) -> Projections:
        return Projections(self.config, ProjectionInputs(PLAN, self.embed), Comm.single())

    def embeddings(self, step: int) -> np.ndarray:
        drawn = np.random.default_rng(step).standard_normal((len(ROWS), 4))
        return drawn.astype(np.float32)

    def embed(self, model: EmbeddingModel, rows: np.ndarray) -> Tensor:
        assert model is self.model
        return torch.from_numpy(self.embeddings(self.made)[rows])

    def step(self) -> tuple[int, float | None, float | None]:
        """Make one step; return its problem, the term's weight, and the step it draws back to."""
        projections = self.projections
        if projections.begins(self.made):
            projections.start_problem(self.model, self.made)
        term, problem = projections.term, projections.record(self.model)["problem"]
        anchored = None
        if term is not None:  # Each weight has grown by the steps since the anchor was taken.
            count = sum(value.numel() for value in term.anchor.values())
            anchored = self.made - float(term.distance(self.model)) / count**0.5
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 1.0
        self.made += 1
        score = self.scores.get(self.made)
        known = [state.first_step for state in projections.states]
        if projections.prepares_after(self.made) or score is not None:
            projections.after_step(self.model, self.made, score)
        self.prepared += [s for s in projections.states if s.first_step not in known]
        return int(problem), term and term.weight, anchored

    def resume(self) -> None:
        """Go on with new projections from what a checkpoint holds."""
        file = io.BytesIO()
        torch.save(self.projections.state_dict(), file)
        file.seek(0)
        self.projections = self.fresh()
        self.projections.load_state_dict(torch.load(file, weights_only=True))


def follow(course: Course, steps: int, resumed_at: int | None = None) -> list[Any]:
    found = []
    for step in range(steps):
        if step == resumed_at:
            course.resume()
        found.append(course.step())
    return found


def config_of(**values: Any) -> ProjectionsConfig:
    settings = {"steps_per_problem": 4, "lead_steps": 3, "proximal_weight": 0.8} | values
    return ProjectionsConfig.model_validate(settings)


def first_steps(course: Course) -> list[tuple[int, int]]:
    return [(state.problem, state.first_step) for state in course.prepared]


def assert_course(found: list[Any], expected: list[tuple[int, float | None, int | None]]) -> None:
    assert [problem for problem, _, _ in found] == [problem for problem, _, _ in expected]
    weights = [weight for _, weight, _ in expected]
    assert [weight for _, weight, _ in found] == pytest.approx(weights)
    assert [step for _, _, step in found] == pytest.approx([step for _, _, step in expected])


def test_problems_weights_and_solutions_by_step() -> None:
    """4 steps a problem; the weight is 0.8 in problem 1 and halved with each further problem."""
    expected = [(0, None, None)] * 4 + [(1, 0.8, 4)] * 4 + [(2, 0.4, 8)] * 4 + [(3, 0.2, 12)] * 2
    for resumed_at in (None, *range(1, 14)):
        course = Course(config_of(proximal_decay=0.5))
        assert_course(follow(course, 14, resumed_at), expected)
        assert first_steps(course) == [(0, 0), (1, 4), (2, 8), (3, 12), (4, 16)]
        for state in course.prepared:
            drawn = draw_representatives(
                PLAN.rows, PLAN.labels, seed=SEED, problem=state.problem, number=1
            )
            assert np.array_equal(state.representatives, drawn)
        assert len({state.representatives.tobytes() for state in course.prepared}) == 5


def test_validations_without_progress_end_a_problem() -> None:
    """Patience 2, 3 steps ahead: worse at 8 (equal) and 10, at 16 and 18, at 26 and 28.

    A problem's validations are compared with its own: 0.1 at 14 is a first one, after 0.9. The two
    worse ones need not be lost by a checkpoint between them. What is not a number is worse.
    """
    scores = {2: 0.5, 4: 0.4, 6: 0.6, 8: 0.6, 10: 0.5, 12: 0.9}
    scores |= {14: 0.1, 16: 0.05, 18: 0.1, 20: 0.0}
    scores |= {22: math.nan, 24: 0.02, 26: 0.01, 28: 0.0, 30: 0.5, 32: 0.1, 34: 0.2}
    expected = [(0, None, None)] * 13 + [(1, 0.8, 13)] * 8 + [(2, 0.8, 21)] * 10
    expected += [(3, 0.8, 31)] * 4
    for resumed_at in (None, *range(1, 35)):
        course = Course(config_of(steps_per_problem=40, patience=2), scores)
        assert_course(follow(course, 35, resumed_at), expected)
        assert first_steps(course) == [(0, 0), (1, 13), (2, 21), (3, 31)]


def test_a_problem_lasts_min_steps_and_at_most_steps_per_problem() -> None:
    """Patience 1, always worse: the steps before a decision count from the problem's first one."""
    worse = {step: -float(step) for step in range(2, 40, 2)}
    for resumed_at in (None, 5, 8, 11, 15):
        course = Course(config_of(steps_per_problem=40, patience=1, min_steps=6), worse)
        follow(course, 20, resumed_at)
        assert first_steps(course) == [(0, 0), (1, 9), (2, 19)]
    better = {step: 1.0 + step for step in range(6, 40, 2)}
    for resumed_at in (None, 6, 11, 20):
        course = Course(config_of(steps_per_problem=12, patience=1), {2: 1.0, 4: 0.5} | better)
        follow(course, 20, resumed_at)
        assert first_steps(course) == [(0, 0), (1, 7), (2, 19)]


@pytest.mark.parametrize("resumed_at", [None, 2, 6, 9, 13, 18])
def test_representatives_and_neighbors_are_of_the_network_when_they_were_prepared(
    resumed_at: int | None,
) -> None:
    """A search every 4 steps, 3 steps before it takes effect; a new problem every 10 steps."""
    mining = {"neighbors_per_class": 2, "refresh_every": 4}
    config = config_of(
        steps_per_problem=10,
        selection="k_center",
        pool_per_class=4,
        representatives_per_class=2,
        mining=mining,
    )
    course = Course(config)
    seen = []
    for step in range(20):
        if step == resumed_at:
            course.resume()
        course.step()
        neighbors = course.projections.neighbors(step)
        assert neighbors is not None
        seen.append(neighbors.tolist())
    firsts = [(0, 0), (0, 4), (0, 8), (1, 10), (1, 14), (1, 18), (2, 20)]
    assert first_steps(course) == firsts
    drawn = np.empty(0)
    for (problem, first), state, end in zip(
        firsts, course.prepared, [4, 8, 10, 14, 18, 20, 20], strict=True
    ):
        embeddings = course.embeddings(max(0, first - 3))
        if first % 10 == 0:
            pool = draw_representatives(
                PLAN.rows, PLAN.labels, seed=SEED, problem=problem, number=4
            )
            drawn = np.array([own[k_center_loop(embeddings[own], 2)] for own in pool])
        assert state.representatives.tolist() == drawn.tolist()
        nearest = nearest_loop(embeddings[drawn], 2)
        assert seen[first:end] == [nearest] * (end - first)


def test_which_rows_count_as_representatives() -> None:
    course = Course(config_of(pairs="representatives"))
    course.step()
    now, then = (state.representatives.ravel().tolist() for state in course.prepared)
    for step, drawn in ((1, now), (3, now), (4, then)):
        found = course.projections.is_representative(ROWS, step)
        assert found is not None
        assert found.tolist() == [row in drawn for row in ROWS.tolist()]
        assert found.sum() == CLASSES
    everything = Course(config_of(pairs="all")).projections
    assert everything.is_representative(ROWS, 0) is None


def test_settings_of_the_other_form_are_refused() -> None:
    for values, words in (
        ({"table": {"trainable": False}}, "table has settings, but form is batch"),
        ({"form": "table", "pairs": "representatives"}, "pairs is representatives, but with form"),
        ({"form": "table", "mining": {}, "lead_steps": 4}, "lead_steps 4 must be less than"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(**values)
    config_of(form="table", lead_steps=4)  # Nothing is prepared ahead.


def test_the_next_problem_or_search_is_prepared_inside_a_problem() -> None:
    """3 steps ahead of step 3 or of a search at step 3 is step 0, after which nothing is prepared.

    One step more is enough for both: a problem every 4 steps, a search 4 steps into one of 8.
    """
    for values, words in (
        ({"steps_per_problem": 3}, "lead_steps 3 must be less than steps_per_problem 3"),
        (
            {"steps_per_problem": 8, "mining": {"refresh_every": 3}},
            "refresh_every 3 must be more than lead_steps 3",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(**values)
    course = Course(config_of(steps_per_problem=4))
    follow(course, 6)
    assert first_steps(course) == [(0, 0), (1, 4), (2, 8)]
    course = Course(config_of(steps_per_problem=8, mining={"refresh_every": 4}))
    follow(course, 10)
    assert first_steps(course) == [(0, 0), (0, 4), (1, 8), (1, 12)]
