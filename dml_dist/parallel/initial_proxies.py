"""Initial proxies by global row: the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK_ROWS = 256
"""Rows drawn from one stream; part of what a seed means, so never changed."""

_STREAM = 0x70726F78
"""Keeps these draws apart from others with the same seed."""


def fill_initial_proxies(proxies: Tensor, row_low: int, seed: int) -> None:
    """Fill rows with normal numbers of variance 1 / D, so that their length is about 1.

    Each block of rows has its own counter-based stream (Philox), keyed by seed and block.

    Args:
        proxies: (L, D) CPU tensor, written in place; row i is row `row_low + i` of the table.
        row_low: The first row's number in the whole table.
        seed: Seed, >= 0.
    """
    num_rows, dim = proxies.shape
    row_high = row_low + num_rows
    for block in range(row_low // _BLOCK_ROWS, -(-row_high // _BLOCK_ROWS)):
        stream = np.random.Philox(np.random.SeedSequence((seed, _STREAM, block)))
        drawn = np.random.Generator(stream).standard_normal((_BLOCK_ROWS, dim), dtype=np.float32)
        start = block * _BLOCK_ROWS
        low, high = max(row_low, start), min(row_high, start + _BLOCK_ROWS)
        proxies[low - row_low : high - row_low] = torch.from_numpy(
            drawn[low - start : high - start]
        )
    proxies /= dim**0.5
