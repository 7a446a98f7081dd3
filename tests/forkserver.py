"""The fork server of test processes, with all modules that they need imported in advance.

A process has one such server, and its first user sets what it imports. If `data/pool.py` started it
(for writers and loader workers), each rank forked by a test would import torch and torchvision,
which takes 3 s.
"""

from __future__ import annotations

import multiprocessing as mp
import warnings
from multiprocessing import forkserver

CONTEXT = mp.get_context("forkserver")
_IMPORTS = [
    "torch",
    "torch.distributed",
    "torchvision",
    "pyarrow.parquet",
    "webdataset",
    "faiss",
    "matplotlib.figure",
    "dml_dist.cli",
    "dml_dist.orchestration.train",
    "dml_dist.orchestration.evaluate",
    "dml_dist.runtime.rank",
    "dml_dist.data.datasets",
    "dml_dist.data.write_shards",
    "tests.unit.test_write_shards",
]


def start() -> None:
    """Start the server if none is running; it imports while the caller continues."""
    CONTEXT.set_forkserver_preload(_IMPORTS)
    forkserver.ensure_running()


def raise_warnings() -> None:
    """Raise warnings in this process as pytest does in its own: forked ones know no such filter."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)
