"""What dynamic assignment needs of a run: batches with two images of a class, spread embeddings."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from dml_dist.config.data import BalancedBatchesConfig, BatchesConfig
from dml_dist.errors import ConfigError

logger = logging.getLogger(__name__)

_WARN_AFTER = 50
"""Steps with one chosen proxy until the warning."""


def check_batches(batches: BatchesConfig, class_sizes: np.ndarray, global_batch_size: int) -> None:
    """Raise if batches hold no two images of a class, from which positives are taken.

    Args:
        batches: How batches are made.
        class_sizes: Images of each training class.
        global_batch_size: B.

    Raises:
        ConfigError: If balanced batches have one image of a class, or shuffled ones less than one
            pair of a class on average.
    """
    if isinstance(batches, BalancedBatchesConfig):
        if batches.samples_per_class >= 2:
            return
        problem = "data.batches.samples_per_class is 1"
    else:
        sizes = class_sizes.astype(np.float64)
        total = sizes.sum()
        share = (sizes * (sizes - 1)).sum() / (total * (total - 1))
        pairs = global_batch_size * (global_batch_size - 1) / 2 * share
        if pairs >= 1:
            return
        problem = (
            f"shuffled batches of {global_batch_size:,} of {int(total):,} images in "
            f"{len(sizes):,} classes hold {pairs:.2g} pairs of a class on average"
        )
    raise ConfigError(
        "loss.assignment: dynamic takes a positive from another image of the class in the batch, "
        f"but {problem}. Set data.batches to balanced with samples_per_class of at least 2."
    )


class SharedProxyWarning:
    """Warns once when all images of each batch have had one nearest proxy for many steps."""

    def __init__(self) -> None:
        self._steps = 0

    def see(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Count the last steps.

        Args:
            step: Steps made.
            num_steps: Steps whose means are given.
            values: Recorded means.
        """
        before = self._steps
        self._steps = before + num_steps if values.get("chosen_proxies") == 1 else 0
        if before < _WARN_AFTER <= self._steps:
            logger.warning(
                "All images of the batches have had the same nearest proxy for %d steps (noticed "
                "at step %d): dynamic assignment has no negatives then, and nothing is learnt. "
                "Spread the embeddings with model.normalize: batch, and keep loss.revive_dead.",
                self._steps,
                step,
            )
