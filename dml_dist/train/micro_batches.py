"""Forward and backward pass of a step in micro-batches, for batches larger than memory.

Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
RepL4NLP 2021 (gradient caching). With weights theta, embeddings x_i = f(image_i), Jacobians J_i and
the loss l of the global batch,

    dl/dtheta = sum_i J_i^T dl/dx_i

1. each micro-batch is embedded without a graph;
2. the loss of the global batch gives dl/dx_i of all images at once;
3. each micro-batch is embedded again, with a graph, and its dl/dx_i go back through it.

So the activations of one micro-batch are in memory at a time, for a second forward pass. The factor
of the gradient contract (`parallel/proxies.py`) is in dl/dx_i already: each rank adds up the parts
of its micro-batches, and DDP averages the sums over ranks in the backward pass of the last one.

The second forward pass repeats the first: it starts from the same state of torch's generators
(dropout, stochastic depth) and from the same buffers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dml_dist.errors import ConfigError
from dml_dist.models.build_model import batch_norm_channels
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.train.state import TrainState, share_buffers


@dataclass(frozen=True, eq=False)
class _Start:
    """What a forward pass starts from: states of torch's generators, buffers of the network."""

    cpu: Tensor
    gpu: Tensor | None
    buffers: list[Tensor]


class MicroBatches:
    """The images of this rank in one step, in micro-batches."""

    def __init__(self, state: TrainState, images: Tensor, size: int) -> None:
        """Divide images, (b, 3, H, W), into micro-batches of `size`; the last may be smaller."""
        self._state = state
        self._images = images.split(size)
        self._buffers = [*state.model.buffers()] if state.model.has_changing_buffers else []
        self._starts: list[_Start] = []

    @torch.no_grad()
    def embed(self) -> Tensor:
        """Return the embeddings of all images, (b, D), as a leaf; every rank calls this."""
        # DDP's first forward pass does so, too, but only after its start was kept.
        share_buffers(self._state.model, self._state.comm)
        parts = []
        for images in self._images:
            self._starts.append(self._start())
            parts.append(self._forward(images))
        return torch.cat(parts).requires_grad_()

    def backward(self, embeddings: Tensor) -> None:
        """Pass the gradient of the embeddings back to the network; every rank calls this."""
        assert embeddings.grad is not None
        gradients = embeddings.grad.split([len(images) for images in self._images])
        last = len(self._images) - 1
        for number, (images, gradient) in enumerate(zip(self._images, gradients, strict=True)):
            self._return_to(self._starts[number])
            with nullcontext() if number == last else self._without_reduction():
                self._forward(images).backward(gradient)

    def _forward(self, images: Tensor) -> Tensor:
        with self._state.precision.context(images.device.type):
            embeddings: Tensor = self._state.network(images)
        return embeddings

    def _without_reduction(self) -> AbstractContextManager[None]:
        network = self._state.network
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def _start(self) -> _Start:
        device = self._state.comm.device
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return _Start(torch.get_rng_state(), gpu, [buffer.clone() for buffer in self._buffers])

    @torch.no_grad()
    def _return_to(self, start: _Start) -> None:
        torch.set_rng_state(start.cpu)
        if start.gpu is not None:
            torch.cuda.set_rng_state(start.gpu, self._state.comm.device)
        for buffer, value in zip(self._buffers, start.buffers, strict=True):
            buffer.copy_(value)


def check_micro_batches(size: int | None, model: EmbeddingModel) -> None:
    """Raise if micro-batches would change what the network computes.

    Args:
        size: `train.micro_batch_size`.
        model: The network.

    Raises:
        ConfigError: If it normalises by statistics of the batch.
    """
    if size is None:
        return
    for statistics in ("synchronized", "per_rank"):
        if num_layers := len(batch_norm_channels(model, statistics)):
            raise ConfigError(
                f"train.micro_batch_size is {size}, but the network has batch normalisation "
                f"(layers: {num_layers}) with {statistics} statistics, which differ between a "
                "micro-batch and the whole batch. Use group normalisation (model.backbone.norm: "
                "group), frozen statistics (model.backbone.batch_norm.statistics: frozen) and "
                "model.normalize: none, or remove train.micro_batch_size."
            )
