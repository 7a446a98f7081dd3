"""Tables of results on the terminal, from the same rows as the report page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dml_dist.report.formatting import filled_columns, format_seconds, result_table
from dml_dist.report.summary import read_summary
from dml_dist.runs.folder import RunFolder


def print_results(folder: RunFolder, console: Console) -> None:
    """Print a finished run: metrics, speed, times, restarts and the cost of checkpoints."""
    summary = read_summary(folder.path)
    rows = summary.table()
    columns = filled_columns(rows)
    table = Table("test classes", *(heading for heading, _ in columns))
    for row in rows:
        table.add_row(row.label, *(getattr(row, field) for _, field in columns))
    table.add_section()
    before = [""] * next((i for i, (_, field) in enumerate(columns) if field == "trained"), 0)
    if summary.images_per_second is not None:
        speed = f"{summary.images_per_second:,.0f} images/s"
        table.add_row("training speed", *before, speed)
    seconds = summary.metrics.get("seconds", {})
    for name, label in (("train", "training"), ("evaluate", "evaluation"), ("total", "whole run")):
        if name in seconds:
            table.add_row(f"time, {label}", *before, format_seconds(seconds[name]))
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
