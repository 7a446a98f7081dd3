"""The look of figures: drawn once, saved as PNG, and as SVG that takes the page's colors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colors = Mapping[str, str]

# Okabe and Ito's colors, which people with any kind of color vision tell apart.
LIGHT: Colors = {
    "ink": "#1b1f24",
    "muted": "#626b76",
    "rule": "#dfe3e8",
    "faint": "#c3cad3",
    "recall": "#0072b2",
    "map": "#c2510a",
    "third": "#00795a",
    "fourth": "#b0568a",
    "fifth": "#a87900",
    "sixth": "#3d93c9",
}
SERIES = ("recall", "map", "third", "fourth", "fifth", "sixth")
"""Names of the colors that tell apart what has no color of its own."""

# In SVG these stand for the page's custom properties and are replaced after drawing.
MARKS: Colors = {name: f"#00fe{number:02x}" for number, name in enumerate(LIGHT)}

SIZE = (4.6, 2.9)  # inches; 331 units of the SVG: about the width of a phone
_NUMBER = re.compile(r"-?\d+\.\d{3,}")


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    Attributes:
        name: Name of its PNG file without extension.
        caption: What it shows, a sentence or more.
        png: The figure, 200 dots an inch, for light paper.
        svg: The same figure, whose colors are custom properties of the page.
        small: Whether it stands beside two others of its kind.
    """

    name: str
    caption: str
    png: bytes
    svg: str
    small: bool = False


def draw_picture(
    name: str, caption: str, draw: Callable[[Colors], Figure], *, small: bool = False
) -> Picture:
    """Draw a figure twice, with the colors of paper and with marks for the page's colors."""
    import matplotlib

    # The salt makes the names inside the SVG, and so the file, the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        png, svg = io.BytesIO(), io.StringIO()
        draw(LIGHT).savefig(png, format="png", dpi=200)
        draw(MARKS).savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    return Picture(name, caption, png.getvalue(), _for_page(svg.getvalue(), name, caption), small)


def new_figure(size: tuple[float, float] = SIZE) -> Figure:
    """Return an empty figure of a size in inches."""
    # Not pyplot: it keeps figures and a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(
    colors: Colors,
    xlabel: str,
    ylabel: str,
    *,
    size: tuple[float, float] = SIZE,
) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes in the house's look."""
    figure = new_figure(size)
    axes = figure.add_subplot()
    style_axes(axes, colors, xlabel, ylabel)
    return figure, axes


def style_axes(axes: Axes, colors: Colors, xlabel: str, ylabel: str) -> None:
    """Give axes the house's look: one spine, pale horizontal rules, quiet labels."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colors["muted"])
    axes.grid(axis="y", color=colors["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colors["muted"], length=0)
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel(xlabel, color=colors["muted"])
    axes.set_ylabel(ylabel, color=colors["muted"])


def whole_numbers(axis: Any, count: int = 6) -> None:
    """Let an axis have ticks at whole numbers, with thousands set apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_above(figure: Figure, colors: Colors, columns: int = 2, **changes: Any) -> None:
    """Put the legend above the axes, where it hides nothing."""
    options = {"handlelength": 2.2, "columnspacing": 1.2, "fontsize": 8, **changes}
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        labelcolor=colors["ink"],
        **options,
    )


def add_points(axes: Axes, points_N2: np.ndarray, color: str, size: float, **options: Any) -> None:
    """Draw points as one path: a tenth of the bytes that a marker for each would take in SVG.

    Args:
        axes: Where.
        points_N2: (N, 2) positions in data units.
        color: Their color.
        size: Diameter in points (1/72 inch).
        options: Of the patch, such as zorder, alpha.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not len(points_N2):
        return
    # Strokes of no length with round ends are dots.
    vertices = np.repeat(np.asarray(points_N2, dtype=np.float64), 2, axis=0)
    codes = np.tile(np.array([Path.MOVETO, Path.LINETO], dtype=np.uint8), len(points_N2))
    path = Path(vertices, codes)
    path.should_simplify = False
    patch = PathPatch(
        path, facecolor="none", edgecolor=color, linewidth=size, capstyle="round", **options
    )
    axes.add_patch(patch)


def _for_page(svg: str, name: str, caption: str) -> str:
    """Return matplotlib's SVG as an element of a page: its fonts, its colors, its width."""
    svg = svg[svg.index("<svg") :]
    for key, mark in MARKS.items():
        svg = svg.replace(mark, f"var(--{key})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    # A hundredth of a unit is finer than any screen.
    svg = re.sub(
        r'(?<= d=")[^"]*', lambda match: _NUMBER.sub(_rounded, match[0].replace("\n", "")), svg
    )
    # Names must be the page's own: two figures both have an axes_1.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = rf'<svg role="img" aria-label="{label}" viewBox="\1"'
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"', lambda match: head.replace(r"\1", match[1]), svg, count=1
    )


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}"
