"""Configuration of losses over pairs and triplets of the global batch.

Distances are those of unit vectors, 0 to 2; larger margins are errors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import NonNegativeFloat, PositiveFloat, Section

_MAX_DISTANCE = 2.0
"""Of two unit vectors; 4 when squared."""


class ContrastiveConfig(Section):
    """Contrastive loss over all ordered pairs of the global batch; distances are not squared."""

    name: Literal["contrastive"] = "contrastive"

    positive_margin: Annotated[float, Field(ge=-2, lt=2)] = 0.0
    """m_pos; positives are pulled to this distance. With a negative one all of them count."""

    negative_margin: Annotated[float, Field(gt=0, le=2)] = 0.5
    """m_neg; negatives are pushed to this distance. Distances of unit vectors are at most 2."""

    reduction: Literal["nonzero", "mean"] = "nonzero"
    """Mean over the terms that are not zero, or all pairs; separate for positives and negatives."""

    @model_validator(mode="after")
    def _check(self) -> ContrastiveConfig:
        if self.positive_margin >= self.negative_margin:
            raise ValueError(
                f"positive_margin must be below negative_margin, got {self.positive_margin} and "
                f"{self.negative_margin}: positives would be left farther apart than negatives"
            )
        return self


class TripletConfig(Section):
    """Triplet loss over the global batch."""

    name: Literal["triplet"] = "triplet"

    margin: NonNegativeFloat = 0.1
    """m; at most the largest distance of unit vectors: 2, or 4 with `squared`."""

    mining: Literal["all", "semi_hard", "hard"] = "all"
    """Triplets that count: all; those with d_ap < d_an < d_ap + m; each anchor's hardest."""

    squared: bool = False
    """Whether distances are squared."""

    swap: bool = False
    """Whether the positive's distance to the negative replaces the anchor's if it is smaller."""

    smooth: bool = False
    """softplus in place of relu."""

    reduction: Literal["nonzero", "mean"] = "nonzero"
    """Mean over the terms that are not zero, or over all triplets that count."""

    triplet_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for triplets, in MiB; they are processed in chunks of this size."""

    @model_validator(mode="after")
    def _check(self) -> TripletConfig:
        largest = _MAX_DISTANCE**2 if self.squared else _MAX_DISTANCE
        if self.margin > largest:
            raise ValueError(
                f"margin must be at most {largest:g}, the largest distance of unit vectors with "
                f"squared: {str(self.squared).lower()}, got {self.margin}: no triplet meets it"
            )
        if self.mining == "semi_hard" and self.margin == 0:
            raise ValueError(
                "mining: semi_hard needs margin > 0, got margin 0: no triplet would count"
            )
        return self


class MarginConfig(Section):
    """Margin loss with distance-weighted negatives (Wu et al., ICCV 2017)."""

    name: Literal["margin"] = "margin"

    margin: PositiveFloat = 0.2
    """m; positives are pulled below beta - m, negatives pushed above beta + m."""

    beta: PositiveFloat = 1.2
    """The boundary distance of positives and negatives, or its initial value if learned."""

    beta_form: Literal["fixed", "scalar", "class"] = "scalar"
    """beta is a constant, one learned number, or one learned number per class."""

    nu: NonNegativeFloat = 0.0
    """Weight of the batch's mean beta, which is added to the loss."""

    distance_cutoff: PositiveFloat = 0.5
    """Negatives at smaller distances are sampled as if they were at this distance."""

    loss_cutoff: Annotated[float, Field(gt=0, lt=2)] = 1.4
    """Negatives at this distance or beyond are sampled only if there are no others."""

    reduction: Literal["nonzero", "mean"] = "nonzero"
    """Mean over the terms that are not zero, or over all sampled pairs."""

    @model_validator(mode="after")
    def _check(self) -> MarginConfig:
        if self.beta - self.margin < 0 or self.beta + self.margin > _MAX_DISTANCE:
            raise ValueError(
                "beta - margin and beta + margin must lie within 0 and 2, the distances of unit "
                f"vectors, got {self.beta - self.margin:g} and {self.beta + self.margin:g} from "
                f"beta {self.beta} and margin {self.margin}: no pair can satisfy such a margin"
            )
        if self.distance_cutoff >= self.loss_cutoff:
            raise ValueError(
                f"distance_cutoff must be below loss_cutoff, got {self.distance_cutoff} and "
                f"{self.loss_cutoff}: no negative would be sampled by its distance"
            )
        if self.nu > 0 and self.beta_form == "fixed":
            raise ValueError(
                f"nu {self.nu} needs beta_form: scalar or class, got fixed: a constant beta has "
                "no gradient to weight"
            )
        return self


class MultiSimilarityConfig(Section):
    """Multi-similarity loss with its miner (Wang et al., CVPR 2019)."""

    name: Literal["multi_similarity"] = "multi_similarity"

    positive_scale: PositiveFloat = 2.0
    """a, the factor of positives' cosines."""

    negative_scale: PositiveFloat = 50.0
    """b, the factor of negatives' cosines."""

    base: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """l, the cosine at which a pair's exponential is 1."""

    epsilon: Annotated[float, Field(gt=0, le=2)] | None = 0.1
    """The miner keeps pairs within this of the hardest of the other kind; null keeps all pairs."""

    reduction: Literal["nonzero", "mean"] = "mean"
    """Mean over the rows of the batch, as in the paper, or over those whose term is not zero."""
