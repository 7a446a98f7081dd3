"""The report of a run: one HTML page that needs no network, and its figures as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

from dml_dist.config.yaml_text import read_yaml
from dml_dist.errors import ConfigError
from dml_dist.report.class_results import draw_classes, read_class_results, weakest_rows
from dml_dist.report.curves import draw_curves
from dml_dist.report.figures import Picture
from dml_dist.report.formatting import (
    filled_columns,
    format_count,
    format_metric,
    format_seconds,
    group,
    metric_label,
    number,
    recall_key,
)
from dml_dist.report.gallery import Gallery, read_gallery
from dml_dist.report.parts import Parts
from dml_dist.report.proxy_diagnostics import draw_proxies, read_proxy_facts
from dml_dist.report.render import write_page
from dml_dist.report.space import draw_space, read_space
from dml_dist.report.summary import RunSummary, read_summary
from dml_dist.report.tiles import TileMaker
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.info import Attempt

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Headline:
    """A headline number: the value, its name, and its values before training."""

    label: str
    value: str
    before: str = ""


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
    distance, seed = _distance(summary.config), summary.info.seed
    parts, folder = Parts(), summary.folder
    gallery = parts.read("retrieval gallery", lambda: read_gallery(folder)) or Gallery(())
    classes = parts.read("results per class", lambda: read_class_results(folder))
    space = parts.read("embeddings", lambda: read_space(folder, distance))
    proxies = parts.read("proxy statistics", lambda: read_proxy_facts(folder))
    curves = parts.make("curves", lambda: draw_curves(summary), [])
    class_pictures = _drawn(parts, "figure of classes", classes, lambda x: [draw_classes(x)])
    space_pictures = _drawn(parts, "embedding space", space, lambda x: draw_space(x, classes, seed))
    proxy_pictures = _drawn(parts, "figures of proxies", proxies, draw_proxies)
    tiles = TileMaker(gallery)
    table = parts.make("results", summary.table, [])
    headline = parts.make("headline", lambda: _headline(summary), [])
    class_tiles = parts.make("classes", lambda: tiles.by_class(gallery.classes), [])
    outcomes = parts.make("retrieval", lambda: tiles.by_outcome(gallery.queries), [])
    sections: list[tuple[str, str, bool]] = [
        ("results", "Results", bool(table)),
        ("curves", "Curves", bool(curves)),
        ("history", summary.history.title, bool(summary.history.title)),
        ("classes", "Classes", bool(class_pictures or class_tiles)),
        ("retrieval", "Retrieval", bool(gallery.queries)),
        ("space", "Embedding space", bool(space_pictures)),
        ("proxies", "Proxies", proxies is not None),
    ]
    return write_page(
        RunFolder(run_dir).report_dir,
        "page.html",
        [*curves, *class_pictures, *space_pictures, *proxy_pictures],
        kind="run",
        command="report",
        name=summary.info.name,
        status=summary.info.status.state,
        warnings=_warnings(summary, parts),
        missing=_missing(summary, parts),
        sections=sections,
        facts=_facts(summary),
        config=summary.config,
        config_name="config.yaml",
        info=summary.info,
        headline=headline,
        table=table,
        columns=filled_columns(table),
        best=summary.best_validation,
        curves=_of_size(curves, small=False),
        small_curves=_of_size(curves, small=True),
        history=summary.history,
        class_pictures=class_pictures,
        weakest=[] if classes is None else weakest_rows(classes),
        classes=class_tiles,
        gallery=outcomes,
        num_queries=len(gallery.queries),
        num_misses=sum(not query.is_hit for query in gallery.queries),
        overall=_overall(summary),
        space=space_pictures,
        proxies=proxies,
        proxy_pictures=proxy_pictures,
        when=_when,
    )


def _drawn(
    parts: Parts,
    name: str,
    value: _Value | None,
    draw: Callable[[_Value], Sequence[Picture]],
) -> list[Picture]:
    return [] if value is None else list(parts.make(name, lambda: draw(value), []))


def _of_size(curves: Sequence[Picture], *, small: bool) -> list[Picture]:
    return [curve for curve in curves if curve.small == small]


def _distance(config: str | None) -> Literal["cosine", "euclidean"]:
    """Return the distance of a run's configuration; cosine when it cannot be read."""
    try:
        values = read_yaml(config or "", "config.yaml").value
        euclidean = values["evaluation"]["distance"] == "euclidean"
    except (ConfigError, KeyError, TypeError):
        return "cosine"
    return "euclidean" if euclidean else "cosine"


def _headline(summary: RunSummary) -> list[_Headline]:
    """Return two scores before and after training, the duration and the speed."""
    trained = summary.result("trained")
    baselines = {name: summary.result(name) for name in ("features", "untrained")}
    found = []
    for key in (recall_key(trained), "map_at_r"):
        if key in trained:
            before = ", ".join(
                f"{format_metric(key, scores[key])} {name}"
                for name, scores in baselines.items()
                if key in scores
            )
            label = f"{metric_label(key)} on test classes"
            found.append(_Headline(label, format_metric(key, trained[key]), before))
    if summary.total_seconds is not None:
        found.append(_Headline("total time", format_seconds(summary.total_seconds)))
    if summary.images_per_second is not None:
        speed = format_count(round(summary.images_per_second))
        found.append(_Headline("training images per second", speed))
    return found


def _overall(summary: RunSummary) -> str | None:
    """Return the share of all queries that hit, as half a sentence."""
    trained = summary.result("trained")
    key = recall_key(trained)
    if key is None:
        return None
    return f"{metric_label(key)} over all queries is {format_metric(key, trained[key])}"


def _warnings(summary: RunSummary, parts: Parts) -> list[str]:
    """Return what a reader should know before trusting or repeating the numbers."""
    warnings = [*summary.damaged, *parts.failed]
    attempts = summary.info.attempts
    dirty = [attempt for attempt in attempts if attempt.git.dirty]
    if dirty:
        warnings.append(
            f"The source tree had uncommitted changes{_of_attempts(dirty, attempts)}: "
            "the git revision alone does not give this code."
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
        warnings.append("The run continued after its results were written: they are older.")
    return warnings


def _of_attempts(some: Sequence[Attempt], every: Sequence[Attempt]) -> str:
    """Return which attempts are meant, nothing when it is all of them."""
    if len(some) == len(every):
        return ""
    numbers = ", ".join(str(attempt.attempt) for attempt in some)
    return f" in attempt{'s' if len(some) > 1 else ''} {numbers}"


def _missing(summary: RunSummary, parts: Parts) -> list[str]:
    """Return what the folder does not hold, one sentence each."""
    missing = [*_unfinished(summary)]
    if not summary.steps:
        missing.append("There are no training records, so no loss curve.")
    if not summary.under("validation"):
        missing.append("There are no validation records.")
    if not summary.result("trained"):
        missing.append("There is no result on the test classes.")
    elif not summary.result("untrained"):
        missing.append("There is no result of the untrained network to compare with.")
    if parts.missing:
        missing.append(
            f"The run's folder does not hold: {', '.join(parts.missing)}. A final evaluation "
            "writes these, embeddings with evaluation.save_embeddings and proxy statistics for a "
            "loss with proxies."
        )
    if summary.config is None:
        missing.append("config.yaml is missing.")
    return missing


def _unfinished(summary: RunSummary) -> list[str]:
    """Return why a run is not finished and how far it is, as one note."""
    status = summary.info.status
    reason = f": {status.reason.rstrip('.')}" if status.reason else ""
    match status.state:
        case "finished":
            return []
        case "running":
            text = "The run has not finished: it is running, or its processes were killed."
        case "stopped":
            at = "" if status.step is None else f" after step {status.step:,}"
            text = f"The run was stopped{at}{reason}. It can be resumed."
        case "failed":
            text = f"The run failed{reason}. It can be resumed."
    if summary.steps:
        text += f" Its last training record is of step {summary.steps[-1]['step']:,}."
    return [text]


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
