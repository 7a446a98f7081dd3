"""Small runs for tests of training: a tiny network, images in memory, the loop around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.loader import Batch
from dml_dist.data.plans import locate, rank_positions
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import RecordWriter
from dml_dist.topology import Topology
from dml_dist.train.loop import ProgressEvent, TrainHooks, TrainResult, train
from dml_dist.train.optim_state import named_states
from dml_dist.train.projections import ProjectionInputs
from dml_dist.train.run_plan import RunPlan, resolve
from dml_dist.train.state import TrainState

NUM_CLASSES = 7
IMAGES_PER_CLASS = 5
NUM_IMAGES = NUM_CLASSES * IMAGES_PER_CLASS
BATCH_SIZE = 10
"""Not divisible by three ranks; the last batch of an epoch has 5 of 35 images."""


def small_config(**changes: Any) -> RunConfig:
    """Return the configuration of a small run; `changes` are dotted paths with `__` for dots."""
    overrides = [f"{path.replace('__', '.')}={value}" for path, value in changes.items()]
    return parse_config(
        {
            "name": "small",
            "seed": 3,
            "data": {"path": "unused", "batches": {"name": "shuffled", "last": "keep"}},
            "model": {"backbone": {"name": "conv4", "width": 8}, "embedding_size": 6},
            "optim": {"name": "adam", "lr": 0.01, "proxy_lr": 0.1},
            "schedule": {"name": "constant", "warmup_steps": 3},
            "train": {
                "global_batch_size": BATCH_SIZE,
                "steps": 6,
                "log_every": 2,
                "max_grad_norm": 1.0,
            },
            "checkpoint": {"every_steps": 3, "keep": 3},
            "evaluation": {"every_steps": 3},
        },
        overrides,
    )


def small_plan(config: RunConfig, world_size: int, *, validation: bool = True) -> RunPlan:
    """Return the plan of a small run."""
    return resolve(
        config,
        train_class_sizes=[IMAGES_PER_CLASS] * NUM_CLASSES,
        validation_class_sizes=[2, 2] if validation else [],
        world_size=world_size,
    )


def images_of(rows: np.ndarray) -> Tensor:
    """Return the images of rows: a pattern of their class with noise of their own."""
    images = []
    for row in rows.tolist():
        pattern = torch.Generator().manual_seed(1000 + row // IMAGES_PER_CLASS)
        noise = torch.Generator().manual_seed(row)
        images.append(
            torch.randn(3, 16, 16, generator=pattern)
            + 0.5 * torch.randn(3, 16, 16, generator=noise)
        )
    return torch.stack(images)


def global_rows(step: int, plan: RunPlan) -> np.ndarray:
    """Return the rows of a global batch; every row once an epoch."""
    epoch, place = locate(step, plan.steps_per_epoch)
    order = np.random.default_rng(epoch).permutation(NUM_IMAGES)
    return order[place * plan.global_batch_size : (place + 1) * plan.global_batch_size]


@dataclass
class SmallRun:
    """One attempt at a small run on one rank, with its recorded events."""

    topology: Topology
    comm: Comm
    config: RunConfig
    folder: Path
    attempt: int = 1
    validation: bool = True
    scores: dict[int, float] = field(default_factory=dict)
    fail_at: int | None = None
    events: list[ProgressEvent] = field(default_factory=list)
    evaluated: list[tuple[str, int]] = field(default_factory=list)
    seen: list[np.ndarray] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)

    @property
    def plan(self) -> RunPlan:
        return small_plan(self.config, self.topology.world_size, validation=self.validation)

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        for step in range(start, end):
            if step == self.fail_at:
                raise KeyboardInterrupt
            rows = global_rows(step, self.plan)
            self.seen.append(rows)
            low, high = rank_positions(len(rows), self.topology.world_size, self.topology.rank)
            part = rows[low:high]
            labels = torch.from_numpy(100 + part // IMAGES_PER_CLASS)
            yield Batch(images_of(part), labels, torch.from_numpy(part), step)

    def evaluate(
        self, model: EmbeddingModel, split: Literal["validation", "test"], step: int
    ) -> dict[str, float]:
        assert not model.training
        self.evaluated.append((split, step))
        return {"map_at_r": self.scores.get(step, step / 100)}

    def stop_reason(self, step: int, metrics: Mapping[str, float] | None) -> str | None:
        """Return why to stop; a small run does not."""
        return None

    def means(self) -> ProjectionInputs | None:
        """Return what alternating projections need; each attempt has its own."""
        return None

    def train(self, *, resume: bool = False) -> TrainResult:
        main = self.topology.is_main
        self.folder.mkdir(parents=True, exist_ok=True)
        hooks = TrainHooks(
            checkpoints=self.folder / "checkpoints",
            attempt=self.attempt,
            batches=self.batches,
            class_ids=lambda labels: labels - 100,
            evaluate=self.evaluate,
            report=self.events.append,
            stop_reason=self.stop_reason,
            step_records=RecordWriter(self.folder / "steps.jsonl", self.attempt) if main else None,
            evaluation_records=(
                RecordWriter(self.folder / "evaluations.jsonl", self.attempt) if main else None
            ),
            checkpoint_records=(
                RecordWriter(self.folder / "checkpoints.jsonl", self.attempt) if main else None
            ),
            begin=self.begun.append,
            projections=self.means(),
        )
        try:
            return train(self.config, self.plan, self.comm, hooks, resume=resume)
        finally:
            writers = (hooks.step_records, hooks.evaluation_records, hooks.checkpoint_records)
            for writer in writers:
                if writer is not None:
                    writer.close()


def small_run(folder: Path, config: RunConfig, **values: Any) -> SmallRun:
    """Return a small run in this process."""
    return SmallRun(Topology(), Comm.single(), config, folder, **values)


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Return weights, this rank's proxies and counts, all optimiser state, flat and copied."""
    found = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    found |= {f"owned.{name}": value.detach() for name, value in state.owned.items()}
    found |= {f"replicated.{name}": value.detach() for name, value in state.replicated.items()}
    found |= {f"owned.{name}": own.values for name, own in state.objective.owned_buffers().items()}
    for name, values in named_states(state.optimizer).items():
        for key, value in values.items():
            found[f"optim.{name}.{key}"] = torch.as_tensor(value)
    return {name: value.clone() for name, value in found.items()}


def whole_snapshot(state: TrainState) -> dict[str, Tensor]:
    """Return a snapshot with the proxies of all ranks joined; every rank calls this."""
    own = snapshot(state)
    parts = state.comm.gather_objects(own)
    joined = {}
    for name, value in own.items():
        rows = name.startswith(("owned.", "optim.objective.")) and value.ndim > 0
        joined[name] = torch.cat([part[name] for part in parts]) if rows else value
    return joined
