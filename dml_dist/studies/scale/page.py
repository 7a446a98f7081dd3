"""The page of a scaling study: one HTML file that needs no network, and its figures as PNG."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.config.load import dump_config
from dml_dist.config.schema import RunConfig
from dml_dist.report.figures import Picture
from dml_dist.report.parts import Parts
from dml_dist.report.render import write_page
from dml_dist.studies.scale.figures import (
    MEGABYTE,
    draw_efficiency,
    draw_speeds,
    draw_throughput,
    draw_traffic,
)
from dml_dist.studies.scale.model_figures import Pair, draw_forecast, draw_memory, draw_pairs
from dml_dist.studies.scale.model_part import (
    HELD_OUT,
    ModelPart,
    check_table,
    model_part,
    peer_memory,
)
from dml_dist.studies.scale.point_lines import SIZES, lines_over, sizes_text, varied_sizes
from dml_dist.studies.scale.point_tables import (
    NO_ROWS,
    POINT_CELLS,
    format_number,
    memory_table,
    names_of,
    point_rows,
    results_notes,
    results_table,
    split_table,
    traffic_table,
)
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.step_split import draw_split

TRAFFIC_BAND = 0.05
"""Counted bytes may be this much above the predicted ones."""

_TABLES = ("points.parquet", "points.csv")


def write_scale_page(folder: Path, points: Sequence[ScalePoint], config: RunConfig) -> Path:
    """Write report/ of a scaling study: the page and its figures.

    Args:
        folder: The study's folder. Its tables points.parquet and points.csv, or those in report/,
            are linked, so they are written before.
        points: All points of the study, of any status.
        config: The study's configuration.

    Returns:
        Path of the page.
    """
    parts, report_dir = Parts(), folder / "report"
    model = parts.make("cost model", lambda: model_part(points, config), None)
    pictures = _pictures(points, model, parts)
    tables = {
        "split": parts.make("table of times", lambda: split_table(points), NO_ROWS),
        "memory": parts.make("table of memory", lambda: memory_table(points), NO_ROWS),
        "traffic": parts.make("table of traffic", lambda: traffic_table(points), NO_ROWS),
        "results": parts.make("table of results", lambda: results_table(points), NO_ROWS),
    }
    checks = parts.make("published figures", check_table, NO_ROWS)
    rows = parts.make("table of points", lambda: point_rows(points), [])
    headline = parts.make("headline", lambda: _headline(points, model), [])
    sections: list[tuple[str, str, bool]] = [
        ("ranks", "Ranks", bool(pictures.throughput or pictures.efficiency)),
        ("sizes", "Other sizes", bool(pictures.speeds)),
        ("split", "Time of a step", bool(tables["split"][1])),
        ("memory", "Memory", bool(tables["memory"][1])),
        ("traffic", "Traffic", bool(tables["traffic"][1])),
        ("results", "Equal results", bool(tables["results"][1])),
        ("model", "Model", model is not None),
        ("forecast", "Extrapolation", model is not None),
        ("checks", "Published figures", bool(checks[1])),
        ("points", "Points", True),
    ]
    done = all(point.status != "waiting" for point in points)
    return write_page(
        report_dir,
        "study/scale.html",
        pictures.all,
        kind="scaling study",
        command="scale",
        name=config.name,
        status="finished" if done else "unfinished",
        warnings=[*_warnings(points), *parts.failed],
        missing=_missing(points),
        sections=sections,
        facts=parts.make("facts", lambda: _facts(points), []),
        config=dump_config(config),
        config_name="scale.yaml",
        states=_states(points),
        headline=headline,
        figures_of=pictures,
        **tables,
        results_notes=parts.make("results", lambda: results_notes(points), []),
        model=model,
        checks=checks,
        points=rows,
        point_cells=POINT_CELLS,
        downloads=_downloads(folder, report_dir),
    )


def _downloads(folder: Path, report_dir: Path) -> list[tuple[str, str]]:
    places = [place / name for name in _TABLES for place in (folder, report_dir)]
    found = {path.name: path for path in places if path.is_file()}
    return [
        (name, Path(os.path.relpath(path, report_dir)).as_posix()) for name, path in found.items()
    ]


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class _Pictures:
    """Figures of the page by section."""

    throughput: Sequence[Picture]
    efficiency: Sequence[Picture]
    speeds: Sequence[Picture]
    split: Sequence[Picture]
    memory: Sequence[Picture]
    traffic: Sequence[Picture]
    sent: Sequence[Picture]
    model: Sequence[Picture]
    forecast: Sequence[Picture]

    @property
    def all(self) -> list[Picture]:
        return [picture for name in self.__dataclass_fields__ for picture in getattr(self, name)]


def _pictures(points: Sequence[ScalePoint], model: ModelPart | None, parts: Parts) -> _Pictures:
    peers = parts.make("published memory", peer_memory, [])
    return _Pictures(
        throughput=parts.make("throughput", lambda: draw_throughput(points), []),
        efficiency=parts.make("efficiency", lambda: draw_efficiency(points), []),
        speeds=parts.make("speed by size", lambda: draw_speeds(points), []),
        split=parts.make("time split", lambda: draw_split(points), []),
        memory=parts.make("memory", lambda: draw_memory(points, peers), []),
        traffic=parts.make("traffic", lambda: draw_traffic(points), []),
        sent=parts.make("predicted and counted bytes", lambda: _draw_sent(points), []),
        model=parts.make("residuals", lambda: [] if model is None else _draw_model(model), []),
        forecast=parts.make(
            "extrapolation",
            lambda: [] if model is None else _draw_forecasts(model),
            [],
        ),
    )


def _draw_sent(points: Sequence[ScalePoint]) -> list[Picture]:
    pairs = [
        Pair(
            point,
            point.proxies,
            predicted=point.sent_predicted / MEGABYTE,
            low=point.sent_predicted / MEGABYTE,
            high=point.sent_predicted / MEGABYTE,
            measured=point.sent_counted / MEGABYTE,
            deviation=point.sent_counted / point.sent_predicted - 1,
        )
        for point in points
        if point.measured and point.sent_predicted > 0 and math.isfinite(point.sent_counted)
    ]
    text = (
        "Bytes that a rank sends in a step: counted on the network interface against those "
        "computed from the plan. Right: how far they are apart; headers and acknowledgements of "
        "the network are in the counted ones alone."
    )
    return draw_pairs("sent", text, pairs, "MB sent", "counted above predicted", TRAFFIC_BAND)


def _draw_model(model: ModelPart) -> list[Picture]:
    text = "measured against the model's, with its bracket. Right: residuals."
    above = "model above measured"
    return [
        *draw_pairs("model-step", f"Time of a step: {text}", model.seconds, "step (ms)", above),
        *draw_pairs(
            "model-memory", f"Memory of a rank: {text}", model.memory, "memory (MB)", above
        ),
    ]


def _draw_forecasts(model: ModelPart) -> list[Picture]:
    text = (
        "Lines and bands are the model and its bracket, not measurements. Dotted: a size is more "
        "than 4 times outside what was measured, or something else is uncertain."
    )
    machine = "Points are measured on this machine; ranks beyond its processors share them."
    return [
        *draw_forecast("forecast-classes", f"By classes. {machine} {text}", model.over_classes),
        *draw_forecast(
            "forecast-ranks",
            f"By ranks of this machine, the rows of a rank fixed. {machine} {text}",
            model.over_ranks,
        ),
        *draw_forecast(
            "forecast-gpus", f"On GPUs, from what is named below. {text}", model.on_gpus
        ),
    ]


# ---------------------------------------------------------------- notes and facts


def _states(points: Sequence[ScalePoint]) -> str:
    counts = Counter(point.status for point in points)
    found = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(points)} {'point' if len(points) == 1 else 'points'}: {found or 'none'}"


def _warnings(points: Sequence[ScalePoint]) -> list[str]:
    measured = [point for point in points if point.measured]
    warnings = []
    if not measured:
        warnings.append("No point is measured, so there are no figures and no model.")
    if names := names_of(point for point in measured if point.noisy):
        warnings.append(
            f"The machine was not quiet, also when measured again, at: {names}. These are marked "
            "and in no fit."
        )
    if names := names_of(point for point in measured if point.oversubscribed):
        warnings.append(
            f"More ranks than processors at: {names}. Their speed says little about machines with "
            "enough processors; they are marked and in no fit."
        )
    if len({(point.device, point.processors) for point in measured}) > 1:
        warnings.append("Points were measured on different machines: speeds are not comparable.")
    return warnings


def _missing(points: Sequence[ScalePoint]) -> list[str]:
    missing = [
        f"{point.name} {'failed' if point.status == 'failed' else 'was refused'}: "
        f"{point.problem.rstrip('.') or 'no reason is recorded'}."
        for point in points
        if point.status in ("failed", "refused")
    ]
    if names := names_of(point for point in points if point.status == "waiting"):
        missing.append(f"Not measured yet: {names}.")
    return missing


def _headline(points: Sequence[ScalePoint], model: ModelPart | None) -> list[tuple[str, str, str]]:
    """Return label, value and detail of the headline numbers."""
    measured = [point for point in points if point.measured]
    found = [("points measured", f"{len(measured)} of {len(points)}", "")]
    if measured:
        best = max(measured, key=lambda point: point.images_per_second)
        found.append(("images/s at most", format_number(best.images_per_second), best.name))
    quiet = [p for p in measured if not p.noisy and not p.oversubscribed]
    sharded = [point for point in quiet if point.proxies == "sharded"]
    weak = lines_over(sharded, "world_size", "per rank")
    if weak:
        ends = [(line.points[0], line.points[-1]) for line in weak]
        most = max(end.world_size for _, end in ends)
        shares = [
            100 * end.images_per_second * first.world_size / first.images_per_second / most
            for first, end in ends
            if end.world_size == most
        ]
        low, high = f"{min(shares):.0f}", f"{max(shares):.0f}"
        value = f"{low} %" if low == high else f"{low} to {high} %"
        detail = "sharded proxies, rows of a rank fixed"
        found.append((f"efficiency at {most} ranks", value, detail))
    errors = [abs(p.deviation) for p in model.seconds if p.group == HELD_OUT] if model else []
    if errors:
        text = f"{100 * statistics.median(errors):.1f} %"
        found.append(
            ("error of the model's step time", text, f"median of {len(errors)} points held out")
        )
    return found


def _facts(points: Sequence[ScalePoint]) -> list[tuple[str, str]]:
    varied = varied_sizes(points)
    facts = [("varied", ", ".join(SIZES[name] for name in varied) or "nothing")]
    if points:
        same = [name for name in SIZES if name not in varied]
        facts.append(("the same at all points", sizes_text(points[0], same)))
    machines = dict.fromkeys(
        f"{point.device}, {point.processors} processors" for point in points if point.measured
    )
    facts += [("machine", machine) for machine in machines]
    loads = [point.load for point in points if point.measured and math.isfinite(point.load)]
    if loads:
        facts.append(("other processes, on average", f"{min(loads):.1f} to {max(loads):.1f}"))
    return facts
