"""The page of a comparison: one HTML file that needs no network, figures as PNG, tables as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.config.load import dump_config
from dml_dist.config.search_space import format_value
from dml_dist.config.study import SearchConfig
from dml_dist.files import write_text_atomic
from dml_dist.report.formatting import MISSING, format_metric, format_seconds
from dml_dist.report.parts import Parts
from dml_dist.report.render import write_page
from dml_dist.report.study.comparison_tables import (
    comparison_rows,
    difference_notes,
    difference_rows,
    plain_differences,
    plain_results,
    plain_runs,
)
from dml_dist.report.study.plots import draw_axis, draw_convergence
from dml_dist.report.study.read import Comparison, MethodResult, read_comparison
from dml_dist.report.study.references import ReferenceRow, own_protocols
from dml_dist.report.study.stats import LEVEL, format_interval
from dml_dist.runs.comparison import ComparisonFolder, compare_section
from dml_dist.terminal import csv_text


def write_comparison(path: Path) -> Path:
    """Write report/ of a comparison from its folder: page, figures, tables as CSV.

    Args:
        path: The comparison's folder; nothing else is read.

    Returns:
        Path of the page.

    Raises:
        ConfigError: If the folder is no comparison.
        DataError: If a run's file is damaged.
    """
    comparison = read_comparison(path)
    report_dir = ComparisonFolder(comparison.folder).report_dir
    parts = Parts()
    convergence = parts.make("convergence", lambda: draw_convergence(comparison), [])
    axis = parts.make("figure against a field", lambda: draw_axis(comparison), [])
    differences = difference_rows(comparison)
    sections: list[tuple[str, str, bool]] = [
        ("results", "Results", True),
        ("differences", "Gains", bool(differences[1])),
        ("axis", "Against a field", bool(axis)),
        ("convergence", "Convergence", bool(convergence)),
        ("values", "Values", True),
        ("published", "Published results", True),
        ("methods", "Methods", True),
    ]
    page = write_page(
        report_dir,
        "study/comparison.html",
        [*convergence, *axis],
        kind="comparison",
        command="compare",
        name=comparison.config.name,
        status="unfinished" if comparison.num_missing else "finished",
        warnings=[*_warnings(comparison), *parts.failed],
        missing=_missing(comparison),
        sections=sections,
        facts=_facts(comparison),
        config=dump_config(comparison.config),
        config_name="compare.yaml",
        num_runs=len(comparison.runs),
        results=comparison_rows(comparison),
        notes=_notes(comparison),
        differences=differences,
        difference_notes=difference_notes(comparison),
        axis=axis,
        convergence=convergence,
        tuned=_tuned(comparison),
        search=_search_text(comparison),
        published=_published(comparison),
        reason=comparison.published.reason,
        protocols=comparison.published.protocols,
        methods=[(method.name, method.changes) for method in comparison.methods],
    )
    write_text_atomic(report_dir / "comparison.csv", csv_text(*plain_results(comparison)))
    write_text_atomic(report_dir / "runs.csv", csv_text(*plain_runs(comparison)))
    if comparison.differences:
        write_text_atomic(report_dir / "differences.csv", csv_text(*plain_differences(comparison)))
    return page


def _missing(comparison: Comparison) -> list[str]:
    """Return what the folder does not hold, one sentence each."""
    missing = []
    if comparison.num_missing:
        names = [
            f"{method.name} seed {seed}" for method in comparison.methods for seed in method.missing
        ]
        count = "1 run is" if len(names) == 1 else f"{len(names)} runs are"
        missing.append(f"{count} not finished and not in the tables: {', '.join(names)}.")
    if names := [
        f"{method.name} seed {run.seed}"
        for method in comparison.methods
        for run in method.runs
        if not run.trained
    ]:
        missing.append(
            f"Without a result on the test classes, so not in any mean: {', '.join(names)}."
        )
    return missing


def _warnings(comparison: Comparison) -> list[str]:
    warnings = []
    if any(len(method.runs) == 1 for method in comparison.methods):
        warnings.append("A method with one seed has no interval: differences may be chance.")
    attempts = [run.summary.info.attempts[-1] for run in comparison.runs]
    if len({attempt.host for attempt in attempts}) > 1:
        warnings.append("Runs were made on different machines: their times are not comparable.")
    if len({tuple(sorted(attempt.versions.items())) for attempt in attempts}) > 1:
        warnings.append("Runs were made with different versions of packages.")
    if any(attempt.git.dirty for attempt in attempts):
        warnings.append("The source tree had uncommitted changes.")
    elif len({attempt.git.revision for attempt in attempts}) > 1:
        warnings.append("Runs were made with different revisions of the source.")
    return warnings


def _notes(comparison: Comparison) -> list[str]:
    """Return what the columns of the table mean."""
    chosen = (
        "the last checkpoint"
        if comparison.config.validation.name == "none"
        else "the checkpoint with the highest MAP@R on validation classes"
    )
    notes = [
        f"Test classes, {chosen}: mean over the seeds ± half the {LEVEL:.0%} interval by "
        "Student's t. The intervals cover the choice of the seed, not of the data."
    ]
    reference, target = comparison.reference, comparison.target_recall
    if reference is not None and target is not None:
        where = (
            "the test classes, evaluated during training as in much of the literature (“literature "
            "protocol”); nothing was selected by them"
            if comparison.protocol == "literature"
            else "validation classes, since test classes were not evaluated during training"
        )
        notes.append(
            f"Target recall: {format_metric(comparison.recall_key, target)}, the highest value of "
            f"the mean curve of {reference.name}. Steps and time are those at which the mean curve "
            "of a method first reaches it, among the evaluated steps; “of single runs”: the same "
            f"for each run alone. Curves are of {where}."
        )
    elif compare_section(comparison.config).mark is None:
        notes.append("There is no target recall: compare.reference names the method that sets it.")
    return notes


@dataclass(frozen=True)
class _TunedRow:
    method: str
    values: list[str]
    trials: str
    best: str


def _tuned(comparison: Comparison) -> tuple[list[str], list[_TunedRow]]:
    """Return the searched paths, and for each method the values found."""
    search = compare_section(comparison.config).search
    if search is None:
        return [], []
    rows = []
    for method in comparison.methods:
        values = [
            "not used" if path in method.without else _value(method, path) for path in search.space
        ]
        diverged = f", {method.num_diverged} not finite" if method.num_diverged else ""
        best = method.best_trial
        rows.append(
            _TunedRow(
                method.name,
                values,
                f"{len(method.trials)}{diverged}" if method.values else "not searched",
                MISSING if best is None else format_metric("map_at_r", best),
            )
        )
    return list(search.space), rows


def _value(method: MethodResult, path: str) -> str:
    value = method.values.get(path)
    return format_value(value) if method.runs else MISSING


def _search_text(comparison: Comparison) -> str:
    search = compare_section(comparison.config).search
    if search is None:
        return "Nothing was searched: every method has the values of the configuration."
    at_most = "at most " if search.sampler.name == "grid" else ""
    return (
        f"{at_most}{search.trials} trials of {search.steps:,} steps for each method, with the same "
        f"ranges for all: {_ranges(search)}. The first trial has the method's own values, where "
        f"the ranges contain them; the sampler {search.sampler.name} gives the others. Trials are "
        "ranked by their highest MAP@R on validation classes; no test class was read."
    )


def _ranges(search: SearchConfig) -> str:
    return ", ".join(f"{path} {distribution}" for path, distribution in search.space.items())


def _published(comparison: Comparison) -> list[tuple[ReferenceRow, str]]:
    """Return the published rows with our number of the same method and protocol."""
    results = {method.name: method for method in comparison.methods}
    return [(row, _ours(row, results.get(row.method), comparison)) for row in _rows(comparison)]


def _rows(comparison: Comparison) -> Sequence[ReferenceRow]:
    mine = own_protocols(comparison.config)
    return [row for row in comparison.published.rows if row.protocol in mine]


def _ours(row: ReferenceRow, method: MethodResult | None, comparison: Comparison) -> str:
    if method is None or not method.runs:
        return MISSING
    if row.protocol == "best_on_test":
        if not len(method.band.mean):
            return MISSING
        return f"{100 * float(method.band.mean.recall.max()):.2f} %"
    return format_interval(method.interval(comparison.recall_key))


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    config = comparison.config
    section = compare_section(config)
    facts = [
        ("methods", str(len(section.methods))),
        ("seeds", ", ".join(map(str, section.seeds))),
        ("steps of each run", f"{config.train.steps:,}"),
        ("global batch size", f"{config.train.global_batch_size:,}"),
        ("network", f"{config.model.backbone.name}, {config.model.embedding_size}-d"),
        ("runs at a time", str(section.parallel)),
    ]
    if comparison.runs:
        info = comparison.runs[0].summary.info
        for label in ("training", "validation"):
            if label in info.facts:
                facts.append((label, str(info.facts[label])))
        attempt = info.attempts[-1]
        facts.append(("ranks of each run", f"{attempt.world_size}: {attempt.device}"))
        facts.append(("machine", f"{attempt.host}, {attempt.platform}"))
        if attempt.git.revision:
            facts.append(("git", attempt.git.revision[:12]))
        spent = sum(run.seconds or 0.0 for run in comparison.runs)
        facts.append(("all runs together, with evaluations", format_seconds(spent)))
    return facts
