"""What a point costs by its sizes alone: rows, bytes in memory, bytes sent. Nothing is run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from dml_dist.config.model import BackboneConfig, Conv4Config, ModelConfig, TimmConfig
from dml_dist.config.objective import LossConfig, ProxyNCAConfig
from dml_dist.config.schema import RunConfig
from dml_dist.losses.chunks import chunk_rows
from dml_dist.models.build_model import build_model
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.collectives import gather_traffic
from dml_dist.parallel.comm import Comm
from dml_dist.parallel.traffic import Traffic
from dml_dist.partition import part_sizes
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.train.optim import state_slots

_FLOAT_BYTES = 4

_GUESSED_FLOPS = {"cpu": 5e10, "gpu": 5e13}
"""Floating-point operations a second of a processor and of a GPU in a network, before anything was
measured: orders of magnitude."""

_GUESSED_PRODUCT_SECONDS = {"cpu": 5e-10, "gpu": 1e-12}
"""Time of one product of logits, forward and backward; likewise."""


@dataclass(frozen=True)
class Method:
    """What the cost of a step depends on beside the sizes of a point.

    Attributes:
        loss: The section `loss` of the configuration.
        state_slots: Values that the optimiser keeps per element of a parameter.
    """

    loss: LossConfig = field(default_factory=ProxyNCAConfig)
    state_slots: int = 2

    @classmethod
    def of(cls, config: RunConfig) -> Method:
        """Return the method of a configuration; a custom optimiser counts as Adam."""
        slots = state_slots(config.optim)
        loss = config.loss
        if isinstance(loss, ProxyNCAConfig) and loss.class_weighting != "none":
            # Weights of classes cost nothing, and would need the images of each class.
            unweighted = {"class_weighting": "none", "effective_number_beta": 0.999}
            loss = loss.model_copy(update=unweighted)
        return cls(loss, 2 if slots is None else slots)


@dataclass(frozen=True)
class Estimate:
    """Costs of a rank and step, from sizes alone.

    Attributes:
        owned_rows: Rows of proxies of the largest rank.
        products: Products of queries and proxies, times D: the arithmetic of the logits.
        state_bytes: The proxies with their gradient and optimiser state.
        logits_bytes: One chunk of logits with its temporaries.
        batch_bytes: Embeddings and labels of the gathered batch.
        network_bytes: Parameters of the network with gradient and optimiser state, without
            activations; 0 where `gradient_bytes` of the point is unknown.
        objective: What the objective sends.
        gradients: What DDP sends.
        seconds_guess: A step at guessed rates, for a study of which no point was measured.
    """

    owned_rows: int
    products: float
    state_bytes: int
    logits_bytes: int
    batch_bytes: int
    network_bytes: int
    objective: Traffic
    gradients: Traffic
    seconds_guess: float

    @property
    def memory_bytes(self) -> int:
        """Proxies with state and gradient, logits and gathered batch: a point's
        `memory_predicted`."""
        return self.state_bytes + self.logits_bytes + self.batch_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes that a rank sends in a step: a point's `sent_predicted`."""
        return self.objective.total + self.gradients.total


def backbone_name(config: BackboneConfig) -> str:
    """Return the name of a backbone with what tells it apart, such as conv4-32."""
    match config:
        case Conv4Config():
            return f"conv4-{config.width}"
        case TimmConfig():
            return config.model
        case _:
            return config.name


def network_gradient_bytes(config: ModelConfig) -> int:
    """Return the bytes of the gradients of a network, which is built without memory."""
    # A custom backbone may read files or compute in its constructor: it is built on the CPU.
    with torch.device("cpu" if config.backbone.name == "custom" else "meta"):
        model = build_model(config, seed=0, pretrained=False)
    return sum(p.numel() * _FLOAT_BYTES for p in model.parameters() if p.requires_grad)


def backbone_flops(config: ModelConfig, image_size: int) -> int:
    """Return the floating-point operations of a backbone for an image, forward, as torch counts.

    0 where the size of images is not known.
    """
    device = "cpu" if config.backbone.name == "custom" else "meta"
    with torch.device(device), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if image_size:
            backbone = build_model(config, seed=0, pretrained=False).backbone.eval()
            backbone(torch.empty(1, 3, image_size, image_size))
    return int(counter.get_total_flops())


def estimate(point: ScalePoint, method: Method, backbone_flops: int = 0) -> Estimate:
    """Return the costs of a point; of its measured numbers only `gradient_bytes` is read.

    Args:
        point: The point.
        method: Loss and optimiser.
        backbone_flops: Operations of the network for an image, forward; for `seconds_guess` alone.

    Raises:
        TopologyError: If there are more ranks than proxies.
    """
    world_size, width = point.world_size, point.embedding_size
    batch_sizes = part_sizes(point.global_batch_size, world_size)
    replicated = point.proxies == "replicated"
    comm = Comm.planned(1 if replicated else world_size)
    objective = build_objective(
        method.loss, num_classes=point.num_classes, embedding_size=width, seed=0, comm=comm
    )
    rows = max(objective.proxy_rows())
    # A rank with all proxies needs only its own images; one with a part of them needs all images.
    queries = max(batch_sizes) if replicated else point.global_batch_size
    if replicated:
        sent = gather_traffic(batch_sizes, 1, torch.int64, what="labels", sums_gradients=False)
        for what, size in (("loss", 1), ("proxies", rows * width)):
            sent += Traffic.of("all_reduce", what, size * _FLOAT_BYTES, world_size)
    else:
        sent = objective.traffic(batch_sizes)
    gradient = 0 if math.isnan(point.gradient_bytes) else int(point.gradient_bytes)
    products = float(queries) * width * (rows or max(batch_sizes))
    kind = "cpu" if point.device == "cpu" else "gpu"
    # The backward pass costs twice the forward pass.
    seconds = 3 * backbone_flops * max(batch_sizes) / _GUESSED_FLOPS[kind]
    seconds += products * _GUESSED_PRODUCT_SECONDS[kind]
    return Estimate(
        owned_rows=rows,
        products=products,
        state_bytes=rows * width * _FLOAT_BYTES * (2 + method.state_slots),
        logits_bytes=_logits_bytes(point, method, queries, rows or max(batch_sizes)),
        batch_bytes=queries * (width * _FLOAT_BYTES + 8),
        network_bytes=gradient * (2 + method.state_slots),
        objective=sent,
        gradients=Traffic.of("all_reduce", "gradients", gradient, world_size),
        seconds_guess=processor_share(point) * seconds,
    )


def processor_share(point: ScalePoint) -> float:
    """Return the ranks that a processor serves: 1 / n where a rank computes on n. A GPU serves one.

    Threads that are not known are taken to use all processors.
    """
    if point.device != "cpu":
        return 1.0
    shared = point.world_size / max(1, point.processors)
    return max(shared, 1.0 / point.threads) if point.threads else shared


def _logits_bytes(point: ScalePoint, method: Method, queries: int, rows: int) -> int:
    memory_mb = getattr(method.loss, "logit_memory_mb", None)
    chunk = rows
    if memory_mb is not None:
        device = "cpu" if point.device == "cpu" else "meta"
        # Its shape is all that counts.
        shape = torch.empty(1, 1, device=device).expand(queries, point.embedding_size)
        chunk = min(rows, chunk_rows(shape, memory_mb))
    return ((chunk + 1) * queries + chunk * point.embedding_size) * _FLOAT_BYTES
