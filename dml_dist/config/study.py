"""Configuration of a comparison: methods that differ in few fields, seeds, one search for all."""

from __future__ import annotations

from typing import Annotated

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


class RangeConfig(Section):
    """Numbers among which a field is searched."""

    low: PositiveFloat
    """The smallest value."""

    high: PositiveFloat
    """The largest value."""

    log: bool = True
    """Whether values are drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _check(self) -> RangeConfig:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")
        return self


class SearchConfig(Section):
    """Values that are searched for each method: the same ranges, trials and steps for all.

    A trial is a run on one process that sees training classes alone; what counts is the highest
    MAP@R of its validation classes. The first trial has the method's own values, where they lie
    in the ranges; the others are drawn by Optuna's TPE sampler.
    """

    trials: PositiveInt
    """Trials of each method."""

    steps: PositiveInt
    """Optimiser updates of a trial."""

    space: Annotated[dict[str, RangeConfig], Field(min_length=1)]
    """Path of a field, such as optim.lr, and its range."""

    without: dict[MethodName, tuple[str, ...]] = {}  # noqa: RUF012 (pydantic copies it)
    """Method and those paths of `space` that it has not, such as optim.proxy_lr without proxies."""

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
    """Methods x seeds on one data set at equal steps, for `dml-dist compare`."""

    methods: Annotated[dict[MethodName, tuple[str, ...]], Field(min_length=1)]
    """Method and its changes to this configuration, as with --set, such as ["loss.name=triplet"].

    Data, splits, validation, evaluation, batch size and steps are the same for all.
    """

    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """Each method is run once with each of them."""

    reference: str | None = None
    """Method whose best R@1 is the mark for the others; none means triplet, where there is one."""

    bases: dict[MethodName, MethodName] = resumable({})
    """Method and the one that it should improve; their differences are shown, seed by seed."""

    axis: AxisConfig | None = resumable(None)
    """A figure of results against a field; none draws none."""

    search: SearchConfig | None = None
    """Search of some values for each method before the runs; none takes them as they are."""

    parallel: PositiveInt = resumable(1)
    """Runs side by side as Ray tasks, each on one process; 1 is one after another.

    With `launch.launcher` ray or torchrun each run is distributed, and this must be 1.
    """

    references: str = resumable("configs/references.yaml")
    """File of published rows; those of the same data set, network and protocol are shown."""

    @model_validator(mode="after")
    def _check(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each at most once, got {list(self.seeds)}")
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
        """The method whose best R@1 is the mark, if there is one."""
        return self.reference or ("triplet" if "triplet" in self.methods else None)
