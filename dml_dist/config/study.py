"""Configuration of studies, many runs as one: search spaces, and comparisons of methods."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    RUN_NAME,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    resumable,
)

MethodName = Annotated[str, Field(pattern=RUN_NAME)]

# ---------------------------------------------------------------- search spaces


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


# ---------------------------------------------------------------- comparisons


class SearchConfig(Section):
    """A search of some values of each method: the same space, trials and steps for all.

    A trial is a run on one process that sees training classes alone; its value is the highest
    MAP@R on the validation classes. The first trial has the method's own values, where the space
    contains them; Optuna's TPE sampler draws the others.
    """

    trials: PositiveInt
    """Trials of each method."""

    steps: PositiveInt
    """Optimiser updates of a trial."""

    space: SearchSpace
    """Path of a field and its distribution: optim.lr: {type: float, low: 1e-4, high: 1e-1}."""

    without: dict[MethodName, tuple[str, ...]] = {}  # noqa: RUF012 (pydantic copies it)
    """Method and the paths of `space` that do not apply to it: optim.proxy_lr without proxies."""

    seed: NonNegativeInt = 0
    """Seed of the sampler, the same for all methods."""

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        for method, paths in self.without.items():
            if unknown := [path for path in paths if path not in self.space]:
                raise ValueError(
                    f"without.{method} must name paths of space ({', '.join(self.space)}), "
                    f"got {', '.join(unknown)}"
                )
        return self


class AxisConfig(Section):
    """A figure of the final results against a field in which methods differ."""

    path: str
    """The field, a number in every method named below, such as loss.proxy_share."""

    lines: Annotated[
        dict[str, Annotated[tuple[MethodName, ...], Field(min_length=2)]], Field(min_length=1)
    ]
    """Name of a line, and the methods that are its points."""


class CompareConfig(Section):
    """Methods x seeds on one data set with equal steps, for `dml-dist compare`."""

    methods: Annotated[dict[MethodName, tuple[str, ...]], Field(min_length=1)]
    """Method and its changes to this configuration, as with --set, such as ["loss.name=triplet"].

    Data, splits, validation, evaluation, batch size and steps are the same for all.
    """

    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Each method is run once with each seed."""

    reference: str | None = None
    """Method whose best R@1 is the target for the others; null means triplet, if it is a method."""

    bases: dict[MethodName, MethodName] = resumable({})
    """Method and the one that it should improve; the page shows their difference seed by seed."""

    axis: AxisConfig | None = resumable(None)
    """A figure of results against a field; null draws none."""

    search: SearchConfig | None = None
    """Search of some values for each method before its runs; null keeps the configured values."""

    parallel: PositiveInt = resumable(1)
    """Number of runs at a time, as Ray tasks on one process each.

    With `launch.launcher` ray or torchrun each run is distributed, and this must be 1.
    """

    references: str = resumable("configs/references.yaml")
    """File of published results; the page shows those of the same data, network and protocol."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from each other, got {list(self.seeds)}")
        known = ", ".join(self.methods)
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference must be one of the methods {known}, got {self.reference}")
        named = {
            "search.without": [] if self.search is None else list(self.search.without),
            "bases": [*self.bases, *self.bases.values()],
            "axis.lines": []
            if self.axis is None
            else [n for x in self.axis.lines.values() for n in x],
        }
        for place, names in named.items():
            if others := dict.fromkeys(name for name in names if name not in self.methods):
                raise ValueError(f"{place} must name methods ({known}), got {', '.join(others)}")
        if own := [name for name, base in self.bases.items() if name == base]:
            raise ValueError(f"bases must name another method, got {own[0]}: {own[0]}")
        return self

    @property
    def mark(self) -> str | None:
        """The method whose best R@1 is the target, if there is one."""
        return self.reference or ("triplet" if "triplet" in self.methods else None)
