"""Seconds of a collective of NCCL, by the model with which NCCL itself chooses an algorithm.

Latencies, shares of the bandwidth and the formula are those of NVIDIA/nccl, src/graph/tuning.cc
(commit b647562), for rings and trees with the protocols LL, LL128 and Simple; its correction of
trees for medium sizes and NVLS are left out. A collective takes the fastest pair:

    seconds = latency + sent bytes / (bandwidth x share)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dml_dist.parallel.traffic import Kind

_MICRO = 1e-6
_PROTOCOLS = ("ll", "ll128", "simple")

# Microseconds: of the launch, and of a hop by NVLink, PCI and network.
_BASE = {"tree": (6.8, 14.0, 0.0), "ring": (6.6, 14.0, 8.4)}
_HOP = {
    ("tree", "nvlink"): (0.6, 1.25, 28.0),
    ("ring", "nvlink"): (0.6, 1.9, 3.4),
    ("tree", "pci"): (1.0, 1.9, 28.0),
    ("ring", "pci"): (1.0, 2.5, 5.7),
    ("tree", "network"): (5.0, 8.5, 28.0),
    ("ring", "network"): (2.7, 4.0, 14.0),
}
_SHARE = {"tree": (0.92 / 3.8, 0.92 * 120 / 128, 0.92), "ring": (0.25, 0.92, 1.0)}

_NETWORK_OVERHEAD = (1.0, 1.0, 3.0)
"""Microseconds at least of each step of a ring over nodes."""

_PLATEAU = 1.4
"""Factor of the latency of large all-reduces in rings over nodes with the protocol Simple."""


@dataclass(frozen=True)
class Network:
    """GPUs in nodes, and what connects them.

    Attributes:
        gpus_per_node: GPUs of a node.
        node_bandwidth: Bytes a second that a GPU sends to the others of its node.
        network_bandwidth: Bytes a second that a node sends by all its network cards.
        link: How GPUs of a node are connected.
    """

    gpus_per_node: int
    node_bandwidth: float
    network_bandwidth: float
    link: Literal["nvlink", "pci"] = "nvlink"

    def nodes(self, world_size: int) -> int:
        """Return the number of nodes of so many ranks, one on each GPU."""
        return math.ceil(world_size / self.gpus_per_node)


def collective_seconds(kind: Kind, sent: float, world_size: int, network: Network) -> float:
    """Return the seconds of one collective.

    Args:
        kind: The collective.
        sent: Bytes that a rank sends in a ring (`parallel.traffic.sent_bytes`).
        world_size: W.
        network: The network.
    """
    if world_size == 1:
        return 0.0
    algorithms = ("ring", "tree") if kind == "all_reduce" else ("ring",)
    return min(
        _latency(algorithm, i, kind, world_size, network)
        + sent / (_bandwidth(world_size, network) * _SHARE[algorithm][i])
        for algorithm in algorithms
        for i in range(len(_PROTOCOLS))
    )


def _bandwidth(world_size: int, network: Network) -> float:
    """Return the bandwidth of the slowest link of the ring; all network cards of a node add up."""
    if network.nodes(world_size) == 1:
        return network.node_bandwidth
    return min(network.node_bandwidth, network.network_bandwidth)


def _latency(algorithm: str, i: int, kind: Kind, world_size: int, network: Network) -> float:
    nodes = network.nodes(world_size)
    inside = _HOP[algorithm, network.link][i]
    between = _HOP[algorithm, "network"][i]
    base = _BASE[algorithm][i]
    if algorithm == "tree":
        hops = math.ceil(world_size / nodes) - 1
        return _MICRO * (base + 2 * (hops * inside + math.floor(math.log2(nodes)) * between))
    rounds = 2 if kind == "all_reduce" else 1
    steps = rounds * (world_size - 1)
    network_steps = 0
    if nodes > 1:
        network_steps = 2 * nodes if kind == "all_reduce" else nodes - 1
        inside = max(inside, _NETWORK_OVERHEAD[i])
    latency = base + max(0, steps - network_steps) * inside + network_steps * between
    if nodes > 1 and kind == "all_reduce" and _PROTOCOLS[i] == "simple":
        latency *= _PLATEAU
    return _MICRO * latency
