"""The memory bound of an evaluation: block sizes by formula, and the measured peak of arrays."""

from __future__ import annotations

import tracemalloc
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dml_dist.evaluation.retrieval import evaluate
from dml_dist.search import gallery_shard as gallery
from dml_dist.search import propose
from dml_dist.search.propose import gallery_tile
from dml_dist.search.sharded import queries_per_block

MIB = 2**20


class LiveTensors(TorchDispatchMode):
    """Track the live storage bytes of operators called inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not self._users[place]:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._users[place] += 1
        weakref.finalize(tensor, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self.bytes -= size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("memory_mb", [16, 512])
@pytest.mark.parametrize("num_neighbors", [1, 8, 100, 3000])
@pytest.mark.parametrize("world_size", [1, 8])
def test_blocks_fit_the_memory_by_formula(
    device: str, memory_mb: int, num_neighbors: int, world_size: int
) -> None:
    memory = memory_mb * MIB
    num_queries = queries_per_block(memory, num_neighbors, 512, world_size)
    tile = gallery_tile(device, num_queries, memory)
    # A product in float32, and candidates of 12 bytes beside the lists of all ranks.
    lists = num_queries * num_neighbors * (12 + 16 * world_size)
    assert 4 * num_queries * tile + lists <= memory
    assert num_queries * tile >= 4096


def test_tiles_are_full_size_if_memory_allows() -> None:
    assert gallery_tile("cpu", 1024, 512 * MIB) == 2048
    assert gallery_tile("cuda", 1024, 512 * MIB) == 32768
    assert gallery_tile("cuda", 4096, 512 * MIB) == 8192
    assert gallery_tile("cuda", 4096, 1) == 1


@pytest.mark.parametrize("roles", [None, "mixed"])
def test_peak_of_arrays_stays_in_the_bound(
    monkeypatch: pytest.MonkeyPatch, roles: str | None
) -> None:
    count, width, memory_mb = 6000, 32, 16.0
    # The sizes of a GPU, on a CPU.
    monkeypatch.setitem(propose._GALLERY_TILE, "cpu", 32768)
    monkeypatch.setitem(gallery._TILE_QUERIES, "cpu", 4096)
    monkeypatch.setitem(gallery._TILE_GALLERY, "cpu", 16384)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((count, width)).astype(np.float32))
    labels = rng.integers(0, count // 8, count)
    role = None if roles is None else np.array(["query", "gallery", "both"])[np.arange(count) % 3]
    options: dict[str, Any] = {"backend": "torch", "memory_mb": memory_mb, "roles": role}
    with LiveTensors() as live:
        evaluate(x, labels, recall_at=(1, 100), **options)
    # In a second pass, because the first one's bookkeeping is made of Python objects too.
    tracemalloc.start()
    try:
        evaluate(x, labels, recall_at=(1, 100), **options)
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert live.peak + arrays <= memory_mb * MIB + 3 * x.nbytes
