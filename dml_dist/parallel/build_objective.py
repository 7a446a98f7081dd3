"""From a loss section of the configuration to the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dml_dist.config.nir import NIRConfig
from dml_dist.config.objective import (
    ArcFaceConfig,
    CosFaceConfig,
    LossConfig,
    NormalizedSoftmaxConfig,
    ProxyNCAConfig,
)
from dml_dist.config.proxy_losses import ProxiesConfig, SoftTripleConfig
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.losses.build_loss import AnyLoss, build_loss
from dml_dist.losses.forms import RoundsLoss, RowLoss, table_units
from dml_dist.losses.pairs import AnchorLoss
from dml_dist.losses.pairs_margin import Margin
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA
from dml_dist.losses.table_losses import table_loss
from dml_dist.parallel.assignment import DynamicProxyObjective
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.objective import Objective
from dml_dist.parallel.pairs import PairObjective, anchor_objective
from dml_dist.parallel.proxies import PROXIES, ProxyObjective
from dml_dist.parallel.replicated import ReplicatedProxyObjective
from dml_dist.parallel.representatives import RepresentativeObjective, TableForm
from dml_dist.parallel.sampling import SampledProxyObjective


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
    proxies: ProxiesConfig | None = None,
    table: TableForm | None = None,
) -> Objective:
    """Return the objective on this rank's device, with this rank's part of the class table.

    With `Comm.planned` it takes no memory for its parameters; the run plan reads the rows of each
    rank and the traffic from it.

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
        proxies: The section of proxies; None means its defaults.
        table: Options of the table form of alternating projections, if it is used.

    Raises:
        ConfigError: If the loss cannot be built or regularised, has no proxies for the settings of
            `proxies` or no table form, or there are fewer than two classes.
        TopologyError: If there are more ranks than classes or proxies.
    """
    proxies = proxies or ProxiesConfig()
    is_replicated = proxies.placement == "replicated"
    if is_replicated:
        _check_replicated(config)
    wanted = proxies.num_classes or num_classes
    has_more = wanted != num_classes
    if has_more:
        num_classes = _table_classes(config, wanted, num_classes)
    loss = build_loss(config, num_classes, class_sizes=class_sizes, seed=seed, device=comm.device)
    if not is_replicated:
        _check_tables(config, loss, num_classes, comm.world_size, has_table=table is not None)
    shared = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        # Every rank builds the whole table of replicated proxies.
        "comm": Comm.single(str(comm.device)) if is_replicated else comm,
        "dtype": dtype,
    }
    if table is None:
        objective = _objective(config, loss, seed, shared)
    else:
        of_table = table_loss(loss, table.memory_mb)
        objective = RepresentativeObjective(of_table, table, seed=seed, **shared)
    if has_more and PROXIES not in objective.owned_parameters():
        raise ConfigError(
            f"proxies.num_classes is {num_classes:,}, but loss {config.name} has no proxies. "
            "Remove it."
        )
    if proxies.initial_std is not None:
        _spread_proxies(config, objective, proxies.initial_std)
    if is_replicated:
        assert isinstance(objective, ProxyObjective)
        return ReplicatedProxyObjective(objective, comm)
    return objective if nir is None else regularized(nir, objective, seed=seed)


def _check_replicated(config: LossConfig) -> None:
    """Refuse replicated proxies for a loss that is no plain mean over rows."""
    match config:
        case ProxyNCAConfig():
            fits = config.assignment == "static" and config.class_weighting == "none"
        case NormalizedSoftmaxConfig() | CosFaceConfig() | ArcFaceConfig():
            fits = config.negatives_share == 1
        case _:
            fits = isinstance(config, SoftTripleConfig)
    if not fits:
        raise ConfigError(
            "proxies.placement is replicated, with which each rank computes the mean over its own "
            f"rows, but the loss {config.name} as it is set is no such mean. Set placement to "
            "sharded, or use proxy_nca with assignment: static and without class weights, "
            "soft_triple, or normalized_softmax, cosface or arcface with negatives_share: 1."
        )


def _table_classes(config: LossConfig, wanted: int, num_classes: int) -> int:
    """Return the classes of a table that is larger than the number of training classes."""
    if wanted < num_classes:
        raise ConfigError(
            f"proxies.num_classes is {wanted:,}, but there are {num_classes:,} training classes, "
            "which all have a proxy. Raise it, or leave it out."
        )
    if isinstance(config, ProxyNCAConfig) and (
        config.assignment == "dynamic" or config.class_weighting != "none"
    ):
        raise ConfigError(
            f"proxies.num_classes is {wanted:,}, which adds classes without images, but "
            f"loss.assignment is {config.assignment} and loss.class_weighting "
            f"{config.class_weighting}: both need images of every class. Leave it out."
        )
    return wanted


def _objective(config: LossConfig, loss: AnyLoss, seed: int, shared: dict[str, Any]) -> Objective:
    if isinstance(loss, AnchorLoss):
        return anchor_objective(loss, seed=seed, **shared)
    if not isinstance(loss, RowLoss | RoundsLoss):
        return PairObjective(loss, **shared)
    if isinstance(loss, DynamicProxyNCA):
        assert isinstance(config, ProxyNCAConfig)
        return DynamicProxyObjective(
            loss,
            dead_after_steps=config.dead_after_steps,
            revive_dead=config.revive_dead,
            seed=seed,
            **shared,
        )
    if isinstance(config, NormalizedSoftmaxConfig | CosFaceConfig | ArcFaceConfig):
        share = config.negatives_share
        if share < 1:
            return SampledProxyObjective(loss, negatives_share=share, seed=seed, **shared)
    return ProxyObjective(loss, seed=seed, **shared)


@torch.no_grad()
def _spread_proxies(config: LossConfig, objective: Objective, initial_std: float) -> None:
    table = objective.owned_parameters().get(PROXIES)
    if table is None:
        raise ConfigError(
            f"proxies.initial_std is {initial_std:g}, but loss {config.name} has no proxies. "
            "Remove it."
        )
    table.parameter.mul_(initial_std * objective.embedding_size**0.5)


def _check_tables(
    config: LossConfig, loss: AnyLoss, num_classes: int, world_size: int, *, has_table: bool
) -> None:
    """Refuse a table that is too small for each rank to own a part of it."""
    is_proxy_loss = isinstance(loss, RowLoss | RoundsLoss)
    has_class_betas = isinstance(loss, Margin) and loss.beta_form == "class"
    if (is_proxy_loss or has_class_betas or has_table) and world_size > num_classes:
        raise TopologyError(
            f"Loss {config.name} has a table of classes, of which each rank owns at least one, but "
            f"there are {num_classes} training classes and {world_size} ranks. Use at most "
            f"{num_classes} ranks."
        )
    if isinstance(loss, RowLoss | RoundsLoss) and world_size > table_units(loss, num_classes):
        raise TopologyError(
            f"Each rank owns at least one proxy, but loss {config.name} has "
            f"{table_units(loss, num_classes)} proxies for {num_classes} classes, and there are "
            f"{world_size} ranks. Raise loss.proxy_share or use fewer ranks."
        )


# ---------------- non-isotropy regularisation


def regularized(config: NIRConfig, base: Objective, *, seed: int) -> Objective:
    """Return an objective with non-isotropy regularisation.

    Args:
        config: The section `nir`.
        base: The objective of the section `loss`.
        seed: Seed of flow and noise.

    Raises:
        ConfigError: If the loss has no proxies that the flow could be conditioned on.
    """
    # Imported here: runs without a flow work without zuko.
    from dml_dist.losses.flow import ConditionalFlow
    from dml_dist.parallel.nir import NIRObjective

    if not isinstance(base, ProxyObjective) or isinstance(base, DynamicProxyObjective):
        raise ConfigError(
            "nir conditions its flow on the proxies of each class, which this loss does not have "
            f"(it is a {type(base).__name__}). Remove the section nir, or choose a loss such as "
            "proxy_nca or proxy_anchor."
        )
    if isinstance(base, SampledProxyObjective):
        raise ConfigError(
            "nir needs a loss that updates all proxies, but loss.negatives_share is "
            f"{base.negatives_share}. Set it to 1, or remove the section nir."
        )
    size, device = base.embedding_size, base.comm.device
    # Weights are drawn on the CPU, so that they are the same on every device; a plan draws none.
    with torch.device("meta" if device.type == "meta" else "cpu"):
        flow = ConditionalFlow(size, size, seed=seed, dtype=base.dtype, **config.flow.model_dump())
    options = config.model_dump(exclude={"flow"})
    return NIRObjective(base, flow.to(device), seed=seed, **options)
