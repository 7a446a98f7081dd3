"""Scales of searched values: ticks, and values at an end of their range."""

from __future__ import annotations

import pytest

from dml_dist.config.search_space import FloatDistributionConfig, IntDistributionConfig
from dml_dist.studies.tune_axes import ticks_of
from dml_dist.studies.tune_read import Scale, edge_of


@pytest.mark.parametrize(
    ("low", "high", "log", "value", "edge"),
    [
        (0.0, 1.0, False, 0.02, "low"),
        (0.0, 1.0, False, 0.021, None),
        (0.0, 1.0, False, 0.98, "high"),
        (0.0, 1.0, False, 0.5, None),
        # 2 % of four decades is a factor of 10^0.08 = 1.202.
        (1e-4, 1.0, True, 1.20e-4, "low"),
        (1e-4, 1.0, True, 1.21e-4, None),
        (1e-4, 1.0, True, 1 / 1.20, "high"),
        (1e-4, 1.0, True, 1 / 1.21, None),
        (3.0, 3.0, False, 3.0, None),
    ],
)
def test_edges(low: float, high: float, log: bool, value: float, edge: str | None) -> None:
    distribution = FloatDistributionConfig(type="float", low=low, high=high, log=log)
    assert edge_of(distribution, value) == edge


def test_edges_of_integers() -> None:
    distribution = IntDistributionConfig(type="int", low=16, high=64, step=16)
    assert [edge_of(distribution, value) for value in (16, 32, 64)] == ["low", None, "high"]


@pytest.mark.parametrize(
    ("scale", "texts"),
    [
        (Scale("x", 1e-4, 1e-1, log=True), ["0.0001", "0.001", "0.01", "0.1"]),
        (Scale("x", 2e-4, 3e-3, log=True), ["0.0002", "0.0005", "0.001", "0.002"]),
        (Scale("x", 0.3, 0.6, log=True), ["0.3", "0.4", "0.5", "0.6"]),
        (Scale("x", 1e-9, 1.0, log=True), ["1e-09", "1e-07", "1e-05", "0.001", "0.1"]),
        (Scale("x", 0.0, 1.0), ["0", "0.25", "0.5", "0.75", "1"]),
        (Scale("x", choices=(None, "a$b$", "x" * 30)), ["null", r"a\$b\$", "x" * 15 + "…"]),
    ],
)
def test_ticks(scale: Scale, texts: list[str]) -> None:
    assert [text for _, text in ticks_of(scale)] == texts
