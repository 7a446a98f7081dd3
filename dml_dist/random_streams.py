"""All seeded random streams by name; no other module creates a generator or a seed.

A stream is named by its use, the seed and indices such as the epoch, the step or a row. It holds
no state between calls: any process at any time draws the same numbers for the same name. So draws
do not depend on the number of ranks or loader workers, and a resumed run repeats them.
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Literal

import numpy as np


@unique
class Stream(IntEnum):
    """What random numbers are used for.

    The values are part of what a seed means: add new ones, never change or reuse one. Comments
    name the indices.
    """

    # Data sets: what is imported and which images train.
    GLYPH_CLASSES = 1  # none, or the number of the split or of the characters (sop_shape)
    GLYPH_DRAWING = 2  # code points, number of the image
    SPLIT = 3
    TAR_SHARD_CONTENTS = 4  # number of the split
    VALIDATION_CLASSES = 5

    # Batches of the training data.
    TAR_SHARD_ORDER = 6  # epoch
    ROW_ORDER = 7  # epoch
    CLASS_ORDER = 8  # epoch
    SYSTEMATIC_CLASSES = 9  # first step of the state
    SYSTEMATIC_ROWS = 10  # first step of the state
    REPRESENTATIVES = 11  # problem
    AUGMENTATION = 12  # step, position in the global batch
    LOADER_WORKERS = 13

    # Networks and losses.
    MODEL_WEIGHTS = 14
    NETWORK = 15  # step, rank: dropout and stochastic depth
    PROXIES = 16  # block of rows of the global table
    SAMPLED_NEGATIVES = 17  # step, block of classes
    REVIVED_PROXIES = 18  # step, row of the global table
    MINED_NEGATIVES = 19  # step
    FRACTIONAL_PROXIES = 20
    FLOW_WEIGHTS = 21
    FLOW_PERMUTATIONS = 22
    NIR_NOISE = 23  # step

    # Evaluation, search of values, reports and checks.
    KMEANS_CENTERS = 24
    STRUCTURE_CLASSES = 25
    HYPERPARAMETERS = 26
    GALLERY = 27  # none, or the label of the class that is shown
    PROXY_FACTS_IMAGES = 28
    PROXY_FACTS_CLASSES = 29
    DISTANCES_IMAGES = 30
    DISTANCES_CLASSES = 31
    MAP_IMAGES = 32
    MAP_LAYOUT = 33
    CONTACT_SHEET = 34
    CHECK_LOSS_NETWORK = 35
    CHECK_LOSS_INPUTS = 36  # size of the batch
    IMPORTANCES = 37  # number of the objective

    # Networks and losses, added later.
    DYNAMIC_POSITIVES = 38  # step


def generator_of(stream: Stream, seed: int, *indices: int) -> np.random.Generator:
    """Return a new generator at the start of a stream.

    Args:
        stream: What the numbers are used for.
        seed: Any integer >= 0.
        indices: Integers >= 0 that name one of the streams of this use.

    Raises:
        ValueError: If the seed or an index is negative.
    """
    return np.random.Generator(np.random.Philox(_sequence(stream, seed, indices)))


def seed_of(stream: Stream, seed: int, *indices: int, bits: Literal[32, 64] = 64) -> int:
    """Return a stream as a seed for a library's own generator.

    PyTorch takes 64 bits: `torch.Generator(device).manual_seed(seed_of(...))`. Libraries on
    numpy's RandomState, such as Optuna, take 32.

    Args:
        stream: What the numbers are used for.
        seed: Any integer >= 0.
        indices: Integers >= 0 that name one of the streams of this use.
        bits: Size of the result.

    Raises:
        ValueError: If the seed or an index is negative.
    """
    words = _sequence(stream, seed, indices).generate_state(1, np.uint64)
    return int(words[0]) >> (64 - bits)


def _sequence(stream: Stream, seed: int, indices: tuple[int, ...]) -> np.random.SeedSequence:
    # Numpy's own entropy lists are ambiguous: [s] and [s, 0] give the same bits, and integers of
    # 2^32 and more run together with their neighbors. Here the count of integers and the number of
    # words of each one stand before them, so that different names give different words, and at
    # least four of them, below which numpy pads with zeros.
    words = [int(stream), len(indices)]
    for number in (seed, *indices):
        number = int(number)
        if number < 0:
            raise ValueError(
                f"stream {stream.name} was named by seed {seed} and indices {indices}: "
                "all of them must be at least 0"
            )
        parts = [
            (number >> shift) & 0xFFFFFFFF for shift in range(0, max(1, number.bit_length()), 32)
        ]
        words += [len(parts), *parts]
    return np.random.SeedSequence(np.array(words, dtype=np.uint32))
