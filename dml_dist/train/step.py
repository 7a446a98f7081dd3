"""One step of training, on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dml_dist.parallel.objective import TouchedRows
from dml_dist.train.micro_batches import MicroBatches
from dml_dist.train.optim import clip_gradients, has_finite_gradients, set_learning_rates
from dml_dist.train.optim_state import forget_rows, only_rows
from dml_dist.train.proximal import ProximalTerm
from dml_dist.train.spans import Spans
from dml_dist.train.state import TrainState


@dataclass(frozen=True)
class StepOutput:
    """Results of a step, to be read later; reading a value waits for the device.

    Attributes:
        statistics: 0-d tensors of the objective, by name, the same on every rank; the loss of the
            global batch is `loss`.
        gradient_norm: 0-d; the norm before clipping, or None without clipping.
        finite_gradients: 0-d bool; whether the gradients of this rank's parameters are finite.
        embedding_norms: (b,); norms of this rank's embeddings.
    """

    statistics: dict[str, Tensor]
    gradient_norm: Tensor | None
    finite_gradients: Tensor
    embedding_norms: Tensor


def train_step(
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    batch_sizes: Sequence[int],
    *,
    learning_rate_factor: float,
    max_grad_norm: float | None = None,
    micro_batch_size: int | None = None,
    update_backbone: bool = True,
    is_representative: Tensor | None = None,
    neighbors: Tensor | None = None,
    image_rows: Tensor | None = None,
    proximal: ProximalTerm | None = None,
    spans: Spans | None = None,
) -> StepOutput:
    """Make one update; every rank calls this with its part of the global batch.

    DDP averages the gradients of the network over ranks; the objective contains the factor that
    makes them those of the global batch (the gradient contract in `parallel/proxies.py`), and sums
    the gradients of its own replicated parameters.

    Args:
        state: Changed in place; `step` is one higher afterwards.
        images: This rank's images, (b, 3, H, W), on the device.
        labels: Their class ids, (b,) int64 in 0 .. C - 1, on the device.
        batch_sizes: Number of images of every rank; `batch_sizes[rank]` is b.
        learning_rate_factor: The schedule's factor for this update.
        max_grad_norm: Bound on the norm of all gradients together, or None.
        micro_batch_size: Images whose activations are in memory at a time; None means all.
        update_backbone: False leaves the backbone, its running statistics and its optimiser state
            as they are.
        is_representative: Which images are representatives of their classes, (b,) bool; None on
            every rank when all pairs count.
        neighbors: The nearest classes of every class that hard class mining found, (C, h) int64,
            -1 for none; None without it.
        image_rows: Index rows of the images, (b,) int64; needed where the objective has a table of
            representatives.
        proximal: Pulls the weights towards an earlier solution.
        spans: Records where the time goes.
    """
    spans = spans or Spans.off()
    state.model.freeze_backbone(not update_backbone)
    micro_batches = None
    if micro_batch_size is not None and micro_batch_size < max(batch_sizes):
        micro_batches = MicroBatches(state, images, micro_batch_size)
    with spans("forward"), state.precision.context(images.device.type):
        state.optimizer.zero_grad(set_to_none=True)
        embeddings = micro_batches.embed() if micro_batches else state.network(images)
    spans.wait_for_ranks(state.comm)
    with spans("gather"):
        batch = state.objective.gather(
            embeddings,
            labels,
            batch_sizes,
            step=state.step,
            is_representative_B=is_representative,
            neighbors_Ch=neighbors,
            image_rows_B=image_rows,
        )
    with spans("objective"):
        output = state.objective.global_loss(batch)
    with spans.backward():
        with state.comm.guard("gradients"):
            output.loss.backward()
            if micro_batches is not None:
                micro_batches.backward(embeddings)
        state.objective.sum_replicated_gradients()
    with spans("optimizer"):
        touched = state.objective.touched_rows()
        norm, finite = _check_gradients(state, touched, max_grad_norm)
        if proximal is not None:
            proximal.add_gradients(state.model)
        set_learning_rates(state.optimizer, learning_rate_factor)
        with only_rows(state.optimizer, touched.values()):
            state.optimizer.step()
        state.step += 1
        for name, rows in state.objective.after_update(state.step).items():
            forget_rows(state.optimizer, state.owned[name], rows)
    norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
    return StepOutput(output.statistics, norm, finite, norms)


def _check_gradients(
    state: TrainState, touched: Mapping[str, TouchedRows], max_norm: float | None
) -> tuple[Tensor | None, Tensor]:
    """Clip gradients where a bound is set; return their norm, if so, and whether all are finite."""
    shared = [*state.model.parameters(), *state.replicated.values()]
    owned = {**state.owned, **{name: part.values for name, part in touched.items()}}
    if max_norm is None:
        return None, has_finite_gradients([*shared, *owned.values()])
    norm = clip_gradients(shared, owned.values(), max_norm, state.comm)
    return norm, norm.isfinite()
