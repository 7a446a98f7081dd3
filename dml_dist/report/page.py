"""The report of a run: one HTML page that needs no network, and its figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from dml_dist.files import write_bytes_atomic, write_text_atomic
from dml_dist.report.curves import draw_curves
from dml_dist.report.figures import Picture
from dml_dist.report.formatting import (
    format_count,
    format_metric,
    format_seconds,
    group,
    metric_label,
    number,
    recall_key,
)
from dml_dist.report.gallery import Gallery
from dml_dist.report.insights import Insights, find_insights
from dml_dist.report.summary import RunSummary, read_summary
from dml_dist.report.tiles import TileMaker
from dml_dist.runs.folder import Attempt, RunFolder, RunStatus

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Figure:
    """A headline number: the value, what it is, and where it started."""

    label: str
    value: str
    before: str | None = None


def write_report(run_dir: Path) -> Path:
    """Write report/index.html and the figures of a run, finished or not.

    Args:
        run_dir: The run's folder; nothing else is read.

    Returns:
        Path of the page.

    Raises:
        ConfigError: If the folder is no run.
        DataError: If run.json is damaged.
    """
    summary = read_summary(run_dir)
    insights = find_insights(summary)
    curves = draw_curves(summary)
    report_dir = RunFolder(run_dir).report_dir
    report_dir.mkdir(exist_ok=True)
    for picture in [*curves, *insights.pictures]:
        write_bytes_atomic(report_dir / f"{picture.name}.png", picture.png)
    gallery = summary.gallery or Gallery(())
    tiles = TileMaker(gallery)
    page = _template().render(
        summary=summary,
        insights=insights,
        info=summary.info,
        style=Markup((_FOLDER / "page.css").read_text("utf-8")),
        figures=_figures(summary),
        warnings=_warnings(summary, insights),
        missing=_missing(summary, insights),
        table=summary.table(),
        best=summary.best_validation,
        curves=_drawn([curve for curve in curves if not curve.small]),
        small_curves=_drawn([curve for curve in curves if curve.small]),
        class_pictures=_drawn([insights.class_picture] if insights.class_picture else []),
        space=_drawn(insights.space),
        proxy_pictures=_drawn(insights.proxy_pictures),
        gallery=tiles.by_outcome(gallery.queries),
        classes=tiles.by_class(gallery.classes),
        num_queries=len(gallery.queries),
        num_misses=sum(not query.is_hit for query in gallery.queries),
        overall=_overall(summary),
        facts=_facts(summary),
        when=_when,
    )
    path = report_dir / "index.html"
    write_text_atomic(path, page)
    return path


def _drawn(pictures: Sequence[Picture]) -> list[tuple[Picture, Markup]]:
    return [(picture, Markup(picture.svg)) for picture in pictures]


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _figures(summary: RunSummary) -> list[_Figure]:
    """Return the headline: two scores before and after training, duration, speed."""
    untrained, trained = summary.result("untrained"), summary.result("trained")
    figures = []
    for key in (recall_key(trained), "map_at_r"):
        if key in trained:
            before = format_metric(key, untrained[key]) if key in untrained else None
            label = f"{metric_label(key)} on test classes"
            figures.append(_Figure(label, format_metric(key, trained[key]), before))
    if summary.total_seconds is not None:
        figures.append(_Figure("total time", format_seconds(summary.total_seconds)))
    if summary.images_per_second is not None:
        speed = format_count(round(summary.images_per_second))
        figures.append(_Figure("training images per second", speed))
    return figures


def _overall(summary: RunSummary) -> str | None:
    """Return what share of all queries hit, as half a sentence."""
    trained = summary.result("trained")
    key = recall_key(trained)
    if key is None:
        return None
    return f"{metric_label(key)} over all queries is {format_metric(key, trained[key])}"


def _warnings(summary: RunSummary, insights: Insights) -> list[str]:
    """Return what a reader should know before trusting or repeating the numbers."""
    warnings = [*summary.damaged, *insights.damaged]
    attempts = summary.info.attempts
    dirty = [attempt for attempt in attempts if attempt.git.dirty]
    if dirty:
        warnings.append(
            "The source tree had changes that are not committed"
            f"{_of_attempts(dirty, attempts)}: the git revision alone does not give this code."
        )
    if len(attempts) > 1:
        changed = sum(bool(attempt.changes) for attempt in attempts)
        detail = f", {changed} with a changed configuration" if changed else ""
        warnings.append(
            f"The run was resumed or restarted: {len(attempts)} attempts{detail}. "
            "Curves show the last attempt of each step."
        )
    if len({tuple(sorted(attempt.versions.items())) for attempt in attempts}) > 1:
        warnings.append("Attempts ran with different versions of packages.")
    if summary.metrics and not summary.info.finished:
        warnings.append("The run went on after its results were written: they are older.")
    return warnings


def _of_attempts(some: Sequence[Attempt], every: Sequence[Attempt]) -> str:
    """Return which attempts are meant, nothing when it is all of them."""
    if len(some) == len(every):
        return ""
    numbers = ", ".join(str(attempt.attempt) for attempt in some)
    return f" in attempt{'s' if len(some) > 1 else ''} {numbers}"


def _unfinished(status: RunStatus) -> str:
    match status.state:
        case "stopped":
            where = "" if status.step is None else f" at step {status.step:,}"
            return f"The run was stopped{where} ({status.reason}); continue it with --resume."
        case "failed":
            return f"The run failed: {status.reason}."
        case _:
            return "The run has not finished: it is still running, or it was killed."


def _missing(summary: RunSummary, insights: Insights) -> list[str]:
    """Return what the folder does not hold yet, one sentence each."""
    missing = []
    last = summary.steps[-1] if summary.steps else None
    if not summary.info.finished:
        text = _unfinished(summary.info.status)
        if last is not None:
            text += f" Its last training record is of step {last['step']:,}."
        missing.append(text)
    if last is None:
        missing.append("There are no training records, so no loss curve.")
    if not summary.under("validation"):
        missing.append("There are no validation records.")
    if not summary.result("trained"):
        missing.append("There is no result on the test classes yet.")
    if summary.gallery is None:
        missing.append("There is no retrieval gallery; the final evaluation writes it.")
    if insights.class_picture is None and not insights.damaged:
        missing.append("There are no results of single classes; the final evaluation writes them.")
    if not insights.space and not insights.damaged:
        missing.append("There are no embeddings to map: evaluation.save_embeddings keeps them.")
    if insights.proxies is None and summary.result("trained") and not insights.damaged:
        missing.append("There is nothing about proxies: the loss has none, or none were kept.")
    if summary.config is None:
        missing.append("config.yaml is missing.")
    return missing


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    """Return labels and values about data, plan and time."""
    facts = [("seed", str(summary.info.seed))]
    for label, value in summary.info.facts.items():
        amount = number(value)
        facts.append((label, str(value) if amount is None else format_count(amount)))
    for name, seconds in group(summary.metrics, "seconds").items():
        facts.append((f"time: {name.replace('_', ' ')}", format_seconds(float(seconds))))
    return facts


def _when(time: str) -> str:
    """Return a UTC time of ISO 8601 to the minute."""
    return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M UTC")
