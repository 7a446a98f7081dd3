"""Methods in the plan of a run: what must fit together, and what is shown."""

from __future__ import annotations

import numpy as np

from dml_dist.config.data import BalancedBatchesConfig, DataConfig
from dml_dist.config.projections import ProjectionsConfig
from dml_dist.config.schema import NoValidationConfig, RunConfig
from dml_dist.errors import ConfigError, DataError
from dml_dist.parallel.assignment import DynamicProxyObjective
from dml_dist.parallel.objective import Objective
from dml_dist.train.dynamic_assignment import check_batches


def check_methods(config: RunConfig, objective: Objective, class_sizes: np.ndarray) -> None:
    """Raise if the settings of a method do not fit each other, or not the data; reads no data.

    Args:
        config: The run's configuration.
        objective: Its objective.
        class_sizes: Images of each training class.

    Raises:
        ConfigError: If settings do not fit each other.
        DataError: If more than half the classes have one image, under projections of batch form,
            or all classes have fewer images than the table has rows of a class.
    """
    if isinstance(objective, DynamicProxyObjective):
        check_batches(config.data.batches, class_sizes, config.train.global_batch_size)
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
    """Return labels and values for display; empty without such methods."""
    rows = []
    if config.nir is not None:  # the flow is all that is replicated
        numel = sum(value.numel() for value in objective.replicated_parameters().values())
        rows.append(("flow parameters", f"{numel:,}"))
    if config.projections is not None:
        alone = int((class_sizes == 1).sum())
        every = config.projections.steps_per_problem
        rows.append(("projections", f"at most {every:,} steps per problem"))
        if config.projections.form == "table":
            rows += _describe_table(config.projections, class_sizes)
        elif alone:
            rows.append(("classes of one image, which represent themselves", f"{alone:,}"))
    return rows


def _describe_table(
    projections: ProjectionsConfig, class_sizes: np.ndarray
) -> list[tuple[str, str]]:
    number = projections.representatives_per_class
    present = int(np.minimum(class_sizes, number).sum())
    embedded = f"{present:,} images"
    if projections.selection == "k_center":
        pool = int(np.minimum(class_sizes, projections.pool_per_class).sum())
        embedded = f"{pool:,} images to select from, then {present:,}"
    rows = [("embedded at the start of a problem", embedded)]
    if small := int((class_sizes < number).sum()):
        missing = len(class_sizes) * number - present
        rows.append(
            (
                "missing rows",
                f"{missing:,} of {len(class_sizes) * number:,}: {small:,} classes have fewer than "
                f"{number:,} images",
            )
        )
    return rows


def _check_projections(
    projections: ProjectionsConfig, config: RunConfig, class_sizes: np.ndarray
) -> None:
    if projections.patience is not None and isinstance(config.validation, NoValidationConfig):
        raise ConfigError(
            f"projections.patience is {projections.patience}, but validation.name is none, and "
            "validation MAP@R ends a problem. Hold out validation classes or remove patience."
        )
    if projections.form == "table":
        _check_table(projections, class_sizes)
    if projections.forms_batches:
        _check_batches(projections, config.data)
    alone = int((class_sizes == 1).sum())
    if projections.form == "batch" and 2 * alone > len(class_sizes):
        raise DataError(
            f"projections allows at most half of the training classes to have a single image, but "
            f"{alone} of {len(class_sizes)} do: such a representative has no other image of its "
            "class. Remove those classes, or train without projections."
        )


def _check_table(projections: ProjectionsConfig, class_sizes: np.ndarray) -> None:
    number, largest = projections.representatives_per_class, int(class_sizes.max())
    if largest < number:
        raise DataError(
            f"projections.representatives_per_class is {number}, but the largest of the "
            f"{len(class_sizes)} training classes has {largest} images, so every class would miss "
            f"rows of the table. Set it to at most {largest}."
        )


def _check_batches(projections: ProjectionsConfig, data: DataConfig) -> None:
    """Raise if batches cannot follow the problems."""
    batches = data.batches
    if projections.form == "table":
        least, needs = 1, "projections.mining needs data.batches.name balanced (it chooses classes)"
    else:
        least = 2
        needs = (
            "projections needs data.batches.name balanced with samples_per_class >= 2 (a "
            "representative and others of its class)"
        )
    if not isinstance(batches, BalancedBatchesConfig) or batches.samples_per_class < least:
        given = f"name: {batches.name}"
        if isinstance(batches, BalancedBatchesConfig):
            given = f"samples_per_class {batches.samples_per_class}"
        raise ConfigError(f"{needs}, but data.batches has {given}. Change data.batches.")
    ahead = data.loader_workers * data.prefetch + 2
    if projections.lead_steps < ahead:
        raise ConfigError(
            f"projections.lead_steps is {projections.lead_steps}, but the loader reads {ahead} "
            f"batches ahead (data.loader_workers {data.loader_workers} x data.prefetch "
            f"{data.prefetch} + 2). Raise lead_steps, or reduce prefetch."
        )
