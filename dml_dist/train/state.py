"""Everything that training changes, on one rank, and how it is built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, DivergedError
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.batch_norm import synchronize_batch_norm
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.train.optim import build_optimizer, parameter_groups
from dml_dist.train.projections import Projections
from dml_dist.train.representative_table import table_form


@dataclass(frozen=True)
class Precision:
    """Arithmetic of a run.

    Attributes:
        dtype: Of weights, embeddings, objective and optimiser.
        autocast: What the backbone is cast to, or None.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None

    def context(self, device_type: str) -> torch.autocast:
        """Return the context in which the network is called; it does nothing without autocast."""
        enabled = self.autocast is not None
        return torch.autocast(device_type, dtype=self.autocast, enabled=enabled)


@dataclass
class TrainState:
    """What training changes, on this rank.

    Attributes:
        model: The embedding network; equal on every rank.
        network: What is called in training: the model, inside DDP where there are several ranks.
        objective: The loss with this rank's rows of its tables; DDP does not know of it.
        optimizer: One optimiser over both.
        comm: The ranks.
        precision: The arithmetic.
        step: Number of updates made.
        projections: Alternating projections; None without them.
    """

    model: EmbeddingModel
    network: nn.Module
    objective: Objective
    optimizer: Optimizer
    comm: Comm
    precision: Precision
    step: int
    projections: Projections | None = None

    @property
    def owned(self) -> dict[str, Parameter]:
        """This rank's rows of the objective's tables, by name."""
        return {name: rows.parameter for name, rows in self.objective.owned_parameters().items()}

    @property
    def replicated(self) -> dict[str, Parameter]:
        """Parameters of the objective other than its tables, by name; equal on every rank."""
        return self.objective.replicated_parameters()


def resolve_precision(
    name: Literal["auto", "float32", "bf16", "float64"], device_type: str
) -> Precision:
    """Return the arithmetic of a setting; auto is bf16 autocast on a GPU, float32 on a CPU."""
    match name:
        case "float64":
            return Precision(torch.float64, None)
        case "bf16":
            return Precision(torch.float32, torch.bfloat16)
        case "float32":
            return Precision(torch.float32, None)
        case "auto":
            return Precision(torch.float32, torch.bfloat16 if device_type == "cuda" else None)


def build_state(
    config: RunConfig,
    *,
    num_classes: int,
    comm: Comm,
    pretrained: bool = True,
    class_sizes: Sequence[int] | None = None,
) -> TrainState:
    """Return the state before the first step, the same for any number of ranks.

    Every rank calls this: weights that cannot be loaded on one rank end all ranks.

    Args:
        config: The run's configuration.
        num_classes: C, number of training classes.
        comm: The ranks.
        pretrained: False where a checkpoint is loaded next.
        class_sizes: Images of each training class; needed where the loss weighs classes.

    Raises:
        ConfigError: If the model, loss or optimiser cannot be built.
    """
    precision = resolve_precision(config.train.precision, comm.topology.device_type)
    error: Exception | None = None
    try:
        model = build_model(
            config.model, seed=config.seed, pretrained=pretrained, dtype=precision.dtype
        ).to(comm.device)
        if model.batch_norm == "synchronized":
            model.backbone = synchronize_batch_norm(model.backbone, comm)
        if model.normalize_statistics == "synchronized":
            model.normalize = synchronize_batch_norm(model.normalize, comm)
        objective = build_objective(
            config.loss,
            num_classes=num_classes,
            embedding_size=config.model.embedding_size,
            seed=config.seed,
            comm=comm,
            dtype=precision.dtype,
            nir=config.nir,
            class_sizes=class_sizes,
            proxies=config.proxies,
            table=table_form(config.projections),
        ).to(comm.device)
        owned = {name: rows.parameter for name, rows in objective.owned_parameters().items()}
        replicated = objective.replicated_parameters()
        _check_all_owned(objective, {**owned, **replicated})
        groups = parameter_groups(config.optim, model, owned, replicated)
        optimizer = build_optimizer(config.optim, groups)
    except Exception as caught:  # Handed to all ranks by agree.
        error = caught
    comm.agree(error, what="building the model")
    return TrainState(
        model=model,
        network=distribute(model, comm, any_may_be_unused=_any_may_be_unused(config)),
        objective=objective,
        optimizer=optimizer,
        comm=comm,
        precision=precision,
        step=0,
    )


def _any_may_be_unused(config: RunConfig) -> bool:
    """Whether parameters may have no gradient: a custom backbone's, or a frozen backbone's."""
    return config.model.backbone.name == "custom" or config.train.backbone_warmup_epochs > 0


def share_buffers(model: EmbeddingModel, comm: Comm) -> None:
    """Give every rank rank 0's running statistics; every rank calls this.

    DDP does so before each training step. Validation and checkpoints call this first, so that the
    model is the same on every rank between steps, too.
    """
    if comm.world_size > 1 and model.has_changing_buffers:
        for buffer in model.buffers():
            buffer.copy_(comm.broadcast(buffer, 0, what="running statistics"))


def check_finite(state: TrainState, kept: str) -> None:
    """Refuse weights that are not finite; every rank calls this.

    A gradient can overflow where the loss is finite, so weights are checked before they are
    evaluated or saved.

    Args:
        state: The state.
        kept: Which checkpoint the run has, for the error.

    Raises:
        DivergedError: If a rank has such weights; it names them.
    """
    error = None
    values = {**state.model.state_dict(), **state.owned, **state.replicated}
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            error = DivergedError(
                f"Weights in {name} are not finite at step {state.step}. Lower the learning rate "
                f"or set train.max_grad_norm; {kept}."
            )
            break
    state.comm.agree(error, what="finite weights")


_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # PyTorch's newer and older name.
    if name in inspect.signature(DistributedDataParallel).parameters
)
"""DDP's option that gives all ranks rank 0's buffers before each step."""


class _SpareParameter(nn.Module):
    """A model with one more parameter, which is not used.

    DDP with `find_unused_parameters` writes a warning to every rank's standard error, not through
    Python's warnings or logging, when it finds none unused. The spare parameter avoids that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.spare = nn.Parameter(next(model.parameters()).new_zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.model(images)
        return embeddings


def distribute(model: EmbeddingModel, comm: Comm, *, any_may_be_unused: bool) -> nn.Module:
    """Return the model inside DDP, which averages gradients over ranks.

    A custom backbone may have parameters without a gradient, as in one process, and a backbone has
    none during the warm-up of the head: DDP then has to look for them (`find_unused_parameters`).
    The project's own networks use all of theirs, and on a GPU the search would wait for the device
    in every step.

    On the CPU DDP always searches, because that keeps it from rebuilding its buckets after the
    first step. The rebuilding changes the order of summation (from three ranks on), so that a
    resumed run, whose first step is another one, would differ in the last bits from an
    uninterrupted one.
    """
    if comm.world_size == 1:
        return model
    looks = any_may_be_unused or comm.device.type == "cpu"
    buffers: dict[str, Any] = {_SYNC_BUFFERS: model.has_changing_buffers}
    return DistributedDataParallel(
        _SpareParameter(model) if looks else model,
        device_ids=[comm.device] if comm.device.type == "cuda" else None,
        process_group=comm.group,
        find_unused_parameters=looks,
        gradient_as_bucket_view=True,
        **buffers,
    )


def _check_all_owned(objective: Objective, declared: Mapping[str, Parameter]) -> None:
    """Refuse parameters of the objective that would differ between ranks."""
    known = {id(parameter) for parameter in declared.values()}
    lost = [name for name, value in objective.named_parameters() if id(value) not in known]
    if lost:
        raise ConfigError(
            f"The objective's parameters {lost} are neither rows of a table nor replicated, so "
            "ranks would not keep them equal. Return them from owned_parameters() or "
            "replicated_parameters(), or make them constants."
        )
