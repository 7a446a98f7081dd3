"""A step on GPUs in nodes: compute as measured or cited, communication by NCCL's model.

What a node of GPUs loses inside itself is part of the measured or cited step; only what nodes add
is computed. DDP's all-reduce is between hidden behind the backward pass, as far as that lasts, and
not hidden at all: the bracket of a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dml_dist.studies.scale.estimate import Method, estimate
from dml_dist.studies.scale.hardware import Hardware
from dml_dist.studies.scale.model import (
    DEFAULT_ERROR,
    CostModel,
    Prediction,
    extrapolation,
    time_terms,
)
from dml_dist.studies.scale.nccl import Network, collective_seconds
from dml_dist.studies.scale.points import ScalePoint

BACKWARD_SHARE = 2 / 3
"""Share of forward and backward that the backward pass takes."""

_STATE_PASSES = 2
"""An update reads and writes the proxies' state once each."""


@dataclass(frozen=True)
class Compute:
    """What a GPU takes for a step, from points that were measured or cited.

    Attributes:
        fixed: Seconds of a step that do not depend on its images.
        image: Seconds of an image, forward and backward.
        product: Seconds of a product of logits (`Estimate.products`), fast and slow.
        activations: Bytes of an image's activations; NaN where they were not measured.
        error: Relative error of a step that nodes do not change.
        points: The points, for the range that was measured.
        inside: The model of measured points, whose terms of communication are what a node loses
            inside itself; None where that is part of `image`.
        sources: Where the numbers come from, as sentences.
        notes: What was assumed, as sentences.
    """

    fixed: float
    image: float
    product: tuple[float, float]
    activations: float
    points: tuple[ScalePoint, ...]
    sources: tuple[str, ...]
    inside: CostModel | None = None
    error: float = DEFAULT_ERROR
    notes: tuple[str, ...] = ()


def exposed_seconds(reduction: float, backward: float) -> tuple[float, float]:
    """Return what of DDP's reduction a step waits for: with full overlap, and with none."""
    return max(0.0, reduction - backward), reduction


def reduction_seconds(gradient_bytes: float, world_size: int, network: Network) -> float:
    """Return the seconds of DDP's all-reduce over nodes; 0 inside one node, where it is part of
    the measured step."""
    if network.nodes(world_size) == 1:
        return 0.0
    sent = 2 * (world_size - 1) * gradient_bytes / world_size
    return collective_seconds("all_reduce", sent, world_size, network)


def predict_on(
    hardware: Hardware, compute: Compute, point: ScalePoint, method: Method
) -> Prediction:
    """Return the prediction of a step on GPUs.

    Args:
        hardware: The GPUs.
        compute: What one of them takes.
        point: Sizes; `gradient_bytes` is read, other measured numbers are not.
        method: What the costs depend on beside sizes.
    """
    costs = estimate(point, method)
    network, world_size = hardware.network, point.world_size
    images = math.ceil(point.global_batch_size / world_size)
    network_seconds = compute.fixed + compute.image * images
    reduction = reduction_seconds(point.gradient_bytes, world_size, network)
    exposed = exposed_seconds(reduction, BACKWARD_SHARE * network_seconds)
    objective = [seconds * costs.products for seconds in compute.product]
    optimizer = _STATE_PASSES * costs.state_bytes / hardware.memory_bandwidth
    sent = sum(
        collective_seconds(kind, num_bytes, world_size, network)
        for (kind, _), num_bytes in costs.objective.sent.items()
    )
    if compute.inside is not None:
        # Measured inside a node; NCCL's model counts only where there are several.
        inside = _inside_seconds(compute.inside, hardware, point)
        sent = inside + (sent if network.nodes(world_size) > 1 else 0.0)
    same = network_seconds + optimizer + sent
    low, high = (same + objective[i] + exposed[i] for i in (0, 1))
    widening, marked = extrapolation(compute.points, point)
    error = compute.error * widening
    memory = float(costs.memory_bytes + costs.network_bytes)
    if math.isnan(compute.activations):
        marked.append(
            f"Activations of {point.backbone} were not measured: they are not counted in memory."
        )
    else:
        memory += compute.activations * images
    limits: Mapping[str, float] = {
        "compute": network_seconds,
        "objective": sum(objective) / 2,
        "optimizer": optimizer,
        "network": sent + sum(exposed) / 2,
    }
    return Prediction(
        low / (1 + error),
        (low + high) / 2,
        high * (1 + error),
        memory / (1 + error),
        memory,
        memory * (1 + error),
        limits,
        (*compute.notes, *marked),
    )


def _inside_seconds(model: CostModel, hardware: Hardware, point: ScalePoint) -> float:
    """Return the communication of the ranks of one node, as the model was fitted to it."""
    if model.time is None:
        return 0.0
    ranks = min(point.world_size, hardware.network.gpus_per_node)
    images = math.ceil(point.global_batch_size / point.world_size)
    node = replace(point, world_size=ranks, global_batch_size=ranks * images)
    parts = model.time.parts(time_terms(node, model.method))
    return parts["collectives"] + parts["sent"] + parts["gradients"]
