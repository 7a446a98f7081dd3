"""Tables of results on the terminal, from the same rows as the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dml_dist.report.formatting import format_seconds, result_table
from dml_dist.report.summary import read_summary
from dml_dist.runs.folder import RunFolder


def print_results(folder: RunFolder, console: Console) -> None:
    """Print a finished run: metrics, speed, times, restarts and the cost of checkpoints."""
    summary = read_summary(folder.path)
    table = Table("test classes", "untrained", "trained", "best validation")
    for row in summary.table():
        table.add_row(row.label, row.untrained, row.trained, row.validation)
    table.add_section()
    if summary.images_per_second is not None:
        table.add_row("training speed", "", f"{summary.images_per_second:,.0f} images/s", "")
    seconds = summary.metrics.get("seconds", {})
    for name, label in (("train", "training"), ("evaluate", "evaluation"), ("total", "whole run")):
        if name in seconds:
            table.add_row(f"time, {label}", "", format_seconds(seconds[name]), "")
    console.print(table)
    for line in (summary.history.restarts_text, summary.history.checkpoints_text):
        if line is not None:
            console.print(line, highlight=False)


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print one evaluation of a checkpoint."""
    table = Table(f"split {metrics['split']}", metrics["checkpoint"]["folder"])
    for row in result_table(metrics):
        table.add_row(row.label, row.trained)
    table.add_row("time, evaluation", format_seconds(metrics["seconds"]["evaluate"]))
    console.print(table)
