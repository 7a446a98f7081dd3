"""What is known of a search before it starts: that its trials can be made, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from dml_dist.config import shape
from dml_dist.config.load import with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import format_value
from dml_dist.config.study import METHOD_KEY, TRAIN_SECONDS, ASHAPrunerConfig, TuneConfig
from dml_dist.errors import ConfigError, DmlDistError
from dml_dist.orchestration.launch import uses_gpu, world_size_of
from dml_dist.orchestration.train import plan_without_data
from dml_dist.parallel.representatives import REPRESENTATIVES
from dml_dist.runs.study import is_below, value_at
from dml_dist.runs.tuning import (
    SEARCHABLE,
    check_searchable,
    own_values,
    searched_paths,
    trial_configs,
    tune_section,
    tuned_config,
)
from dml_dist.studies.samplers import first_rung, grid_size
from dml_dist.studies.search import check_space
from dml_dist.studies.storage import starting_points
from dml_dist.train.run_plan import RunPlan

_WITHOUT_PLAN = (METHOD_KEY, "optim", "loss")
"""Values on which it does not depend whether a run can be planned; a plan takes 0.1 s."""


@dataclass(frozen=True)
class SearchPlan:
    """What a search will do.

    Attributes:
        plans: Method, or None without methods, and the plans of its runs, one for each fold, with
            the configuration's own values.
        source: Where the numbers of images and classes come from.
        steps: Optimiser updates of a trial, all folds together.
        validations: Steps of a trial at which it has a value.
        rungs: Of ASHA: the validation that decides on each rung; empty for other pruners.
        grid_size: Points of the grid; None for other samplers.
        num_starts: First trials, with the configuration's own values and those of `start`.
    """

    plans: Mapping[str | None, tuple[RunPlan, ...]]
    source: str
    steps: int
    validations: tuple[int, ...]
    rungs: tuple[int, ...]
    grid_size: int | None
    num_starts: int

    @property
    def world_size(self) -> int:
        """Ranks of a trial."""
        return next(iter(self.plans.values()))[0].world_size

    @property
    def images(self) -> int:
        """Training images of a trial with its own batch size, of the method that has most."""
        return max(
            sum(plan.samples_seen(plan.total_steps) for plan in runs)
            for runs in self.plans.values()
        )


def check_search(config: RunConfig) -> SearchPlan:
    """Check everything of a search that can be known before it starts; nothing is written.

    Args:
        config: The search's configuration, paths absolute.

    Raises:
        DmlDistError: If a trial could not be made, or could not do what the search needs of it.
    """
    section = tune_section(config)
    uses_gpu(config.launch, world_size_of(config.launch))  # Raises where there are too few.
    for path in section.space:
        _check_path(path)
    methods = tuple(section.methods) or (None,)
    found = [_check_method(config, method) for method in methods]
    plans = {method: one for method, (one, _) in zip(methods, found, strict=True)}
    runs = plans[methods[0]]
    for number, point in enumerate(section.start):
        try:
            _check_trial(config, point, runs[0].total_steps)
        except ConfigError as error:
            raise ConfigError(f"tune.start.{number} makes no valid trial:\n{error}") from None
    for method in methods:
        for fold, run in enumerate(plans[method]):
            what = f"fold {fold} of {_of(method, config.name)}"
            _check_steps(run, runs[0].total_steps, what)
        _check_objectives(config, method)
        _check_pruner(config, _validations(config, plans[method]))
    validations = _validations(config, runs)
    steps = validations[-1]
    return SearchPlan(
        plans=plans,
        source=found[0][1],
        steps=steps,
        validations=validations,
        rungs=_rungs(section, validations),
        grid_size=_grid_size(config, methods),
        num_starts=len(starting_points(config)[0]),
    )


# ---------------------------------------------------------------- the space


def _check_path(path: str) -> None:
    """Check that a path may be searched; the configuration says whether it has the field."""
    homes = shape.key_paths()
    if is_below(path, SEARCHABLE) or any(path in places for places in homes.values()):
        check_searchable([path])
        return
    searchable = {
        key: [place for place in places if is_below(place, SEARCHABLE)]
        for key, places in homes.items()
    }
    near = shape.nearest(path.rpartition(".")[2], [key for key in searchable if searchable[key]])
    hint = f"did you mean {' or '.join(searchable[near][:3])}? Otherwise " if near else ""
    raise ConfigError(
        f"tune.space: the configuration has no field {path}; {hint}search fields below "
        f"{', '.join(SEARCHABLE)}"
    )


def _check_method(config: RunConfig, method: str | None) -> tuple[tuple[RunPlan, ...], str]:
    """Check a method and its space; return the plans of its runs and where numbers come from."""
    section = tune_section(config)
    chosen = {} if method is None else {METHOD_KEY: method}
    own = tuned_config(config, chosen)
    try:
        found = [_plan(config, run) for run in trial_configs(config, "trial-0", chosen)]
    except DmlDistError as error:
        raise error if method is None else type(error)(f"method {method}: {error}") from None
    plans = tuple(plan for plan, _ in found)
    paths = searched_paths(config, method)
    for path in paths:
        _check_effect(own, method, path, plans[0])
    check_space(
        section.space,
        paths,
        lambda values: _check_trial(config, {**chosen, **values}, plans[0].total_steps),
        f"tune.space: {method or config.name}",
        f"correct the range, or {_remedy(method)}",
    )
    return plans, found[0][1]


def _check_effect(own: RunConfig, method: str | None, path: str, plan: RunPlan) -> None:
    """Refuse a path that would switch something on, or does nothing."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        above = ".".join(parts[:length])
        if value_at(own, above) is None and any(above in x for x in shape.key_paths().values()):
            raise ConfigError(
                f"tune.space: {path} would switch on {above}, which is null in "
                f"{_of(method, 'the configuration')}; {_remedy(method)}, or set {above}"
            )
    missing = {
        "optim.proxy_lr": "proxies" if not plan.has_proxies else "",
        "optim.representative_lr": ""
        if plan.row_kind == REPRESENTATIVES
        else "table of representatives",
        # The flow, and beta of the margin loss; those of a custom loss are not known.
        "optim.loss_lr": "parameters other than proxies"
        if own.nir is None and own.loss.name not in ("margin", "custom")
        else "",
    }.get(path)
    if missing:
        raise ConfigError(
            f"tune.space: {path} does nothing for {_of(method, 'the configuration')}, whose loss "
            f"{own.loss.name} has no {missing}; {_remedy(method)}"
        )


def _check_trial(config: RunConfig, values: Mapping[str, Any], steps: int) -> RunConfig:
    """Make a trial with some values, and its plan; return the configuration of its first run."""
    run = trial_configs(config, "trial-0", values)[0]
    if all(is_below(path, _WITHOUT_PLAN) for path in values):
        return run
    try:
        plan, _ = _plan(config, run)
    except DmlDistError as error:
        raise ConfigError(str(error)) from None
    what = ", ".join(f"{path} = {format_value(value)}" for path, value in values.items())
    _check_steps(plan, steps, what)
    return run


def _plan(config: RunConfig, run: RunConfig) -> tuple[RunPlan, str]:
    # A trial's own test split are validation classes, which counts of a data set do not list.
    data = run.data.model_copy(update={"test_split": config.data.test_split})
    return plan_without_data(run.model_copy(update={"data": data}))


def _check_steps(plan: RunPlan, steps: int, what: str) -> None:
    if plan.total_steps != steps:
        raise ConfigError(
            f"all runs of a search need the same number of steps, but there are runs of {steps:,} "
            f"and of {plan.total_steps:,} ({what}): the length of an epoch depends on batches and "
            "folds; set train.steps instead of train.epochs"
        )


def _remedy(method: str | None) -> str:
    return f"name the path in tune.without.{method}" if method else "remove the path"


def _of(method: str | None, otherwise: str) -> str:
    return f"method {method}" if method else otherwise


# ---------------------------------------------------------------- objectives, pruner, grid


def _check_objectives(config: RunConfig, method: str | None) -> None:
    own = tuned_config(config, {} if method is None else {METHOD_KEY: method})
    recorded = ["map_at_r", "r_precision", *(f"recall_at_{k}" for k in own.evaluation.recall_at)]
    if own.nir is not None:
        recorded += ["density", "spectral_decay", "uniformity"]
    for place, objective in enumerate(tune_section(config).objectives):
        if objective.metric not in (*recorded, TRAIN_SECONDS):
            raise ConfigError(
                f"tune.objectives.{place}.metric: validations of "
                f"{_of(method, 'the configuration')} do not record {objective.metric}; they record "
                f"{', '.join(recorded)} (K of recall_at_K is one of evaluation.recall_at; density, "
                f"spectral_decay and uniformity need nir), and every trial {TRAIN_SECONDS}"
            )


def _validations(config: RunConfig, runs: tuple[RunPlan, ...]) -> tuple[int, ...]:
    """Return the steps of a trial at which it has a value."""
    found = []
    for fold, run in enumerate(runs):
        every = config.evaluation.every_steps or run.steps_per_epoch
        inside = [*range(every, run.total_steps, every), run.total_steps]
        found += [fold * run.total_steps + step for step in inside]
    return tuple(found)


def _check_pruner(config: RunConfig, validations: tuple[int, ...]) -> None:
    section, steps = tune_section(config), validations[-1]
    first = first_rung(section.pruner, steps)
    if first is None:
        return
    name = section.pruner.name
    if section.objectives[0].metric == TRAIN_SECONDS:
        raise ConfigError(
            f"tune.pruner {name} compares trials while they are trained, but {TRAIN_SECONDS} is "
            "known only at their end; set tune.pruner to {name: none}, or give another metric"
        )
    if first >= steps:
        raise ConfigError(
            f"tune.pruner.grace_steps {first:,} must be below the {steps:,} steps of a trial, "
            "otherwise no trial is ever pruned; lower it, or set tune.pruner to {name: none}"
        )
    if not any(first <= step < steps for step in validations):
        every = config.evaluation.every_steps
        raise ConfigError(
            f"tune.pruner {name} can stop a trial at a validation from step {first:,} on, but a "
            f"trial of {steps:,} steps has none between that step and its end: "
            f"evaluation.every_steps is {'null, an epoch' if every is None else f'{every:,}'}; "
            "lower it, or set tune.pruner to {name: none}"
        )


def _rungs(section: TuneConfig, validations: tuple[int, ...]) -> tuple[int, ...]:
    """Return the validation that decides on each rung: the first one at it or later."""
    pruner, steps, found = section.pruner, validations[-1], []
    if not isinstance(pruner, ASHAPrunerConfig):
        return ()
    rung = first_rung(pruner, steps) or 1
    while (decides := next((step for step in validations if step >= rung), steps)) < steps:
        found.append(decides)
        rung *= pruner.reduction
    return tuple(found)


def _grid_size(config: RunConfig, methods: tuple[str | None, ...]) -> int | None:
    section = tune_section(config)
    if section.sampler.name != "grid":
        return None
    size = sum(grid_size(section.space, searched_paths(config, method)) for method in methods)
    if section.trials > size:
        raise ConfigError(
            f"tune.trials is {section.trials:,}, but the grid of tune.space has only {size:,} "
            f"points; set tune.trials to at most {size:,}, or choose smaller steps"
        )
    return size


# ---------------------------------------------------------------- dry run


def dry_run_tuning(config: RunConfig, console: Console) -> None:
    """Print what a search will do; nothing is written or started."""
    config = with_absolute_paths(config)
    plan = check_search(config)
    space = Table("searched", "values", "own value", "methods")
    for path, values in tune_section(config).space.items():
        methods = [one for one in plan.plans if path in searched_paths(config, one)]
        own = dict.fromkeys(_own_value(config, one, path) for one in methods)
        names = [one for one in methods if one is not None]
        space.add_row(path, str(values), "\n".join(own), "\n".join(names) or "all")
    console.print(space)
    facts = Table("plan", config.name, title_justify="left")
    for label, value in _facts(config, plan):
        facts.add_row(label, value)
    console.print(facts)


def _own_value(config: RunConfig, method: str | None, path: str) -> str:
    chosen = {} if method is None else {METHOD_KEY: method}
    value = format_value(value_at(tuned_config(config, chosen), path))
    return value if path in own_values(config, method) else f"{value} (outside)"


def _facts(config: RunConfig, plan: SearchPlan) -> list[tuple[str, str]]:
    section = tune_section(config)
    trials = section.trials
    objectives = " and ".join(f"{one.direction} {one.metric}" for one in section.objectives)
    grid = "" if plan.grid_size is None else f", {plan.grid_size:,} points"
    folds = f"in {section.folds} folds, " if section.folds > 1 else ""
    given = " or those of tune.start" if section.start else ""
    first = f", the first {plan.num_starts:,} with own values{given}" if plan.num_starts else ""
    parallel = section.parallel or "as many as the cluster has CPUs and GPUs for"
    return [
        ("data", plan.source),
        *next(iter(plan.plans.values()))[0].describe()[:2],
        ("objective", f"{objectives} on validation classes"),
        ("sampler", f"{section.sampler.name}, seed {section.seed}{grid}"),
        ("trials", f"{trials:,}{first}"),
        ("trials at a time", str(parallel)),
        ("ranks of a trial", f"{plan.world_size:,}"),
        ("steps of a trial", f"{plan.steps:,}, {folds}{len(plan.validations):,} validations"),
        ("pruner", "\n".join(_pruning(section, plan))),
        ("steps in all", _total_steps(section, plan)),
        ("images in all", f"at most {trials * plan.images:,}"),
    ]


def _pruning(section: TuneConfig, plan: SearchPlan) -> list[str]:
    pruner = section.pruner
    first = first_rung(pruner, plan.steps)
    if first is None:
        return ["none: every trial is trained to its end"]
    if not isinstance(pruner, ASHAPrunerConfig):
        return [f"{pruner.name}, from step {first:,} on"]
    reach = [_reach(section, pruner, place) for place in range(len(plan.rungs) + 1)]
    lines = [f"{pruner.name}, the best 1 / {pruner.reduction} go on"]
    for place, step in enumerate(plan.rungs):
        if step not in plan.rungs[:place]:  # One validation may decide on several rungs.
            lines.append(f"step {step:,}: reached by about {reach[place]:,} trials")
    return [*lines, f"the end: about {reach[-1]:,} trials"]


def _reach(section: TuneConfig, pruner: ASHAPrunerConfig, rungs: int) -> int:
    """Return how many trials are expected to pass a number of rungs."""
    return max(1, round(section.trials / pruner.reduction**rungs))


def _total_steps(section: TuneConfig, plan: SearchPlan) -> str:
    most, pruner = section.trials * plan.steps, section.pruner
    if not isinstance(pruner, ASHAPrunerConfig):
        return f"{most:,}" if pruner.name == "none" else f"at most {most:,}"
    ends = [*plan.rungs, plan.steps]
    about = sum(
        _reach(section, pruner, place) * (end - begin)
        for place, (begin, end) in enumerate(zip([0, *plan.rungs], ends, strict=True))
    )
    return f"about {about:,} of {most:,} without pruning"
