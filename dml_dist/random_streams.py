"""Random numbers of the data layer: one independent, counter-based stream for each use.

A stream is named by the run's seed, its purpose and counters such as the epoch or the step. It
holds no state between calls, so any process at any time draws the same numbers for the same name.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for. The numbers are part of what a seed means: append, never renumber."""

    TAR_SHARD_ORDER = 0
    ROW_ORDER = 1
    CLASS_ORDER = 2
    VALIDATION_CLASSES = 3
    AUGMENTATION = 4
    SYSTEMATIC_CLASSES = 5
    SYSTEMATIC_ROWS = 6
    REPRESENTATIVES = 7


def stream(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """Return the generator named by `(seed, purpose, counters)`.

    SeedSequence pads the seed to a fixed width when there is a spawn key, so that different names
    give different streams; products such as seed * epoch would not.

    Args:
        seed: The run's seed, >= 0.
        purpose: What the numbers are for.
        counters: Integers in [0, 2**32), the same number of them for all uses of one purpose.
    """
    name = np.random.SeedSequence(seed, spawn_key=(int(purpose), *counters))
    return np.random.Generator(np.random.Philox(name))
