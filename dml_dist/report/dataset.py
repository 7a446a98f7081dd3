"""`dml-dist data show`: statistics of a data set on the terminal, and a picture of it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from dml_dist.config.data import CacheConfig
from dml_dist.data.index import Index
from dml_dist.data.remote_shards import open_index
from dml_dist.data.statistics import (
    ContactSheet,
    SplitFacts,
    contact_sheet,
    split_facts,
    split_names,
)
from dml_dist.files import write_bytes_atomic
from dml_dist.report.figures import (
    LIGHT,
    SERIES,
    new_figure,
    new_picture_path,
    style_axes,
    whole_numbers,
)
from dml_dist.report.formatting import MISSING
from dml_dist.terminal import say_styled
from dml_dist.urls import is_url, shown_url

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE = 13  # points
_MOST_SPLITS = 4
_GAP = 4  # pixels between two tiles


def show_dataset(
    location: str | Path,
    console: Console,
    *,
    out: Path | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Path:
    """Print the statistics of a data set and write a picture of it.

    Args:
        location: Folder of tar shards and index, or a URL of one: its index and a few tar shards
            are copied, those into the cache of `data.cache`'s defaults.
        console: Where tables and warnings go.
        out: The picture, a PNG that does not exist yet; None is a new file in the current folder.
        window: Number of tar shards mixed by a shuffled epoch; None is the default.
        seed: Seed of the choice of classes and images.

    Returns:
        The picture.

    Raises:
        ConfigError: If `out` exists or is no PNG.
        DataError: If the index is missing or damaged, or an image cannot be read.
        RunError: If the server of a URL does not answer.
    """
    shown = shown_url(str(location))
    stem = (
        Path(shown.partition("?")[0]).name if is_url(location) else Path(location).absolute().name
    )
    target = new_picture_path(out, f"{stem or 'data'}-show")
    index = open_index(str(location), CacheConfig())
    names = split_names(index)
    facts = [split_facts(index, name, window=window, seed=seed) for name in names]
    console.print(_table(shown, index, facts))
    for text in _size_lines(index):
        console.print(text, highlight=False)
    for fact in facts:
        for warning in fact.warnings:
            say_styled(console, "warning:", "yellow", warning)
    sheets = [contact_sheet(index, name, seed=seed) for name in names[:_MOST_SPLITS]]
    write_bytes_atomic(target, _picture(stem, index, facts, sheets))
    console.print(f"picture: {target}", highlight=False, soft_wrap=True)
    return target


# ---------------------------------------------------------------- the terminal


def _table(shown: str, index: Index, facts: Sequence[SplitFacts]) -> Table:
    """Return the statistics of all splits, one column per split."""
    title = f"{len(index):,} images of {len(index.class_names):,} classes: {shown}"
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=True)
    table.add_column("")
    for fact in facts:
        table.add_column(fact.name, justify="right")

    def add(label: str, values: Sequence[str]) -> None:
        if any(value != MISSING for value in values):
            table.add_row(label, *values)

    add("images", [f"{fact.num_images:,}" for fact in facts])
    add("classes", [f"{fact.num_classes:,}" for fact in facts])
    add("super-classes", [_count(fact.num_super_classes) for fact in facts])
    for role, label in (("query", "queries only"), ("gallery", "gallery only")):
        add(label, [_count(fact.roles.get(role, 0)) for fact in facts])
    if any(set(fact.roles) - {"both"} for fact in facts):
        add("query and gallery", [_count(fact.roles.get("both", 0)) for fact in facts])
    table.add_section()
    add("images per class: smallest", [f"{fact.class_sizes[-1]:,}" for fact in facts])
    add("images per class: median", [f"{np.median(fact.class_sizes):,.6g}" for fact in facts])
    add("images per class: largest", [f"{fact.class_sizes[0]:,}" for fact in facts])
    add("largest / median", [f"{fact.imbalance:,.1f}" for fact in facts])
    add("Gini coefficient of sizes", [f"{fact.gini:.2f}" for fact in facts])
    add("classes with one image", [f"{fact.lone_share:.1%}" for fact in facts])
    table.add_section()
    add("windows of a shuffled epoch", [f"{len(fact.window_classes):,}" for fact in facts])
    add("classes in a window, median", [f"{np.median(fact.window_classes):,.0f}" for fact in facts])
    add("the same, if images were shuffled", [f"{fact.mixed_classes:,.0f}" for fact in facts])
    return table


def _count(number: int) -> str:
    return f"{number:,}" if number else MISSING


def _size_lines(index: Index) -> list[str]:
    """Return the sizes of all images, in bytes and in pixels."""
    megabytes = float(index.length.sum()) / 2**20
    stored = f"{len(index.tar_shards):,} tar shards, {megabytes:,.1f} MiB of images"
    kinds, counts = np.unique(index.extension.astype(str), return_counts=True)
    order = np.argsort(-counts)
    formats = ", ".join(f"{counts[at]:,} {kinds[at]}" for at in order)
    return [f"stored: {stored} ({formats})", f"pixels: {_pixels(index)}"]


def _same_size(index: Index) -> bool:
    return len(np.unique(index.width)) == len(np.unique(index.height)) == 1


def _pixels(index: Index) -> str:
    if _same_size(index):
        return f"every image is {index.width[0]:,} x {index.height[0]:,}"
    parts = []
    for name, values in (("width", index.width), ("height", index.height)):
        low, middle, high = np.percentile(values, [0, 50, 100])
        parts.append(f"{name} {low:,.0f} to {high:,.0f}, median {middle:,.0f}")
    return "; ".join(parts)


# ---------------------------------------------------------------- the picture


def _picture(
    name: str, index: Index, facts: Sequence[SplitFacts], sheets: Sequence[ContactSheet]
) -> bytes:
    """Return the picture as PNG: class sizes, image sizes, then a contact sheet for each split."""
    import matplotlib

    columns = 2 if len(sheets) > 1 else 1
    lines = -(-len(sheets) // columns)
    same = _same_size(index)
    heights = [2.6 if same else 3.0] + [
        max(0.5 + 0.52 * len(sheet.tiles) for sheet in sheets[line * columns :][:columns])
        for line in range(lines)
    ]
    with matplotlib.rc_context({"font.size": 9}):
        figure = new_figure((13.0 if columns == 2 else 8.4, sum(heights) + 0.4))
        figure.suptitle(
            f"{name}: {len(index):,} images, {len(index.class_names):,} classes"
            + (f", each image {index.width[0]:,} × {index.height[0]:,} pixels" if same else ""),  # noqa: RUF001
            x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", color=LIGHT["ink"],
            parse_math=False,
        )  # fmt: skip
        parts = figure.subfigures(1 + lines, 1, height_ratios=heights, squeeze=False)[:, 0]
        charts = np.atleast_1d(parts[0].subplots(1, 1 if same else 2))
        _draw_class_sizes(charts[0], facts)
        if not same:
            _draw_pixels(charts[1], index)
        for line in range(lines):
            cells = np.atleast_1d(parts[1 + line].subplots(1, columns))
            for at, cell in enumerate(cells):
                number = line * columns + at
                cell.set_axis_off()
                if number < len(sheets):
                    _draw_sheet(cell, sheets[number])
        return _png(figure)


def _png(figure: Figure) -> bytes:
    import warnings

    file = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in any script; missing glyphs are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()


def _draw_class_sizes(axes: Axes, facts: Sequence[SplitFacts]) -> None:
    style_axes(axes, LIGHT, "images per class", "classes")
    axes.set_title("Class sizes", loc="left", fontweight="bold", color=LIGHT["ink"])
    largest = max(int(fact.class_sizes[0]) for fact in facts)
    smallest = min(int(fact.class_sizes[-1]) for fact in facts)
    spread = largest - smallest + 1
    bins = np.linspace(smallest - 0.5, largest + 0.5, spread + 1 if spread <= 30 else 31)
    wide = 0.85 / len(facts) * np.diff(bins)
    for number, fact in enumerate(facts):
        counts, _ = np.histogram(fact.class_sizes, bins)
        axes.bar(
            bins[:-1] + 0.075 * np.diff(bins) + number * wide,
            counts,
            width=wide,
            align="edge",
            color=LIGHT[SERIES[number % len(SERIES)]],
            label=f"{fact.name}: {fact.num_images:,} images, {fact.num_classes:,} classes",
        )
    if spread < 4:
        axes.set_xlim(smallest - 2.5, largest + 2.5)
    axes.set_ylim(0, axes.get_ylim()[1] * (1.12 + 0.07 * len(facts)))
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    for text in axes.legend(frameon=False, loc="upper left", fontsize=8).get_texts():
        text.set_color(LIGHT["ink"])
        text.set_parse_math(False)


def _draw_pixels(axes: Axes, index: Index) -> None:
    axes.set_title("Image sizes", loc="left", fontweight="bold", color=LIGHT["ink"])
    style_axes(axes, LIGHT, "pixels", "images")
    high = int(max(index.width.max(), index.height.max()))
    low = int(min(index.width.min(), index.height.min()))
    bins = np.linspace(low - 0.5, high + 0.5, min(40, high - low + 1) + 1)
    for name, values, color in (
        ("width", index.width, SERIES[0]),
        ("height", index.height, SERIES[1]),
    ):
        counts, _ = np.histogram(values, bins)
        axes.stairs(counts, bins, color=LIGHT[color], linewidth=1.6, label=name)
        axes.stairs(counts, bins, color=LIGHT[color], alpha=0.12, fill=True)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    axes.legend(frameon=False, loc="upper right", fontsize=8, labelcolor=LIGHT["ink"])


def _draw_sheet(axes: Axes, sheet: ContactSheet) -> None:
    side = sheet.tiles[0].shape[1]
    step = side + _GAP
    columns = max(len(row) for row in sheet.tiles)
    canvas = np.full((len(sheet.tiles) * step - _GAP, columns * step - _GAP, 3), 255, np.uint8)
    for line, row in enumerate(sheet.tiles):
        for column, tile in enumerate(row):
            top, left = line * step, column * step
            canvas[top : top + side, left : left + side] = tile
    axes.imshow(canvas, interpolation="antialiased")
    axes.set_anchor("NW")
    shown = len(sheet.tiles)
    axes.set_title(
        f"{sheet.split}: {shown} {'class' if shown == 1 else 'classes'}, drawn at random",
        loc="left", fontweight="bold", color=LIGHT["ink"], parse_math=False,
    )  # fmt: skip
    for line, (name, size) in enumerate(zip(sheet.class_names, sheet.class_sizes, strict=True)):
        axes.text(
            -_GAP * 2,
            line * step + side / 2,
            f"{_short(name)}\n{size:,} {'image' if size == 1 else 'images'}",
            ha="right", va="center", fontsize=8, color=LIGHT["ink"], parse_math=False,
        )  # fmt: skip


def _short(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"…{name[-(limit - 1) :]}"
