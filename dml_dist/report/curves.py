"""The curves of a run: drawn once, saved as PNG, and as SVG that takes the page's colors."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dml_dist.report.summary import RunSummary, Series
from dml_dist.report.tables import metric_label, recall_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any kind of color vision tell apart.
_LIGHT = {
    "ink": "#1b1f24",
    "muted": "#626b76",
    "rule": "#dfe3e8",
    "recall": "#0072b2",
    "map": "#c2510a",
}
# In SVG these stand for the page's custom properties and are replaced after drawing.
_MARKS = {name: f"#00fe{number:02x}" for number, name in enumerate(_LIGHT)}
_SIZE = (4.6, 2.9)  # inches; 331 units of the SVG: about the width of a phone
_MARKS_UP_TO = 30  # evaluations of a line that are marked one by one
_SMOOTH_FROM = 40  # records from which a running mean says more than the records


@dataclass(frozen=True)
class Curve:
    """One figure of the report.

    Attributes:
        name: Name of its PNG file without extension.
        caption: What it shows, a sentence.
        png: The figure, 200 dots an inch, for light paper.
        svg: The same figure, whose colors are custom properties of the page.
    """

    name: str
    caption: str
    png: bytes
    svg: str


def draw_curves(summary: RunSummary) -> list[Curve]:
    """Draw the curves that the records allow: the loss, and the scores of evaluations."""
    curves = []
    loss = summary.training("loss")
    if len(loss):
        curves.append(_curve("loss", _loss_caption(loss), _draw_loss, loss))
    lines = _retrieval_lines(summary)
    if lines:
        curves.append(_curve("retrieval", _retrieval_caption(summary), _draw_retrieval, lines))
    return curves


@dataclass(frozen=True)
class _Line:
    series: Series
    label: str
    color: str
    dashed: bool


def _retrieval_lines(summary: RunSummary) -> list[_Line]:
    """Return recall and MAP@R of the validation, and of the test split where it was watched."""
    keys = [("map_at_r", "map")]
    recall = recall_key(*summary.evaluations)
    if recall is not None:
        keys.insert(0, (recall, "recall"))
    lines = []
    for protocol, dashed in (("validation", False), ("literature", True)):
        for key, color in keys:
            series = summary.evaluation(key, protocol)
            if len(series):
                where = "test, literature protocol" if dashed else "validation"
                lines.append(_Line(series, f"{metric_label(key)} {where}", color, dashed))
    return lines


def _loss_caption(loss: Series) -> str:
    text = "Training loss against the step"
    if len(loss) >= _SMOOTH_FROM:
        text += f"; the heavy line is the mean over {_window(len(loss)):,} records"
    if loss.num_non_finite:
        text += f"; {loss.num_non_finite:,} records have no finite loss"
    return text + "."


def _retrieval_caption(summary: RunSummary) -> str:
    text = "Retrieval among held-out classes against the step."
    if len(summary.evaluation("map_at_r", "literature")):
        text = (
            "Retrieval against the step. Dashed: test classes watched during training, as much of "
            "the literature does (“literature protocol”); nothing was selected by it."
        )
    return text


def _curve(name: str, caption: str, draw: Any, data: Any) -> Curve:
    """Draw a figure twice, with the colors of paper and with marks for the page's colors."""
    import matplotlib

    # The salt makes the names inside the SVG, and so the file, the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        png, svg = io.BytesIO(), io.StringIO()
        draw(data, _LIGHT).savefig(png, format="png", dpi=200)
        draw(data, _MARKS).savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    return Curve(name, caption, png.getvalue(), _for_page(svg.getvalue(), name, caption))


def _axes(colors: Mapping[str, str], ylabel: str) -> tuple[Figure, Any]:
    """Return a figure with one pair of axes: two spines, pale horizontal rules."""
    # Not pyplot: it keeps figures and a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colors["muted"])
    axes.grid(axis="y", color=colors["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colors["muted"], length=0)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.set_xlabel("step (optimizer updates)", color=colors["muted"])
    axes.set_ylabel(ylabel, color=colors["muted"])
    return figure, axes


def _draw_loss(loss: Series, colors: Mapping[str, str]) -> Figure:
    figure, axes = _axes(colors, "training loss")
    smooth = len(loss) >= _SMOOTH_FROM
    axes.plot(
        loss.steps,
        loss.values,
        color=colors["recall"],
        linewidth=0.8 if smooth else 1.6,
        alpha=0.4 if smooth else 1.0,
        marker="o" if len(loss) == 1 else None,
    )
    if smooth:
        mean = _running_mean(loss.values, _window(len(loss)))
        axes.plot(loss.steps, mean, color=colors["recall"], linewidth=1.8)
    return figure


def _draw_retrieval(lines: list[_Line], colors: Mapping[str, str]) -> Figure:
    figure, axes = _axes(colors, "score (%)")
    crowded = max(len(line.series) for line in lines) > _MARKS_UP_TO
    for line in lines:
        axes.plot(
            line.series.steps,
            100 * line.series.values,
            color=colors[line.color],
            linewidth=1.6,
            linestyle="--" if line.dashed else "-",
            marker=None if crowded else "o" if line.color == "recall" else "s",
            markersize=3.5,
            # Open marks say test where the dashes between two points are too few to be seen.
            markerfacecolor="none" if line.dashed else colors[line.color],
            label=line.label,
        )
    axes.set_ylim(0, 102)
    figure.legend(
        loc="outside upper left",
        ncols=2,
        frameon=False,
        fontsize=8,
        labelcolor=colors["ink"],
        handlelength=2.2,
        columnspacing=1.2,
    )
    return figure


def _window(num_records: int) -> int:
    return max(5, num_records // 40 // 2 * 2 + 1)  # odd, so that it has a center


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the finite values in a centered window, NaN where there is none."""
    finite = np.isfinite(values)
    weights = np.ones(window)
    sums = np.convolve(np.where(finite, values, 0.0), weights, mode="same")
    counts = np.convolve(finite.astype(np.float64), weights, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _for_page(svg: str, name: str, caption: str) -> str:
    """Return matplotlib's SVG as an element of a page: its fonts, its colors, its width."""
    svg = svg[svg.index("<svg") :]
    for key, mark in _MARKS.items():
        svg = svg.replace(mark, f"var(--{key})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    # Names must be the page's own: two figures both have an axes_1.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = rf'<svg role="img" aria-label="{label}" viewBox="\1"'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"', head, svg, count=1)
