"""Alternating projections in progress: which problem is trained on, and when the next one begins.

Can, Gurbuz, Alatan, "Deep Metric Learning with Alternating Projections onto Feasible Sets", ICIP
2021. Training looks for a point of an intersection of sets: all embeddings that satisfy the
proximity constraints to one set of class representatives. A problem fixes the representatives,
which every batch then holds (`data/systematic.py`), or whose embeddings are the rows of a class
table (`train/representative_table.py`), and pulls the weights towards the solution of the previous
problem (`train/proximal.py`).

A problem that forms batches is prepared `lead_steps` before its first step, because the loader
reads ahead. A run that is resumed in between finds the prepared problem in the checkpoint and
repeats the uninterrupted run. With a table and no mining, batches are those of a run without
projections: the loader needs no state, and a problem is prepared right before its first step.
Every rank calls every method, and all decide alike.

The solution of a problem is its last weights. With a table it is those of its best validation, as
in the released code of the successor (yetigurbuz/ccp-dml, losses/ccp/callback.py): they become the
anchor of the next problem, while training continues from the last weights, with which the next
representatives are embedded. That code also begins k-center with the distances to the last rows;
here it begins with the first image of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from dml_dist.config.projections import ProjectionsConfig
from dml_dist.data.systematic import PlanState, TrainingRows, draw_representatives, state_at
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.representatives import RepresentativeObjective
from dml_dist.search.representatives import k_center, nearest_classes
from dml_dist.train.proximal import ProximalTerm, pulled_weights
from dml_dist.train.representative_table import EmbedRows, RepresentativeTable


@dataclass(frozen=True, eq=False)
class ProjectionInputs:
    """What the caller provides for alternating projections.

    Attributes:
        plan: The training images; a `SystematicPlan` where problems form batches.
        embed: Embeds index rows on all ranks; every rank calls it.
        states: States of the plan, shared with the loader, which reads them at every step.
    """

    plan: TrainingRows
    embed: EmbedRows
    states: list[PlanState] = field(default_factory=list)


def build_projections(
    config: ProjectionsConfig,
    inputs: ProjectionInputs,
    objective: Objective,
    optimizer: Optimizer,
) -> Projections:
    """Return the sequence of problems of a run.

    Args:
        config: The section `projections`.
        inputs: Of the caller.
        objective: The objective, whose table a problem writes if it has one of representatives.
        optimizer: Its optimiser, which forgets the state of rows that are written.
    """
    table = None
    if isinstance(objective, RepresentativeObjective):
        table = RepresentativeTable(objective, optimizer, inputs.embed)
    return Projections(config, inputs, objective.comm, table)


class Projections:
    """The sequence of problems.

    Attributes:
        states: States of the batch plan, by rising first step.
        term: Pulls the weights towards the last solution; None in the first problem.
    """

    def __init__(
        self,
        config: ProjectionsConfig,
        inputs: ProjectionInputs,
        comm: Comm,
        table: RepresentativeTable | None = None,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.comm = comm
        self.table = table
        self.states = inputs.states
        self.term: ProximalTerm | None = None
        self._lead_steps = config.lead_steps if config.forms_batches else 0
        self._held: tuple[PlanState, Tensor] | None = None
        # The problem that is trained on, its first step, and how its validations went.
        self._problem = 0
        self._first_step = 0
        self._best = float("-inf")
        self._num_worse = 0
        # The weights of its best validation, in the table form.
        self._solution: Mapping[str, Tensor] = {}

    def begin(self, model: EmbeddingModel) -> None:
        """Prepare the first problem, before any step."""
        drawn = self._select(model, problem=0)
        if self.table is not None:
            self.table.rewrite(model, drawn)
        self.states.append(PlanState(0, 0, drawn, self._neighbors(model, drawn)))

    def begins(self, step: int) -> bool:
        """Return whether a problem begins at this step, after the first."""
        return state_at(self.states, step).problem != self._problem

    def start_problem(self, model: EmbeddingModel, step: int) -> None:
        """Start the problem that begins at this step; the last solution is its anchor."""
        state = state_at(self.states, step)
        weight = self.config.proximal_weight * self.config.proximal_decay ** (state.problem - 1)
        self.term = ProximalTerm(self._solution or pulled_weights(model), weight)
        self._problem, self._first_step = state.problem, step
        self._best, self._num_worse = float("-inf"), 0
        self._solution = {}
        if self.table is not None:
            self.table.rewrite(model, state.representatives)

    def after_step(self, model: EmbeddingModel, step: int, map_at_r: float | None) -> None:
        """Prepare what begins `lead_steps` from now, if anything does.

        Args:
            model: As it is after `step` updates, the same on every rank.
            step: Updates made.
            map_at_r: Validation MAP@R, if it was measured after this step.
        """
        stagnates = self._stagnates(model, step, map_at_r)
        if self.states[-1].problem > self._problem:
            return  # The next problem is prepared already.
        first = step + self._lead_steps
        if stagnates or self._ends(first):
            drawn = self._select(model, problem=self._problem + 1)
            neighbors = self._neighbors(model, drawn)
            self._add(PlanState(self._problem + 1, first, drawn, neighbors), step)
        elif self._refreshes(first):
            drawn = self.states[-1].representatives
            state = PlanState(self._problem, first, drawn, self._neighbors(model, drawn))
            self._add(state, step)

    def prepares_after(self, step: int) -> bool:
        """Return whether `after_step` may embed images after `step` updates."""
        first = step + self._lead_steps
        return self._ends(first) or self._refreshes(first)

    def is_representative(self, rows: np.ndarray, step: int) -> np.ndarray | None:
        """Return which rows of a batch are representatives, (b,) bool; None when all pairs count.

        Args:
            rows: (b,) index rows.
            step: Updates made before the batch.
        """
        if self.config.pairs == "all":
            return None
        return np.isin(rows, state_at(self.states, step).representatives)

    def neighbors(self, step: int) -> Tensor | None:
        """Return the classes that mining found near every class, (C, h); None without mining.

        Args:
            step: Updates made before the batch.
        """
        state = state_at(self.states, step)
        if state.neighbors is None:
            return None
        if self._held is None or self._held[0] is not state:  # Copied to the device once.
            self._held = state, torch.from_numpy(state.neighbors).to(self.comm.device)
        return self._held[1]

    def record(self, model: EmbeddingModel) -> dict[str, float]:
        """Return values to be recorded; waits for the device."""
        values = {"problem": float(self._problem)}
        if self.term is not None:
            values["distance_to_last_solution"] = float(self.term.distance(model))
        return values

    # ------------------------------------------------------------ decisions

    def _ends(self, first: int) -> bool:
        return first == self._first_step + self.config.steps_per_problem

    def _stagnates(self, model: EmbeddingModel, step: int, map_at_r: float | None) -> bool:
        """Take a validation into account; return whether the problem ends for lack of progress."""
        if map_at_r is None:
            return False
        if map_at_r > self._best:
            self._best, self._num_worse = map_at_r, 0
            if self.table is not None:
                self._solution = pulled_weights(model)
        else:
            self._num_worse += 1
        patience = self.config.patience
        lasted = step - self._first_step >= self.config.min_steps
        return patience is not None and lasted and self._num_worse >= patience

    def _refreshes(self, first: int) -> bool:
        mining = self.config.mining
        if mining is None or mining.refresh_every is None:
            return False
        return first > self._first_step and (first - self._first_step) % mining.refresh_every == 0

    def _add(self, state: PlanState, step: int) -> None:
        """Append a state, in place, and drop those that end before `step`."""
        now = state_at(self.states, step).first_step
        kept = [old for old in self.states if now <= old.first_step < state.first_step]
        self.states[:] = [*kept, state]

    # ------------------------------------------------------------ preparation

    def _select(self, model: EmbeddingModel, problem: int) -> np.ndarray:
        """Return the representatives of a problem, (C, M) int64 index rows, -1 for none."""
        number = self.config.representatives_per_class
        if self.config.selection == "random":
            return self._draw(problem, number)
        pool = self._draw(problem, self.config.pool_per_class)
        found = self.inputs.embed(model, pool[pool >= 0])
        is_image = torch.from_numpy(pool >= 0).to(found.device)
        embeddings = found.new_zeros((*pool.shape, found.shape[1]))
        embeddings[is_image] = found
        selected = k_center(embeddings, number, is_image).cpu().numpy()
        return np.where(selected >= 0, np.take_along_axis(pool, selected.clip(0), axis=1), -1)

    def _draw(self, problem: int, number: int) -> np.ndarray:
        plan = self.inputs.plan
        return draw_representatives(
            plan.rows,
            plan.labels,
            seed=plan.seed,
            problem=problem,
            number=number,
            repeats=self.table is None,
        )

    def _neighbors(self, model: EmbeddingModel, representatives: np.ndarray) -> np.ndarray | None:
        """Return the nearest classes of every class, (C, h); None without mining."""
        mining = self.config.mining
        if mining is None:
            return None
        if self.table is not None:
            # At no cost. The next problem's first batches follow the rows of this one, as trained.
            embeddings, _ = self.table.objective.class_rows()
        else:
            found = self.inputs.embed(model, representatives.reshape(-1))
            embeddings = found.reshape(*representatives.shape, -1)
        nearest = nearest_classes(embeddings, mining.neighbors_per_class, self.comm)
        return nearest.cpu().numpy()

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and scalars."""
        return {
            "problem": self._problem,
            "first_step": self._first_step,
            "best": self._best,
            "num_worse": self._num_worse,
            "states": [
                {
                    "problem": state.problem,
                    "first_step": state.first_step,
                    "representatives": torch.from_numpy(state.representatives),
                    "neighbors": (
                        None if state.neighbors is None else torch.from_numpy(state.neighbors)
                    ),
                }
                for state in self.states
            ],
            "weight": None if self.term is None else self.term.weight,
            "anchor": {} if self.term is None else dict(self.term.anchor),
            "solution": dict(self._solution),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Load the result of `state_dict`, on any number of ranks."""
        self._problem = values["problem"]
        self._first_step = values["first_step"]
        self._best = values["best"]
        self._num_worse = values["num_worse"]
        self.states[:] = [
            PlanState(
                state["problem"],
                state["first_step"],
                state["representatives"].numpy(),
                None if state["neighbors"] is None else state["neighbors"].numpy(),
            )
            for state in values["states"]
        ]
        anchor, self._solution = (
            {name: weight.to(self.comm.device) for name, weight in values.get(kind, {}).items()}
            for kind in ("anchor", "solution")
        )
        self.term = None
        if values["weight"] is not None:
            self.term = ProximalTerm(anchor, values["weight"])
