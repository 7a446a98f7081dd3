"""The table form of alternating projections in the training loop."""

from __future__ import annotations

import shutil
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
from dml_dist.data.systematic import SystematicPlan, TrainingRows, draw_representatives
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.representatives import RepresentativeObjective
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.projections import ProjectionInputs
from dml_dist.train.proximal import pulled_weights
from dml_dist.train.state import TrainState
from tests.distributed.test_projections import ProjectedRun, described, projected_config
from tests.ranks import run_ranks
from tests.training_setup import (
    IMAGES_PER_CLASS,
    NUM_CLASSES,
    NUM_IMAGES,
    SmallRun,
    snapshot,
    whole_snapshot,
)
from tests.unit.test_representatives import nearest_loop

ROWS = np.setdiff1d(np.arange(NUM_IMAGES), [1, 2, 4])
"""Images that representatives are drawn from: two of class 0, five of each other class."""

M = 3


class TableRun(ProjectedRun):
    """A small run whose representatives are in a table."""

    def means(self) -> ProjectionInputs:
        labels = 100 + ROWS // IMAGES_PER_CLASS
        plan = TrainingRows(ROWS, labels, self.config.seed)
        assert self.config.projections is not None
        if self.config.projections.forms_batches:
            plan = SystematicPlan(ROWS, labels, self.config.seed, 5, 2, holds_representatives=False)
        self.followed = ProjectionInputs(plan, self.embed)
        self.embedded: list[np.ndarray] = []
        return self.followed

    def embed(self, model: EmbeddingModel, rows: np.ndarray) -> Tensor:
        self.embedded.append(rows)
        return super().embed(model, rows)

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        if isinstance(self.followed.plan, SystematicPlan):
            return super().batches(start, end)
        return SmallRun.batches(self, start, end)


SETTINGS = {
    "steps": (
        "{form: table, steps_per_problem: 4, proximal_weight: 0.1, representatives_per_class: 3, "
        "selection: k_center, pool_per_class: 4}"
    ),
    "patient": (
        "{form: table, steps_per_problem: 20, proximal_weight: 0.1, patience: 2, "
        "representatives_per_class: 3, table: {trainable: false}}"
    ),
    "mined": (
        "{form: table, steps_per_problem: 6, lead_steps: 3, proximal_weight: 0.1, "
        "representatives_per_class: 3, mining: {neighbors_per_class: 2, refresh_every: 4}}"
    ),
}
LOSSES = {"steps": "contrastive", "patient": "triplet", "mined": "multi_similarity"}


@dataclass(frozen=True)
class Expected:
    """The course of 14 steps under falling validations, worked by hand.

    Attributes:
        begins: First steps of problems 1, 2, ...
        states: Problem and first step of what is prepared at the end.
    """

    begins: list[int]
    states: list[tuple[int, int]]


EXPECTED = {
    # A state is dropped when the one after the next is added.
    "steps": Expected([4, 8, 12], [(2, 8), (3, 12)]),
    # Worse at 4 and 6: a problem from 6 on; better at 8, worse at 10 and 12: one from 12 on.
    "patient": Expected([6, 12], [(1, 6), (2, 12)]),
    "mined": Expected([6, 12], [(2, 12), (2, 16)]),
}
AT = {1: ("steps", "patient", "mined"), 2: ("mined",), 3: ("steps", "patient")}
"""Settings that are trained on a number of ranks."""

SCORES = {step: 1.0 - step / 100 for step in range(40)}


def table_config(setting: str, **changes: Any) -> RunConfig:
    settings = {
        "loss": f"{{name: {LOSSES[setting]}}}",
        "projections": SETTINGS[setting],
        "optim__representative_lr": 0.05,
        "data__batches": "{name: balanced, classes_per_batch: 5, samples_per_class: 2}",
    }
    return projected_config("random", **{**settings, **changes})


def unexpected(setting: str, run: TableRun, state: TrainState) -> list[str]:
    """Return what differs from the course that was worked by hand, on this rank."""
    expected, projections = EXPECTED[setting], state.projections
    assert projections is not None
    found = {"states": [(s.problem, s.first_step) for s in projections.states] == expected.states}
    if run.topology.is_main:
        problems = [int(record["problem"]) for record in read_records(run.folder / "steps.jsonl")]
        begins = [step for step in range(1, 14) if problems[step] != problems[step - 1]]
        found["problems"] = begins == expected.begins
    return [f"{setting}: {name} are not as worked by hand" for name in found if not found[name]]


def repeat_exactly(topology: Topology, root: str) -> list[str]:
    """Interrupt runs after the checkpoint of step 8; return what differs from uninterrupted ones.

    There `steps` has prepared problem 2 and not begun it, `patient` is in problem 1 with its best
    weights so far, and `mined` has prepared a search for step 10.
    """
    comm = Comm.from_default_group()
    problems = []
    for setting in AT[topology.world_size]:
        config = table_config(setting)
        folder = Path(root) / f"{setting}-{topology.world_size}"
        whole = TableRun(topology, comm, config, folder / "whole", scores=SCORES)
        state = whole.train().state
        expected = snapshot(state)
        problems += unexpected(setting, whole, state)
        run = TableRun(topology, comm, config, folder / "cut", scores=SCORES)
        run.fail_at = 9
        with pytest.raises(KeyboardInterrupt):
            run.train()
        comm.barrier()
        run.fail_at, run.attempt, run.seen = None, 2, []
        result = run.train(resume=True)
        assert result.start_step == 8
        found = snapshot(result.state)
        differ = [name for name in expected if not torch.equal(expected[name], found[name])]
        problems += [f"{setting}: {name}" for name in differ]
        if described(whole.followed.states) != described(run.followed.states):
            problems.append(f"{setting}: states")
    return problems


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resumed_runs_are_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    if world_size == 1:
        assert repeat_exactly(Topology(), str(tmp_path)) == []
    else:
        assert run_ranks(repeat_exactly, world_size, str(tmp_path)) == [[]] * world_size


def train_whole(topology: Topology, root: str, saved_by: int | None = None) -> dict[str, Any]:
    """Train a mined run in float64, from another number of ranks' step 8 if it is given."""
    comm = Comm.from_default_group()
    config = table_config("mined", train__precision="float64", train__steps=11)
    folder = Path(root) / f"{saved_by}-to-{topology.world_size}"
    if saved_by is not None and topology.is_main:
        name = "checkpoints/step_00000008-a1"
        shutil.copytree(Path(root) / f"None-to-{saved_by}" / name, folder / name)
    comm.barrier()
    run = TableRun(topology, comm, config, folder, attempt=1 if saved_by is None else 2)
    result = run.train(resume=saved_by is not None)
    assert result.start_step == (0 if saved_by is None else 8)
    return {
        "weights": whole_snapshot(result.state),
        "batches": run.seen,
        "states": described(run.followed.states),
    }


def test_the_number_of_ranks_does_not_matter(tmp_path: Path) -> None:
    one = train_whole(Topology(), str(tmp_path))
    assert [state[:2] for state in one["states"]] == [(1, 6), (1, 10), (2, 12)]
    two = run_ranks(train_whole, 2, str(tmp_path))[0]
    three = run_ranks(train_whole, 3, str(tmp_path), 2)[0]
    for other, first in ((two, 0), (three, 8)):
        for expected, rows in zip(one["batches"][first:], other["batches"], strict=True):
            assert np.array_equal(expected, rows)
        assert one["states"] == other["states"]
        for name, value in one["weights"].items():
            assert float((value - other["weights"][name]).abs().max()) <= 1e-9, name
    assert one["weights"]["owned.representatives"].shape == (NUM_CLASSES * M, 6)


class Watched(TableRun):
    """Keeps the weights of each validation, and the table before the first step of a problem."""

    weights: dict[int, dict[str, Tensor]]
    model: EmbeddingModel

    def evaluate(self, model: EmbeddingModel, split: Any, step: int) -> dict[str, float]:
        self.model = model
        self.weights[step] = pulled_weights(model)
        return super().evaluate(model, split, step)


def test_a_problem_begins_with_its_representatives_and_the_best_weights(tmp_path: Path) -> None:
    # Best at 4; worse at 6 and 8: problem 1 begins at step 8, which is the last one made.
    scores = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.25}
    config = table_config(
        "patient",
        train__steps=9,
        projections__table="{trainable: true}",
        projections__selection="k_center",
        projections__pool_per_class=4,
    )
    run = Watched(Topology(), Comm.single(), config, tmp_path, scores=scores)
    run.weights = {}
    objective, before = [], []
    rewrite = RepresentativeObjective.rewrite

    def watched(self: Any, embeddings_CMD: Tensor, image_rows_CM: Tensor) -> Tensor:
        objective.append((embeddings_CMD.clone(), image_rows_CM.clone()))
        before.append(pulled_weights(run.model) if run.weights else None)
        return rewrite(self, embeddings_CMD, image_rows_CM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepresentativeObjective, "rewrite", watched)
        state = run.train().state
    assert state.projections is not None
    assert state.projections.term is not None

    # The anchor is the best solution; training and the table go on from the last weights.
    anchor = state.projections.term.anchor
    assert all(torch.equal(anchor[name], value) for name, value in run.weights[4].items())
    assert all(torch.equal(before[1][name], value) for name, value in run.weights[8].items())

    # The first problem's pool and rows, then the second's.
    pools, drawn = run.embedded[::2], run.embedded[1::2]
    for problem in (0, 1):
        pool = draw_representatives(
            ROWS,
            ROWS // IMAGES_PER_CLASS,
            seed=config.seed,
            problem=problem,
            number=4,
            repeats=False,
        )
        assert np.array_equal(pools[problem], pool[pool >= 0])
        embeddings, rows = objective[problem]
        assert (rows[0] >= 0).tolist() == [True, True, False]
        assert (rows[1:] >= 0).all()
        assert all(set(own.tolist()) <= {*pool[c].tolist()} for c, own in enumerate(rows))
        assert all(len({*own.tolist()}) == M for own in rows)
        assert np.array_equal(drawn[problem], rows[rows >= 0].numpy())
        assert (embeddings[rows < 0] == 0).all()

    # One step after the rows were written, Adam's moments are those of one gradient.
    table = state.owned["representatives"]
    moments = state.optimizer.state[table]
    first, second = moments["exp_avg"] / (1 - 0.9), moments["exp_avg_sq"] / (1 - 0.999)
    assert first.abs().max() > 0
    torch.testing.assert_close(first.square(), second, rtol=1e-3, atol=1e-12)
    records = read_records(tmp_path / "steps.jsonl")
    assert [record["problem"] for record in records] == [0] * 8 + [1]
    assert {record["missing_representatives"] for record in records} == {1}
    assert all("table_loss" in record and "in_batch_loss" in record for record in records)


def test_mining_reads_the_table(tmp_path: Path) -> None:
    """Neighbors are those of the rows as trained, and images are embedded once a problem."""
    read = []
    class_rows = RepresentativeObjective.class_rows

    def watched(self: Any) -> tuple[Tensor, Tensor]:
        rows_CMD, images_CM = class_rows(self)
        read.append(rows_CMD.clone())
        return rows_CMD, images_CM

    run = TableRun(Topology(), Comm.single(), table_config("mined", train__steps=3), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepresentativeObjective, "class_rows", watched)
        run.train()
    states = run.followed.states
    # Before the first step, a search after step 1 for step 4, and problem 1 after step 3.
    assert described(states)[-1][:2] == (1, 6)
    assert len(read) == 3
    assert (read[0] - read[2]).abs().max() > 0.01
    for rows, state in zip(read, states, strict=True):
        assert state.neighbors is not None
        assert state.neighbors.tolist() == nearest_loop(rows.numpy(), 2)
    assert [len(rows) for rows in run.embedded] == [int((states[0].representatives >= 0).sum())]
