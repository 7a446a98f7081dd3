"""The plan of a run: sizes, steps, memory and traffic, from configuration and class sizes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dml_dist.config.objective import CosineScheduleConfig
from dml_dist.config.schema import RunConfig
from dml_dist.data.plans import build_plan
from dml_dist.errors import ConfigError, DataError
from dml_dist.models.build_model import batch_norm_channels, build_model, describe_network
from dml_dist.models.embedding import EmbeddingModel, parameter_kinds
from dml_dist.models.timm_backbone import network_transform
from dml_dist.parallel.batch_norm import batch_norm_traffic, check_batch_norm
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.proxies import PROXIES
from dml_dist.parallel.representatives import REPRESENTATIVES, RepresentativeObjective
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_sizes
from dml_dist.train.micro_batches import check_micro_batches
from dml_dist.train.optim import describe_learning_rates, state_slots
from dml_dist.train.plan_methods import check_methods, describe_methods
from dml_dist.train.representative_table import table_form
from dml_dist.train.state import resolve_precision


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Attributes:
        world_size: W, number of ranks.
        num_images: Training images.
        num_classes: C, training classes.
        class_sizes: Images of each training class, by class id.
        num_validation_images: Images of the classes held out.
        num_validation_classes: Classes held out; 0 without validation.
        global_batch_size: B, images of a full batch over all ranks.
        micro_batch_size: Images of a rank in memory with their activations; None means all.
        steps_per_epoch: Updates of one epoch.
        total_steps: Updates of the run.
        proxy_rows: Rows of proxies, or of representatives, of each rank; zeros for a loss without.
        proxy_bytes: Bytes of each rank's rows with their optimiser state; None when a custom
            optimiser keeps an unknown state.
        row_kind: What the rows are: `proxies` or `representatives`.
        traffic: What each rank sends in a step with a full batch, by its source: `objective`,
            `gradients of the network` (DDP's all-reduce) and, where ranks share its statistics,
            `batch normalisation`.
        num_backbone_parameters: Parameters of the backbone.
        num_head_parameters: Parameters of pooling and head.
        network: Further facts about the network, as labels and values.
        methods: Label and value of learning rates, regularisation and alternating projections.
    """

    world_size: int
    num_images: int
    num_classes: int
    class_sizes: tuple[int, ...] = field(repr=False)
    num_validation_images: int
    num_validation_classes: int
    global_batch_size: int
    micro_batch_size: int | None
    steps_per_epoch: int
    total_steps: int
    proxy_rows: tuple[int, ...]
    proxy_bytes: tuple[int, ...] | None
    row_kind: str
    traffic: Mapping[str, Traffic]
    num_backbone_parameters: int
    num_head_parameters: int
    network: tuple[tuple[str, str], ...]
    methods: tuple[tuple[str, str], ...]

    @property
    def has_proxies(self) -> bool:
        """Whether the loss has proxies."""
        return any(self.proxy_rows) and self.row_kind == PROXIES

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
        """Return the plan as labels and values, for display."""
        proxies = "none"
        if any(self.proxy_rows):
            proxies = ", ".join(f"{rows:,}" for rows in self.proxy_rows)
        memory = "unknown for a custom optimiser"
        if self.proxy_bytes is not None:
            memory = ", ".join(f"{size / 2**20:,.2f} MiB" for size in self.proxy_bytes)
        return [
            ("training", f"{self.num_images:,} images of {self.num_classes:,} classes"),
            ("validation", self._validation()),
            ("ranks", f"{self.world_size}"),
            ("global batch", f"{self.global_batch_size:,} images"),
            ("images per rank", ", ".join(str(size) for size in self.batch_sizes(0))),
            *self._micro_batches(),
            ("steps per epoch", f"{self.steps_per_epoch:,}"),
            ("total steps", f"{self.total_steps:,} ({self._num_epochs():g} epochs)"),
            ("backbone parameters", f"{self.num_backbone_parameters:,}"),
            ("head parameters", f"{self.num_head_parameters:,}"),
            *self.network,
            *self.methods,
            (f"{self.row_kind} per rank", proxies),
            (f"memory of {self.row_kind} with optimiser state", memory),
            *(
                (f"sent per rank and step, {source}", _describe_traffic(traffic))
                for source, traffic in self.traffic.items()
            ),
        ]

    def _micro_batches(self) -> list[tuple[str, str]]:
        if self.micro_batch_size is None:
            return []
        number = math.ceil(max(self.batch_sizes(0)) / self.micro_batch_size)
        return [("images per micro-batch", f"{self.micro_batch_size:,} ({number:,} per rank)")]

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
    """Return the plan of a run; reads no data.

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
    objective = _objective_without_data(config, sizes, world_size, dtype)
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
    check_methods(config, objective, sizes)
    total_steps = config.train.steps or (config.train.epochs or 0) * batches.steps_per_epoch
    _check_course(config, total_steps, batches.steps_per_epoch)
    model = _model_without_memory(config)
    check_micro_batches(config.train.micro_batch_size, model)
    backbone, head = _count_parameters(model)
    plan = RunPlan(
        world_size=world_size,
        num_images=len(labels),
        num_classes=len(sizes),
        class_sizes=tuple(sizes.tolist()),
        num_validation_images=sum(validation_class_sizes),
        num_validation_classes=len(validation_class_sizes),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=total_steps,
        proxy_rows=objective.proxy_rows(),
        proxy_bytes=_proxy_bytes(config, objective, dtype),
        row_kind=REPRESENTATIVES if isinstance(objective, RepresentativeObjective) else PROXIES,
        traffic=_traffic(config, objective, model, dtype),
        num_backbone_parameters=backbone,
        num_head_parameters=head,
        network=describe_network(model),
        methods=(
            *describe_learning_rates(config, objective, batches.steps_per_epoch),
            *describe_methods(config, objective, sizes),
        ),
    )
    _check_batch_norm(config, plan, model)
    return plan


def _objective_without_data(
    config: RunConfig, sizes: np.ndarray, world_size: int, dtype: torch.dtype
) -> Objective:
    return build_objective(
        config.loss,
        num_classes=len(sizes),
        embedding_size=config.model.embedding_size,
        seed=config.seed,
        comm=Comm.planned(world_size),
        dtype=dtype,
        nir=config.nir,
        class_sizes=sizes.tolist(),
        proxies=config.proxies,
        table=table_form(config.projections),
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
    if not total_steps:
        return  # The network is evaluated as it is.
    warmup = config.schedule.warmup_steps
    if isinstance(config.schedule, CosineScheduleConfig) and warmup >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps is {warmup}, but the run has only {total_steps} steps, and the "
            "cosine begins after warm-up. Use fewer warm-up steps or a longer run."
        )
    frozen = config.train.backbone_warmup_epochs
    if frozen and frozen * steps_per_epoch >= total_steps:
        raise ConfigError(
            f"train.backbone_warmup_epochs is {frozen}, but the run has {total_steps} steps of "
            f"{steps_per_epoch} per epoch, so the backbone would never be trained. Use fewer "
            "warm-up epochs or a longer run."
        )


def _check_batch_norm(config: RunConfig, plan: RunPlan, model: EmbeddingModel) -> None:
    if not plan.total_steps:
        return  # The network is evaluated as it is.
    trained = plan.total_steps - config.train.backbone_warmup_epochs * plan.steps_per_epoch
    steps = (0, plan.steps_per_epoch - 1) if trained >= plan.steps_per_epoch else (0,)
    check_batch_norm(model, plan.num_images, [plan.batch_sizes(step) for step in steps])


def _model_without_memory(config: RunConfig) -> EmbeddingModel:
    """Return the network without memory for its parameters: for its shapes alone."""
    network_transform(config.data.transform, config.model.backbone)  # Refuses another size.
    # A custom backbone may read files or compute in its constructor: it is built on the CPU.
    device = "cpu" if config.model.backbone.name == "custom" else "meta"
    with torch.device(device):
        return build_model(config.model, seed=config.seed, pretrained=False)


def _count_parameters(model: EmbeddingModel) -> tuple[int, int]:
    """Return the number of parameters of backbone and head."""
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
    if channels := batch_norm_channels(model, "synchronized"):
        layers = (batch_norm_traffic(size, world_size, dtype) for size in channels)
        sent["batch normalisation"] = sum(layers, Traffic())
    return sent


def _proxy_bytes(
    config: RunConfig, objective: Objective, dtype: torch.dtype
) -> tuple[int, ...] | None:
    """Return the bytes of each rank's rows with their optimiser state, if that is known."""
    # Rows that are not trained are not among the owned parameters.
    slots = state_slots(config.optim) if objective.owned_parameters() else 0
    if slots is None:
        return None
    row_bytes = config.model.embedding_size * dtype.itemsize
    return tuple(size * row_bytes * (1 + slots) for size in objective.proxy_rows())


def _describe_traffic(traffic: Traffic) -> str:
    kinds = traffic.by_kind()
    parts = ", ".join(f"{kind.replace('_', '-')} {_readable(n)}" for kind, n in kinds.items())
    total = _readable(traffic.total)
    return f"{total} ({parts})" if len(kinds) > 1 else total


def _readable(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes" if num_bytes < 2**20 else f"{num_bytes / 2**20:,.2f} MiB"
