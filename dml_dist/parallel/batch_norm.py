"""Batch normalisation with the statistics of the global batch, on any number of ranks.

Forward: each rank's moments are gathered and merged in rank order (`models/batch_moments.py`), so
that all ranks normalise by the same bits and keep the same running statistics. Backward: with
y = w (x - mean) / s + b, s = sqrt(variance + eps), n values of a channel in the global batch and
g = dl/dy,

    dl/dx = w / s (g - sum(g) / n - (x - mean) sum(g (x - mean)) / (n s^2))

with sums over the GLOBAL batch: one all-reduce of two values per channel. The gradient contract of
`parallel/proxies.py` needs no factor here: the incoming gradient is W dl/dy on every rank, and the
formula is linear in g, so that the outgoing one is W dl/dx. dl/dw and dl/db are this rank's part,
which DDP averages as it does those of any other layer.

Legend: N images of this rank, C channels, P positions of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dml_dist.errors import ConfigError
from dml_dist.losses.numerics import accurate_dtype
from dml_dist.models.batch_moments import Moments, finish, merge, pack, partial, unpack
from dml_dist.models.build_model import batch_norm_channels
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.traffic import Traffic

_MOMENTS = "moments of batch normalisation"
_GRADIENT = "gradient of batch normalisation"

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, ...) by the moments of all ranks' values.

    Parameters, buffers and their names are those of the layer it replaces; running
    statistics are the same on every rank. In evaluation mode it is that layer. In training mode
    forward and backward are collectives.
    """

    def __init__(self, layer: _BatchNorm, comm: Comm) -> None:
        """Take over a layer's settings, parameters and buffers themselves, not copies of them."""
        super().__init__(
            layer.num_features,
            layer.eps,
            layer.momentum,
            affine=False,
            track_running_stats=False,
        )
        self.affine = layer.affine
        self.track_running_stats = layer.track_running_stats
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            delattr(self, name)
            self.register_buffer(name, getattr(layer, name))
        self.train(layer.training)
        self.comm = comm

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised values, of the shape and dtype of the input."""
        if not self.training:  # ranks evaluate batches of their own
            running = (self.running_mean, self.running_var)
            lacking = self.running_mean is None
            return F.batch_norm(input, *running, self.weight, self.bias, lacking, eps=self.eps)
        output, mean_C, unbiased_C = _Normalize.apply(
            input, self.weight, self.bias, self.eps, self.comm
        )
        if self.track_running_stats:
            self._update(mean_C, unbiased_C)
        return output

    @torch.no_grad()
    def _update(self, mean_C: Tensor, unbiased_C: Tensor) -> None:
        """Move the running statistics towards this batch's, by torch's rule."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # the mean over all batches
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Take every shape that has channels."""


class _Normalize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, comm: Comm
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accurate_dtype(x)
        own = partial(x.reshape(*x.shape[:2], -1).to(dtype))
        total = _over_ranks(own, comm)
        if total.count < 2:  # on every rank alike
            raise ConfigError(
                "Batch normalisation needs at least 2 values of each channel in the global batch, "
                f"but there is {int(total.count)}. Use larger images or a larger global batch."
            )
        mean_C, variance_C, unbiased_C = finish(total)
        ctx.save_for_backward(x, weight, mean_C.to(dtype), (variance_C + eps).rsqrt().to(dtype))
        ctx.count, ctx.comm = total.count.to(dtype), comm
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        output = F.batch_norm(x, mean_C.to(dtype), variance_C.to(dtype), weight, bias, eps=eps)
        return output, mean_C, unbiased_C

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean_C, scale_C = ctx.saved_tensors
        grad_NCP = grad.reshape(*grad.shape[:2], -1).to(mean_C.dtype)
        centered_NCP = x.reshape(grad_NCP.shape).to(mean_C.dtype) - mean_C[:, None]
        sums_2C = torch.stack([grad_NCP.sum(dim=(0, 2)), (grad_NCP * centered_NCP).sum(dim=(0, 2))])
        grad_x = None
        if ctx.needs_input_grad[0]:
            totals_2C = ctx.comm.all_reduce_sum(sums_2C, what=_GRADIENT)
            mean_grad_C, mean_product_C = totals_2C / ctx.count
            slope_C = mean_product_C * scale_C.square()
            grad_NCP = grad_NCP - mean_grad_C[:, None] - centered_NCP * slope_C[:, None]
            factor_C = scale_C if weight is None else scale_C * weight
            grad_x = (grad_NCP * factor_C[:, None]).reshape(x.shape).to(x.dtype)
        grad_weight = None if weight is None else (sums_2C[1] * scale_C).to(weight.dtype)
        grad_bias = None if weight is None else sums_2C[0].to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _over_ranks(own: Moments, comm: Comm) -> Moments:
    """Return the moments of all ranks together, the same bits on every rank."""
    sizes = [1] * comm.world_size
    rows = comm.all_gather_rows(pack(own), sizes, what=_MOMENTS)
    return reduce(merge, map(unpack, rows))


def synchronize_batch_norm(module: nn.Module, comm: Comm) -> nn.Module:
    """Return the module with layers that normalise by the statistics of the global batch.

    On a GPU these are torch's SyncBatchNorm, on a CPU SynchronizedBatchNorm; parameters stay the
    same objects, names in a state dict stay. One rank needs no change.

    Args:
        module: Changed in place, where it is not such a layer itself.
        comm: The ranks.

    Raises:
        ConfigError: If it holds another kind of batch normalisation.
    """
    if comm.world_size == 1:
        return module
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in (*_PLAIN, nn.SyncBatchNorm):
            raise ConfigError(
                f"model.backbone.batch_norm.statistics: synchronized needs layers BatchNorm1d, "
                f"BatchNorm2d or BatchNorm3d, got {type(layer).__name__} at {name}; use those, "
                "or batch_norm.statistics: per_rank"
            )
    if comm.device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, comm.group)
        return converted
    return _replace(module, comm)


def batch_norm_traffic(num_channels: int, world_size: int, dtype: torch.dtype) -> Traffic:
    """Return what each rank sends for one layer in a step.

    Args:
        num_channels: C.
        world_size: W.
        dtype: Of the sums in the backward pass, float32 or float64.
    """
    moments = (1 + 2 * num_channels) * torch.float64.itemsize
    sums = 2 * num_channels * dtype.itemsize
    gathered = Traffic.of("all_gather", _MOMENTS, moments, world_size)
    return gathered + Traffic.of("all_reduce", _GRADIENT, sums, world_size)


def _replace(module: nn.Module, comm: Comm) -> nn.Module:
    if isinstance(module, _PLAIN):
        return SynchronizedBatchNorm(module, comm)
    for name, child in module.named_children():
        module.add_module(name, _replace(child, comm))
    return module


def check_batch_norm(model: EmbeddingModel, num_images: int, batches: Sequence[list[int]]) -> None:
    """Raise if batch normalisation would take its statistics from a single image.

    Args:
        model: The network.
        num_images: Training images, for the error.
        batches: Images of every rank, of each kind of batch: a full one, and the last of an epoch.

    Raises:
        ConfigError: If it would; torch itself raises only where such an image has one position.
    """
    per_rank = bool(batch_norm_channels(model, "per_rank"))
    if not per_rank and not batch_norm_channels(model, "synchronized"):
        return
    for sizes in batches:
        if per_rank and min(sizes) < 2:
            of = f"rank {sizes.index(min(sizes))} has {min(sizes)} of the {sum(sizes)} images"
        elif sum(sizes) < 2:
            of = "there is only 1 image"
        else:
            continue
        raise ConfigError(
            f"Batch normalisation with {'per_rank' if per_rank else 'synchronized'} statistics "
            f"needs at least 2 images, but {of} in a batch ({num_images:,} images in batches of "
            f"{sum(batches[0])} on {len(sizes)} {'rank' if len(sizes) == 1 else 'ranks'}). Set "
            "data.batches.last: drop, change train.global_batch_size or the number of ranks, or "
            "freeze the statistics."
        )
