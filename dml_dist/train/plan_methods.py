"""What regularisation and alternating projections ask of a run, and how a plan describes them."""

from __future__ import annotations

import numpy as np

from dml_dist.config.data import BalancedBatchesConfig, DataConfig
from dml_dist.config.projections import ProjectionsConfig
from dml_dist.config.schema import NoValidationConfig, RunConfig
from dml_dist.errors import ConfigError, DataError
from dml_dist.parallel.build_nir import flow_numbers
from dml_dist.parallel.build_objective import proxies_per_class


def check_methods(config: RunConfig, class_sizes: np.ndarray) -> None:
    """Refuse what a method cannot be carried out with; reads no data.

    Args:
        config: The run's configuration.
        class_sizes: Images of each training class.

    Raises:
        ConfigError: If settings do not fit each other.
        DataError: If more than half the classes have one image, under projections.
    """
    if config.nir is not None:
        _check_nir(config)
    if config.projections is not None:
        _check_projections(config.projections, config, class_sizes)


def describe_methods(config: RunConfig, class_sizes: np.ndarray) -> list[tuple[str, str]]:
    """Return rows of label and value for people; empty without such methods."""
    rows = []
    if config.nir is not None:
        numbers = flow_numbers(config.nir, config.model.embedding_size)
        rows.append(("parameters of the flow", f"{numbers:,}"))
    if config.projections is not None:
        alone = int((class_sizes == 1).sum())
        every = config.projections.steps_per_problem
        rows.append(("projections", f"a problem lasts at most {every:,} steps"))
        if alone:
            rows.append(("classes of one image, their own representatives", f"{alone:,}"))
    return rows


def _check_nir(config: RunConfig) -> None:
    if not proxies_per_class(config.loss):
        raise ConfigError(
            f"nir: required a loss with proxies of each class, which the flow takes as its "
            f"condition, got loss {config.loss.name}; leave the section nir out, or choose a loss "
            "such as proxy_nca or proxy_anchor"
        )
    if config.nir is not None and config.nir.link == "exp" and config.train.max_grad_norm is None:
        raise ConfigError(
            "nir.link: exp required train.max_grad_norm, got none: gradients of the exponential "
            "reach e^60, and one such step ruins an optimiser's state; give train.max_grad_norm"
        )


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
