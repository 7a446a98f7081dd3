"""The model of a scaling study: what it fits, what it predicts, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from dml_dist.errors import ConfigError
from dml_dist.studies.scale.estimate import Method
from dml_dist.studies.scale.model import (
    DEFAULT_ERROR,
    CostModel,
    Residual,
    fit,
    memory_terms,
    predict,
    time_terms,
)
from dml_dist.studies.scale.points import ScalePoint

METHOD = Method()
SECONDS = {
    "fixed": 0.004,
    "images": 1e-3,
    "products": 2e-10,
    "state": 3e-10,
    "collectives": 2e-4,
    "sent": 1e-9,
    "gradients": 2e-9,
}
BYTES = {"fixed": 50e6, "images": 2e6, "state": 1.1, "logits": 1.5, "batch": 1.0}


def sized(
    world_size: int = 1, num_classes: int = 10_000, width: int = 64, batch: int = 64
) -> ScalePoint:
    return ScalePoint(
        name=f"{world_size}-{num_classes}-{width}-{batch}",
        world_size=world_size,
        num_classes=num_classes,
        embedding_size=width,
        global_batch_size=batch,
        backbone="conv4-32",
        image_size=28,
        processors=2,
        gradient_bytes=200_000.0,
    )


def measured(point: ScalePoint, factor: float = 1.0) -> ScalePoint:
    """Return the point as a machine with exactly the coefficients above would measure it."""
    times, sizes = time_terms(point, METHOD), memory_terms(point, METHOD)
    return replace(
        point,
        status="measured",
        seconds_step=factor * sum(SECONDS[name] * term for name, term in times.items()),
        memory_measured=factor * sum(BYTES[name] * term for name, term in sizes.items()),
    )


GRID = [
    measured(sized(ranks, classes, width, batch))
    for ranks in (1, 2)
    for classes in (1_000, 30_000, 1_000_000)
    for width, batch in ((64, 64), (128, 64), (64, 256))
]


def bracket_holds(model: CostModel, point: ScalePoint) -> bool:
    found = predict(model, point)
    return found.seconds_low <= point.seconds_step <= found.seconds_high


def test_points_that_were_held_out_are_predicted() -> None:
    model = fit(GRID)
    assert len(model.points) == 12
    held = {residual.name for residual in model.residuals}
    assert len(held) == 6
    assert held.isdisjoint(point.name for point in model.points)
    assert {residual.metric for residual in model.residuals} == {"seconds", "memory"}
    assert max(abs(residual.error) for residual in model.residuals) < 0.01
    point = measured(sized(2, 2_000_000, 128, 128))
    found = predict(model, point)
    assert found.seconds == pytest.approx(point.seconds_step, rel=0.01)
    assert found.memory == pytest.approx(point.memory_measured, rel=0.01)
    assert sum(found.limits.values()) == pytest.approx(found.seconds)
    assert not found.marked


def test_the_order_of_points_does_not_matter() -> None:
    point = sized(2, 2_000_000)
    assert predict(fit(GRID), point) == predict(fit(GRID[::-1]), point)


def test_a_model_is_as_sure_as_its_residuals() -> None:
    names = sorted(point.name for point in GRID)
    noisy = [
        measured(replace(point, status="waiting"), 1.3 if names.index(point.name) % 2 else 0.8)
        for point in GRID
    ]
    exact, rough = fit(GRID), fit(noisy)
    assert rough.error("seconds") > 5 * exact.error("seconds")
    worst = max(abs(r.error) for r in rough.residuals if r.metric == "seconds")
    assert rough.error("seconds") == worst
    found = predict(rough, sized(2, 30_000))
    assert found.seconds_high / found.seconds_low >= (1 + worst) ** 2 * 0.999


def test_residual_is_relative_to_what_was_measured() -> None:
    assert Residual("a", "seconds", measured=2.0, predicted=1.5).error == pytest.approx(-0.25)


def test_with_few_points_each_is_held_out_in_turn() -> None:
    few = GRID[:5]
    model = fit(few)
    assert len(model.points) == 5
    # All but those with the smallest or largest size of their kind.
    assert 0 < len({residual.name for residual in model.residuals}) < 5
    fewer = fit(GRID[:3])
    assert fewer.residuals == ()
    assert fewer.error("seconds") == DEFAULT_ERROR


def test_what_points_cannot_tell_apart_widens_the_bracket() -> None:
    """A study of classes alone does not say what of the fixed time is that of images."""
    model = fit([measured(sized(num_classes=classes)) for classes in (1_000, 30_000, 1_000_000)])
    inside = predict(model, sized(num_classes=100_000))
    assert inside.seconds_high / inside.seconds_low < 1.25
    doubled = measured(sized(num_classes=100_000, batch=128))
    found = predict(model, doubled)
    assert bracket_holds(model, doubled)
    # From "nothing grows with the batch" to "all of it does".
    assert found.seconds_high / found.seconds_low > 1.8


def test_communication_that_was_not_measured_is_marked() -> None:
    alone = [point for point in GRID if point.world_size == 1]
    found = predict(fit(alone), sized(2))
    assert any("collectives, sent, gradients" in mark for mark in found.marked)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ({"world_size": 16, "global_batch_size": 128}, "world_size"),
        ({"num_classes": 8_000_000}, "num_classes"),
        ({"embedding_size": 1024}, "embedding_size"),
        ({"global_batch_size": 2048}, "global_batch_size"),
        ({"global_batch_size": 8}, "global_batch_size"),
    ],
)
def test_extrapolation_beyond_four_times_is_widened_and_marked(
    size: dict[str, int], name: str
) -> None:
    model = fit(GRID)
    found = predict(model, replace(sized(2), **size))
    marks = [mark for mark in found.marked if mark.startswith(name)]
    assert len(marks) == 1
    assert "8 times" in marks[0]
    error = model.error("seconds")
    assert found.seconds_high >= found.seconds * (1 + 1.5 * error) * 0.999


def test_extrapolation_up_to_four_times_is_not_marked() -> None:
    assert predict(fit(GRID), sized(2, num_classes=4_000_000, width=512, batch=1024)).marked == ()


def test_ranks_that_share_processors_are_marked() -> None:
    found = predict(fit(GRID), sized(4))
    assert found.marked == ("4 ranks share 2 processors: they wait for each other.",)


def test_another_backbone_is_marked() -> None:
    found = predict(fit(GRID), replace(sized(), backbone="resnet50"))
    assert found.marked == ("The points are of conv4-32, not of resnet50.",)


def test_unquiet_points_and_those_of_another_kind_are_left_out() -> None:
    others = [
        replace(GRID[0], name="noisy", noisy=True, seconds_step=99.0),
        replace(GRID[0], name="shared", oversubscribed=True, seconds_step=99.0),
        replace(GRID[0], name="remote", remote=True, seconds_step=99.0),
        replace(GRID[0], name="failed", status="failed", seconds_step=math.nan),
    ]
    model = fit([*others, *GRID])
    assert set(model.left_out) == {"noisy", "shared", "remote"}
    assert predict(model, sized()) == predict(fit(GRID), sized())


@pytest.mark.parametrize("points", [[], GRID[:1], [replace(GRID[0], status="failed")] * 3])
def test_too_few_points_are_refused(points: Sequence[ScalePoint]) -> None:
    with pytest.raises(ConfigError, match="at least two measured points"):
        fit(points)


def test_memory_may_be_unknown() -> None:
    found = predict(fit([replace(p, memory_measured=math.nan) for p in GRID]), sized())
    assert math.isnan(found.memory)
    assert found.seconds > 0
