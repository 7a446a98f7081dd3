"""The model against numbers that others published."""

from __future__ import annotations

import pytest

from dml_dist.studies.scale.cluster import exposed_seconds
from dml_dist.studies.scale.published import Check, checks, insightface_points, published


@pytest.fixture(scope="module")
def found() -> list[Check]:
    return list(checks())


def only(found: list[Check], *texts: str) -> list[Check]:
    return [check for check in found if all(text in f"{check}" for text in texts)]


def test_every_number_has_a_source() -> None:
    rows = published()
    assert len(rows) == 48
    assert all(row.source and row.unit and row.value > 0 for row in rows)


def test_speed_of_sharded_proxies_is_predicted_from_fewer_classes(found: list[Check]) -> None:
    (check,) = only(found, "model parallel", "images/s")
    assert check.published == 1389
    assert check.basis == "fitted to the points of 125,000, 1,400,000 classes"
    assert check.low == check.high
    assert check.error == pytest.approx(100 * (check.low / 1389 - 1))
    assert abs(check.error) < 5
    # The line through both points: 0.2 % too fast.
    assert check.error == pytest.approx(0.2, abs=0.1)


def test_memory_of_sharded_proxies_is_predicted_from_fewer_classes(found: list[Check]) -> None:
    (check,) = only(found, "model parallel", "MB a GPU")
    assert check.published == 32188
    assert abs(check.error) < 10
    assert check.error == pytest.approx(-6.6, abs=0.1)


def test_memory_of_sampled_proxies_is_predicted_up_to_29_million_classes(
    found: list[Check],
) -> None:
    pair = only(found, "partial fc 0.1", "MB a GPU")
    assert [check.published for check in pair] == [19950, 32324]
    assert all("8,000,000 classes" in check.basis for check in pair)
    assert all(abs(check.error) < 2 for check in pair)


def test_efficiency_over_nodes_is_near_the_bracket(found: list[Check]) -> None:
    efficiencies = only(found, "percent of perfect scaling")
    sources = {check.source for check in efficiencies}
    assert len(efficiencies) == 11
    assert {source.split()[0] for source in sources} == {"DLPerf", "Horovod", "Goyal"}
    for check in efficiencies:
        assert 0 < check.low < check.high <= 100
        assert check.width == check.high - check.low
        outside = max(check.low - check.published, check.published - check.high, 0)
        assert abs(check.error) == pytest.approx(outside)
        assert outside < 15
        print(f"{check.setup}: {check.published:.1f} in {check.low:.1f} to {check.high:.1f}")
    # An unstated network is assumed, and said to be.
    assert all(
        "assumed" in check.basis for check in efficiencies if check.source.startswith("DLPerf")
    )


def test_a_network_with_more_parameters_scales_worse(found: list[Check]) -> None:
    """VGG-16 sends 553 MB where Inception V3 sends 95 MB, over 25 Gb/s."""
    (vgg,) = only(found, "VGG-16, 512")
    (inception,) = only(found, "Inception V3, 512")
    # 64 images at 154 a second, and 2 x 553 MB x 511 / 512 at 3.125 GB/s, hidden by 2/3 at best.
    step, reduction = 64 / 154, 2 * 553e6 / 3.125e9
    assert vgg.low == pytest.approx(100 * step / (step + reduction), abs=2)
    assert vgg.high == pytest.approx(100 * step / (step / 3 + reduction), abs=2)
    assert vgg.width > 2 * inception.width


def test_reduction_is_hidden_only_as_far_as_the_backward_pass_lasts() -> None:
    assert exposed_seconds(0.3, 0.2) == pytest.approx((0.1, 0.3))
    assert exposed_seconds(0.1, 0.2) == (0.0, 0.1)


def test_a_check_that_is_beyond_its_tolerance_fails() -> None:
    check = Check("source", "setup", "metric", 100, 120, 120, 20.0, 15.0, "basis")
    assert not check.passed


def test_all_checks_pass(found: list[Check]) -> None:
    assert [check for check in found if not check.passed] == []


def test_published_points_are_points_of_a_study() -> None:
    points = insightface_points("partial fc 0.1", most_classes=8_000_000)
    assert [point.num_classes for point in points] == [125_000, 1_400_000, 5_500_000, 8_000_000]
    assert points[0].seconds_step == pytest.approx(1024 / 5004)
    assert points[0].memory_measured == 4868e6
