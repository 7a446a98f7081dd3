"""Search spaces and samplers: what a search of hyper-parameters draws, and how."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import RUN_NAME, NonNegativeInt, PositiveFloat, PositiveInt, Section

MethodName = Annotated[str, Field(pattern=RUN_NAME)]

# ---------------------------------------------------------------- distributions


class FloatDistributionConfig(Section):
    """A number, as Optuna's FloatDistribution."""

    type: Literal["float"]

    low: float
    """The smallest value."""

    high: float
    """The largest value."""

    step: PositiveFloat | None = None
    """Distance between neighboring values, counted from low; null allows every number."""

    log: bool = False
    """Whether values are drawn on a logarithmic scale; excludes step and needs low > 0."""

    @model_validator(mode="after")
    def _check(self) -> FloatDistributionConfig:
        _check_range(self.low, self.high, self.step)
        if self.log and self.step is not None:
            raise ValueError(f"log and step exclude each other, got log true and step {self.step}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, got low {self.low}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether the distribution can draw a value."""
        if not _is_number(value) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.step if self.step is not None else 0.0
        return abs(steps - round(steps)) < 1e-8  # Optuna's tolerance.

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that a configuration must accept for it to accept all of them."""
        return self.low, self.high

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All values; None if there is no step."""
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        return tuple(min(self.low + place * self.step, self.high) for place in range(count))

    def __str__(self) -> str:
        """Describe the values: 0.0003 to 0.01 (log)."""
        step = "" if self.step is None else f" in steps of {self.step:g}"
        return f"{self.low:g} to {self.high:g}{step}{' (log)' if self.log else ''}"


class IntDistributionConfig(Section):
    """An integer, as Optuna's IntDistribution."""

    type: Literal["int"]

    low: int
    """The smallest value."""

    high: int
    """The largest value."""

    step: PositiveInt = 1
    """Distance between neighboring values, counted from low."""

    log: bool = False
    """Whether values are drawn on a logarithmic scale; needs step 1 and low >= 1."""

    @model_validator(mode="after")
    def _check(self) -> IntDistributionConfig:
        _check_range(self.low, self.high, self.step)
        if self.log and self.step != 1:
            raise ValueError(f"log and step exclude each other, got log true and step {self.step}")
        if self.log and self.low < 1:
            raise ValueError(f"log needs low >= 1, got low {self.low}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether the distribution can draw a value."""
        inside = _is_number(value) and self.low <= value <= self.high
        return inside and (value - self.low) % self.step == 0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that a configuration must accept for it to accept all of them."""
        return self.low, self.high

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All values; None on a logarithmic scale."""
        return None if self.log else tuple(range(self.low, self.high + 1, self.step))

    def __str__(self) -> str:
        """Describe the values: 16 to 64 in steps of 16."""
        step = "" if self.step == 1 else f" in steps of {self.step}"
        return f"{self.low} to {self.high}{step}{' (log)' if self.log else ''}"


class CategoricalDistributionConfig(Section):
    """One of some values without an order, as Optuna's CategoricalDistribution."""

    type: Literal["categorical"]

    choices: Annotated[tuple[Any, ...], Field(min_length=1)]
    """The values: numbers, text, booleans or null."""

    @model_validator(mode="after")
    def _check(self) -> CategoricalDistributionConfig:
        if nested := [choice for choice in self.choices if isinstance(choice, list | dict)]:
            raise ValueError(f"choices must be numbers, text, booleans or null, got {nested[0]}")
        # Optuna compares them with ==, by which 1, 1.0 and true are the same choice.
        if len(set(self.choices)) < len(self.choices):
            raise ValueError(f"choices must differ from each other, got {_listed(self.choices)}")
        return self

    def contains(self, value: Any) -> bool:
        """Whether the distribution can draw a value."""
        return any(value == choice for choice in self.choices)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that a configuration must accept for it to accept all of them."""
        return self.choices

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All values."""
        return self.choices

    def __str__(self) -> str:
        """Describe the values: one of gem, avg."""
        return f"one of {_listed(self.choices)}"


DistributionConfig = Annotated[
    FloatDistributionConfig | IntDistributionConfig | CategoricalDistributionConfig,
    Field(discriminator="type"),
]
SearchSpace = Annotated[dict[str, DistributionConfig], Field(min_length=1)]
"""Path of a field, such as optim.lr, and the distribution of its values."""


def format_value(value: Any) -> str:
    """Return a value of a search space as tables and messages show it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return {None: "null", True: "true", False: "false"}[value] if _is_word(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(map(format_value, choices))


def _check_range(low: float, high: float, step: float | None) -> None:
    if low > high:
        raise ValueError(f"low must not be above high, got low {low} and high {high}")
    # Optuna lowers `high` to the last step with a warning. In decimals, since 0.3 % 0.1 is not 0.
    width = Decimal(str(high)) - Decimal(str(low))
    if step is not None and width % Decimal(str(step)):
        raise ValueError(
            f"high - low must be a multiple of step, got low {low}, high {high} and step {step}"
        )


# ---------------------------------------------------------------- samplers


class TPESamplerConfig(Section):
    """Optuna's tree-structured Parzen estimator: multivariate, with constant liar."""

    name: Literal["tpe"] = "tpe"

    startup_trials: PositiveInt | None = None
    """Random trials before the sampler learns from earlier ones; null: half of them, at most 10."""


class RandomSamplerConfig(Section):
    """Independent random values."""

    name: Literal["random"] = "random"


class GridSamplerConfig(Section):
    """Every combination of values, in order; floats need a step, integers no log."""

    name: Literal["grid"] = "grid"


class CMAESSamplerConfig(Section):
    """Optuna's CMA-ES: numbers only, no methods, one objective."""

    name: Literal["cmaes"] = "cmaes"

    startup_trials: PositiveInt = 1
    """Random trials before the sampler begins."""


class GPSamplerConfig(Section):
    """Optuna's Gaussian process with expected improvement: no methods."""

    name: Literal["gp"] = "gp"

    startup_trials: PositiveInt = 10
    """Random trials before the sampler learns from earlier ones."""


SamplerConfig = Annotated[
    TPESamplerConfig
    | RandomSamplerConfig
    | GridSamplerConfig
    | CMAESSamplerConfig
    | GPSamplerConfig,
    Field(discriminator="name"),
]


class SearchSection(Section):
    """Fields of every search of hyper-parameters."""

    space: SearchSpace
    """Path of a field and its distribution: optim.lr: {type: float, low: 1e-4, high: 1e-1}."""

    without: dict[MethodName, tuple[str, ...]] = {}  # noqa: RUF012 (pydantic copies it)
    """Method and the paths of `space` that do not apply to it: optim.proxy_lr without proxies."""

    sampler: SamplerConfig = TPESamplerConfig()
    """How values are drawn."""

    seed: NonNegativeInt = 0
    """Seed of the sampler."""

    def paths_of(self, method: str | None) -> list[str]:
        """Return the paths that are searched for a method; None if the search has no methods."""
        without = self.without.get(method, ()) if method is not None else ()
        return [path for path in self.space if path not in without]

    @model_validator(mode="after")
    def _check_search(self) -> SearchSection:
        for method, paths in self.without.items():
            if unknown := [path for path in paths if path not in self.space]:
                raise ValueError(
                    f"without.{method} must name paths of space ({', '.join(self.space)}), "
                    f"got {', '.join(unknown)}"
                )
        match self.sampler:
            case GridSamplerConfig():
                endless = [path for path, one in self.space.items() if one.grid is None]
                if endless:
                    raise ValueError(
                        f"sampler grid needs floats with a step and integers without log in space, "
                        f"got {', '.join(f'{path}: {self.space[path]}' for path in endless)}"
                    )
            case CMAESSamplerConfig():
                for path, one in self.space.items():
                    if isinstance(one, CategoricalDistributionConfig):
                        raise ValueError(
                            f"sampler cmaes draws numbers only, got {path}: {one}; use tpe, gp or "
                            "random, or a range"
                        )
        return self
