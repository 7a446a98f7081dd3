"""What a GPU takes for a step: from points that were measured on it, from a publication, or as the
user says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dml_dist.errors import ConfigError
from dml_dist.studies.scale.cluster import Compute
from dml_dist.studies.scale.estimate import Method
from dml_dist.studies.scale.hardware import GRADIENT_BYTES, PRESETS, Hardware, StepTime
from dml_dist.studies.scale.model import CostModel, fit, time_terms
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.published import insightface_points


def _product_seconds(hardware: Hardware) -> tuple[tuple[float, float], tuple[ScalePoint, ...], str]:
    """Return seconds of a product of logits on a GPU, fast and slow, and from what they follow.

    Logits are read and written more than computed: the time is between that of a V100 divided by
    the ratio of memory bandwidths, and that of a V100 itself.
    """
    model = fit(insightface_points("model parallel"))
    assert model.time is not None
    point = model.points[-1]
    terms = time_terms(point, model.method)
    parts = model.time.parts(terms)
    slow = (parts["products"] + parts["state"]) / terms["products"]
    ratio = hardware.memory_bandwidth / PRESETS["v100-nvlink-100g"].memory_bandwidth
    source = (
        "Objective: model parallel at 125,000 to 5,500,000 classes on 8 V100, insightface's README"
    )
    if ratio > 1:
        source += f", up to {ratio:.2f} times as fast by memory bandwidth"
    return (slow / ratio, slow), model.points, source


def from_citation(cited: StepTime, hardware: Hardware) -> Compute:
    """Return the compute of a published step time."""
    product, measured, source = _product_seconds(hardware)
    return Compute(
        fixed=0.0,
        image=1 / cited.images_per_second,
        product=product,
        activations=math.nan,
        points=measured,
        sources=(
            f"Step of {cited.backbone} on {cited.gpu}: {cited.images_per_second:,.0f} images/s a "
            f"GPU in a node of {cited.gpus}, {cited.precision} precision, {cited.image_size} "
            f"pixels; {cited.source}",
            source,
        ),
    )


def from_step_time(seconds: float, point: ScalePoint, hardware: Hardware) -> Compute:
    """Return the compute of a step that the user measured.

    Args:
        seconds: Forward and backward of a GPU's share of the batch.
        point: The sizes that are asked for.
        hardware: The GPU.
    """
    product, measured, source = _product_seconds(hardware)
    images = math.ceil(point.global_batch_size / point.world_size)
    return Compute(
        fixed=0.0,
        image=seconds / images,
        product=product,
        activations=math.nan,
        points=measured,
        sources=(f"Step of {images:,} images: {seconds:g} s, as the question says", source),
        notes=("What a node of GPUs loses inside itself is not counted: it was not measured.",),
    )


def from_points(model: CostModel) -> Compute:
    """Return the compute of points that were measured on the GPU."""
    assert model.time is not None
    seconds = dict(zip(model.time.names, model.time.coefficients, strict=True))
    notes: tuple[str, ...] = ()
    if max(point.world_size for point in model.points) == 1:
        notes = ("What a node of GPUs loses inside itself is not counted: only 1 was measured.",)
    return Compute(
        fixed=float(seconds["fixed"]),
        image=float(seconds["images"]),
        product=(float(seconds["products"]),) * 2,
        activations=math.nan,
        points=model.points,
        inside=model,
        sources=(describe_model(model),),
        error=model.error("seconds"),
        notes=notes,
    )


def describe_model(model: CostModel) -> str:
    """Return from which points a model follows, and its error."""
    names = ", ".join(point.name for point in model.points)
    error = f"error of points held out at most {100 * model.error('seconds'):.0f} %"
    if not model.residuals:
        error = "too few to hold one out"
    return f"Model of {len(model.points)} points of the study ({names}); {error}"


def with_activations(
    compute: Compute, points: Sequence[ScalePoint], method: Method, point: ScalePoint
) -> Compute:
    """Return the compute with bytes of an image's activations, if the study measured them."""
    same = [other for other in points if other.backbone == point.backbone]
    try:
        model = fit(same, method)
    except ConfigError:  # Too few points.
        return compute
    if model.memory is None:
        return compute
    image = dict.fromkeys(model.memory.names, 0.0) | {"images": 1.0}
    # The most that the points allow, where they do not tell images from what is fixed.
    _, activations = model.memory.bounds(image)
    first = model.points[0]
    source = f"Activations: {first.device}, images of {first.image_size} pixels, this study"
    return replace(compute, activations=activations, sources=(*compute.sources, source))


def gradient_bytes_of(backbone: str, points: Sequence[ScalePoint]) -> float:
    """Return the bytes of a network's gradients, as measured or published; NaN if unknown."""
    measured = (p.gradient_bytes for p in points if p.backbone == backbone)
    known = next((size for size in measured if size > 0), math.nan)
    return GRADIENT_BYTES.get(backbone, math.nan) if math.isnan(known) else known
