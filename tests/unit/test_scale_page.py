"""The page of a scaling study, against numbers worked out by hand from made-up points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.studies.scale import page as page_module
from dml_dist.studies.scale.figures import draw_efficiency, log_ticks, plain_number
from dml_dist.studies.scale.model_part import model_part
from dml_dist.studies.scale.page import write_scale_page
from dml_dist.studies.scale.point_lines import lines_over
from dml_dist.studies.scale.point_tables import (
    results_notes,
    results_table,
    split_table,
    traffic_table,
)
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.step_split import draw_split
from tests.blank_figures import save_blank
from tests.report_runs import Page
from tests.scale_points import class_sweep, full_study, point_of, troubled_study

DASH = "–"  # noqa: RUF001


def config_of(**backbone: Any) -> RunConfig:
    return parse_config(
        {
            "name": "demo",
            "data": {"path": "/nowhere/shards"},
            "model": {"backbone": backbone or {"name": "conv4", "width": 32}},
            "train": {"global_batch_size": 64, "steps": 60},
        }
    )


FIGURES: dict[str, Figure] = {}
"""The last figures by the name of their picture."""


@pytest.fixture(autouse=True, scope="module")
def kept_figures() -> Iterator[None]:
    """Keep the figures, and save blank ones: layout takes seconds."""

    def save(figure: Figure, target: IO[Any], **options: Any) -> None:
        FIGURES[rcParams["svg.hashsalt"]] = figure
        save_blank(figure, target, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


def page_of(folder: Path, points: Sequence[ScalePoint]) -> Page:
    folder.mkdir(exist_ok=True)
    return Page(write_scale_page(folder, points, config_of()))


@dataclass(frozen=True)
class Written:
    """A page with its figures."""

    page: Page
    figures: Mapping[str, Figure]

    @classmethod
    def of(cls, folder: Path, points: Sequence[ScalePoint]) -> Written:
        FIGURES.clear()
        return cls(page_of(folder, points), dict(FIGURES))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written.of(tmp_path_factory.mktemp("troubled"), troubled_study())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "report").mkdir()
    (folder / "points.parquet").touch()
    (folder / "report/points.csv").touch()
    return Written.of(folder, class_sweep())


def measured(world_size: int, speed: float, **changes: Any) -> ScalePoint:
    low, high = 0.9 * speed, 1.1 * speed
    return point_of(
        world_size,
        name=f"w{world_size}-{changes.get('proxies', 'sharded')}",
        images_per_second=speed,
        images_per_second_low=low,
        images_per_second_high=high,
        **changes,
    )


def line_of(figure: Figure, label: str) -> dict[str, Any]:
    """Return style and points of the line with a label: its points are drawn in its color."""
    axes = figure.axes[0]
    (sample,) = [line for line in axes.lines if line.get_label() == label]
    same = [line for line in axes.lines if line.get_color() == sample.get_color()]
    marked = [
        line for line in same if line.get_marker() == sample.get_marker() and len(line.get_xdata())
    ]
    points = {
        (float(x), round(float(y), 6)): line.get_markerfacecolor()
        for line in marked
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    return {"dashed": sample.is_dashed(), "marker": sample.get_marker(), "points": points}


# ---------------------------------------------------------------- lines


def test_weak_and_strong_lines() -> None:
    points = [point_of(1, global_batch_size=64), point_of(2, global_batch_size=64)]
    points += [point_of(2, global_batch_size=128), point_of(2, 5000, global_batch_size=256)]
    (strong,) = lines_over(points, "world_size")
    (weak,) = lines_over(points, "world_size", "per rank")
    assert [point.global_batch_size for point in strong.points] == [64, 64]
    assert [point.global_batch_size for point in weak.points] == [64, 128]


def test_labels_name_only_what_differs() -> None:
    lines = lines_over(full_study(), "num_classes")
    labels = [line.label for line in lines]
    assert len(set(labels)) == len(labels) == 10
    assert "W 2, B 64, sharded" in labels
    groups = {line.group for line in lines}
    assert groups == {f"W {w}, B {b}" for w, b in ((1, 64), (2, 64), (2, 128), (4, 64), (4, 256))}


# ---------------------------------------------------------------- figures


def test_efficiency() -> None:
    """64 rows a rank: 200, 300 and 400 images/s of 2, 4 and 8 ranks are 100, 75 and 50 %."""
    speeds = {2: 200, 4: 300, 8: 400}
    points = [measured(w, speed, global_batch_size=64 * w) for w, speed in speeds.items()]
    points += [
        replace(point, name=f"{point.name}-r", proxies="replicated", images_per_second=200)
        for point in points
    ]
    (picture,) = draw_efficiency(points)  # None of strong scaling.
    sharded = line_of(FIGURES[picture.name], "sharded")
    replicated = line_of(FIGURES[picture.name], "replicated")
    assert picture.name == "efficiency-weak"
    assert list(sharded["points"]) == [(2, 100), (4, 75), (8, 50)]
    assert list(replicated["points"]) == [(2, 100), (4, 50), (8, 25)]
    # Told apart without color: by line and marker.
    assert (sharded["dashed"], replicated["dashed"]) == (False, True)
    assert sharded["marker"] != replicated["marker"]
    hollow = [face == "none" for face in sharded["points"].values()]
    assert hollow == [False, True, True]  # Four and eight ranks on two processors.


def test_failed_refused_and_noisy_points_are_marked(troubled: Written) -> None:
    axes = troubled.figures["throughput-weak"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["failed: no value"].get_xdata()) == [2]
    assert list(lines["refused: no value"].get_xdata()) == [4]
    speed = next(p for p in troubled_study() if p.noisy).images_per_second
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [2, speed] in [[*line.get_xdata(), *line.get_ydata()] for line in crosses]


def test_parts_of_a_step_add_up() -> None:
    unknown = dict.fromkeys(("seconds_wait", "seconds_gather", "seconds_reduction"), math.nan)
    points = [replace(point, **unknown) for point in class_sweep()[:2]]
    draw_split(points)
    bars = FIGURES["split"].axes[0].patches
    for row in (0, 1):
        widths = [
            bar.get_width() for bar in bars if round(bar.get_y() + bar.get_height() / 2) == row
        ]
        assert len(widths) == 9
        assert sum(widths) == pytest.approx(100)
    _, (first, _) = split_table(points)
    assert first[:3] == [points[0].name, f"{1000 * points[0].seconds_step:.3g}", "0.4"]
    assert first[5] == DASH  # No gather with one rank.


def test_memory_beside_published(sweep: Written) -> None:
    axes = sweep.figures["memory"].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    peer = lines["model parallel, 8 x V100, r100"]
    assert list(peer.get_xdata()) == [125_000, 1_400_000, 5_500_000]
    assert list(peer.get_ydata()) == [5306, 11178, 32188]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    names = [row[0] for row in sweep.page.table("memory")[1:]]
    assert names == [point.name for point in class_sweep()]


def test_round_numbers_without_exponents() -> None:
    assert log_ticks(900, 1.1e6) == [1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    assert log_ticks(90, 2100, 4) == [100, 300, 1000]
    assert [plain_number(x) for x in (1e8, 2.5e6, 1e5, 0.001)] == [
        "100 M",
        "2.5 M",
        "100,000",
        "0.001",
    ]


def test_texts_of_figures_do_not_overlap(troubled: Written) -> None:
    check_texts(troubled.figures)


@pytest.mark.slow
def test_texts_of_many_lines_do_not_overlap(tmp_path: Path) -> None:
    check_texts(Written.of(tmp_path, full_study()).figures)


def check_texts(figures: Mapping[str, Figure]) -> None:
    assert len(figures) > 8
    for name, figure in figures.items():
        figure.canvas.draw()
        boxes = list(text_boxes(figure))
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), (name, one, other)
        for text, box in boxes:
            assert box.x0 >= 0, (name, text)
            assert box.x1 <= figure.bbox.x1, (name, text)


def text_boxes(figure: Figure) -> Iterator[tuple[str, Any]]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        x, y = axes.get_xlim(), axes.get_ylim()
        for axis, (low, high) in ((axes.xaxis, sorted(x)), (axes.yaxis, sorted(y))):
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            legends += [tick.label1 for tick in ticks if tick.label1.get_visible()]
            legends.append(axis.label)
    for text in legends:
        if text.get_text():
            yield text.get_text(), text.get_window_extent(renderer).padded(-0.5)


# ---------------------------------------------------------------- page


def test_trouble_is_shown_as_such(troubled: Written) -> None:
    page = troubled.page
    assert "12 points: 9 measured, 1 waiting, 1 failed, 1 refused" in page.text
    assert "<script" not in page.raw
    assert "w2-c100000-b64-replicated failed: rank 1 ended with exit code 1: <script>" in page.text
    assert "w4-c100000-b128-replicated was refused: it needs 9.1 GB of memory" in page.text
    assert "Not measured yet: w4-c100000-b128-sharded." in page.text
    assert (
        "More ranks than processors at: w4-c1000-b128-sharded, w4-c1000-b128-replicated."
        in page.text
    )
    rows = {row[0]: row for row in page.table("points")[1:]}
    assert len(rows) == 12
    assert rows["w2-c1000-b64-sharded"][1] == "measured, noisy, 3 tries"
    assert rows["w4-c1000-b128-sharded"][1] == "measured, oversubscribed"
    assert rows["w4-c100000-b128-replicated"][1] == "refused"
    assert "the machine has 8.0 GB" in rows["w4-c100000-b128-replicated"][2]
    assert rows["w4-c100000-b128-replicated"][3:] == [DASH] * 5


def test_marked_points_are_in_no_fit(troubled: Written) -> None:
    page = troubled.page
    assert "Measured, but in no fit: 1 noisy, 2 more ranks than processors." in page.text
    assert {row[0] for row in page.table("model")[1:]} == {
        *("w1-c1000-b32-sharded", "w1-c1000-b32-replicated"),
        *("w1-c100000-b32-sharded", "w1-c100000-b32-replicated"),
        *("w2-c1000-b64-replicated", "w2-c100000-b64-sharded"),
    }


def test_traffic() -> None:
    points = [
        point_of(2, classes, name=f"c{classes}", sent_predicted=1e6, sent_counted=counted)
        for classes, counted in ((1000, 1.03e6), (2000, 0.99e6))
    ]
    assert [row[:4] for row in traffic_table([point_of(1), *points])[1]] == [
        ["c1000", "1 MB", "1.03 MB", "+3.0 %"],
        ["c2000", "1 MB", "990 kB", "-1.0 %"],
    ]
    page_module._draw_sent(points)
    right = FIGURES["sent"].axes[1]
    heights = [y for line in right.lines for y in line.get_ydata() if line.get_marker() == "o"]
    assert heights == pytest.approx([3, -1])


def test_equal_results(sweep: Written) -> None:
    points = [point_of(1), point_of(2, loss_difference=2e-6)]
    points.append(point_of(2, 2000, loss_difference=3e-7))
    (worst, _) = results_notes(points)
    assert "by at most 2.0e-06 of it, over all steps (w2-c1000-b64-sharded)" in worst
    assert results_table(points)[1][1][1:] == ["6,400", "41.20 %", "2.0e-06"]
    assert sweep.page.table("results")[1][1:] == ["6,400", "41.10 %", "one rank"]


def test_gpus_need_a_step_time(sweep: Written) -> None:
    assert "There is no extrapolation to GPUs. No step time of conv4-32 on" in sweep.page.text
    assert "forecast-gpus" not in sweep.figures
    assert "forecast-classes" in sweep.figures


def test_forecast_on_gpus_from_a_cited_step_time() -> None:
    points = [replace(point, backbone="resnet50") for point in class_sweep()]
    part = model_part(points, config_of(name="resnet50", norm="group"))
    assert [one.label for one in part.on_gpus] == [
        *("C 1,000,000", "C 10,000,000", "C 100,000,000")
    ]
    one = part.on_gpus[0]
    assert list(one.values) == [8, 16, 64, 256, 1024]
    assert all(a < b < c for a, b, c in zip(one.low, one.middle, one.high, strict=True))
    assert part.forecast_notes[0].startswith("GPUs: Step of resnet50 on A100: ")


def test_extrapolation_is_dotted_from_four_times_the_measured_range(sweep: Written) -> None:
    axes = sweep.figures["forecast-classes"].axes[0]
    assert "by the model" in axes.get_ylabel()
    near = next(line for line in axes.lines if any(map(math.isnan, line.get_ydata())))
    pairs = zip(near.get_xdata(), near.get_ydata(), strict=True)
    inside = [x for x, y in pairs if not math.isnan(y)]
    assert 2_500_000 < max(inside) <= 4_000_000  # 1,000,000 is the largest measured.


def test_published_checks(sweep: Written) -> None:
    rows = sweep.page.table("checks")[1:]
    assert rows[0][:3] == ["model parallel, 8 V100, 5,500,000 classes", "images/s", "1,389"]
    assert not any("not passed" in cell for row in rows for cell in row)


def test_a_part_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(page_module, "draw_throughput", fail)
    monkeypatch.setattr(page_module, "memory_table", fail)
    page = page_of(tmp_path, class_sweep())
    assert "The part 'throughput' failed: ZeroDivisionError: no such thing." in page.text
    assert 'id="split"' in page.raw
    assert len(page.table("points")) == 6


@pytest.mark.parametrize(
    "points", [[], [point_of(1)], [p for p in troubled_study() if not p.measured]]
)
def test_too_few_points_for_a_model(tmp_path: Path, points: list[ScalePoint]) -> None:
    page = page_of(tmp_path, points)
    assert "There is no model." in page.text
    assert "The part" not in page.text
    assert len(page.table("points")) == 1 + len(points)


def test_tables_are_linked_where_they_are(sweep: Written) -> None:
    links = [values["href"] for tag, values in sweep.page.elements if tag == "a"]
    assert "../points.parquet" in links
    assert "points.csv" in links
    assert not [link for link in links if "://" in link]
