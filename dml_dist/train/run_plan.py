"""What a run will do, in numbers, from its configuration and the sizes of its classes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dml_dist.config.data import BalancedBatchesConfig, DataConfig
from dml_dist.config.objective import (
    AdamConfig,
    AdamWConfig,
    CosineScheduleConfig,
    CustomOptimizerConfig,
    OptimizerConfig,
    RMSpropConfig,
    SGDConfig,
)
from dml_dist.config.projections import ProjectionsConfig
from dml_dist.config.schema import NoValidationConfig, RunConfig
from dml_dist.data.plans import build_plan
from dml_dist.errors import ConfigError, DataError
from dml_dist.models.build_model import batch_norm_channels, build_model, describe_network
from dml_dist.models.embedding import EmbeddingModel, parameter_kinds
from dml_dist.parallel.batch_norm import batch_norm_traffic
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_sizes
from dml_dist.train.state import resolve_precision


@dataclass(frozen=True)
class RunPlan:
    """The resolved course of a run.

    Attributes:
        world_size: W, number of ranks.
        num_images: Training images.
        num_classes: C, training classes.
        class_sizes: Images of each training class, by class id.
        num_validation_images: Images of the classes held out.
        num_validation_classes: Classes held out; 0 without validation.
        global_batch_size: B, images of a full batch over all ranks.
        steps_per_epoch: Updates of one epoch.
        total_steps: Updates of the run.
        proxy_rows: Rows of proxies of each rank; zeros for a loss without proxies.
        proxy_bytes: Bytes of each rank's proxies with their optimiser state; None when a custom
            optimiser keeps an unknown state.
        traffic: What each rank sends in a step with a full batch, by its source: `objective`,
            `gradients of the network` (DDP's all-reduce) and, where ranks share its statistics,
            `batch normalisation`.
        num_backbone_parameters: Parameters of the backbone.
        num_head_parameters: Parameters of pooling and head.
        network: Label and value of what else there is to know of the network.
        methods: Label and value of regularisation and alternating projections.
    """

    world_size: int
    num_images: int
    num_classes: int
    class_sizes: tuple[int, ...] = field(repr=False)
    num_validation_images: int
    num_validation_classes: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    proxy_rows: tuple[int, ...]
    proxy_bytes: tuple[int, ...] | None
    traffic: Mapping[str, Traffic]
    num_backbone_parameters: int
    num_head_parameters: int
    network: tuple[tuple[str, str], ...]
    methods: tuple[tuple[str, str], ...]

    def batch_sizes(self, step: int) -> list[int]:
        """Return the number of images of every rank at a global step, from 0.

        Only the last batch of an epoch may be smaller than the others.
        """
        done = step % self.steps_per_epoch * self.global_batch_size
        size = min(self.global_batch_size, self.num_images - done)
        return part_sizes(size, self.world_size)

    def samples_seen(self, step: int) -> int:
        """Return the number of images trained on after `step` updates."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        of_epoch = min(self.num_images, self.steps_per_epoch * self.global_batch_size)
        return epochs * of_epoch + rest * self.global_batch_size

    def describe(self) -> list[tuple[str, str]]:
        """Return the plan as rows of label and value, for people."""
        proxies = "none"
        if any(self.proxy_rows):
            proxies = ", ".join(f"{rows:,}" for rows in self.proxy_rows)
        memory = "not known for a custom optimiser"
        if self.proxy_bytes is not None:
            memory = ", ".join(f"{size / 2**20:,.2f} MiB" for size in self.proxy_bytes)
        return [
            ("training", f"{self.num_images:,} images of {self.num_classes:,} classes"),
            ("validation", self._validation()),
            ("ranks", f"{self.world_size}"),
            ("global batch", f"{self.global_batch_size:,} images"),
            ("parts of the batch", ", ".join(str(size) for size in self.batch_sizes(0))),
            ("steps per epoch", f"{self.steps_per_epoch:,}"),
            ("steps in all", f"{self.total_steps:,} ({self._num_epochs():g} epochs)"),
            ("parameters of the backbone", f"{self.num_backbone_parameters:,}"),
            ("parameters of the head", f"{self.num_head_parameters:,}"),
            *self.network,
            *self.methods,
            ("rows of proxies per rank", proxies),
            ("with their optimiser state", memory),
            *(
                (f"sent per rank and step, {source}", _describe_traffic(traffic))
                for source, traffic in self.traffic.items()
            ),
        ]

    def _validation(self) -> str:
        if not self.num_validation_classes:
            return "none"
        return f"{self.num_validation_images:,} images of {self.num_validation_classes:,} classes"

    def _num_epochs(self) -> float:
        return round(self.total_steps / self.steps_per_epoch, 2)


def resolve(
    config: RunConfig,
    *,
    train_class_sizes: Sequence[int],
    validation_class_sizes: Sequence[int] = (),
    world_size: int,
) -> RunPlan:
    """Return the plan of a run, or say in numbers why there is none; reads no data.

    Args:
        config: The run's configuration.
        train_class_sizes: Images of each training class, by class id.
        validation_class_sizes: Images of each class held out; empty without validation.
        world_size: Number of ranks.

    Raises:
        ConfigError: If batch, classes, schedule or model do not fit each other.
        DataError: If a class has no image.
        TopologyError: If there are more ranks than classes or images of a batch.
    """
    sizes = np.asarray(train_class_sizes, dtype=np.int64)
    _check_classes(sizes)
    dtype = resolve_precision(config.train.precision, "cpu").dtype
    objective = build_objective(
        config.loss,
        num_classes=len(sizes),
        embedding_size=config.model.embedding_size,
        seed=config.seed,
        comm=Comm.planned(world_size),
        dtype=dtype,
        nir=config.nir,
        class_sizes=sizes.tolist(),
    )
    labels = np.repeat(np.arange(len(sizes)), sizes)
    batches = build_plan(
        config.data.batches,
        rows=np.arange(len(labels)),
        labels=labels,
        tar_shard=np.zeros(len(labels), dtype=np.int32),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        world_size=world_size,
    )
    check_methods(config, sizes)
    total_steps = config.train.steps or (config.train.epochs or 0) * batches.steps_per_epoch
    _check_course(config, total_steps, batches.steps_per_epoch)
    model = _model_without_memory(config)
    backbone, head = _count_parameters(model)
    return RunPlan(
        world_size=world_size,
        num_images=len(labels),
        num_classes=len(sizes),
        class_sizes=tuple(sizes.tolist()),
        num_validation_images=sum(validation_class_sizes),
        num_validation_classes=len(validation_class_sizes),
        global_batch_size=config.train.global_batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total_steps,
        proxy_rows=objective.proxy_rows(),
        proxy_bytes=_proxy_bytes(config, objective.proxy_rows(), dtype),
        traffic=_traffic(config, objective, model, dtype),
        num_backbone_parameters=backbone,
        num_head_parameters=head,
        network=describe_network(model),
        methods=tuple(describe_methods(config, objective, sizes)),
    )


def _check_classes(sizes: np.ndarray) -> None:
    if len(sizes) < 2:
        raise DataError(
            f"Training needs at least 2 classes, but there are {len(sizes)}. Hold out fewer "
            "classes for validation, or add images of other classes."
        )
    if (empty := np.flatnonzero(sizes < 1)).size:
        raise DataError(
            f"Every training class needs an image, but {len(empty)} of {len(sizes)} classes have "
            f"none, the first is class {empty[0]}. Leave empty classes out of the data set."
        )


def _check_course(config: RunConfig, total_steps: int, steps_per_epoch: int) -> None:
    warmup = config.schedule.warmup_steps
    if isinstance(config.schedule, CosineScheduleConfig) and warmup >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps: required fewer than the {total_steps} steps of the run, "
            f"got {warmup}; the cosine begins after warm-up"
        )
    frozen = config.train.backbone_warmup_epochs
    if frozen and frozen * steps_per_epoch >= total_steps:
        raise ConfigError(
            f"train.backbone_warmup_epochs: required fewer epochs than the run has "
            f"({total_steps} steps of {steps_per_epoch} an epoch), got {frozen}; "
            "the backbone would never be trained"
        )


def _model_without_memory(config: RunConfig) -> EmbeddingModel:
    """Return the network for its shapes alone; no memory is taken for its parameters."""
    # A custom backbone may read files or compute in its constructor: it is made as it is.
    device = "cpu" if config.model.backbone.name == "custom" else "meta"
    with torch.device(device):
        return build_model(config.model, seed=config.seed, pretrained=False)


def _count_parameters(model: EmbeddingModel) -> tuple[int, int]:
    """Return the numbers of parameters of backbone and head."""
    kinds = parameter_kinds(model)
    counts = {"backbone": 0, "head": 0}
    for name, parameter in model.named_parameters():
        counts[kinds[name].part] += parameter.numel()
    return counts["backbone"], counts["head"]


def _traffic(
    config: RunConfig, objective: Objective, model: EmbeddingModel, dtype: torch.dtype
) -> dict[str, Traffic]:
    """Return what each rank sends in a step with a full batch, by its source."""
    world_size = objective.comm.world_size
    projections = config.projections
    sent = {
        "objective": objective.traffic(
            part_sizes(config.train.global_batch_size, world_size),
            representatives=projections is not None and projections.pairs != "all",
            mined=projections is not None and projections.mining is not None,
        ),
        "gradients of the network": Traffic.of(
            "all_reduce",
            "gradients",
            sum(_count_parameters(model)) * dtype.itemsize,
            world_size,
        ),
    }
    if model.batch_norm == "synchronized" and (channels := batch_norm_channels(model)):
        layers = (batch_norm_traffic(size, world_size, dtype) for size in channels)
        sent["batch normalisation"] = sum(layers, Traffic())
    return sent


def _proxy_bytes(
    config: RunConfig, rows: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """Return the bytes of each rank's proxies with their optimiser state, if that is known."""
    slots = _state_slots(config.optim)
    if slots is None:
        return None
    row_bytes = config.model.embedding_size * dtype.itemsize
    return tuple(size * row_bytes * (1 + slots) for size in rows)


def _state_slots(config: OptimizerConfig) -> int | None:
    """Return how many numbers the optimiser keeps for each number of a parameter."""
    match config:
        case AdamConfig() | AdamWConfig():
            return 2
        case SGDConfig():
            return 1 if config.momentum else 0
        case RMSpropConfig():
            return 2 if config.momentum else 1
        case CustomOptimizerConfig():
            return None


def _describe_traffic(traffic: Traffic) -> str:
    kinds = traffic.by_kind()
    parts = ", ".join(f"{kind.replace('_', '-')} {_readable(n)}" for kind, n in kinds.items())
    total = _readable(traffic.total)
    return f"{total} ({parts})" if len(kinds) > 1 else total


def _readable(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes" if num_bytes < 2**20 else f"{num_bytes / 2**20:,.2f} MiB"


# ---------------- regularisation and alternating projections


def check_methods(config: RunConfig, class_sizes: np.ndarray) -> None:
    """Refuse what a method cannot be carried out with; reads no data.

    Args:
        config: The run's configuration.
        class_sizes: Images of each training class.

    Raises:
        ConfigError: If settings do not fit each other.
        DataError: If more than half the classes have one image, under projections.
    """
    if config.nir is not None and config.nir.link == "exp" and config.train.max_grad_norm is None:
        raise ConfigError(
            "nir.link exp needs train.max_grad_norm, which is not set: gradients of the "
            "exponential reach e^60, and one such step ruins the optimiser's state."
        )
    if config.projections is not None:
        _check_projections(config.projections, config, class_sizes)


def describe_methods(
    config: RunConfig, objective: Objective, class_sizes: np.ndarray
) -> list[tuple[str, str]]:
    """Return rows of label and value for people; empty without such methods."""
    rows = []
    if config.nir is not None:  # the flow is all that is replicated
        numel = sum(value.numel() for value in objective.replicated_parameters().values())
        rows.append(("parameters of the flow", f"{numel:,}"))
    if config.projections is not None:
        alone = int((class_sizes == 1).sum())
        every = config.projections.steps_per_problem
        rows.append(("projections", f"a problem lasts at most {every:,} steps"))
        if alone:
            rows.append(("classes of one image, their own representatives", f"{alone:,}"))
    return rows


def _check_projections(
    projections: ProjectionsConfig, config: RunConfig, class_sizes: np.ndarray
) -> None:
    batches = config.data.batches
    if not isinstance(batches, BalancedBatchesConfig) or batches.samples_per_class < 2:
        given = f"name: {batches.name}"
        if isinstance(batches, BalancedBatchesConfig):
            given = f"samples_per_class {batches.samples_per_class}"
        raise ConfigError(
            "projections: required data.batches.name: balanced with samples_per_class >= 2 (a "
            f"representative and others of its class), got {given}; change data.batches"
        )
    if projections.patience is not None and isinstance(config.validation, NoValidationConfig):
        raise ConfigError(
            f"projections.patience {projections.patience}: required validation classes, whose "
            "MAP@R ends a problem, got validation.name: none; hold classes out or leave it out"
        )
    _check_lead(projections, config.data)
    alone = int((class_sizes == 1).sum())
    if 2 * alone > len(class_sizes):
        raise DataError(
            f"projections: required at most half the training classes with one image, got {alone} "
            f"of {len(class_sizes)}: the representative of such a class meets no other image of "
            "it; leave those classes out, or train without projections"
        )


def _check_lead(projections: ProjectionsConfig, data: DataConfig) -> None:
    ahead = data.loader_workers * data.prefetch + 2
    if projections.lead_steps < ahead:
        raise ConfigError(
            f"projections.lead_steps: required at least {ahead}, the batches that the loader "
            f"reads ahead (data.loader_workers {data.loader_workers} x data.prefetch "
            f"{data.prefetch} + 2), got {projections.lead_steps}; raise it or read less ahead"
        )
