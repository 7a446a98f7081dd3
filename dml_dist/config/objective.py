"""Configuration of losses and optimisation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    CustomSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from dml_dist.config.pair_losses import (
    ContrastiveConfig,
    MarginConfig,
    MultiSimilarityConfig,
    TripletConfig,
)
from dml_dist.config.proxy_losses import (
    ArcFaceConfig,
    CosFaceConfig,
    NormalizedSoftmaxConfig,
    ProxyAnchorConfig,
    ProxyNCAConfig,
    SoftTripleConfig,
)

# ---------------------------------------------------------------- losses


class CustomLossConfig(CustomSection):
    """A custom loss, of row form (over proxies) or pair form (over the global batch)."""

    name: Literal["custom"] = "custom"


LossConfig = Annotated[
    ProxyNCAConfig
    | ProxyAnchorConfig
    | SoftTripleConfig
    | NormalizedSoftmaxConfig
    | CosFaceConfig
    | ArcFaceConfig
    | ContrastiveConfig
    | TripletConfig
    | MarginConfig
    | MultiSimilarityConfig
    | CustomLossConfig,
    Field(discriminator="name"),
]

# ---------------------------------------------------------------- optimisers


class _OptimizerConfig(Section):
    lr: PositiveFloat = 1e-3
    """Learning rate of the backbone, and of every group without one of its own."""

    head_lr: PositiveFloat | None = None
    """Learning rate of the embedding head; null means `lr`."""

    proxy_lr: PositiveFloat | None = None
    """Learning rate of the proxies; null means `lr`."""

    representative_lr: PositiveFloat | None = None
    """Learning rate of the representatives of `projections.form: table`; null means `lr`."""

    loss_lr: PositiveFloat | None = None
    """Learning rate of other parameters of the loss (margin's beta); null means `lr`."""

    bias_lr: PositiveFloat | None = None
    """Learning rate of biases of backbone and head; null means that of their group."""

    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of all parameters that are not excluded."""

    no_weight_decay: tuple[
        Literal["backbone", "head", "biases", "norms", "proxies", "loss"], ...
    ] = ("biases", "norms", "proxies", "loss")
    """Kinds of parameters without weight decay; representatives count as proxies."""


class AdamConfig(_OptimizerConfig):
    """Adam."""

    name: Literal["adam"] = "adam"

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the running means of the gradient and of its square."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; Proxy-NCA recipes use 1.0."""


class AdamWConfig(_OptimizerConfig):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = "adamw"

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Decay of the running means of the gradient and of its square."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class SGDConfig(_OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum."""

    nesterov: bool = False
    """Nesterov's form of momentum; needs momentum > 0."""

    @model_validator(mode="after")
    def _check(self) -> SGDConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum > 0, got momentum 0")
        return self


class RMSpropConfig(_OptimizerConfig):
    """RMSprop."""

    name: Literal["rmsprop"] = "rmsprop"

    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the running mean of the squared gradient."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


class CustomOptimizerConfig(CustomSection, _OptimizerConfig):
    """`target(parameter_groups, **options)` returns a torch optimiser with elementwise state."""

    name: Literal["custom"] = "custom"


OptimizerConfig = Annotated[
    AdamConfig | AdamWConfig | SGDConfig | RMSpropConfig | CustomOptimizerConfig,
    Field(discriminator="name"),
]

# ---------------------------------------------------------------- schedules


class ConstantScheduleConfig(Section):
    """Constant learning rates after warm-up."""

    name: Literal["constant"] = "constant"

    warmup_steps: NonNegativeInt = 0
    """Steps over which the factor rises linearly to 1."""


class StepScheduleConfig(Section):
    """The learning rates are multiplied by gamma at each milestone."""

    name: Literal["step"] = "step"

    warmup_steps: NonNegativeInt = 0
    """Steps over which the factor rises linearly to 1."""

    milestones: tuple[PositiveInt, ...]
    """Epochs at whose start the factor is multiplied by gamma, in increasing order."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The factor."""

    @model_validator(mode="after")
    def _check(self) -> StepScheduleConfig:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {list(self.milestones)}")
        return self


class CosineScheduleConfig(Section):
    """Cosine decay of the learning rates to `final` at the last step."""

    name: Literal["cosine"] = "cosine"

    warmup_steps: NonNegativeInt = 0
    """Steps over which the factor rises linearly to 1."""

    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Factor at the end."""


ScheduleConfig = Annotated[
    ConstantScheduleConfig | StepScheduleConfig | CosineScheduleConfig,
    Field(discriminator="name"),
]
