"""Figure style: each figure as PNG, and as SVG in the colors of the page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dml_dist.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colors = Mapping[str, str]

# The palette of Okabe and Ito, safe for color blindness.
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
"""Names of the colors of series that have no color of their own."""

# Placeholders in SVG, replaced by the page's custom properties after drawing.
PLACEHOLDERS: Colors = {name: f"#00fe{number:02x}" for number, name in enumerate(LIGHT)}

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
        small: Whether the page shows it small, three in a row.
    """

    name: str
    caption: str
    png: bytes
    svg: str
    small: bool = False


def draw_picture(
    name: str, caption: str, draw: Callable[[Colors], Figure], *, small: bool = False
) -> Picture:
    """Draw a figure twice: with the light colors, and with placeholders for the page's colors."""
    import matplotlib

    # The salt makes the ids inside the SVG, and so the file, the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        png, svg = io.BytesIO(), io.StringIO()
        draw(LIGHT).savefig(png, format="png", dpi=200)
        draw(PLACEHOLDERS).savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    return Picture(name, caption, png.getvalue(), _for_page(svg.getvalue(), name, caption), small)


def new_picture_path(out: Path | None, stem: str) -> Path:
    """Return where a command writes its picture; it overwrites nothing.

    Args:
        out: The value of --out; None is STEM.png in the current folder, or STEM-2.png, ...
        stem: Name without extension.

    Raises:
        ConfigError: If `out` exists or is no PNG, or its folder does not exist.
    """
    if out is None:
        names = (f"{stem}{'' if n == 1 else f'-{n}'}.png" for n in itertools.count(1))
        return next(path for name in names if not (path := Path.cwd() / name).exists())
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out must name a PNG file, got {out}; end the name in .png")
    if out.exists():
        raise ConfigError(
            f"--out must name a new file, but {out} exists; remove it or give another name"
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"--out must be in an existing folder, but {out.absolute().parent} does not exist; "
            "create it or give another --out"
        )
    return out.absolute()


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
    """Return a figure with one pair of axes in the style of reports."""
    figure = new_figure(size)
    axes = figure.add_subplot()
    style_axes(axes, colors, xlabel, ylabel)
    return figure, axes


def style_axes(axes: Axes, colors: Colors, xlabel: str, ylabel: str) -> None:
    """Apply the style of reports: one spine, light horizontal grid lines, muted labels."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colors["muted"])
    axes.grid(axis="y", color=colors["rule"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colors["muted"], length=0)
    axes.tick_params(axis="x", length=3)
    axes.set_xlabel(xlabel, color=colors["muted"])
    axes.set_ylabel(ylabel, color=colors["muted"])


def whole_numbers(axis: Any, count: int = 6) -> None:
    """Let an axis have ticks at whole numbers, with thousands separators."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_above(figure: Figure, colors: Colors, columns: int = 2, **changes: Any) -> None:
    """Place the legend above the axes, where it covers no data."""
    options = {"handlelength": 2.2, "columnspacing": 1.2, "fontsize": 8, **changes}
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        labelcolor=colors["ink"],
        **options,
    )


def add_points(axes: Axes, points_N2: np.ndarray, color: str, size: float, **options: Any) -> None:
    """Draw points as one path: a tenth of the SVG bytes of one marker per point.

    Args:
        axes: Where.
        points_N2: (N, 2) positions in data units.
        color: Their color.
        size: Diameter in points (1/72 inch).
        options: Of the patch, such as zorder, alpha.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    if not len(points_N2):
        return
    # Strokes of no length with round ends are dots.
    vertices = np.repeat(np.asarray(points_N2, dtype=np.float64), 2, axis=0)
    codes = np.tile(np.array([Outline.MOVETO, Outline.LINETO], dtype=np.uint8), len(points_N2))
    path = Outline(vertices, codes)
    path.should_simplify = False
    patch = PathPatch(
        path, facecolor="none", edgecolor=color, linewidth=size, capstyle="round", **options
    )
    axes.add_patch(patch)


def _for_page(svg: str, name: str, caption: str) -> str:
    """Return matplotlib's SVG for a page: with its fonts, its colors and its width."""
    svg = svg[svg.index("<svg") :]
    for key, color in PLACEHOLDERS.items():
        svg = svg.replace(color, f"var(--{key})")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    # A hundredth of a unit is finer than any screen.
    svg = re.sub(
        r'(?<= d=")[^"]*', lambda match: _NUMBER.sub(_rounded, match[0].replace("\n", "")), svg
    )
    # Ids must be unique on the page: every figure has an axes_1.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = rf'<svg role="img" aria-label="{label}" viewBox="\1"'
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"', lambda match: head.replace(r"\1", match[1]), svg, count=1
    )


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}"
