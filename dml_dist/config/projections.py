"""Configuration of alternating projections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class ClassMiningConfig(Section):
    """Hard class mining: classes that lie near each other share batches."""

    neighbors_per_class: PositiveInt = 3
    """Nearest classes that each seed class brings into its batch."""

    refresh_every: PositiveInt | None = None
    """Steps between two searches inside a problem; none searches at its beginning only."""


class ProjectionsConfig(Section):
    """Alternating projections onto feasible sets (Can, Gurbuz, Alatan): one problem after another.

    A problem fixes representatives of every class; every batch that holds a class holds one of
    them, and the weights are drawn to the solution of the problem before. Needs
    `data.batches.name: balanced`, and works with every loss.
    """

    steps_per_problem: PositiveInt = 200
    """Steps after which a problem ends, at the latest."""

    patience: PositiveInt | None = None
    """Validations without a higher MAP@R after which a problem ends; none leaves this out."""

    min_steps: NonNegativeInt = 0
    """With `patience`: steps that a problem lasts at least."""

    proximal_weight: NonNegativeFloat = 2e-4
    """Weight of half the squared distance to the last solution; 0 in the first problem."""

    proximal_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The weight is multiplied by it with each further problem."""

    representatives_per_class: PositiveInt = 1
    """Representatives of each class."""

    selection: Literal["random", "k_center"] = "random"
    """Random: a seeded draw. K_center: a seeded pool is embedded, greedy k-centre picks from it."""

    pool_per_class: PositiveInt = 12
    """With `selection: k_center`: images of each class in the pool."""

    pairs: Literal["representatives", "all"] = "representatives"
    """Which pairs and triplets a pair loss counts: those that involve a representative, or all."""

    mining: ClassMiningConfig | None = None
    """Hard class mining; none lets classes take turns."""

    lead_steps: PositiveInt = 32
    """Steps between the moment at which a problem is prepared and its first step.

    The loader reads ahead, so it must be at least the batches that are prefetched. It must be less
    than `steps_per_problem` and `mining.refresh_every`.
    """

    @model_validator(mode="after")
    def _check(self) -> ProjectionsConfig:
        if self.lead_steps >= self.steps_per_problem:
            raise ValueError(
                f"lead_steps {self.lead_steps} must be less than steps_per_problem "
                f"{self.steps_per_problem}: a problem is prepared inside the one before"
            )
        if self.min_steps > self.steps_per_problem:
            raise ValueError(
                f"min_steps {self.min_steps} must be at most steps_per_problem "
                f"{self.steps_per_problem}"
            )
        every = self.mining.refresh_every if self.mining else None
        if every is not None and every > self.steps_per_problem:
            raise ValueError(
                f"mining.refresh_every {every} must be at most steps_per_problem "
                f"{self.steps_per_problem}: a longer interval never comes"
            )
        if every is not None and every <= self.lead_steps:
            raise ValueError(
                f"mining.refresh_every {every} must be more than lead_steps {self.lead_steps}: "
                "a search begins inside the problem that it is for, and takes effect before the "
                "next one begins"
            )
        if self.selection == "k_center" and self.pool_per_class < self.representatives_per_class:
            raise ValueError(
                f"pool_per_class {self.pool_per_class} must be at least "
                f"representatives_per_class {self.representatives_per_class}"
            )
        return self
