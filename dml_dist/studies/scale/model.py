"""A model of the time and memory of a step, fitted to measured points.

Both are sums of terms, each the product of a number that follows from the sizes of a point
(`time_terms`, `memory_terms`) and a coefficient that is fitted, never negative:

    seconds = a + b images of a rank + c products of the logits + d bytes of proxies' state
              + e collectives + f bytes sent by the objective + g bytes sent by DDP

With W ranks, batch B, C classes and dimension D the products are B C D / W, and state and gradient
take O(C D / W), or C D where proxies are replicated. On processors, ranks of one machine share
them, so that b, c and d count the ranks of a processor (`estimate.processor_share`). e, f and g are
those of the machine that was measured (gloo), and say nothing of another network; `cluster.py` has
GPUs.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dml_dist.errors import ConfigError
from dml_dist.studies.scale.estimate import Method, estimate, processor_share
from dml_dist.studies.scale.least_squares import Fit
from dml_dist.studies.scale.points import ScalePoint

TIME_TERMS = ("fixed", "images", "products", "state", "collectives", "sent", "gradients")
MEMORY_TERMS = ("fixed", "images", "state", "logits", "batch")

DEFAULT_ERROR = 0.1
"""Relative error that is assumed where too few points were measured to hold one out."""

_SMALLEST_ERROR = 0.02
_FAR = 4.0
"""Extrapolation by more than this factor is marked, and widens the bracket."""

_FEWEST_FOR_PARTS = 9
"""With fewer points each one is held out in turn, and the model is fitted to all of them."""

_FEWEST_FOR_ERRORS = 4

SIZES = ("world_size", "num_classes", "embedding_size", "global_batch_size")


@dataclass(frozen=True)
class Residual:
    """A point that was held out, and its prediction.

    Attributes:
        name: Name of the point.
        metric: Seconds of a step, or bytes of memory.
        measured: As measured.
        predicted: By a fit without the point.
    """

    name: str
    metric: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted minus measured, relative to measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, eq=False)
class CostModel:
    """Time and memory of a step as functions of a point's sizes.

    Attributes:
        method: What the costs depend on beside sizes.
        time: Terms of `TIME_TERMS`, seconds.
        memory: Terms of `MEMORY_TERMS`, bytes; None where no memory was measured.
        points: The points that it was fitted to.
        residuals: Points held out, with their predictions; empty with too few points.
        left_out: Names of measured points that were not used, and why.
    """

    method: Method
    time: Fit | None
    memory: Fit | None
    points: tuple[ScalePoint, ...]
    residuals: tuple[Residual, ...]
    left_out: Mapping[str, str]

    def error(self, metric: str) -> float:
        """Return the largest relative error of the points held out."""
        errors = [abs(residual.error) for residual in self.residuals if residual.metric == metric]
        return max([_SMALLEST_ERROR, *errors]) if errors else DEFAULT_ERROR


@dataclass(frozen=True)
class Prediction:
    """A step that was not measured.

    Attributes:
        seconds_low: Of a step, the fastest that the points allow.
        seconds: Of a step.
        seconds_high: Of a step, the slowest.
        memory_low: Bytes of a rank at least; NaN where memory was not measured.
        memory: Bytes of a rank.
        memory_high: Bytes of a rank at most.
        limits: Seconds of a step by what takes them: compute (the network, and whatever does not
            depend on sizes), objective, optimizer, network.
        marked: What makes the prediction less certain, as sentences; empty inside the measured
            range.
    """

    seconds_low: float
    seconds: float
    seconds_high: float
    memory_low: float
    memory: float
    memory_high: float
    limits: Mapping[str, float]
    marked: tuple[str, ...]


# ---------------- terms


def time_terms(point: ScalePoint, method: Method) -> dict[str, float]:
    """Return the terms of a step's seconds."""
    costs = estimate(point, method)
    share = processor_share(point)
    return {
        "fixed": max(1.0, share),
        "images": share * math.ceil(point.global_batch_size / point.world_size),
        "products": share * costs.products,
        "state": share * costs.state_bytes,
        "collectives": float(len(costs.objective.sent) + len(costs.gradients.sent)),
        "sent": float(costs.objective.total),
        "gradients": float(costs.gradients.total),
    }


def memory_terms(point: ScalePoint, method: Method) -> dict[str, float]:
    """Return the terms of a rank's memory."""
    costs = estimate(point, method)
    return {
        "fixed": 1.0,
        "images": float(math.ceil(point.global_batch_size / point.world_size)),
        "state": float(costs.state_bytes),
        "logits": float(costs.logits_bytes),
        "batch": float(costs.batch_bytes),
    }


_LIMIT_OF = {
    "fixed": "compute",
    "images": "compute",
    "products": "objective",
    "state": "optimizer",
    "collectives": "network",
    "sent": "network",
    "gradients": "network",
}


# ---------------- fit


def fit(points: Sequence[ScalePoint], method: Method | None = None) -> CostModel:
    """Return a model of the measured points.

    Of points that differ in more than W, B, C, D and the proxies' placement, the largest group is
    used. Noisy and oversubscribed points are left out. With nine points or more a third of them
    is held out; with fewer, each one in turn. Only points inside the range of the others are.

    Args:
        points: Points of a study, in any order.
        method: What the costs depend on beside sizes.

    Raises:
        ConfigError: If fewer than two points can be used.
    """
    method = method or Method()
    used, left_out = _usable(points)
    if len(used) < 2:
        raise ConfigError(
            f"A model needs at least two measured points of one kind, but of {len(points)} points "
            f"only {len(used)} can be used. Run `dml-dist scale` until more points are measured."
        )
    kept, residuals = used, []
    if len(used) >= _FEWEST_FOR_PARTS:
        kept, held = _parts(used)
        residuals = _residuals(kept, held, method)
    elif len(used) >= _FEWEST_FOR_ERRORS:
        for point in used:
            others = [other for other in used if other is not point]
            if _is_inside(point, others):
                residuals += _residuals(others, [point], method)
    time, memory = _fits(kept, method)
    return CostModel(method, time, memory, tuple(kept), tuple(residuals), left_out)


def _kind(point: ScalePoint) -> tuple[object, ...]:
    reading = (point.loader_workers, point.tar_shards, point.remote)
    return (point.device, point.processors, point.backbone, point.image_size, *reading)


def _usable(points: Sequence[ScalePoint]) -> tuple[list[ScalePoint], dict[str, str]]:
    left_out = {}
    measured = []
    for point in points:
        if point.noisy or point.oversubscribed:
            left_out[point.name] = "noisy" if point.noisy else "more ranks than processors"
        elif point.measured:
            measured.append(point)
    if not measured:
        return [], left_out
    kinds = Counter(map(_kind, measured))
    # Counter keeps the order of first sight, so that ties do not depend on the process.
    (most, _), *_ = kinds.most_common(1)
    used = [point for point in measured if _kind(point) == most]
    for point in measured:
        if _kind(point) != most:
            left_out[point.name] = "of another kind than most points"
    used.sort(key=lambda point: (*(getattr(point, size) for size in SIZES), point.name))
    return used, left_out


def _parts(points: Sequence[ScalePoint]) -> tuple[list[ScalePoint], list[ScalePoint]]:
    """Return the points to fit and a third to hold out, the same for the same names.

    In an order that is unrelated to sizes: every third point of a grid may be all of one size.
    """
    kept = list(points)
    held: list[ScalePoint] = []
    for point in sorted(points, key=lambda point: hashlib.sha256(point.name.encode()).digest()):
        others = [other for other in kept if other is not point]
        if len(held) < len(points) // 3 and _is_inside(point, others):
            kept, held = others, [*held, point]
    return kept, held


def _is_inside(point: ScalePoint, others: Sequence[ScalePoint]) -> bool:
    """Whether no size of a point is beyond those of the others: its error is no extrapolation's."""
    return point.proxies in {other.proxies for other in others} and all(
        min(getattr(other, size) for other in others)
        <= getattr(point, size)
        <= max(getattr(other, size) for other in others)
        for size in SIZES
    )


def _fits(points: Sequence[ScalePoint], method: Method) -> tuple[Fit | None, Fit | None]:
    timed = [point for point in points if point.seconds_step > 0]  # NaN is not.
    sized = [point for point in points if point.memory_measured > 0]
    time = memory = None
    if timed:
        terms = [time_terms(point, method) for point in timed]
        time = Fit.to(terms, [point.seconds_step for point in timed])
    if sized:
        terms = [memory_terms(point, method) for point in sized]
        memory = Fit.to(terms, [point.memory_measured for point in sized])
    return time, memory


def _residuals(
    kept: Sequence[ScalePoint], held: Sequence[ScalePoint], method: Method
) -> list[Residual]:
    time, memory = _fits(kept, method)
    found = []
    for point in held:
        if time is not None and point.seconds_step > 0:
            predicted = sum(time.parts(time_terms(point, method)).values())
            found.append(Residual(point.name, "seconds", point.seconds_step, predicted))
        if memory is not None and point.memory_measured > 0:
            predicted = sum(memory.parts(memory_terms(point, method)).values())
            found.append(Residual(point.name, "memory", point.memory_measured, predicted))
    return found


# ---------------- prediction


def predict(model: CostModel, point: ScalePoint) -> Prediction:
    """Return the prediction for a point's sizes on the machine that was measured.

    Args:
        model: The model.
        point: Its sizes; measured numbers but `gradient_bytes` are not read. Device, processors,
            threads and unknown `gradient_bytes` are those of the fitted points.
    """
    first = model.points[0]
    gradient = point.gradient_bytes if point.gradient_bytes > 0 else first.gradient_bytes
    point = replace(
        point,
        device=first.device,
        processors=first.processors,
        threads=first.threads,
        gradient_bytes=gradient,
    )
    widening, marked = extrapolation(model.points, point)
    if point.backbone != first.backbone:
        marked.append(f"The points are of {first.backbone}, not of {point.backbone}.")
    terms = time_terms(point, model.method)
    limits: dict[str, float] = {}
    low = seconds = high = math.nan
    if model.time is not None:
        for name, value in model.time.parts(terms).items():
            limits[_LIMIT_OF[name]] = limits.get(_LIMIT_OF[name], 0.0) + value
        low, seconds, high = _bracket(model.time, terms, model.error("seconds") * widening)
        marked += _unseen(model.time, terms)
    memory = (math.nan,) * 3
    if model.memory is not None:
        terms = memory_terms(point, model.method)
        memory = _bracket(model.memory, terms, model.error("memory") * widening)
    if point.device == "cpu" and point.world_size > point.processors:
        marked.append(
            f"{point.world_size:,} ranks share {point.processors:,} processors: they wait for each "
            "other."
        )
    return Prediction(low, seconds, high, *memory, limits, tuple(marked))


def _bracket(fit: Fit, terms: Mapping[str, float], error: float) -> tuple[float, float, float]:
    low, high = fit.bounds(terms)
    return low / (1 + error), sum(fit.parts(terms).values()), high * (1 + error)


def _unseen(fit: Fit, terms: Mapping[str, float]) -> list[str]:
    missing = [
        name
        for name, column in zip(fit.names, fit.rows.T, strict=True)
        if terms[name] > 0 and not column.any()
    ]
    if not missing:
        return []
    return [f"No measured point has these costs, which count as 0: {', '.join(missing)}."]


def extrapolation(points: Sequence[ScalePoint], point: ScalePoint) -> tuple[float, list[str]]:
    """Return by how much a bracket is widened, and the sizes beyond 4 times the measured range.

    The error counts once inside 4 times the range, and once more for each further factor of 4.
    """
    widening, marked = 1.0, []
    for size in SIZES:
        value = getattr(point, size)
        measured = [getattr(other, size) for other in points]
        low, high = min(measured), max(measured)
        ratio = max(value / high, low / value)
        if ratio > _FAR:
            widening += math.log(ratio, _FAR) - 1
            side = f"the largest measured, {high:,}"
            if value < low:
                side = f"below the smallest measured, {low:,}"
            marked.append(f"{size} {value:,} is {ratio:.3g} times {side}.")
    return widening, marked
