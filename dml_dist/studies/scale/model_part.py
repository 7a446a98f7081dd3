"""The model's part of a scaling study's page: residuals, extrapolation, published figures."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.report.formatting import MISSING
from dml_dist.studies.scale.ask import answer
from dml_dist.studies.scale.estimate import Method
from dml_dist.studies.scale.figures import MEGABYTE
from dml_dist.studies.scale.model import DEFAULT_ERROR, CostModel, fit, predict
from dml_dist.studies.scale.model_figures import Forecast, Pair, PeerMemory
from dml_dist.studies.scale.point_lines import SIZES, sizes_text
from dml_dist.studies.scale.point_tables import NO_ROWS, Table, format_number, format_share
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.published import checks, published
from dml_dist.studies.tune_axes import sentence

HELD_OUT = "held out"
_FITTED = "fitted"

_MOST_CLASSES = 100_000_000
_GPUS = (8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class ModelPart:
    """What the page shows of the model.

    Attributes:
        notes: Sentences about the fit, or why there is none.
        seconds: Milliseconds of a step, measured and predicted.
        memory: Megabytes of a rank, measured and predicted.
        residuals: Table of both.
        over_classes: Images per second on the measured machine by classes.
        over_ranks: Images per second on the measured machine by ranks.
        on_gpus: Images per second on GPUs by their number.
        forecast_notes: From what the forecasts for GPUs follow, or why there are none.
    """

    notes: Sequence[str]
    seconds: Sequence[Pair] = ()
    memory: Sequence[Pair] = ()
    residuals: Table = NO_ROWS
    over_classes: Sequence[Forecast] = ()
    over_ranks: Sequence[Forecast] = ()
    on_gpus: Sequence[Forecast] = ()
    forecast_notes: Sequence[str] = ()


def model_part(points: Sequence[ScalePoint], config: RunConfig) -> ModelPart:
    """Fit the model to the points and return what the page shows of it."""
    try:
        model = fit(points, Method.of(config))
    except ConfigError as error:
        return ModelPart([f"There is no model. {error}"])
    by_name = {point.name: point for point in points}
    seconds = list(_pairs(model, by_name, "seconds"))
    memory = list(_pairs(model, by_name, "memory"))
    on_gpus, notes = _on_gpus(points, config)
    return ModelPart(
        notes=_notes(model, seconds, memory),
        seconds=seconds,
        memory=memory,
        residuals=_residual_table(seconds, memory),
        over_classes=_over_classes(model, points),
        over_ranks=_over_ranks(model, points),
        on_gpus=on_gpus,
        forecast_notes=notes,
    )


# ---------------------------------------------------------------- residuals


def _pairs(model: CostModel, points: dict[str, ScalePoint], metric: str) -> Iterable[Pair]:
    """Yield the points that were held out, then the fitted ones that never were."""
    factor = 1000 if metric == "seconds" else 1 / MEGABYTE
    held = {one.name: one for one in model.residuals if one.metric == metric}
    fitted = {point.name for point in model.points}
    for name in [*held, *sorted(fitted - held.keys(), key=list(points).index)]:
        point = points[name]
        found = predict(model, point)
        low, predicted, high = found.memory_low, found.memory, found.memory_high
        measured = point.memory_measured
        if metric == "seconds":
            low, predicted, high = found.seconds_low, found.seconds, found.seconds_high
            measured = point.seconds_step
        if name in held:
            predicted = held[name].predicted
        if all(map(math.isfinite, (low, predicted, high))) and measured > 0:
            yield Pair(
                point,
                HELD_OUT if name in held else _FITTED,
                predicted=factor * predicted,
                low=factor * low,
                high=factor * high,
                measured=factor * measured,
                deviation=predicted / measured - 1,
            )


def _notes(model: CostModel, seconds: Sequence[Pair], memory: Sequence[Pair]) -> list[str]:
    count = len(model.points)
    fitted = f"The model is fitted to {count} points"
    held = {one.name for one in model.residuals}
    if held and held <= {point.name for point in model.points}:
        notes = [f"{fitted}; for its error each was held out of a fit in turn."]
    elif held:
        notes = [f"{fitted}; for its error {len(held)} others were held out."]
    else:
        assumed = f"{100 * DEFAULT_ERROR:.0f} % are assumed"
        notes = [f"{fitted}, too few to hold one out: its error is not known, {assumed}."]
    for what, pairs in (("step time", seconds), ("memory", memory)):
        errors = [abs(pair.deviation) for pair in pairs if pair.group == HELD_OUT]
        if errors:
            notes.append(
                f"Error of the {what} of points held out: median "
                f"{100 * statistics.median(errors):.1f} %, largest {100 * max(errors):.1f} %."
            )
    reasons = Counter(model.left_out.values())
    if reasons:
        texts = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        notes.append(f"Measured, but in no fit: {texts}.")
    return notes


def _residual_table(seconds: Sequence[Pair], memory: Sequence[Pair]) -> Table:
    header = ["point", "", "step, ms", "model", "bracket", "error"]
    header += ["memory, MB", "model", "bracket", "error"]
    by_name = [{pair.point.name: pair for pair in pairs} for pairs in (seconds, memory)]
    rows = []
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        pairs = [found.get(name) for found in by_name]
        group = next(pair.group for pair in pairs if pair is not None)
        rows.append([name, group, *(text for pair in pairs for text in _cells(pair))])
    return header, rows


def _cells(pair: Pair | None) -> list[str]:
    if pair is None:
        return [MISSING] * 4
    return [
        format_number(pair.measured),
        format_number(pair.predicted),
        f"{format_number(pair.low)} to {format_number(pair.high)}",
        format_share(pair.deviation),
    ]


# ---------------------------------------------------------------- extrapolation


def _over_classes(model: CostModel, points: Sequence[ScalePoint]) -> list[Forecast]:
    """Return forecasts over classes for each form of the proxies that was measured so."""
    found = []
    for proxies in ("sharded", "replicated"):
        same = [point for point in model.points if point.proxies == proxies]
        if len({point.num_classes for point in same}) > 1:
            base = max(same, key=lambda point: (point.world_size, point.global_batch_size))
            classes = _log_steps(min(point.num_classes for point in same), _MOST_CLASSES)
            asked = [replace(base, num_classes=value) for value in classes]
            found.append(_forecast(model, asked, points, "num_classes"))
    return found


def _over_ranks(model: CostModel, points: Sequence[ScalePoint]) -> list[Forecast]:
    """Return forecasts over ranks of the measured machine, the rows of a rank fixed."""
    found = []
    for proxies in ("sharded", "replicated"):
        same = [point for point in model.points if point.proxies == proxies]
        if len({point.world_size for point in same}) > 1:
            base = max(same, key=lambda point: (point.num_classes, point.global_batch_size))
            rows = base.global_batch_size // base.world_size
            most = 4 * max(point.world_size for point in points if point.measured)
            asked = [
                replace(base, world_size=2**power, global_batch_size=rows * 2**power)
                for power in range(most.bit_length())
                if 2**power <= base.num_classes
            ]
            found.append(_forecast(model, asked, points, "world_size"))
    return found


def _forecast(
    model: CostModel, asked: Sequence[ScalePoint], points: Sequence[ScalePoint], size: str
) -> Forecast:
    found = [predict(model, point) for point in asked]
    sizes = {_sizes_without(point, size): None for point in asked}
    steps = list(zip(asked, found, strict=True))
    kept = ("proxies", "num_classes") if size == "world_size" else ("proxies", "world_size")
    return Forecast(
        label=sizes_text(asked[0], kept),
        size=size,
        values=[getattr(point, size) for point in asked],
        low=[point.global_batch_size / one.seconds_high for point, one in steps],
        middle=[point.global_batch_size / one.seconds for point, one in steps],
        high=[point.global_batch_size / one.seconds_low for point, one in steps],
        marked=[bool(one.marked) for one in found],
        measured=[p for p in points if p.measured and _sizes_without(p, size) in sizes],
    )


def _sizes_without(point: ScalePoint, size: str) -> tuple[object, ...]:
    """Return the sizes that are equal along a forecast: over ranks, their rows."""
    names = [name for name in SIZES if name not in (size, "global_batch_size")]
    batch: float = point.global_batch_size
    if size == "world_size":
        batch /= point.world_size
    return batch, *(getattr(point, name) for name in names)


def _log_steps(low: int, high: int) -> list[int]:
    """Return whole numbers from `low` to `high`, about four for each factor of ten."""
    count = max(1, round(4 * math.log10(high / low)))
    return sorted({round(low * (high / low) ** (step / count)) for step in range(count + 1)})


def _on_gpus(points: Sequence[ScalePoint], config: RunConfig) -> tuple[list[Forecast], list[str]]:
    """Return forecasts over GPUs, and their sources; or none, and why."""
    largest = max(point.num_classes for point in points if point.measured)
    forecasts, notes = [], []
    try:
        for classes in sorted({largest, 10_000_000, _MOST_CLASSES}):
            gpus = [n for n in _GPUS if n <= classes]
            answers = [answer(f"gpus={n} classes={classes}", points, config) for n in gpus]
            speeds = [one.images_per_second for one in answers]
            forecasts.append(
                Forecast(
                    label=f"C {classes:,}",
                    size="world_size",
                    values=gpus,
                    low=[low for low, _, _ in speeds],
                    middle=[middle for _, middle, _ in speeds],
                    high=[high for _, _, high in speeds],
                    marked=[bool(one.marked) for one in answers],
                )
            )
            notes += [*answers[0].sources, *answers[-1].marked]
    except ConfigError as error:
        reason = sentence(str(error).removeprefix("--ask: "))
        return [], [f"There is no extrapolation to GPUs. {reason}"]
    return forecasts, [f"GPUs: {note.rstrip('.')}." for note in dict.fromkeys(notes)]


# ---------------------------------------------------------------- published figures


def check_table() -> Table:
    """Return the model's checks against published figures."""
    header = ["setup", "metric", "published", "model", "error", "accepted", "source and basis"]
    rows = []
    for check in checks():
        low, high = format_number(check.low), format_number(check.high)
        unit = "points" if check.width else "%"
        mark = "" if check.passed else ", not passed"
        rows.append(
            [
                check.setup,
                check.metric,
                format_number(check.published),
                f"{low} to {high}" if check.width else low,
                f"{check.error:+.1f} {unit}{mark}" if check.error else f"inside{mark}",
                f"{check.tolerance:g} {unit}",
                f"{check.source}; {check.basis}",
            ]
        )
    return header, rows


def peer_memory() -> list[PeerMemory]:
    """Return the published memory of a GPU by classes, a line for each method and machine."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in published():
        if row.metric.startswith("memory") and row.num_classes is not None:
            lines.setdefault((row.method, row.setup), []).append((row.num_classes, row.value))
    return [
        PeerMemory(
            f"{method}, {setup}",
            [classes for classes, _ in sorted(values)],
            [1e6 * value for _, value in sorted(values)],
        )
        for (method, setup), values in lines.items()
    ]
