"""What a run's folder tells beyond its records: results of classes, embeddings, proxies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from dml_dist.errors import DataError
from dml_dist.report.classes import ClassResults, draw_classes, read_class_results
from dml_dist.report.figures import Picture
from dml_dist.report.formatting import format_metric
from dml_dist.report.proxy_diagnostics import ProxyFacts, draw_proxies, read_proxy_facts
from dml_dist.report.space import draw_space, read_space
from dml_dist.report.summary import RunSummary

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ClassRow:
    """A class of the list of the weakest, ready to be shown."""

    name: str
    super_class: str | None
    num_images: int
    recall_at_1: str
    map_at_r: str


@dataclass(frozen=True, eq=False)
class Insights:
    """Figures and lists of the page beside curves and galleries.

    Attributes:
        class_picture: How R@1 is distributed over the classes; None without results.
        weakest: The classes with the lowest R@1, the weakest first.
        space: Maps of the embeddings and their distances.
        proxy_pictures: Lengths and similarities of proxies.
        proxies: What was found out about them; None without.
        damaged: What could not be read, one sentence each.
    """

    class_picture: Picture | None
    weakest: list[ClassRow]
    space: list[Picture]
    proxy_pictures: list[Picture]
    proxies: ProxyFacts | None
    damaged: tuple[str, ...]

    @property
    def pictures(self) -> list[Picture]:
        """All figures."""
        classes = [] if self.class_picture is None else [self.class_picture]
        return [*classes, *self.space, *self.proxy_pictures]


def find_insights(summary: RunSummary) -> Insights:
    """Read and draw what a run's folder holds; what is missing or damaged is left out."""
    damaged: list[str] = []

    def read(reader: Callable[[Path], _Value | None]) -> _Value | None:
        try:
            return reader(summary.folder)
        except DataError as error:
            damaged.append(str(error))
            return None

    results = read(read_class_results)
    if results is not None and not len(results):
        results = None
    distance = _distance(summary.config)
    space = read(lambda folder: read_space(folder, distance))
    facts = read(read_proxy_facts)
    seed = summary.info.seed
    return Insights(
        class_picture=None if results is None else draw_classes(results),
        weakest=[] if results is None else _weakest(results),
        space=[] if space is None else list(draw_space(space, results, seed)),
        proxy_pictures=[] if facts is None else draw_proxies(facts),
        proxies=facts,
        damaged=tuple(damaged),
    )


def _weakest(results: ClassResults) -> list[ClassRow]:
    return [
        ClassRow(
            results.names[at],
            results.super_classes[at],
            int(results.num_images[at]),
            format_metric("recall_at_1", float(results.recall_at_1[at])),
            format_metric("map_at_r", float(results.map_at_r[at])),
        )
        for at in results.weakest()
    ]


def _distance(config: str | None) -> Literal["cosine", "euclidean"]:
    """Return what a run's configuration compares embeddings by; cosine when it does not tell."""
    try:
        values = yaml.safe_load(config or "")
        euclidean = values["evaluation"]["distance"] == "euclidean"
    except (yaml.YAMLError, KeyError, TypeError):
        return "cosine"
    return "euclidean" if euclidean else "cosine"
