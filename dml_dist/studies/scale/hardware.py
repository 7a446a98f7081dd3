"""GPUs, nodes and networks with the sources of their numbers, and step times that others measured.

Bandwidth inside a node is NCCL's own: links of a GPU times 20.0 (V100, A100) or
20.6 GB/s (H100), from NVIDIA/nccl, src/graph/topo.h. That of the network is its cards' nominal
rate. Memory and its bandwidth are those of NVIDIA's data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from dml_dist.studies.scale.nccl import Network

_GIGABIT = 1e9 / 8


@dataclass(frozen=True)
class Hardware:
    """GPUs of one kind in nodes.

    Attributes:
        name: Name of the preset.
        gpu: The GPU.
        memory: Bytes of a GPU.
        memory_bandwidth: Bytes a second of its memory.
        network: Nodes and network.
        source: Where the numbers come from.
    """

    name: str
    gpu: str
    memory: float
    memory_bandwidth: float
    network: Network
    source: str


def _presets(*presets: Hardware) -> dict[str, Hardware]:
    return {preset.name: preset for preset in presets}


PRESETS = _presets(
    Hardware(
        "h100-nvlink-400g",
        gpu="H100",
        memory=80e9,
        memory_bandwidth=3.35e12,
        network=Network(8, 18 * 20.6e9, 8 * 400 * _GIGABIT),
        source="NVIDIA H100 SXM and DGX H100 data sheets: 8 GPUs, 8 cards of 400 Gb/s a node",
    ),
    Hardware(
        "a100-nvlink-200g",
        gpu="A100",
        memory=80e9,
        memory_bandwidth=2.039e12,
        network=Network(8, 12 * 20.0e9, 8 * 200 * _GIGABIT),
        source="NVIDIA A100 80GB SXM and DGX A100 data sheets: 8 GPUs, 8 cards of 200 Gb/s a node",
    ),
    Hardware(
        "a100-100g-ethernet",
        gpu="A100",
        memory=80e9,
        memory_bandwidth=2.039e12,
        network=Network(8, 12 * 20.0e9, 100 * _GIGABIT),
        source="NVIDIA A100 80GB SXM data sheet; 8 GPUs and one card of 100 Gb/s a node, assumed",
    ),
    Hardware(
        "v100-nvlink-100g",
        gpu="V100",
        memory=32e9,
        memory_bandwidth=0.9e12,
        network=Network(8, 6 * 20.0e9, 100 * _GIGABIT),
        source="NVIDIA V100 SXM2 32GB data sheet; 8 GPUs and one card of 100 Gb/s a node, assumed",
    ),
)
"""By name; the first one whose GPU has a step time of the backbone is the default."""


@dataclass(frozen=True)
class StepTime:
    """How fast others trained a network.

    Attributes:
        backbone: The network.
        gpu: The GPU.
        images_per_second: Of one GPU of a full node, its losses inside the node included.
        batch_size_per_gpu: Images of a step on a GPU.
        gpus: GPUs of that node.
        precision: Arithmetic.
        image_size: Side of the images, pixels.
        source: Where it is published.
    """

    backbone: str
    gpu: str
    images_per_second: float
    batch_size_per_gpu: int
    gpus: int
    precision: str
    image_size: int
    source: str


_NVIDIA = (
    "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md, "
    "training performance"
)
STEP_TIMES = (
    StepTime("resnet50", "A100", 16621 / 8, 256, 8, "mixed", 224, f"{_NVIDIA}, DGX A100"),
    StepTime("resnet50", "V100", 8056 / 8, 256, 8, "mixed", 224, f"{_NVIDIA}, DGX-1 32GB"),
)

GRADIENT_BYTES = {
    "resnet18": 47e6,
    "resnet50": 102e6,
    "resnet101": 178e6,
    "inception_v3": 95e6,
    "vgg16": 553e6,
    "r100": 261e6,
}
"""Four bytes for each parameter, as torchvision counts them, with the classifier; r100 is
insightface's iresnet100."""


def cited_step_time(backbone: str, gpu: str) -> StepTime | None:
    """Return a step time that is published for a network on a GPU, or None."""
    return next((t for t in STEP_TIMES if (t.backbone, t.gpu) == (backbone, gpu)), None)
