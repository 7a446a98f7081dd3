"""`dml-dist compare`: search each method's values, execute its runs, write the page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dml_dist.config.load import with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import format_value
from dml_dist.errors import ConfigError, DmlDistError, RunError
from dml_dist.files import write_bytes_atomic
from dml_dist.orchestration.train import plan_without_data
from dml_dist.report.formatting import format_metric
from dml_dist.report.parts import try_to_write
from dml_dist.report.study.comparison import write_comparison
from dml_dist.report.study.comparison_tables import (
    SINGLE_RUNS,
    TIME,
    comparison_rows,
    difference_rows,
)
from dml_dist.report.study.read import read_comparison
from dml_dist.report.study.references import read_references
from dml_dist.runs.comparison import (
    ComparisonFolder,
    axis_values,
    compare_section,
    method_config,
    run_config,
    run_name,
    searched_paths,
    trial_config,
)
from dml_dist.runtime.datasets import ensure_imported, warn_of_secrets
from dml_dist.runtime.loggers import check_loggers
from dml_dist.runtime.progress import Display, Emit, note, phase
from dml_dist.studies.pool import Pool
from dml_dist.studies.samplers import grid_size
from dml_dist.studies.search import check_space, num_trials, open_study, search_method
from dml_dist.train.run_plan import RunPlan
from dml_dist.urls import local_path

_PROXY_RATE = "optim.proxy_lr"


def run_comparison(
    config: RunConfig, console: Console, *, run_dir: Path | None = None, resume: bool = False
) -> Path:
    """Execute a comparison, or continue it, and return its folder.

    Args:
        config: A run's configuration with the section `compare`.
        console: Where progress and the table go.
        run_dir: The comparison's folder; None is runs/NAME.
        resume: Continue the comparison in the folder, instead of refusing one that exists.

    Raises:
        DmlDistError: If configuration or data are wrong, before anything starts; or if a run
            failed, after all others are finished.
    """
    config = with_absolute_paths(config)
    section = compare_section(config)
    folder = ComparisonFolder((run_dir or Path("runs") / config.name).absolute())
    folder.check(config, resume=resume)
    plans = _check_methods(config)
    warn_of_secrets(config, console)
    if local_path(config.data.path) is not None:
        ensure_imported(config.data, console)
    with folder.lock():
        folder.check(config, resume=resume)  # Again: another command may have been faster.
        _begin(config, folder)
        _announce(config, plans, console)
        with Pool(folder, config.launch, section.parallel) as pool, Display(console) as emit:
            values = _search(config, folder, pool, emit)
            problems = _run(config, folder, pool, emit, values)
        page = try_to_write(write_comparison, folder.path)
    print_comparison(folder.path, console)
    if page is not None:
        console.print(f"report:  {page}", highlight=False, soft_wrap=True)
    if problems:
        count = len(section.methods) * len(section.seeds)
        raise RunError(
            f"{len(problems)} of {count} runs failed: {'; '.join(problems)}; fix the cause, then "
            "repeat the command with --resume"
        )
    console.print(f"results: {folder.path}", highlight=False, soft_wrap=True)
    return folder.path


def dry_run_comparison(config: RunConfig, console: Console) -> None:
    """Print the runs of a comparison and their cost; nothing is written or started."""
    config = with_absolute_paths(config)
    section = compare_section(config)
    plans = _check_methods(config)
    check_loggers(config.loggers)
    table = Table()
    for text in ("method", "changes", "searched", "trials", "runs", "steps", "images"):
        table.add_column(text, overflow="fold")
    total_steps = total_images = 0
    for method, (plan, _) in plans.items():
        trials, trial_steps = _trials(config, method)
        runs = len(section.seeds)
        steps = runs * plan.total_steps + trials * trial_steps
        images = runs * plan.samples_seen(plan.total_steps) + trials * plan.samples_seen(
            trial_steps
        )
        total_steps, total_images = total_steps + steps, total_images + images
        table.add_row(
            method,
            "\n".join(section.methods[method]) or "none",
            _searched(config, method),
            f"{trials} x {trial_steps:,} steps" if trials else "none",
            f"{runs} x {plan.total_steps:,} steps",
            f"{steps:,}",
            f"{images:,}",
        )
    table.add_section()
    table.add_row("all", "", "", "", "", f"{total_steps:,}", f"{total_images:,}")
    console.print(table)
    plan, source = next(iter(plans.values()))
    _say(console, f"data: {source}")
    for label, value in plan.describe()[:2]:
        _say(console, f"{label}: {value}")
    for method in plans:
        names = [run_name(method, seed) for seed in section.seeds]
        _say(console, f"runs: {', '.join(names)}")
    if section.search is not None:
        search = section.search
        _say(console, f"search: sampler {search.sampler.name}, seed {search.seed}")
    mark = section.mark
    _say(
        console,
        f"{total_images:,} training images in all, evaluations not counted; "
        f"{_at_a_time(config)}; "
        + (f"the target is the best R@1 of {mark}" if mark else "no method sets a target"),
    )


def print_comparison(path: Path, console: Console) -> None:
    """Print the tables of a comparison."""
    comparison = read_comparison(path)
    header, rows = comparison_rows(comparison)
    # These columns are on the page alone, so that numbers are not cut in 80 columns.
    kept = [place for place, text in enumerate(header) if text not in (SINGLE_RUNS, TIME)]
    _print(console, [header[place] for place in kept], [[row[at] for at in kept] for row in rows])
    header, rows = difference_rows(comparison)
    if rows:
        _print(console, header, rows)


def _print(console: Console, header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for place, text in enumerate(header):
        name = text.replace(" to ", " to\n")
        if place:
            table.add_column(name, justify="right", no_wrap=True)
        else:
            table.add_column(name, overflow="fold", min_width=12)
    for row in rows:
        table.add_row(*row)
    console.print(table)


# ---------------------------------------------------------------- before


def _check_methods(config: RunConfig) -> dict[str, tuple[RunPlan, str]]:
    """Check every method and its search space; return its plan and where its numbers come from."""
    section = compare_section(config)
    if config.launch.launcher == "torchrun":
        raise ConfigError(
            "a comparison starts the ranks of its runs itself, and torchrun would start several "
            "comparisons: launch.launcher must be inprocess or ray, got torchrun"
        )
    if section.search is not None:
        open_study(section.search)  # What its sampler needs is installed.
    plans = {}
    for method in section.methods:
        own = method_config(config, method)
        try:
            plans[method] = plan_without_data(own)
        except DmlDistError as error:
            raise type(error)(f"method {method}: {error}") from None
        _check_search(config, method, own, plans[method][0])
    axis_values(config)
    return plans


def _check_search(config: RunConfig, method: str, own: RunConfig, plan: RunPlan) -> None:
    section = compare_section(config)
    paths = searched_paths(config, method)
    if _PROXY_RATE in paths and not plan.has_proxies:
        raise ConfigError(
            f"compare.search.space: {_PROXY_RATE} does nothing for {method}, whose loss "
            f"{own.loss.name} has no proxies; name it in compare.search.without.{method}"
        )
    search = section.search
    if search is not None:
        size = grid_size(search.space, paths) if search.sampler.name == "grid" else 0
        if size > search.trials:
            raise ConfigError(
                f"compare.search.trials is {search.trials}, but the grid of {method} has {size} "
                "points, and its first ones differ in the last paths alone; allow as many trials, "
                "make the grid smaller, or use the sampler random"
            )
        check_space(
            search.space,
            paths,
            partial(trial_config, config, method, 0),
            f"compare.search.space: {method}",
            f"correct it, or name the path in compare.search.without.{method}",
        )


def _begin(config: RunConfig, folder: ComparisonFolder) -> None:
    """Save the configuration, and the published results as they are now."""
    source = Path(compare_section(config).references)
    if source.is_file() and not folder.references_path.exists():
        read_references(source)  # An error now, not after hours.
        write_bytes_atomic(folder.references_path, source.read_bytes())
    folder.write_config(config)


def _announce(
    config: RunConfig, plans: Mapping[str, tuple[RunPlan, str]], console: Console
) -> None:
    section = compare_section(config)
    plan = next(iter(plans.values()))[0]
    trials = sum(_trials(config, method)[0] for method in plans)
    first = f"{trials} trials of {section.search.steps:,} steps, then " if section.search else ""
    _say(
        console,
        f"{config.name}: {first}{len(plans)} methods x {len(section.seeds)} seeds, "
        f"{plan.total_steps:,} steps of {plan.global_batch_size} each, {_at_a_time(config)}",
    )


def _trials(config: RunConfig, method: str) -> tuple[int, int]:
    """Return number and steps of a method's trials."""
    search = compare_section(config).search
    return num_trials(config, method), search.steps if search is not None else 0


def _searched(config: RunConfig, method: str) -> str:
    search = compare_section(config).search
    if search is None:
        return "nothing"
    missing = search.without.get(method, ())
    lines = searched_paths(config, method) or ["nothing"]
    return "\n".join([*lines, *(f"without {path}" for path in missing)])


def _at_a_time(config: RunConfig) -> str:
    parallel = compare_section(config).parallel
    if parallel > 1:
        return f"{parallel} runs at a time as Ray tasks"
    ranks = config.launch.num_workers if config.launch.launcher == "ray" else 1
    return f"one run at a time on {ranks} {'rank' if ranks == 1 else 'ranks'}"


# ---------------------------------------------------------------- the work


def _search(
    config: RunConfig, folder: ComparisonFolder, pool: Pool, emit: Emit
) -> dict[str, dict[str, Any]]:
    """Return the values found for each method; methods are searched at the same time."""
    section = compare_section(config)
    methods = list(section.methods)

    def callback(method: str, number: int, outcome: Mapping[str, Any]) -> None:
        values = ", ".join(f"{path} {format_value(x)}" for path, x in outcome["values"].items())
        score = outcome["map_at_r"]
        result = "loss not finite" if score is None else f"MAP@R {format_metric('map_at_r', score)}"
        emit(note(f"{method}, trial {number + 1}: {values}: validation {result}"))

    tasks = [
        partial(search_method, config, method, folder, pool.execute, callback) for method in methods
    ]
    return {methods[number]: future.result() for number, future in pool.each(tasks)}


def _run(
    config: RunConfig,
    folder: ComparisonFolder,
    pool: Pool,
    emit: Emit,
    values: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Execute all runs, seed by seed; return the messages of those that failed."""
    section = compare_section(config)
    configs = [
        (run_config(config, method, seed, values[method]), folder.run(run_name(method, seed)))
        for seed in section.seeds
        for method in section.methods
    ]
    problems = []
    tasks = [partial(pool.execute, *one) for one in configs]
    for done, (number, future) in enumerate(pool.each(tasks), start=1):
        name = configs[number][0].name
        error = future.exception()
        if isinstance(error, RunError):  # The other runs are executed nevertheless.
            problems.append(f"{name}: {error}")
            emit(note(f"{name}: {error}"))
        else:
            emit(note(f"{name}: {_score(config, future.result())}"))
        emit(phase("runs", done, len(configs)))
    return problems


def _score(config: RunConfig, metrics: Mapping[str, Any]) -> str:
    key = f"recall_at_{config.evaluation.recall_at[0]}"
    trained = metrics["trained"]
    return (
        f"R@{config.evaluation.recall_at[0]} {format_metric(key, trained[key])}, "
        f"MAP@R {format_metric('map_at_r', trained['map_at_r'])}"
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
