"""From a loss section of the configuration to the objective, and to what it costs in traffic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dml_dist.config.nir import FlowConfig, NIRConfig
from dml_dist.config.objective import (
    ArcFaceConfig,
    CosFaceConfig,
    LossConfig,
    NormalizedSoftmaxConfig,
    ProxyNCAConfig,
)
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.losses.build_loss import AnyLoss, build_loss
from dml_dist.losses.forms import RoundsLoss, RowLoss, rounds_of, table_units
from dml_dist.losses.pairs import AnchorLoss
from dml_dist.losses.pairs_margin import Margin
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA
from dml_dist.parallel.assignment import NUM_COUNTS, DynamicProxyObjective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.pairs import PairObjective, anchor_objective
from dml_dist.parallel.proxies import Objective, ProxyObjective
from dml_dist.parallel.sampling import SampledProxyObjective
from dml_dist.partition import part_sizes

if TYPE_CHECKING:
    from dml_dist.losses.flow import ConditionalFlow


def build_objective(
    config: LossConfig,
    *,
    num_classes: int,
    embedding_size: int,
    seed: int,
    comm: Comm,
    dtype: torch.dtype = torch.float32,
    nir: NIRConfig | None = None,
    class_sizes: Sequence[int] | None = None,
) -> Objective:
    """Return the objective on this rank's device, with this rank's part of the class table.

    Args:
        config: The loss section.
        num_classes: Training classes, C >= 2.
        embedding_size: D.
        seed: Seed of the initial proxies and of what losses draw, which do not depend on the
            number of ranks.
        comm: The ranks.
        dtype: float32, or float64, of proxies and loss.
        nir: The section of non-isotropy regularisation, if there is one.
        class_sizes: Images of each training class; needed where the loss weighs classes.

    Raises:
        ConfigError: If the loss cannot be built or regularised, or there are fewer than two
            classes.
        TopologyError: If there are more ranks than classes or proxies.
    """
    loss = build_loss(config, num_classes, class_sizes=class_sizes, seed=seed, device=comm.device)
    if comm.world_size > num_classes and _is_sharded(loss):
        raise TopologyError(
            f"loss {config.name}: required at least one class for each rank, got {num_classes} "
            f"training classes and {comm.world_size} ranks; start fewer ranks"
        )
    _check_rows(config, loss, num_classes, comm.world_size)
    of_table = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "seed": seed,
        "comm": comm,
        "dtype": dtype,
    }
    objective = _objective(config, loss, of_table)
    return objective if nir is None else regularized(nir, objective, seed=seed, dtype=dtype)


def _objective(config: LossConfig, loss: AnyLoss, of_table: dict[str, Any]) -> Objective:
    of_pairs = {name: value for name, value in of_table.items() if name != "embedding_size"}
    if isinstance(loss, AnchorLoss):
        return anchor_objective(loss, **of_pairs)
    if not isinstance(loss, RowLoss | RoundsLoss):
        return PairObjective(loss, num_classes=of_table["num_classes"], comm=of_table["comm"])
    if isinstance(loss, DynamicProxyNCA):
        assert isinstance(config, ProxyNCAConfig)
        return DynamicProxyObjective(
            loss,
            dead_after_steps=config.dead_after_steps,
            revive_dead=config.revive_dead,
            **of_table,
        )
    if isinstance(config, NormalizedSoftmaxConfig | CosFaceConfig | ArcFaceConfig):
        share = config.negatives_share
        if share < 1:
            return SampledProxyObjective(loss, negatives_share=share, **of_table)
    return ProxyObjective(loss, **of_table)


def proxy_rows(
    config: LossConfig, *, class_sizes: Sequence[int], world_size: int
) -> tuple[int, ...]:
    """Return the rows of proxies of each rank; zeros for a loss without proxies.

    Args:
        config: The loss section.
        class_sizes: Images of each training class.
        world_size: Number of ranks.

    Raises:
        ConfigError: If there are fewer than two classes or proxies.
        TopologyError: If there are more ranks than proxies.
    """
    loss = build_loss(config, len(class_sizes), class_sizes=class_sizes)
    if not isinstance(loss, RowLoss | RoundsLoss):
        return (0,) * world_size
    _check_rows(config, loss, len(class_sizes), world_size)
    units = part_sizes(table_units(loss, len(class_sizes)), world_size)
    return tuple(size * loss.proxies_per_class for size in units)


def proxies_per_class(config: LossConfig) -> int:
    """Return K, the proxies that each class has, its own or shared; 0 where classes have none."""
    loss = _form_of(config)
    if isinstance(loss, DynamicProxyNCA) or not isinstance(loss, RowLoss | RoundsLoss):
        return 0
    return loss.proxies_per_class


def _check_rows(config: LossConfig, loss: AnyLoss, num_classes: int, world_size: int) -> None:
    """Refuse a table of its own number of rows that is too small to be shared out."""
    if not isinstance(loss, RowLoss | RoundsLoss):
        return
    units = table_units(loss, num_classes)
    if world_size > units:
        raise TopologyError(
            f"loss {config.name}: required at least one proxy for each rank, got {units} proxies "
            f"for {num_classes} classes and {world_size} ranks; raise loss.proxy_share or start "
            "fewer ranks"
        )


def _form_of(config: LossConfig) -> AnyLoss:
    """Return a configuration's loss for what does not depend on the data."""
    if isinstance(config, ProxyNCAConfig):
        config = config.model_copy(update={"proxy_share": 1.0})
    return build_loss(config, 2, class_sizes=(1, 1))


def has_rows_of_classes(config: LossConfig) -> bool:
    """Whether class c owns the rows cK .. cK + K - 1 of the proxies: none is shared or chosen."""
    loss = _form_of(config)
    return isinstance(loss, RowLoss | RoundsLoss) and getattr(loss, "num_free_rows", None) is None


def has_class_table(config: LossConfig) -> bool:
    """Whether ranks own rows of a class table, so that there must be a class for each rank."""
    return _is_sharded(_form_of(config))


def _is_sharded(loss: AnyLoss) -> bool:
    if isinstance(loss, Margin):
        return loss.beta_form == "class"
    return isinstance(loss, RowLoss | RoundsLoss)


def bytes_per_step(
    config: LossConfig,
    *,
    embedding_size: int,
    batch_sizes: Sequence[int],
    dtype: torch.dtype = torch.float32,
    nir: NIRConfig | None = None,
) -> int:
    """Return what the objective makes each rank send in one step, as `Comm.bytes_sent` counts.

    It is O(B D) and does not depend on the number of classes. The gradients of replicated
    parameters count.

    Args:
        config: The loss section.
        embedding_size: D.
        batch_sizes: Rows of each rank.
        dtype: float32 or float64, of proxies and loss. For a loss of one's own of row form, each
            statistic is taken to be one number a row.
        nir: The section of non-isotropy regularisation, if there is one.
    """
    world_size, total, largest = len(batch_sizes), sum(batch_sizes), max(batch_sizes)
    others, item = world_size - 1, dtype.itemsize
    # Parts of unequal size travel padded to the largest.
    sent = others * largest * torch.int64.itemsize + others * largest * embedding_size * item
    loss = _form_of(config)
    if isinstance(loss, AnchorLoss):
        reduced = _all_reduced_by_anchors(loss, total)
        sent += sum(2 * others * numbers * item // world_size for numbers in reduced)
        return sent + others * largest * embedding_size * item
    if not isinstance(loss, RowLoss | RoundsLoss):
        return sent

    def all_reduced(names: Iterable[str], scalars: frozenset[str], number_bytes: int) -> int:
        numbers = sum(1 if name in scalars else total for name in names)
        return 2 * others * numbers * number_bytes // world_size

    for round_ in rounds_of(loss):
        scalars = round_.scalars
        nearest = [name for name, how in round_.merges.items() if how == "argmax"]
        merges = {name: how for name, how in round_.merges.items() if how != "argmax"}
        peaks = [name for name, how in merges.items() if how != "sum"]
        owners = [name for name, how in merges.items() if how == "max"]
        sent += 2 * all_reduced(nearest, scalars, torch.float64.itemsize)
        sent += all_reduced(peaks, scalars, item) + all_reduced(merges, scalars, item)
        sent += all_reduced(owners, scalars, torch.int32.itemsize)
    if isinstance(loss, DynamicProxyNCA):
        sent += 2 * others * NUM_COUNTS * torch.float64.itemsize // world_size
    if nir is not None:
        reduced = all_reduced_by_nir(
            nir,
            embedding_size=embedding_size,
            num_rows=total,
            proxies_per_class=loss.proxies_per_class,
        )
        sent += sum(2 * others * numbers * item // world_size for numbers in reduced)
    return sent + others * largest * embedding_size * item


def _all_reduced_by_anchors(loss: AnchorLoss, num_rows: int) -> list[int]:
    """Return how many numbers each all-reduce of a step has."""
    numbers = [len(loss.merges)]
    if isinstance(loss, Margin) and loss.beta_form == "class":
        numbers += [num_rows, num_rows]  # The rows' betas, and their gradients.
    if isinstance(loss, Margin) and loss.beta_form == "scalar":
        numbers += [1]  # The gradient of beta.
    return numbers


# ---------------- non-isotropy regularisation

_NUM_SUMS = 3
"""Sums over the batch that `NIRObjective` merges."""


def regularized(
    config: NIRConfig, beneath: Objective, *, seed: int, dtype: torch.dtype
) -> Objective:
    """Return an objective under non-isotropy regularisation.

    Args:
        config: The section `nir`.
        beneath: The objective of the section `loss`.
        seed: Seed of flow and noise.
        dtype: float32 or float64, of the flow.

    Raises:
        ConfigError: If the loss has no proxies that the flow could be given.
    """
    # Imported here: runs without a flow work without zuko.
    from dml_dist.parallel.nir import NIRObjective

    if not isinstance(beneath, ProxyObjective) or isinstance(beneath, DynamicProxyObjective):
        raise ConfigError(
            "nir: required a loss that has proxies of each class, which the flow takes as its "
            f"condition, got {type(beneath).__name__}; leave the section nir out, or choose "
            "a loss such as proxy_nca or proxy_anchor"
        )
    if isinstance(beneath, SampledProxyObjective):
        raise ConfigError(
            "nir: required a loss that moves all proxies, got loss.negatives_share "
            f"{beneath.negatives_share}; set it to 1, or leave the section nir out"
        )
    size = beneath.proxies.shape[1]
    flow = _flow(config.flow, size, seed, dtype).to(beneath.comm.device)
    options = config.model_dump(exclude={"flow"})
    return NIRObjective(beneath, flow, seed=seed, **options)


def flow_numbers(config: NIRConfig, embedding_size: int) -> int:
    """Return the number of parameters of the flow; no memory is taken for them."""
    with torch.device("meta"):
        flow = _flow(config.flow, embedding_size, 0, torch.float32)
    return sum(parameter.numel() for parameter in flow.parameters())


def all_reduced_by_nir(
    config: NIRConfig, *, embedding_size: int, num_rows: int, proxies_per_class: int
) -> list[int]:
    """Return how many numbers each all-reduce has beyond those of the loss, after warm-up.

    Args:
        config: The section `nir`.
        embedding_size: D.
        num_rows: Rows of the global batch.
        proxies_per_class: K of the loss beneath.
    """
    conditions = num_rows * proxies_per_class * embedding_size
    numbers = [conditions, _NUM_SUMS, flow_numbers(config, embedding_size)]
    return [*numbers, conditions] if "proxies" in config.gradients_to else numbers


def _flow(config: FlowConfig, size: int, seed: int, dtype: torch.dtype) -> ConditionalFlow:
    from dml_dist.losses.flow import ConditionalFlow

    return ConditionalFlow(size, size, seed=seed, dtype=dtype, **config.model_dump())
