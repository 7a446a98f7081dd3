"""From the configuration of non-isotropy regularisation to its objective and its traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dml_dist.config.nir import FlowConfig, NIRConfig
from dml_dist.errors import ConfigError
from dml_dist.parallel.assignment import DynamicProxyObjective
from dml_dist.parallel.proxies import Objective, ProxyObjective
from dml_dist.parallel.sampling import SampledProxyObjective

if TYPE_CHECKING:
    from dml_dist.losses.flow import ConditionalFlow

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
