"""Alternating projections in the training loop: resumed runs, other ranks, and their course."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist.config.schema import RunConfig
from dml_dist.data.loader import Batch
from dml_dist.data.plans import rank_positions
from dml_dist.data.systematic import (
    PlanState,
    SystematicPlan,
    draw_representatives,
    systematic_batches,
)
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.projections import ProjectionInputs
from dml_dist.train.state import TrainState
from tests.ranks import run_ranks
from tests.training_setup import (
    IMAGES_PER_CLASS,
    NUM_IMAGES,
    SmallRun,
    images_of,
    small_config,
    snapshot,
    whole_snapshot,
)

AHEAD = 2
"""Batches that the loader of these tests has read before they are asked for."""


class ProjectedRun(SmallRun):
    """A small run whose batches follow the problems, read ahead as a loader does."""

    def means(self) -> ProjectionInputs:
        labels = 100 + np.arange(NUM_IMAGES) // IMAGES_PER_CLASS
        plan = SystematicPlan(np.arange(NUM_IMAGES), labels, self.config.seed, 5, 2)
        self.followed = ProjectionInputs(plan, self.embed)
        self.problems: list[tuple[int, int]] = []
        return self.followed

    def embed(self, model: EmbeddingModel, rows: np.ndarray) -> Tensor:
        model.eval()
        with torch.no_grad():
            dtype = next(model.parameters()).dtype
            embeddings = model(images_of(rows).to(dtype)).float()
        model.train()
        return embeddings

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        plan, states = self.followed.plan, self.followed.states
        source = systematic_batches(plan, states, start, end)
        ready: deque[tuple[int, np.ndarray]] = deque()
        for step in range(start, end):
            while len(ready) <= AHEAD and (found := next(source, None)) is not None:
                ready.append((found[0], found[1].rows))
            if step == self.fail_at:
                raise KeyboardInterrupt
            planned, rows = ready.popleft()
            assert planned == step
            self.seen.append(rows)
            low, high = rank_positions(len(rows), self.topology.world_size, self.topology.rank)
            part = torch.from_numpy(rows[low:high])
            labels = 100 + part // IMAGES_PER_CLASS
            yield Batch(images_of(part.numpy()), labels, part, step)


SETTINGS = {
    "random": (
        "{steps_per_problem: 4, lead_steps: 3, proximal_weight: 0.1, pairs: representatives}"
    ),
    "mined": (
        "{steps_per_problem: 6, lead_steps: 3, proximal_weight: 0.1, proximal_decay: 0.5, "
        "selection: k_center, pool_per_class: 4, representatives_per_class: 2, "
        "mining: {neighbors_per_class: 2, refresh_every: 4}}"
    ),
    "patient": (
        "{steps_per_problem: 20, lead_steps: 3, proximal_weight: 0.1, patience: 2, min_steps: 2}"
    ),
}


@dataclass(frozen=True)
class Expected:
    """The course of 14 steps under falling validations, worked by hand.

    Attributes:
        begins: First steps of problems 1, 2, ...
        states: Problem and first step of what is prepared at the end.
        weight: Of the proximal term at the end.
    """

    begins: list[int]
    states: list[tuple[int, int]]
    weight: float


EXPECTED = {
    "random": Expected([4, 8, 12], [(3, 12), (4, 16)], 0.1),
    "mined": Expected([6, 12], [(2, 12), (2, 16)], 0.05),
    # Worse at 4 and 6: a problem from 9 on; better at 10, worse at 12 and 14: one from 17 on.
    "patient": Expected([9], [(1, 9), (2, 17)], 0.1),
}


def projected_config(setting: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "data__batches": "{name: balanced, classes_per_batch: 5, samples_per_class: 2}",
        "data__loader_workers": 0,
        "loss": "{name: contrastive}",
        "projections": SETTINGS[setting],
        "train__steps": 14,
        "train__log_every": 1,
        "evaluation__every_steps": 2,
        "checkpoint__every_steps": 4,
    }
    return small_config(**{**settings, **changes})


def described(states: list[PlanState]) -> list[Any]:
    return [
        (s.problem, s.first_step, s.representatives.tolist(), np.asarray(s.neighbors).tolist())
        for s in states
    ]


def unexpected(setting: str, run: ProjectedRun, state: TrainState) -> list[str]:
    """Return what differs from the course that was worked by hand, on this rank."""
    expected, projections = EXPECTED[setting], state.projections
    assert projections is not None
    assert projections.term is not None
    found = {
        "states": [(s.problem, s.first_step) for s in projections.states] == expected.states,
        "weight": projections.term.weight == pytest.approx(expected.weight),
        "validations": run.evaluated == [("validation", step) for step in range(2, 15, 2)],
    }
    if run.topology.is_main:
        problems = [int(record["problem"]) for record in read_records(run.folder / "steps.jsonl")]
        begins = [step for step in range(1, 14) if problems[step] != problems[step - 1]]
        found["problems"] = begins == expected.begins
        found["records"] = len(problems) == 14
    return [
        f"{setting}: {name} are not as worked by hand" for name, fits in found.items() if not fits
    ]


def repeat_exactly(topology: Topology, root: str) -> list[str]:
    """Interrupt runs at every place of a problem; return what differs from uninterrupted ones."""
    comm = Comm.from_default_group()
    problems = []
    # Validation gets worse, so that patience ends a problem.
    scores = {step: 1.0 - step / 100 for step in range(40)}
    for setting in SETTINGS:
        config = projected_config(setting)
        folder = Path(root) / f"{setting}-{topology.world_size}"
        whole = ProjectedRun(topology, comm, config, folder / "whole", scores=scores)
        state = whole.train().state
        expected = snapshot(state)
        problems += unexpected(setting, whole, state)
        for fail_at in (5, 9):
            run = ProjectedRun(topology, comm, config, folder / f"cut-{fail_at}", scores=scores)
            run.fail_at = fail_at
            with pytest.raises(KeyboardInterrupt):
                run.train()
            comm.barrier()
            run.fail_at, run.attempt, run.seen = None, 2, []
            result = run.train(resume=True)
            found = snapshot(result.state)
            differ = [name for name in expected if not torch.equal(expected[name], found[name])]
            problems += [f"{setting}, cut at {fail_at}: {name}" for name in differ]
            batches = zip(whole.seen[result.start_step :], run.seen, strict=True)
            if not all(np.array_equal(one, two) for one, two in batches):
                problems.append(f"{setting}, cut at {fail_at}: batches")
            if described(whole.followed.states) != described(run.followed.states):
                problems.append(f"{setting}, cut at {fail_at}: states")
    return problems


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_runs_are_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    if world_size == 1:
        assert repeat_exactly(Topology(), str(tmp_path)) == []
    else:
        assert run_ranks(repeat_exactly, world_size, str(tmp_path)) == [[]] * world_size


def train_whole(topology: Topology, root: str) -> dict[str, Any]:
    """Train a mined run in float64; return its weights, batches and states."""
    comm = Comm.from_default_group()
    config = projected_config("mined", train__precision="float64", train__steps=11)
    run = ProjectedRun(topology, comm, config, Path(root) / str(topology.world_size))
    state = run.train().state
    return {
        "weights": whole_snapshot(state),
        "batches": run.seen,
        "states": described(run.followed.states),
        "mined": mined_shares(Path(root) / str(topology.world_size)),
    }


def mined_shares(folder: Path) -> list[float]:
    return [record["active_mined"] for record in read_records(folder / "steps.jsonl")]


def go_on(topology: Topology, root: str, saved_by: int) -> dict[str, Any]:
    """Go on from another number of ranks' checkpoint of step 8, inside a problem."""
    comm = Comm.from_default_group()
    config = projected_config("mined", train__precision="float64", train__steps=11)
    folder = Path(root) / f"{saved_by}-to-{topology.world_size}"
    if topology.is_main:
        name = "checkpoints/step_00000008-a1"
        shutil.copytree(Path(root) / str(saved_by) / name, folder / name)
    comm.barrier()
    run = ProjectedRun(topology, comm, config, folder, attempt=2)
    result = run.train(resume=True)
    assert result.start_step == 8
    return {
        "weights": whole_snapshot(result.state),
        "batches": run.seen,
        "states": described(run.followed.states),
        "mined": mined_shares(folder),
    }


def test_the_number_of_ranks_does_not_matter(tmp_path: Path) -> None:
    one = train_whole(Topology(), str(tmp_path))
    # A search at step 7 for step 10, inside problem 1; problem 2 is prepared, but not begun.
    assert [state[:2] for state in one["states"]] == [(1, 6), (1, 10), (2, 12)]
    two = run_ranks(train_whole, 2, str(tmp_path))[0]
    three = run_ranks(go_on, 3, str(tmp_path), 2)[0]
    for other, first in ((two, 0), (three, 8)):
        for expected, rows in zip(one["batches"][first:], other["batches"], strict=True):
            assert np.array_equal(expected, rows)
        assert one["states"] == other["states"]
        assert one["mined"][first:] == other["mined"]
        for name, value in one["weights"].items():
            assert float((value - other["weights"][name]).abs().max()) <= 1e-9, name
    assert all(0 < share <= 1 for share in one["mined"])


def test_the_course_of_problems(tmp_path: Path) -> None:
    config = projected_config("random", train__steps=10)
    run = ProjectedRun(Topology(), Comm.single(), config, tmp_path)
    run.train()
    records = read_records(tmp_path / "steps.jsonl")
    assert [record["problem"] for record in records] == [0] * 4 + [1] * 4 + [2] * 2
    distances = [record.get("distance_to_last_solution") for record in records]
    assert distances[:4] == [None] * 4
    assert all(later > 0 for later in distances[4:])
    plan = run.followed.plan
    for step, rows in enumerate(run.seen):
        drawn = draw_representatives(
            plan.rows, plan.labels, seed=config.seed, problem=step // 4, number=1
        )
        # 5 classes with one representative each and one other image.
        assert np.isin(rows, drawn).tolist() == [True, False] * 5
        assert (rows[::2] // IMAGES_PER_CLASS == rows[1::2] // IMAGES_PER_CLASS).all()


def test_validation_without_progress_ends_a_problem(tmp_path: Path) -> None:
    config = projected_config("patient", train__steps=12, projections__patience=1)
    # Better at 4, worse at 6: a problem from step 9 on; better at 10, worse at 12.
    scores = {2: 0.1, 4: 0.2, 6: 0.15, 8: 0.3, 10: 0.4, 12: 0.3}
    run = ProjectedRun(Topology(), Comm.single(), config, tmp_path, scores=scores)
    run.train()
    problems = [record["problem"] for record in read_records(tmp_path / "steps.jsonl")]
    assert problems == [0] * 9 + [1] * 3
    assert run.followed.states[-1].first_step == 15


def test_the_last_solution_draws(tmp_path: Path) -> None:
    """A strong proximal term keeps the weights near the solution of the problem before."""
    distances = {}
    for weight in (0.0, 100.0):
        setting = "{steps_per_problem: 4, lead_steps: 3, proximal_weight: " + str(weight) + "}"
        config = projected_config(
            "random", train__steps=8, projections=setting, train__max_grad_norm="null"
        )
        folder = tmp_path / str(weight)
        ProjectedRun(Topology(), Comm.single(), config, folder).train()
        distances[weight] = read_records(folder / "steps.jsonl")[-1]["distance_to_last_solution"]
    assert distances[100.0] < 0.7 * distances[0.0]
