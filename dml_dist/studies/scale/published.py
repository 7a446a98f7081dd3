"""Checks of the model against numbers that others published.

`published_scaling.csv` has the numbers, each with its source. Efficiency is the share of perfect
scaling from the first number of GPUs that is named. Losses inside a node are measured: a check
begins at one full node, or at one GPU where nothing else is published.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from dml_dist.studies.scale.cluster import BACKWARD_SHARE, exposed_seconds, reduction_seconds
from dml_dist.studies.scale.hardware import GRADIENT_BYTES, PRESETS
from dml_dist.studies.scale.model import CostModel, fit, predict
from dml_dist.studies.scale.nccl import Network
from dml_dist.studies.scale.points import ScalePoint

_INSIGHTFACE = "8 x V100, r100"
_GIGABIT = 1e9 / 8

_EFFICIENCY_TOLERANCE = 15.0


@dataclass(frozen=True)
class Published:
    """A row of `published_scaling.csv`; None is an empty number."""

    source: str
    method: str
    setup: str
    num_gpus: int
    num_classes: int | None
    metric: str
    value: float
    unit: str
    note: str


@dataclass(frozen=True)
class Check:
    """A published number and what the model says of it.

    Attributes:
        source: Where it was published.
        setup: Method, GPUs and classes.
        metric: images/s, MB or percent.
        published: The number.
        low: Lower end of the prediction; of a bracket where it is not a number.
        high: Upper end.
        error: Percent for a number; for a bracket, the points by which the published number is
            outside, 0 inside.
        tolerance: The largest error that is accepted.
        basis: What the prediction was made from, and what was assumed.
    """

    source: str
    setup: str
    metric: str
    published: float
    low: float
    high: float
    error: float
    tolerance: float
    basis: str

    @property
    def width(self) -> float:
        """Width of the bracket; 0 for a number."""
        return self.high - self.low

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return abs(self.error) <= self.tolerance


@cache
def published() -> tuple[Published, ...]:
    """Return all published numbers."""
    text = files("dml_dist.studies.scale").joinpath("published_scaling.csv").read_text("utf-8")
    return tuple(
        Published(
            row["source"],
            row["method"],
            row["setup"],
            int(row["num_gpus"]),
            int(row["num_classes"]) if row["num_classes"] else None,
            row["metric"],
            float(row["value"]),
            row["unit"],
            row["note"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def insightface_points(method: str, *, most_classes: int | None = None) -> list[ScalePoint]:
    """Return insightface's points of 8 V100 as points of a study; 1,024 images a step, 512-d.

    Args:
        method: "model parallel" or "partial fc 0.1".
        most_classes: Only points of at most so many classes.
    """
    values: dict[int, dict[str, float]] = {}
    for row in published():
        if (row.method, row.setup) == (method, _INSIGHTFACE) and row.num_classes is not None:
            values.setdefault(row.num_classes, {})[row.metric] = row.value
    return [
        ScalePoint(
            name=f"insightface, {method}, {num_classes:,} classes",
            world_size=8,
            num_classes=num_classes,
            embedding_size=512,
            global_batch_size=1024,
            backbone="r100",
            image_size=112,
            status="measured",
            device="V100",
            images_per_second=value["throughput"],
            seconds_step=1024 / value["throughput"],
            memory_measured=value["memory per GPU"] * 1e6,
            gradient_bytes=GRADIENT_BYTES["r100"],
        )
        for num_classes, value in values.items()
        if most_classes is None or num_classes <= most_classes
    ]


def checks() -> tuple[Check, ...]:
    """Return all checks: proxies of many classes, then efficiency over nodes."""
    sharded = fit(insightface_points("model parallel", most_classes=1_400_000))
    sampled = fit(insightface_points("partial fc 0.1", most_classes=8_000_000))
    return (
        *_class_checks(sharded, "model parallel", 5_500_000, _speed, 5),
        *_class_checks(sharded, "model parallel", 5_500_000, _memory, 10),
        *_class_checks(sampled, "partial fc 0.1", 16_000_000, _memory, 2),
        *(_efficiency_check(case) for case in _efficiency_cases()),
    )


# ---------------- proxies of many classes


def _speed(model: CostModel, point: ScalePoint) -> tuple[str, float, float]:
    predicted = point.global_batch_size / predict(model, point).seconds
    return "images/s", point.images_per_second, predicted


def _memory(model: CostModel, point: ScalePoint) -> tuple[str, float, float]:
    return "MB a GPU", point.memory_measured / 1e6, predict(model, point).memory / 1e6


def _class_checks(
    model: CostModel,
    method: str,
    fewest: int,
    values: Callable[[CostModel, ScalePoint], tuple[str, float, float]],
    tolerance: float,
) -> list[Check]:
    """Check the points of at least `fewest` classes, which the model was not fitted to."""
    fitted = ", ".join(f"{point.num_classes:,}" for point in model.points)
    found = []
    for point in insightface_points(method):
        if point.num_classes >= fewest:
            metric, measured, predicted = values(model, point)
            found.append(
                Check(
                    "insightface recognition/arcface_torch README",
                    f"{method}, 8 V100, {point.num_classes:,} classes",
                    metric,
                    measured,
                    predicted,
                    predicted,
                    100 * (predicted / measured - 1),
                    tolerance,
                    f"fitted to the points of {fitted} classes",
                )
            )
    return found


# ---------------- efficiency over nodes


@dataclass(frozen=True)
class _EfficiencyCase:
    """A published efficiency, the step that it begins with, and the network."""

    source: str
    setup: str
    published: float
    num_gpus: int
    seconds: float
    gradient_bytes: float
    network: Network
    basis: str


_V100 = PRESETS["v100-nvlink-100g"].network
_HOROVOD = Network(4, 12e9, 25 * _GIGABIT, "pci")
_GOYAL = Network(8, 4 * 18.0e9, 50 * _GIGABIT)

_TENSORFLOW = "TensorFlow's docs_src/performance/benchmarks.md"
_P100_STEPS = {
    "Inception V3": (64, 142.0, "inception_v3", f"142 images/s of one P100 by {_TENSORFLOW}"),
    "ResNet-101": (64, 1656.82 / 16, "resnet101", "1,657 images/s of 16 GPUs by the same source"),
    "VGG-16": (64, 154.0, "vgg16", f"154 images/s of one P100 by {_TENSORFLOW}"),
    "ResNet-50 synchronous SGD": (
        32,
        195.0,
        "resnet50",
        f"195 images/s of one P100 at batch 32 by {_TENSORFLOW}",
    ),
}
"""Images of a step, images/s of a GPU, network and source."""


def _efficiency_cases() -> list[_EfficiencyCase]:
    found = []
    for row in published():
        if row.source.startswith("DLPerf") and row.num_gpus > _V100.gpus_per_node:
            found.append(_dlperf_case(row))
        elif row.metric == "efficiency":
            images, speed, backbone, basis = _P100_STEPS[row.method]
            network = _GOYAL if row.source.startswith("Goyal") else _HOROVOD
            found.append(
                _EfficiencyCase(
                    row.source,
                    f"{row.method}, {row.num_gpus} P100",
                    row.value,
                    row.num_gpus,
                    images / speed,
                    GRADIENT_BYTES[backbone],
                    network,
                    f"{basis}; {network.network_bandwidth / _GIGABIT:g} Gb/s a node",
                )
            )
    return found


def _dlperf_case(row: Published) -> _EfficiencyCase:
    """Return efficiency from the 8 GPUs of one node on, at 100 Gb/s."""
    same: Sequence[Published] = [
        other for other in published() if (other.source, other.method) == (row.source, row.method)
    ]
    node = next(other for other in same if other.num_gpus == _V100.gpus_per_node)
    is_face = "insightface" in row.source
    images = (64 if is_face else 128) * node.num_gpus
    scale = row.num_gpus / node.num_gpus
    return _EfficiencyCase(
        row.source,
        f"{row.method}, {row.num_gpus} V100",
        100 * row.value / node.value / scale,
        row.num_gpus,
        images / node.value,
        GRADIENT_BYTES["r100" if is_face else "resnet50"],
        _V100,
        f"from {node.value:,.0f} images/s of 8 GPUs; the network is not stated, 100 Gb/s a node "
        "is assumed",
    )


def _efficiency_check(case: _EfficiencyCase) -> Check:
    reduction = reduction_seconds(case.gradient_bytes, case.num_gpus, case.network)
    hidden, open_ = exposed_seconds(reduction, BACKWARD_SHARE * case.seconds)
    low, high = (100 * case.seconds / (case.seconds + seconds) for seconds in (open_, hidden))
    error = min(0.0, case.published - low) or max(0.0, case.published - high)
    assert not math.isnan(error)
    return Check(
        case.source,
        case.setup,
        "percent of perfect scaling",
        case.published,
        low,
        high,
        error,
        _EFFICIENCY_TOLERANCE,
        case.basis,
    )
