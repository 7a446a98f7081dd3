"""Configuration of non-isotropy regularisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class FlowConfig(Section):
    """The conditional flow: affine coupling blocks with the proxy as condition."""

    num_blocks: PositiveInt = 5
    """Coupling blocks, each after a fixed seeded permutation."""

    depth: Annotated[int, Field(ge=2)] = 8
    """Linear layers of each sub-network."""

    width: PositiveInt = 128
    """Width of their hidden layers."""

    clamp: PositiveFloat = 2.0
    """Bound on the log-scale of a coupling."""


class NIRConfig(Section):
    """Non-isotropy regularisation (Roth, Vinyals, Akata, CVPR 2022) over a loss with proxies.

    The loss becomes `flow_weight` times the regulariser plus `loss_weight` times `loss`.
    """

    flow: FlowConfig = FlowConfig()
    """The flow."""

    flow_weight: PositiveFloat = 1.0
    """Weight of the regulariser; the paper's weight, which leaves `loss_weight` at 1."""

    loss_weight: PositiveFloat = 1.0
    """Weight of the base loss; the released code weights this one (0.0075 to 0.3)."""

    link: Literal["nll", "exp"] = "nll"
    """Nll: the mean negative log-likelihood, as in the paper. Exp: of its exponential, as released;
    above 60 the exponential is continued along its tangent."""

    noise: NonNegativeFloat = 0.0
    """Uniform noise in [0, noise) added to normalised embeddings, which are normalised again."""

    warmup_steps: NonNegativeInt = 0
    """Steps at the start in which the regulariser fits the flow alone."""

    gradients_to: Annotated[
        tuple[Literal["embeddings", "proxies", "flow"], ...], Field(min_length=1)
    ] = ("embeddings", "proxies", "flow")
    """What the regulariser's gradients update."""

    @model_validator(mode="after")
    def _check(self) -> NIRConfig:
        if len(set(self.gradients_to)) != len(self.gradients_to):
            raise ValueError(f"gradients_to must not repeat, got {list(self.gradients_to)}")
        return self
