"""The page of a comparison: one HTML file that needs no network, figures as PNG, tables as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from dml_dist.config.study import SearchConfig
from dml_dist.files import write_bytes_atomic, write_text_atomic
from dml_dist.report.formatting import MISSING, format_metric, format_seconds, metric_label
from dml_dist.report.study.differences import (
    difference_notes,
    difference_rows,
    plain_differences,
)
from dml_dist.report.study.figures import draw_axis, draw_convergence
from dml_dist.report.study.read import Comparison, MethodResult, read_comparison
from dml_dist.report.study.references import ReferenceRow, own_protocols
from dml_dist.report.study.stats import LEVEL, format_interval
from dml_dist.runs.study import ComparisonFolder, compare_section

_FOLDER = Path(__file__).parent.parent
SINGLE_RUNS = "of single runs"
"""Head of the column with the steps of the single runs."""
TIME = "time to it"
"""Head of the column with the training time until the mark."""


def write_comparison(path: Path) -> Path:
    """Write report/ of a comparison anew from its folder: page, figures, tables as CSV.

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
    report_dir.mkdir(exist_ok=True)
    pictures, axis = draw_convergence(comparison), draw_axis(comparison)
    for picture in [*pictures, *axis]:
        write_bytes_atomic(report_dir / f"{picture.name}.png", picture.png)
    write_text_atomic(report_dir / "comparison.csv", _csv(*_plain_rows(comparison)))
    write_text_atomic(report_dir / "runs.csv", _csv(*_run_rows(comparison)))
    if comparison.differences:
        write_text_atomic(report_dir / "differences.csv", _csv(*plain_differences(comparison)))
    header, rows = comparison_rows(comparison)
    page = _template().render(
        name=comparison.config.name,
        style=Markup((_FOLDER / "page.css").read_text("utf-8")),
        finished=not comparison.num_missing,
        num_runs=len(comparison.runs),
        warnings=_warnings(comparison),
        header=header,
        rows=rows,
        level=f"{LEVEL:.0%}",
        notes=_notes(comparison),
        differences=difference_rows(comparison),
        difference_notes=difference_notes(comparison),
        axis=[(picture, Markup(picture.svg)) for picture in axis],
        pictures=[(picture, Markup(picture.svg)) for picture in pictures],
        tuned=_tuned(comparison),
        search=_search_text(comparison),
        published=_published(comparison),
        reason=comparison.published.reason,
        protocols=comparison.published.protocols,
        facts=_facts(comparison),
        methods=[(method.name, method.changes) for method in comparison.methods],
        config=ComparisonFolder(comparison.folder).config_path.read_text("utf-8"),
    )
    target = report_dir / "index.html"
    write_text_atomic(target, page)
    return target


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("study/compare.html")


def _breakable(path: str) -> Markup:
    """Return a path that a narrow column may break behind its dots and underscores."""
    text = escape(path)
    return Markup(text.replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>")))


# ---------------------------------------------------------------- the table of results


def comparison_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of results, for people."""
    recall, mark = comparison.recall_key, comparison.mark
    header = ["method", "seeds", metric_label(recall), metric_label("map_at_r")]
    if mark is not None:
        header += [f"steps to {format_metric(recall, mark)}", SINGLE_RUNS, TIME]
    return header, [
        [
            method.name,
            str(len(method.runs)),
            format_interval(method.interval(recall)),
            format_interval(method.interval("map_at_r")),
            *(_reached(method, mark) if mark is not None else []),
        ]
        for method in comparison.methods
    ]


def _reached(method: MethodResult, mark: float) -> list[str]:
    if not method.runs:
        return [MISSING] * 3
    found = method.reached(mark)
    steps = "not reached" if found.steps is None else f"{found.steps:,.0f}"
    runs = f"{len(found.of_runs)} of {found.num_runs}"
    if found.of_runs:
        low, high = min(found.of_runs), max(found.of_runs)
        span = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
        runs = span if len(found.of_runs) == found.num_runs else f"{span} ({runs})"
    return [steps, runs, MISSING if found.seconds is None else format_seconds(found.seconds)]


def _plain_rows(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    recall, mark = comparison.recall_key, comparison.mark
    header = ["method", "seeds"]
    for key in (recall, "map_at_r"):
        header += [key, f"{key}_low", f"{key}_high"]
    header += ["mark", "steps_to_mark", "seconds_to_mark", "runs_that_reach_it"]
    rows = []
    for method in comparison.methods:
        row: list[Any] = [method.name, len(method.runs)]
        for key in (recall, "map_at_r"):
            interval = method.interval(key)
            row += [_cell(interval.mean), _cell(interval.low), _cell(interval.high)]
        if mark is None or not method.runs:
            row += ["", "", "", ""]
        else:
            found = method.reached(mark)
            row += [mark, found.steps, found.seconds, len(found.of_runs)]
        rows.append(row)
    return header, rows


def _run_rows(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    recall = comparison.recall_key
    rows = [
        [
            *(method.name, run.seed, run.trained.get(recall), run.trained.get("map_at_r")),
            *(run.step, run.seconds),
        ]
        for method in comparison.methods
        for run in method.runs
    ]
    return [
        "method",
        "seed",
        recall,
        "map_at_r",
        "checkpoint_step",
        "seconds_with_evaluations",
    ], rows


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


# ---------------------------------------------------------------- what stands around it


def _warnings(comparison: Comparison) -> list[str]:
    warnings = []
    if comparison.num_missing:
        missing = [
            f"{method.name} seed {seed}" for method in comparison.methods for seed in method.missing
        ]
        warnings.append(
            f"{len(missing)} runs are not finished and not in the table: {', '.join(missing)}."
        )
    if any(len(method.runs) == 1 for method in comparison.methods):
        warnings.append("A method with one seed has no interval: its difference may be chance.")
    attempts = [run.summary.info.attempts[-1] for run in comparison.runs]
    if len({attempt.host for attempt in attempts}) > 1:
        warnings.append("Runs were made on different machines: their times do not compare.")
    if len({tuple(sorted(attempt.versions.items())) for attempt in attempts}) > 1:
        warnings.append("Runs were made with different versions of packages.")
    if any(attempt.git.dirty for attempt in attempts):
        warnings.append("The source tree had changes that are not committed.")
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
        f"Test classes, {chosen}: mean over the seeds ± half the {LEVEL:.0%} interval by Student "
        "t. The intervals tell of seeds alone, not of other data."
    ]
    reference, mark = comparison.reference, comparison.mark
    if reference is not None and mark is not None:
        where = (
            "the test classes, watched during training as much of the literature does (“literature "
            "protocol”); nothing was selected by it"
            if comparison.protocol == "literature"
            else "validation classes, since test classes were not watched"
        )
        notes.append(
            f"Steps and time to {format_metric(comparison.recall_key, mark)}: where the mean curve "
            f"first is as high as that of {reference.name} ever is, at the steps that were "
            f"evaluated; of single runs: the same of each. Curves are of {where}."
        )
    elif compare_section(comparison.config).mark is None:
        notes.append("No method is the mark: compare.reference names one.")
    return notes


@dataclass(frozen=True)
class _TunedRow:
    method: str
    values: list[str]
    trials: str
    best: str


def _tuned(comparison: Comparison) -> tuple[list[str], list[_TunedRow]]:
    """Return the searched paths, and for each method what was found."""
    search = compare_section(comparison.config).search
    if search is None:
        return [], []
    rows = []
    for method in comparison.methods:
        values = [
            "has not" if path in method.without else _value(method, path) for path in search.space
        ]
        diverged = f", {method.num_diverged} not finite" if method.num_diverged else ""
        best = method.best_trial
        rows.append(
            _TunedRow(
                method.name,
                values,
                f"{len(method.trials)}{diverged}" if method.values else "none needed",
                MISSING if best is None else format_metric("map_at_r", best),
            )
        )
    return list(search.space), rows


def _value(method: MethodResult, path: str) -> str:
    value = method.values.get(path)
    return f"{value:.3g}" if isinstance(value, int | float) and method.runs else MISSING


def _search_text(comparison: Comparison) -> str:
    search = compare_section(comparison.config).search
    if search is None:
        return "Nothing was searched: every method has the values of the configuration."
    return (
        f"{search.trials} trials of {search.steps:,} steps for each method, the same ranges for "
        f"all: {_ranges(search)}. The first has the values of the method, the others "
        "are drawn by the TPE sampler of Optuna. What counts is the highest MAP@R on validation "
        "classes; no test class was read."
    )


def _ranges(search: SearchConfig) -> str:
    return ", ".join(
        f"{path} {bounds.low:g} to {bounds.high:g}{' (log)' if bounds.log else ''}"
        for path, bounds in search.space.items()
    )


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
        return f"{100 * float(method.band.mean.recall.max()):.2f} %"
    return format_interval(method.interval(comparison.recall_key))


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    config = comparison.config
    section = compare_section(config)
    facts = [
        ("methods", str(len(section.methods))),
        ("seeds", ", ".join(map(str, section.seeds))),
        ("steps of each run", f"{config.train.steps:,}"),
        ("images of a batch", f"{config.train.global_batch_size:,}"),
        ("network", f"{config.model.backbone.name}, {config.model.embedding_size} numbers"),
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
