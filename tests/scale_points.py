"""Points of made-up scaling studies, from formulas that are written down here alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dml_dist.studies.scale.points import ScalePoint

PARAMETERS = 110_000
"""Of the network."""


def point_of(
    world_size: int = 1,
    num_classes: int = 1000,
    global_batch_size: int = 64,
    proxies: Any = "sharded",
    **changes: Any,
) -> ScalePoint:
    """Return a measured point of a machine with two processors.

    A rank's forward pass takes 0.3 ms a row and its backward pass 0.6 ms; a float of the proxies
    it owns 20 ns in the optimiser and an eighth of that for each row of the batch; the network
    moves 500 MB/s. More than two ranks share the processors.
    """
    dim, ranks, share = 64, world_size, max(1.0, world_size / 2)
    rows = global_batch_size / ranks
    owned = -(-num_classes // ranks) if proxies == "sharded" else num_classes
    state = 4.0 * owned * dim
    gathered = 4.0 * rows * dim * (ranks - 1)
    reduced = 2.0 * (ranks - 1) / ranks * 4.0 * PARAMETERS
    proxy_traffic = 2.0 * (ranks - 1) / ranks * state if proxies == "replicated" else 0.0
    sent = 2 * gathered + reduced + proxy_traffic
    spans = {
        "data": 0.0004,
        "forward": 0.0003 * rows * share,
        "wait": 0.0002 * (ranks - 1),
        "gather": 0.0001 * (ranks - 1) + gathered / 5e8,
        "objective": 0.001 + 2e-11 * owned * dim * global_batch_size * share,
        "backward": 0.0006 * rows * share + 4e-11 * owned * dim * global_batch_size * share,
        "reduction": (reduced + proxy_traffic) / 5e8,
        "optimizer": 0.0005 + 5e-9 * owned * dim,
    }
    step = sum(spans.values()) * 1.02
    speed = global_batch_size / step
    memory = 5 * state + 2 * 4.0 * global_batch_size * min(owned, 16384)
    values: dict[str, Any] = {
        "name": f"w{ranks}-c{num_classes}-b{global_batch_size}-{proxies}",
        "world_size": ranks,
        "num_classes": num_classes,
        "embedding_size": dim,
        "global_batch_size": global_batch_size,
        "backbone": "conv4-32",
        "image_size": 28,
        "proxies": proxies,
        "status": "measured",
        "tries": 1,
        "oversubscribed": ranks > 2,
        "processors": 2,
        "threads": 1,
        "load": 0.1,
        "steps": 20,
        "repetitions": 3,
        "images_per_second": speed,
        "images_per_second_low": 0.97 * speed,
        "images_per_second_high": 1.02 * speed,
        "seconds_step": step,
        **{f"seconds_{name}": seconds for name, seconds in spans.items()},
        "sent_predicted": sent,
        "sent_counted": 1.02 * sent + 500 * (ranks - 1),
        "memory_predicted": memory,
        "memory_measured": memory + 8e6 + 2e4 * rows,
        "gradient_bytes": 4.0 * PARAMETERS,
        "owned_rows": owned,
        "images_seen": 6400,
        "recall_at_1": 0.41 + 0.001 * ranks,
        "loss_difference": 3e-7 * (ranks - 1),
    }
    return ScalePoint(**{**values, **changes})


def without_numbers(point: ScalePoint, status: Any, problem: str = "") -> ScalePoint:
    """Return the point as it is when it failed, was refused or waits; its estimates stay."""
    return ScalePoint(
        **{name: getattr(point, name) for name in SIZE_FIELDS},
        status=status,
        problem=problem,
        sent_predicted=point.sent_predicted,
        memory_predicted=point.memory_predicted,
    )


SIZE_FIELDS = (
    *("name", "world_size", "num_classes", "embedding_size", "global_batch_size", "backbone"),
    *("image_size", "proxies", "loader_workers", "tar_shards", "remote"),
)


def full_study() -> list[ScalePoint]:
    """Return ranks (weak and strong) x classes x proxies, and a loader study."""
    points = [
        point_of(ranks, classes, batch, proxies)
        for proxies in ("sharded", "replicated")
        for classes in (1000, 10_000, 100_000, 1_000_000)
        for ranks, batch in ((1, 64), (2, 64), (2, 128), (4, 64), (4, 256))
    ]
    loaders = [
        point_of(
            2,
            name=f"tar{shards}-{'remote' if remote else 'local'}",
            tar_shards=shards,
            remote=remote,
            loader_workers=2,
            images_per_second=900 - 300 * remote + 40 * shards**0.5,
            images_per_second_low=850 - 300 * remote,
            images_per_second_high=950 - 300 * remote + 40 * shards**0.5,
        )
        for remote in (False, True)
        for shards in (1, 10, 100)
    ]
    return [*points, *loaders]


def troubled_study() -> list[ScalePoint]:
    """Return few points: measured, noisy, oversubscribed, failed, refused and waiting ones."""
    points = [
        point_of(ranks, classes, 32 * ranks, proxies)
        for proxies in ("sharded", "replicated")
        for classes in (1000, 100_000)
        for ranks in (1, 2, 4)
    ]
    by_name = {point.name: point for point in points}
    noisy = by_name["w2-c1000-b64-sharded"]
    failed = by_name["w2-c100000-b64-replicated"]
    refused = by_name["w4-c100000-b128-replicated"]
    waiting = by_name["w4-c100000-b128-sharded"]
    by_name[noisy.name] = replace(noisy, noisy=True, tries=3, load=2.4)
    by_name[failed.name] = without_numbers(
        failed, "failed", 'rank 1 ended with exit code 1: <script>alert("x")</script>'
    )
    by_name[refused.name] = without_numbers(
        refused, "refused", "it needs 9.1 GB of memory for 4 ranks, and the machine has 8.0 GB"
    )
    by_name[waiting.name] = without_numbers(waiting, "waiting")
    return list(by_name.values())


def class_sweep() -> list[ScalePoint]:
    """Return one rank with five numbers of classes."""
    return [point_of(1, classes) for classes in (1000, 10_000, 50_000, 200_000, 1_000_000)]


STUDIES: dict[str, Sequence[ScalePoint]] = {
    "full": full_study(),
    "troubled": troubled_study(),
    "sweep": class_sweep(),
}
