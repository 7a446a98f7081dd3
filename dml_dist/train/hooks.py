"""What the training loop takes from its caller and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dml_dist.config.load import Difference
from dml_dist.data.loader import Batch
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.runs.records import RecordWriter
from dml_dist.train.checkpoint_files import Best
from dml_dist.train.projections import ProjectionInputs
from dml_dist.train.state import TrainState
from dml_dist.train.stopping import StopReason


@dataclass(frozen=True)
class ProgressEvent:
    """What a progress bar shows.

    Attributes:
        step: Updates made.
        total_steps: Updates of the whole run.
        loss: Mean loss since the last event; None at the start.
        images_per_second: Images of all ranks per second of training since the last event.
    """

    step: int
    total_steps: int
    loss: float | None
    images_per_second: float


@dataclass(frozen=True)
class TrainHooks:
    """What the training loop reads, writes and calls; only the writers differ between ranks.

    Attributes:
        checkpoints: Folder of the run's checkpoints, shared by all ranks.
        attempt: Number of this start of the training processes.
        batches: From first step and step after the last to this rank's batches.
        class_ids: From index labels to class ids.
        evaluate: From model, split and step to metrics, equal on every rank; every rank calls it.
        report: Takes progress events; called on rank 0 only.
        stop_reason: Gives why to stop, or None. Asked on every rank about once a second of training
            and after each validation; if any rank has a reason, all stop with a checkpoint.
        begin: Takes the updates made, right before the first step; called on rank 0 only.
        step_records: Writes training records; None on other ranks than 0.
        evaluation_records: Writes validation records; None on other ranks than 0.
        checkpoint_records: Writes a record of each checkpoint; None on other ranks than 0.
        projections: What alternating projections need; None without them.
        machine: Gives what a training record says of the machine; called on rank 0 only.
        name_of_row: From an index row to the sample's name in messages.
    """

    checkpoints: Path
    attempt: int
    batches: Callable[[int, int], Iterable[Batch]]
    class_ids: Callable[[np.ndarray], np.ndarray]
    evaluate: Callable[[EmbeddingModel, Literal["validation", "test"], int], dict[str, float]]
    report: Callable[[ProgressEvent], None]
    stop_reason: StopReason = lambda step, metrics: None
    begin: Callable[[int], None] = lambda step: None
    step_records: RecordWriter | None = None
    evaluation_records: RecordWriter | None = None
    checkpoint_records: RecordWriter | None = None
    projections: ProjectionInputs | None = None
    machine: Callable[[], Mapping[str, float]] = dict
    name_of_row: Callable[[int], str] = "row {}".format


@dataclass(frozen=True)
class TrainResult:
    """How a run ended, the same on every rank.

    Attributes:
        state: Weights, proxies and optimiser state after the last step.
        start_step: Updates that earlier attempts made.
        best: The best checkpoint by validation MAP@R, or None without validation.
        last: Folder of the newest checkpoint.
        changes: Differences to the configuration of the resumed checkpoint.
        seconds: Time of this attempt.
        stopped: Why the run stopped early; None if it did not.
    """

    state: TrainState
    start_step: int
    best: Best | None
    last: Path
    changes: tuple[Difference, ...]
    seconds: float
    stopped: str | None = None
