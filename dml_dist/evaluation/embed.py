"""Compute the embeddings of batches of images, without changing the model's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


class EmbeddingBatch(Protocol):
    """Images with their labels and rows (`data.loader.Batch` is one)."""

    @property
    def images(self) -> Tensor:
        """(b, 3, H, W) float32."""

    @property
    def labels(self) -> Tensor:
        """(b,) int64."""

    @property
    def rows(self) -> Tensor:
        """(b,) int64."""


def embed(
    model: nn.Module,
    batches: Iterable[EmbeddingBatch],
    *,
    device: torch.device | str,
    precision: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the embeddings of batches with their labels and rows, in the order of the batches.

    The model runs in evaluation mode and without gradients; the mode of each module is restored.
    An embedding's bits depend on its batch, so the same results need the same batches.

    Args:
        model: images (b, 3, H, W) -> embeddings (b, D), on `device`; images are cast to the dtype
            of its first floating parameter, float32 if it has none.
        batches: This rank's batches.
        device: Device of the model.
        precision: Autocast dtype, or None for the model's own.
        progress: Called with the number of images embedded so far, after each batch.

    Returns:
        Embeddings (n, D) float32, labels (n,) int64, rows (n,) int64; (0, 0) embeddings without
        batches.
    """
    embeddings: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    done = 0
    device = torch.device(device)
    dtype = _floating_type(model)
    autocast = (
        nullcontext()
        if precision is None
        else torch.autocast(device_type=device.type, dtype=precision)
    )
    with _evaluation_mode(model), torch.inference_mode(), autocast:
        for batch in batches:
            images = batch.images.to(device, dtype, non_blocking=True)
            # Sync point: the copy to the host waits for the device.
            embeddings.append(model(images).to(torch.float32).cpu().numpy())
            labels.append(batch.labels.numpy())
            rows.append(batch.rows.numpy())
            done += len(labels[-1])
            if progress is not None:
                progress(done)
    if not embeddings:
        return (
            np.zeros((0, 0), dtype=np.float32),
            np.zeros(0, dtype=np.int64),
            np.zeros(0, dtype=np.int64),
        )
    return np.concatenate(embeddings), np.concatenate(labels), np.concatenate(rows)


def _floating_type(model: nn.Module) -> torch.dtype:
    types = (parameter.dtype for parameter in model.parameters())
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Restore each module, not only the root: frozen normalization layers are in evaluation mode
    # while the rest of the network trains.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
