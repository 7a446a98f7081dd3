"""The model's part of a scaling study's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dml_dist.studies.scale.model_figures import Forecast, Pair, PeerMemory
from dml_dist.studies.scale.point_tables import Table
from dml_dist.studies.scale.points import ScalePoint


@dataclass(frozen=True)
class ModelPart:
    notes: list[str]
    pairs: list[Pair]
    residuals: Table
    forecasts: list[Forecast]
    forecast_text: str
    forecast_notes: list[str]


def model_part(points: Sequence[ScalePoint]) -> ModelPart | None:
    return None


def check_table() -> Table:
    return [], []


def peer_memory() -> list[PeerMemory]:
    return []
