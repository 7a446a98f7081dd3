"""From the records of a point's run to the point's numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dml_dist.errors import RunError
from dml_dist.parallel.traffic import Traffic
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from dml_dist.studies.scale.grid import Course
from dml_dist.studies.scale.points import SPANS, ScalePoint

Record = Mapping[str, Any]


def measured_records(folder: RunFolder, course: Course) -> tuple[float, list[Record]]:
    """Return the time at which the warm-up ended, and the records of all repetitions.

    Raises:
        RunError: If records are missing.
    """
    records: list[Record] = list(read_records(folder.records("steps")))
    kept = [record for record in records if record["step"] > course.warmup]
    ends = [record["time"] for record in records if record["step"] == course.warmup]
    expected = range(course.warmup + course.log_every, course.total + 1, course.log_every)
    if not ends or [record["step"] for record in kept] != list(expected):
        raise RunError(
            f"{folder.records('steps')} lacks records of some of the steps 1 to {course.total}, "
            "so the point cannot be measured; remove the run and repeat the command with --resume"
        )
    return float(ends[0]), kept


def with_measurements(
    point: ScalePoint,
    course: Course,
    records: Sequence[Record],
    metrics: Mapping[str, Any],
    reference: Sequence[Record] | None,
) -> ScalePoint:
    """Return a point with the numbers of its run.

    Args:
        point: The point; its traffic and memory are predicted.
        course: The steps of its run.
        records: Those of its repetitions.
        metrics: The run's, with its validation.
        reference: Records of the run of one rank with the same batches; None if there is none.
    """
    per_repetition = course.steps // course.log_every
    repetitions = [
        records[low : low + per_repetition] for low in range(0, len(records), per_repetition)
    ]
    batch = point.global_batch_size
    seconds = [
        statistics.fmean(batch / one["images_per_second"] for one in part) for part in repetitions
    ]
    # One of the repetitions as a whole, so that its parts add up to its step.
    middle = seconds.index(statistics.median_low(seconds))
    spans: dict[str, Any] = {
        f"seconds_{name}": statistics.fmean(one[f"seconds_{name}"] for one in repetitions[middle])
        for name in SPANS
    }
    # Each step sends as much, and what other programs send comes in bursts.
    sent = statistics.median(one["interface_bytes"] for one in records) / course.log_every
    is_counted = point.world_size > 1 and not point.remote and point.device == "cpu"
    return replace(
        point,
        status="measured",
        problem="",
        steps=course.steps,
        repetitions=len(repetitions),
        images_per_second=batch / seconds[middle],
        images_per_second_low=batch / max(seconds),
        images_per_second_high=batch / min(seconds),
        seconds_step=seconds[middle],
        sent_counted=sent if is_counted else math.nan,
        memory_measured=records[-1]["memory_bytes"],
        images_seen=course.total * batch,
        recall_at_1=float(metrics.get("validation", {}).get("recall_at_1", math.nan)),
        loss_difference=math.nan if reference is None else loss_difference(records, reference),
        **spans,
    )


def loss_difference(records: Sequence[Record], reference: Sequence[Record]) -> float:
    """Return the largest relative difference of the recorded losses, means over some steps each."""
    pairs = zip(records, reference, strict=True)
    return max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs)


def sent_on(traffic: Traffic, device: str) -> int:
    """Return the bytes that a rank sends on the network, by the backend of its device.

    Gloo makes a reduce-scatter as an all-reduce, of which each rank keeps its part: measured, it
    sends twice as much as a ring. Its other collectives send what a ring does. Headers and
    acknowledgements are not predicted: 0.2 % of large messages, and at two ranks 0.7 kB for a small
    gather and 1.3 kB for a small reduction, about 10 kB for the collectives of a step.
    """
    kinds = traffic.by_kind()
    again = kinds.get("reduce_scatter", 0) if device == "cpu" else 0
    return traffic.total + again
