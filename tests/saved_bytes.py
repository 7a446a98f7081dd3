"""Bytes that autograd graphs keep for the backward pass: memory of activations on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes:
    """Counts the bytes of saved tensors without parameters, while it is entered as a context.

    Attributes:
        now: Bytes kept at the moment.
        peak: The largest value of `now`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.data_ptr() for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self.now = 0
        self.peak = 0

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Saved:
        size = 0 if tensor.data_ptr() in self._parameters else tensor.numel() * tensor.itemsize
        self.now += size
        self.peak = max(self.peak, self.now)
        return _Saved(self, tensor, size)


class _Saved:
    """A tensor for as long as a graph keeps it."""

    def __init__(self, counter: SavedBytes, tensor: Tensor, size: int) -> None:
        self.counter = counter
        self.tensor = tensor
        self.size = size

    def __del__(self) -> None:
        self.counter.now -= self.size


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
