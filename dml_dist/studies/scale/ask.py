"""The answer to `dml-dist scale CONFIG --ask "gpus=64 classes=10000000"`, by the model.

An answer for a GPU needs the time of a step on that GPU: measured by the study, published for that
network, or given as `step_time`. Without one the question is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.studies.scale.cluster import predict_on
from dml_dist.studies.scale.estimate import Method, backbone_name, network_gradient_bytes
from dml_dist.studies.scale.gpu_steps import (
    describe_model,
    from_citation,
    from_points,
    from_step_time,
    gradient_bytes_of,
    with_activations,
)
from dml_dist.studies.scale.hardware import (
    GRADIENT_BYTES,
    PRESETS,
    Hardware,
    cited_step_time,
)
from dml_dist.studies.scale.model import Prediction, fit, predict
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.question import MEASURED, Question, parse


@dataclass(frozen=True)
class Answer:
    """What is predicted for a question.

    Attributes:
        point: The sizes that were asked for.
        hardware: GPUs and network; None for the machine of the study.
        prediction: A step.
        images: Training images of an epoch; None where the question does not say.
        epochs: Passes over them.
        sources: From what points and numbers the answer was derived, as sentences.
        marked: What makes it less certain, as sentences.
        counts_activations: Whether memory has the activations of the network.
    """

    point: ScalePoint
    hardware: Hardware | None
    prediction: Prediction
    images: float | None
    epochs: float
    sources: tuple[str, ...]
    marked: tuple[str, ...]
    counts_activations: bool = True

    @property
    def images_per_second(self) -> tuple[float, float, float]:
        """Lowest, predicted and highest."""
        step, size = self.prediction, self.point.global_batch_size
        return size / step.seconds_high, size / step.seconds, size / step.seconds_low

    @property
    def hours(self) -> tuple[float, float, float] | None:
        """Shortest, predicted and longest; None without a number of images."""
        if self.images is None:
            return None
        low, middle, high = self.images_per_second
        total = self.images * self.epochs / 3600
        return total / high, total / middle, total / low

    @property
    def fits(self) -> bool | None:
        """Whether the memory of a GPU is enough; None where it is unknown."""
        if self.hardware is None or math.isnan(self.prediction.memory):
            return None
        return self.prediction.memory <= self.hardware.memory

    @property
    def limit(self) -> str:
        """What limits the speed: memory of the GPU, compute, objective, optimizer or network."""
        if self.fits is False:
            return "memory of the GPU"
        return max(self.prediction.limits, key=lambda part: self.prediction.limits[part])


def answer(question: str, points: Sequence[ScalePoint], config: RunConfig) -> Answer:
    """Return the answer to a question.

    Args:
        question: Text, such as "gpus=64 classes=10000000".
        points: Points of the study; they may be none.
        config: The study's configuration, for the method and what the question leaves open.

    Raises:
        ConfigError: If the question cannot be read, does not fit together, or cannot be answered
            without a step time.
        TopologyError: If there are more GPUs than proxies.
    """
    asked = parse(question)
    method = Method.of(config)
    backbone = asked.backbone or backbone_name(config.model.backbone)
    if asked.hardware == MEASURED:
        return _on_measured_machine(asked, points, config, method)
    of_network = [point for point in points if point.measured and point.backbone == backbone]
    hardware = _hardware(asked, backbone, of_network)
    usable = [point for point in of_network if _is_on(hardware, point) and not point.noisy]
    cited = cited_step_time(backbone, hardware.gpu)
    rows = max((p.global_batch_size // p.world_size for p in usable), default=None)
    if rows is None:
        rows = cited.batch_size_per_gpu if cited else 128
    point = _sizes(asked, config, backbone, rows * asked.gpus)
    if asked.step_time is not None:
        compute = from_step_time(asked.step_time, point, hardware)
    elif len(usable) >= 2:
        compute = from_points(fit(usable, method))
    elif cited is not None:
        compute = from_citation(cited, hardware)
    else:
        raise ConfigError(_no_step_time(backbone, hardware))
    compute = with_activations(compute, points, method, point)
    marked = []
    gradient = gradient_bytes_of(backbone, points)
    if backbone == backbone_name(config.model.backbone) and math.isnan(gradient):
        gradient = network_gradient_bytes(config.model)
    if math.isnan(gradient):
        marked.append(
            f"The parameters of {backbone} are not known: its all-reduce and memory count as 0."
        )
        gradient = 0.0
    point = replace(point, gradient_bytes=gradient)
    prediction = predict_on(hardware, compute, point, method)
    return Answer(
        point,
        hardware,
        prediction,
        asked.images,
        asked.epochs or 1,
        (*compute.sources, f"{hardware.name}: {hardware.source}"),
        (*marked, *prediction.marked),
        counts_activations=not math.isnan(compute.activations),
    )


def _hardware(asked: Question, backbone: str, points: Sequence[ScalePoint]) -> Hardware:
    """Return the hardware of the question, or the first whose GPU has a step time."""
    if asked.hardware is not None:
        return PRESETS[asked.hardware]
    for preset in PRESETS.values():
        measured = any(_is_on(preset, point) for point in points)
        if measured or cited_step_time(backbone, preset.gpu):
            return preset
    return next(iter(PRESETS.values()))


def _is_on(hardware: Hardware, point: ScalePoint) -> bool:
    """Whether a point was measured on the GPU; its name is longer, such as NVIDIA H100 80GB."""
    return hardware.gpu.lower() in point.device.lower()


def _sizes(asked: Question, config: RunConfig, backbone: str, batch: int) -> ScalePoint:
    if asked.classes is None:
        raise ConfigError("--ask: the question does not say how many classes. Add classes=N.")
    batch = asked.batch or batch
    if batch < asked.gpus:
        raise ConfigError(
            f"--ask: batch {batch:,} is smaller than gpus {asked.gpus:,}, but each GPU needs an "
            "image. Raise batch or lower gpus."
        )
    return ScalePoint(
        name="question",
        world_size=asked.gpus,
        num_classes=asked.classes,
        embedding_size=asked.embedding or config.model.embedding_size,
        global_batch_size=batch,
        backbone=backbone,
        image_size=0,
        proxies=asked.proxies,
        device="GPU",
    )


def _no_step_time(backbone: str, hardware: Hardware) -> str:
    known = ", ".join(
        f"{preset.name} for {time.backbone}"
        for preset in PRESETS.values()
        for name in GRADIENT_BYTES
        if (time := cited_step_time(name, preset.gpu))
    )
    return (
        f"--ask: no step time of {backbone} on {hardware.gpu} was measured or is published here, "
        "and those of other GPUs say nothing of it. Run the study on that GPU, give "
        f"step_time=SECONDS of one GPU's share of the batch, or ask of what is known: {known}."
    )


def _on_measured_machine(
    asked: Question, points: Sequence[ScalePoint], config: RunConfig, method: Method
) -> Answer:
    model = fit(points, method)
    first = model.points[0]
    if asked.step_time is not None or asked.backbone not in (None, first.backbone):
        raise ConfigError(
            f"--ask: hardware={MEASURED} is the machine of the study with its network "
            f"{first.backbone}. Leave out step_time and backbone, or name another hardware."
        )
    rows = max(point.global_batch_size // point.world_size for point in model.points)
    point = _sizes(asked, config, first.backbone, rows * asked.gpus)
    point = replace(point, device=first.device, image_size=first.image_size)
    prediction = predict(model, point)
    sources = (describe_model(model),)
    return Answer(
        point, None, prediction, asked.images, asked.epochs or 1, sources, prediction.marked
    )


# ---------------- shown


def print_answer(given: Answer, console: Console) -> None:
    """Print an answer as a table, with what it was derived from."""
    point, prediction = given.point, given.prediction
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    gpus = f"{point.world_size:,} ranks of the measured machine"
    if given.hardware is not None:
        gpus = f"{point.world_size:,} {given.hardware.gpu} ({given.hardware.name})"
    table.add_row("asked", gpus)
    table.add_row(
        "sizes",
        f"{point.num_classes:,} classes, {point.embedding_size:,}-d, batch "
        f"{point.global_batch_size:,}, {point.backbone}, proxies {point.proxies}",
    )
    low, middle, high = given.images_per_second
    table.add_row("images/s", f"{middle:,.0f} ({low:,.0f} to {high:,.0f}), predicted")
    table.add_row("memory", _memory_text(given))
    if given.hours is None:
        table.add_row("hours", "add images=N (and epochs=N) to the question")
    else:
        low, middle, high = given.hours
        table.add_row(
            "hours", f"{middle:,.3g} ({low:,.3g} to {high:,.3g}) for {given.epochs:g} epochs"
        )
    total = sum(prediction.limits.values()) or 1.0
    shares = ", ".join(
        f"{part} {100 * seconds / total:.0f} %" for part, seconds in prediction.limits.items()
    )
    table.add_row("limit", f"{given.limit} (a step: {shares})")
    for i, source in enumerate(given.sources):
        table.add_row("" if i else "derived from", source)
    for i, mark in enumerate(given.marked):
        table.add_row("" if i else "uncertain", mark)
    console.print(table)


def _memory_text(given: Answer) -> str:
    prediction = given.prediction
    if math.isnan(prediction.memory):
        return "not measured"
    low, middle, high = (
        size / 1e9 for size in (prediction.memory_low, prediction.memory, prediction.memory_high)
    )
    text = f"{middle:,.3g} GB a rank ({low:,.3g} to {high:,.3g})"
    if given.hardware is None:
        return text
    if not given.counts_activations:
        text += " without activations"
    verb = "fits" if given.fits else "does not fit"
    return f"{text}; {verb} in the {given.hardware.memory / 1e9:g} GB of one {given.hardware.gpu}"
