"""Costs of a point of a scaling study from its sizes, and NCCL's model of collectives."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dml_dist.config.model import Conv4Config, ModelConfig, ResNetConfig, TimmConfig
from dml_dist.config.objective import AdamConfig, ProxyNCAConfig
from dml_dist.errors import TopologyError
from dml_dist.studies.scale.estimate import (
    Method,
    backbone_flops,
    backbone_name,
    estimate,
    network_gradient_bytes,
)
from dml_dist.studies.scale.hardware import PRESETS
from dml_dist.studies.scale.nccl import Network, collective_seconds
from dml_dist.studies.scale.points import ScalePoint

POINT = ScalePoint(
    name="point",
    world_size=4,
    num_classes=1001,
    embedding_size=64,
    global_batch_size=32,
    backbone="conv4-32",
    image_size=28,
    gradient_bytes=1000.0,
    processors=2,
)
ADAM = Method(ProxyNCAConfig(), state_slots=2)


def test_a_rank_has_its_share_of_the_proxies_with_gradient_and_moments() -> None:
    costs = estimate(POINT, ADAM)
    assert costs.owned_rows == 251  # The largest of 250, 250, 250 and 251.
    assert costs.state_bytes == 251 * 64 * 4 * 4
    assert estimate(POINT, Method(ProxyNCAConfig(), state_slots=0)).state_bytes == 251 * 64 * 4 * 2
    assert costs.products == 32 * 251 * 64
    assert costs.batch_bytes == 32 * (64 * 4 + 8)
    assert costs.network_bytes == 4000


def test_sharded_traffic_does_not_grow_with_classes_and_replicated_traffic_does() -> None:
    many = replace(POINT, num_classes=100_100)
    sharded = [estimate(point, ADAM).objective.total for point in (POINT, many)]
    assert sharded[0] == sharded[1]
    # Labels and embeddings of 8 rows to 3 others, and their gradient, sum and maximum of rows.
    by_kind = estimate(POINT, ADAM).objective.by_kind()
    assert by_kind["all_gather"] == 3 * 8 * (8 + 64 * 4)
    assert by_kind["reduce_scatter"] == 3 * 8 * 64 * 4
    replicated = estimate(replace(POINT, proxies="replicated"), ADAM)
    table = 1001 * 64 * 4
    assert replicated.owned_rows == 1001
    assert replicated.state_bytes == table * 4
    assert replicated.objective.by_kind()["all_reduce"] == 2 * 3 * table // 4 + 2 * 3
    # The arithmetic is the same: fewer rows against more classes.
    assert replicated.products == 8 * 1001 * 64


def test_bytes_of_ddp_are_those_of_a_ring() -> None:
    assert estimate(POINT, ADAM).gradients.total == 2 * 3 * 1000 // 4
    alone = estimate(replace(POINT, world_size=1), ADAM)
    assert alone.sent_bytes == 0


def test_logits_are_bounded_by_their_chunk() -> None:
    wide = replace(POINT, world_size=1, num_classes=10_000_000, device="cuda")
    costs = estimate(wide, ADAM)
    assert costs.logits_bytes <= 64 * 2**20
    assert costs.state_bytes > 100 * costs.logits_bytes
    few = estimate(replace(wide, num_classes=100), ADAM)
    assert few.logits_bytes == (101 * 32 + 100 * 64) * 4


def test_class_weights_do_not_hinder_an_estimate() -> None:
    loss = ProxyNCAConfig(class_weighting="inverse_frequency")
    method = Method.of(SimpleNamespace(loss=loss, optim=AdamConfig()))  # type: ignore[arg-type]
    assert estimate(POINT, method).owned_rows == 251


def test_more_ranks_than_proxies_are_refused() -> None:
    with pytest.raises(TopologyError, match="at most 3 ranks"):
        estimate(replace(POINT, num_classes=3), ADAM)


def test_guessed_time_grows_with_ranks_that_share_processors() -> None:
    alone = estimate(replace(POINT, world_size=1), ADAM).seconds_guess
    assert alone == pytest.approx(estimate(POINT, ADAM).seconds_guess, rel=0.01)
    doubled = replace(POINT, world_size=8, global_batch_size=64)
    assert estimate(doubled, ADAM).seconds_guess > 1.9 * alone
    one_thread = replace(POINT, world_size=1, threads=1)
    assert estimate(one_thread, ADAM).seconds_guess == pytest.approx(2 * alone, rel=0.05)


def test_guessed_time_grows_with_the_operations_of_the_backbone() -> None:
    resnet = ModelConfig(backbone=ResNetConfig(name="resnet18", norm="group"))
    flops = backbone_flops(resnet, 224)
    assert flops == pytest.approx(2 * 1.814e9, rel=0.01)  # torchvision's table: 1.81 GMACs.
    assert backbone_flops(resnet, 112) == pytest.approx(flops / 4, rel=0.1)
    assert backbone_flops(resnet, 0) == 0  # A transform of the user's own.
    guess = estimate(POINT, ADAM, flops).seconds_guess
    assert estimate(POINT, ADAM, 2 * flops).seconds_guess == pytest.approx(2 * guess, rel=0.01)


def test_backbones_are_told_apart_and_their_gradients_counted() -> None:
    assert backbone_name(Conv4Config(width=32)) == "conv4-32"
    assert backbone_name(TimmConfig(model="tf_efficientnet_lite0")) == "tf_efficientnet_lite0"
    config = ModelConfig(backbone=ResNetConfig(name="resnet18", norm="group"), embedding_size=64)
    # torchvision's 11,689,512 without the classifier's 513,000, with a head of 512 x 64 + 64.
    assert network_gradient_bytes(config) == 4 * (11_689_512 - 513_000 + 512 * 64 + 64)


# ---------------------------------------------------------------- NCCL

NETWORK = Network(gpus_per_node=8, node_bandwidth=100e9, network_bandwidth=10e9)


def test_large_collectives_take_bytes_over_bandwidth() -> None:
    inside = collective_seconds("all_reduce", 1e10, 8, NETWORK)
    assert inside == pytest.approx(0.1, rel=0.01)
    over_nodes = collective_seconds("all_reduce", 1e10, 16, NETWORK)
    assert over_nodes == pytest.approx(1.0, rel=0.01)
    assert collective_seconds("all_gather", 1e10, 1, NETWORK) == 0.0


def test_small_collectives_take_the_lowest_latency() -> None:
    # A ring with the protocol LL: 6.6 us, and 7 hops of 0.6 us.
    assert collective_seconds("all_gather", 0, 8, NETWORK) == pytest.approx(10.8e-6)
    # A tree with LL: 6.8 us, and twice 7 hops of 0.6 us and log2(64) of 5 us.
    assert collective_seconds("all_reduce", 0, 512, NETWORK) == pytest.approx(75.2e-6)


def test_more_bytes_and_more_ranks_are_never_faster() -> None:
    sizes = [10.0**power for power in range(12)]
    seconds = [collective_seconds("all_reduce", size, 64, NETWORK) for size in sizes]
    assert seconds == sorted(seconds)
    ranks = [collective_seconds("all_gather", 1e6, 2**power, NETWORK) for power in range(11)]
    assert ranks == sorted(ranks)


def test_presets_are_in_bytes_a_second() -> None:
    h100 = PRESETS["h100-nvlink-400g"]
    assert h100.network.network_bandwidth == 400e9  # 8 cards of 50 GB/s.
    assert h100.network.nodes(1024) == 128
    assert math.isclose(PRESETS["a100-100g-ethernet"].network.network_bandwidth, 12.5e9)
