"""Configuration of studies, many runs as one: comparisons of methods, searches of values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section, resumable
from dml_dist.config.search_space import MethodName, SearchSection, format_value

# ---------------------------------------------------------------- comparisons


class SearchConfig(SearchSection):
    """A search of some values of each method: the same space, trials and steps for all.

    A trial is a run on one process that sees training classes alone; its value is the highest
    MAP@R on the validation classes. The first trial has the method's own values, where the space
    contains them; the sampler draws the others.
    """

    trials: PositiveInt
    """Trials of each method; the sampler grid makes one for each point, and no more."""

    steps: PositiveInt
    """Optimiser updates of a trial."""


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


# ---------------------------------------------------------------- searches of values

METHOD_KEY = "method"
"""The key of a trial's method among its values."""


class ASHAPrunerConfig(Section):
    """Optuna's asynchronous successive halving: at each rung the best 1 / reduction go on."""

    name: Literal["asha"] = "asha"

    grace_steps: PositiveInt | None = None
    """The first rung, in steps of a trial; the next ones are at reduction, reduction^2, ... times
    it. Null: 1 / reduction^2 of a trial.
    """

    reduction: Annotated[int, Field(ge=2)] = 3
    """Ratio of neighboring rungs, and of the trials that reach them."""


class MedianPrunerConfig(Section):
    """Optuna's median rule: a trial whose best value is below the median at its step is pruned."""

    name: Literal["median"] = "median"

    grace_steps: PositiveInt | None = None
    """Steps of a trial before it can be pruned; null: 1 / 9 of a trial."""

    startup_trials: PositiveInt = 5
    """Finished trials before any is pruned."""


class NoPrunerConfig(Section):
    """Every trial is trained to its end."""

    name: Literal["none"] = "none"


PrunerConfig = Annotated[
    ASHAPrunerConfig | MedianPrunerConfig | NoPrunerConfig, Field(discriminator="name")
]


TRAIN_SECONDS = "train_seconds"
"""The objective that is no metric of validation classes."""


class ObjectiveConfig(Section):
    """What a search optimises."""

    metric: str = "map_at_r"
    """A metric of the validation classes, of the checkpoint with their highest MAP@R: map_at_r,
    r_precision, recall_at_K, with `nir` also density, spectral_decay, uniformity; or train_seconds.
    """

    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether high or low values are good."""

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.metric == TRAIN_SECONDS and self.direction == "maximize":
            raise ValueError(f"{TRAIN_SECONDS} needs direction minimize, got maximize")
        return self


class TuneConfig(SearchSection):
    """A search of values on validation classes, for `dml-dist tune`.

    Each trial is a run of this configuration with other values, executed as `launch` says. The
    first trials have the configuration's own values and those of `start`.
    """

    trials: PositiveInt = resumable(32)
    """Number of trials of the study, those of `start` included."""

    parallel: PositiveInt | None = resumable(None)
    """Number of trials at a time; null: as many as the cluster has CPUs and GPUs for."""

    hours: PositiveFloat | None = resumable(None)
    """Time limit of one call of the command; trials that are running are stopped and can go on."""

    methods: dict[MethodName, tuple[str, ...]] = {}  # noqa: RUF012 (pydantic copies it)
    """Method and its changes to this configuration, as with --set; the search chooses among them.

    Paths of `space` that a method does not have are named in `without`.
    """

    start: tuple[dict[str, Any], ...] = ()
    """Values of early trials, such as published ones: path -> value; with `methods` each names its
    `method`. The sampler draws those that are missing.
    """

    pruner: PrunerConfig = ASHAPrunerConfig()
    """Which trials are stopped early; none with two objectives."""

    objectives: Annotated[tuple[ObjectiveConfig, ...], Field(min_length=1, max_length=2)] = (
        ObjectiveConfig(),
    )
    """One metric, or two for a Pareto front."""

    folds: PositiveInt = 1
    """1: the classes that `validation` holds out. From 2: so many class-disjoint folds of the
    training classes; a trial is a run for each of them, its value the mean.
    """

    storage: Literal["auto", "sqlite", "journal"] = resumable("auto")
    """Optuna's storage in the study's folder; auto: journal on a shared disk, else sqlite."""

    final_seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = resumable((0, 1, 2))
    """Seeds of the runs of --final."""

    @model_validator(mode="after")
    def _check(self) -> TuneConfig:
        if unknown := [name for name in self.without if name not in self.methods]:
            raise ValueError(
                f"without must name methods ({', '.join(self.methods) or 'there are none'}), "
                f"got {', '.join(unknown)}"
            )
        metrics = [objective.metric for objective in self.objectives]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"objectives must have different metrics, got {', '.join(metrics)}")
        if len(metrics) > 1 and self.pruner.name != "none":
            raise ValueError(
                f"pruner must be none with two objectives, got {self.pruner.name}: no value says "
                "which trial is worse"
            )
        if len(set(self.final_seeds)) < len(self.final_seeds):
            raise ValueError(
                f"final_seeds must differ from each other, got {list(self.final_seeds)}"
            )
        for number, point in enumerate(self.start):
            self._check_start(f"start.{number}", dict(point))
        self._check_sampler()
        return self

    def _check_start(self, place: str, values: dict[str, Any]) -> None:
        method = values.pop(METHOD_KEY, None) if self.methods else None
        # Of a list, since the value may have no hash.
        if self.methods and method not in list(self.methods):
            raise ValueError(
                f"{place}.{METHOD_KEY} must be one of the methods {', '.join(self.methods)}, "
                f"got {format_value(method)}"
            )
        known = [path for path in self.space if path not in self.without.get(str(method), ())]
        for path, value in values.items():
            if path not in known:
                whose = f" that {method} has" if method else ""
                raise ValueError(
                    f"{place} must name paths of space{whose} ({', '.join(known)}), got {path}"
                )
            if not self.space[path].contains(value):
                raise ValueError(
                    f"{place}.{path} must be {self.space[path]}, as in space, got {value!r}"
                )

    def _check_sampler(self) -> None:
        if self.sampler.name in ("cmaes", "gp") and self.methods:
            raise ValueError(
                f"sampler {self.sampler.name} cannot choose among methods, whose spaces differ; "
                "use tpe, random or grid, or remove methods"
            )
        if self.sampler.name == "cmaes" and len(self.objectives) > 1:
            raise ValueError("sampler cmaes has one objective, got two; use tpe, gp or random")
