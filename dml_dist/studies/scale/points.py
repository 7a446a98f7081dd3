"""A point of a scaling study: its sizes, and what was measured there; the table of all points.

Every number is per rank and step unless its name says otherwise. Times are seconds, sizes bytes.
NaN is a number that was not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

Status = Literal["measured", "failed", "refused", "waiting"]
"""Measured; failed in its run; refused before it began, by its estimates; not begun yet."""

SPANS = ("data", "forward", "wait", "gather", "objective", "backward", "reduction", "optimizer")
"""Parts of a step, `seconds_<name>` of a point: those of `train/spans.py`, with the time of DDP's
reduction that the backward pass does not hide taken out of `backward`."""


@dataclass(frozen=True)
class ScalePoint:
    """One point of a study.

    Attributes:
        name: Name of the point, unique in its study.
        world_size: W.
        num_classes: C, training classes.
        embedding_size: D.
        global_batch_size: B.
        backbone: Name of the backbone with what tells it apart, such as conv4-32.
        image_size: Side of the images, pixels.
        proxies: Each rank owns a range of classes, or all of them.
        loader_workers: Loader processes of a rank.
        tar_shards: Tar shards of the training images.
        remote: Whether the shards are read from a URL.
        status: See `Status`.
        problem: Why it was refused or failed; empty otherwise.
        noisy: Whether the machine was not quiet, also when it was measured again.
        tries: Times that the point was measured.
        oversubscribed: Whether there were more ranks than processors.
        device: "cpu", or the name of the GPU.
        processors: Processors of the machine.
        threads: CPU threads of a rank; 0 if it is not known.
        load: Runnable processes beside the study's own, on average.
        steps: Measured steps of a repetition, after the warm-up.
        repetitions: Measured repetitions.
        images_per_second: Of all ranks; the median of the repetitions.
        images_per_second_low: The lowest repetition.
        images_per_second_high: The highest repetition.
        seconds_step: One step; the spans below add up to it but for what is between them.
        sent_predicted: Bytes that a rank sends, computed from the plan.
        sent_counted: Bytes that a rank sent by the kernel's counters of the interface.
        memory_predicted: Bytes that the proxies with their optimiser state and gradient, the
            logits and the gathered batch take on a rank.
        memory_measured: Bytes by which the rank's peak is above that before the network and the
            proxies were built.
        gradient_bytes: Bytes of the gradients that DDP reduces.
        owned_rows: Rows of proxies on the largest rank.
        images_seen: Images until the end of the point's run, of all ranks.
        recall_at_1: Recall@1 of the validation classes at the end.
        loss_difference: Largest difference of the recorded losses (means of the steps between two
            records) to those of one rank with the same global batch, relative to them.
    """

    name: str
    world_size: int
    num_classes: int
    embedding_size: int
    global_batch_size: int
    backbone: str
    image_size: int
    proxies: Literal["sharded", "replicated"] = "sharded"
    loader_workers: int = 0
    tar_shards: int = 1
    remote: bool = False
    status: Status = "waiting"
    problem: str = ""
    noisy: bool = False
    tries: int = 0
    oversubscribed: bool = False
    device: str = "cpu"
    processors: int = 0
    threads: int = 0
    load: float = math.nan
    steps: int = 0
    repetitions: int = 0
    images_per_second: float = math.nan
    images_per_second_low: float = math.nan
    images_per_second_high: float = math.nan
    seconds_step: float = math.nan
    seconds_data: float = math.nan
    seconds_forward: float = math.nan
    seconds_wait: float = math.nan
    seconds_gather: float = math.nan
    seconds_objective: float = math.nan
    seconds_backward: float = math.nan
    seconds_reduction: float = math.nan
    seconds_optimizer: float = math.nan
    sent_predicted: float = math.nan
    sent_counted: float = math.nan
    memory_predicted: float = math.nan
    memory_measured: float = math.nan
    gradient_bytes: float = math.nan
    owned_rows: int = 0
    images_seen: int = 0
    recall_at_1: float = math.nan
    loss_difference: float = math.nan

    @property
    def measured(self) -> bool:
        """Whether its numbers are there."""
        return self.status == "measured"


COLUMNS = tuple(field.name for field in fields(ScalePoint))
"""Columns of the table of points."""
