"""Configuration of alternating projections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    resumable,
)


class ClassMiningConfig(Section):
    """Hard class mining: batches are formed of similar classes."""

    neighbors_per_class: PositiveInt = 3
    """Nearest classes that join each seed class in its batch."""

    refresh_every: PositiveInt | None = None
    """Steps between two searches within a problem; null searches at its beginning only."""


class RepresentativeTableConfig(Section):
    """Representatives as a class table: every image meets those of every class at each step."""

    trainable: bool = True
    """Whether the rows are trained within a problem, at `optim.representative_lr`."""

    table_weight: PositiveFloat = 1.0
    """Weight of the loss between the batch and all rows."""

    in_batch_weight: NonNegativeFloat = 0.1
    """Weight of the loss within the batch."""

    memory_mb: PositiveFloat = resumable(64.0)
    """Bound on the memory for distances to rows, in MiB; rows are processed in chunks."""


class ProjectionsConfig(Section):
    """Alternating projections onto feasible sets (Can, Gurbuz, Alatan): one problem after another.

    A problem fixes representatives of every class, and a proximal term pulls the weights to the
    solution of the previous problem.
    """

    form: Literal["batch", "table"] = "batch"
    """Batch: every batch with a class contains one of its representatives; needs balanced batches,
    and works with every loss. Table: their embeddings are a class table, as in the successor
    (chance-constrained projections); for contrastive, triplet and multi-similarity loss.
    """

    table: RepresentativeTableConfig = RepresentativeTableConfig()
    """The table of `form: table`."""

    steps_per_problem: PositiveInt = 200
    """Maximum number of steps of a problem."""

    patience: PositiveInt | None = None
    """Validations without a higher MAP@R after which a problem ends; null disables this."""

    min_steps: NonNegativeInt = 0
    """With `patience`: minimum number of steps of a problem."""

    proximal_weight: NonNegativeFloat = 2e-4
    """Weight of half the squared distance to the last solution; 0 in the first problem."""

    proximal_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the weight from one problem to the next."""

    representatives_per_class: PositiveInt = 1
    """M, representatives of each class. With `form: table` a class of fewer images has fewer."""

    selection: Literal["random", "k_center"] = "random"
    """Random: a seeded sample. K_center: greedy k-centre on the embeddings of a seeded pool."""

    pool_per_class: PositiveInt = 12
    """With `selection: k_center`: images of each class in the pool."""

    pairs: Literal["all", "representatives"] = "all"
    """Which pairs and triplets a pair loss counts: all, or those that involve a representative.

    With the latter alone a batch loses most of its pairs.
    """

    mining: ClassMiningConfig | None = None
    """Hard class mining; null cycles through the classes."""

    lead_steps: PositiveInt = 32
    """Steps between the preparation of a problem and its first step.

    The loader prefetches, so this must be at least the number of prefetched batches. It must be
    less than `steps_per_problem` and `mining.refresh_every`. With `form: table` and no mining,
    batches do not depend on the problem, and it is not used.
    """

    @property
    def forms_batches(self) -> bool:
        """Whether batches depend on the problem, so that the loader must know it ahead."""
        return self.form == "batch" or self.mining is not None

    @model_validator(mode="after")
    def _check(self) -> ProjectionsConfig:
        if self.form == "batch" and self.table != RepresentativeTableConfig():
            raise ValueError(
                "table has settings, but form is batch, which has no table. Set form to table, or "
                "remove table"
            )
        if self.form == "table" and self.pairs != "all":
            raise ValueError(
                f"pairs is {self.pairs}, but with form table the representatives are in the table, "
                "not in batches. Set pairs to all"
            )
        if self.forms_batches and self.lead_steps >= self.steps_per_problem:
            raise ValueError(
                f"lead_steps {self.lead_steps} must be less than steps_per_problem "
                f"{self.steps_per_problem}: a problem is prepared during the previous one"
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
                f"{self.steps_per_problem}: no problem lasts longer"
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
