"""Metric formatting: labels, percent, durations, and the table of results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"  # noqa: RUF001 - a dash, for a missing value

_SHARES = {
    "map_at_r": "MAP@R",
    "r_precision": "R-precision",
    "nmi": "NMI",
    "nmi_geometric": "NMI, geometric mean",
    "ami": "AMI",
    "f1": "Pairwise F1",
    "pair_precision": "Pairwise precision",
    "pair_recall": "Pairwise recall",
}
_NUMBERS = {
    "density": "Embedding-space density",
    "intra_distance": "Distance inside classes",
    "inter_distance": "Distance of classes",
    "spectral_decay": "Spectral decay",
    "uniformity": "Uniformity",
}
_COUNTS = {
    "num_queries": "Queries",
    "num_gallery": "Gallery images",
    "num_lone_queries": "Images alone in their class",
    "num_clusters": "Clusters of k-means",
    "num_empty_clusters": "Empty clusters",
    "kmeans_iterations": "Iterations of k-means",
    "kmeans_seed": "Seed of k-means",
}
_RECALL = re.compile(r"recall_at_(\d+)")
_SUPER_RECALL = re.compile(r"super_class_recall_at_(\d+)")
# Metrics as other projects define them: `project.metric`.
_DEFINITION = re.compile(r"(nir|oml|mlrc)\.(\w+)")
_PROJECTS = {"nir": "NIR", "oml": "OML", "mlrc": "Musgrave et al."}


@dataclass(frozen=True)
class ResultRow:
    """One metric of the table of results, formatted.

    Attributes:
        key: Name of the metric, such as "recall_at_1".
        label: Its display name, such as "R@1".
        features: Value on the test split of the given network's features, or a dash.
        untrained: Value on the test split before training, or a dash.
        trained: Value on the test split after training, or a dash.
        validation: Value of the best validation, or a dash.
    """

    key: str
    label: str
    features: str
    untrained: str
    trained: str
    validation: str

    @property
    def is_count(self) -> bool:
        """Whether it is a count, not a score."""
        return self.key in _COUNTS


def number(value: Any) -> float | None:
    """Return a value of a record as a float; None when it is no number.

    JSON has no non-finite floats; they are stored as "nan", "inf" and "-inf".
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def is_metric(key: str) -> bool:
    """Whether a key of a record names a metric, not its step, time and so on."""
    known = key in _SHARES or key in _NUMBERS or key in _COUNTS
    return known or any(form.fullmatch(key) for form in (_RECALL, _SUPER_RECALL, _DEFINITION))


def is_share(key: str) -> bool:
    """Whether a metric is a share in [0, 1], shown in percent."""
    forms = (_RECALL, _SUPER_RECALL, _DEFINITION)
    return key in _SHARES or any(form.fullmatch(key) for form in forms)


def metric_label(key: str) -> str:
    """Return a metric's display name: R@1 for recall_at_1."""
    if match := _RECALL.fullmatch(key):
        return f"R@{match[1]}"
    if match := _SUPER_RECALL.fullmatch(key):
        return f"Super-class R@{match[1]}"
    if match := _DEFINITION.fullmatch(key):
        return f"{match[2]} as in {_PROJECTS[match[1]]}"
    return (_SHARES | _NUMBERS | _COUNTS).get(key, key.replace("_", " ").capitalize())


def format_metric(key: str, value: Any) -> str:
    """Return a metric's value as text: shares in percent, counts with thousands separators."""
    amount = number(value)
    if amount is None:
        return MISSING
    if not math.isfinite(amount):
        return "not a number" if math.isnan(amount) else "infinite"
    if is_share(key):
        return f"{100 * amount:.2f} %"
    return f"{amount:.4f}" if key in _NUMBERS else format_count(amount)


def format_count(value: float) -> str:
    """Return a number with thousands separators; four digits if it is not whole."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def format_seconds(seconds: float) -> str:
    """Return a duration as text: 0.42 s, 31 s, 4 min 12 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min {whole % 60:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def recall_key(*groups: Mapping[str, Any]) -> str | None:
    """Return the recall metric with the smallest K that any of the groups holds."""
    found = {int(match[1]) for group in groups for key in group if (match := _recall(key))}
    return f"recall_at_{min(found)}" if found else None


def result_table(
    metrics: Mapping[str, Any], validation: Mapping[str, Any] | None = None
) -> list[ResultRow]:
    """Return the table of results: recalls in rising K, other scores, then counts.

    Args:
        metrics: Content of metrics.json; its groups "features", "untrained" and "trained" are read.
        validation: Record of the best validation, if there is one.
    """
    groups = [group(metrics, name) for name in ("features", "untrained", "trained")]
    held_out = dict(validation or {})
    known = [key for key in held_out if is_metric(key)]
    return [
        ResultRow(
            key,
            metric_label(key),
            *(format_metric(key, values.get(key)) for values in (*groups, held_out)),
        )
        for key in _in_order([*(key for values in groups for key in values), *known])
    ]


def filled_columns(table: Sequence[ResultRow]) -> list[tuple[str, str]]:
    """Return heading and field of the columns of the table of results that have a value."""
    every = [
        *(("features", "features"), ("untrained", "untrained"), ("trained", "trained")),
        ("best validation", "validation"),
    ]
    return [
        (heading, field)
        for heading, field in every
        if any(getattr(row, field) != MISSING for row in table)
    ]


def group(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the numbers of one group of metrics.json, none when it is missing."""
    values = metrics.get(name)
    if not isinstance(values, Mapping):
        return {}
    return {key: value for key, value in values.items() if number(value) is not None}


def _recall(key: str) -> re.Match[str] | None:
    return _RECALL.fullmatch(key)


def _in_order(keys: Iterable[str]) -> list[str]:
    def place(key: str) -> tuple[int, int, str]:
        if match := _recall(key):
            return 0, int(match[1]), key
        if key in ("map_at_r", "r_precision"):
            return 1, list(_SHARES).index(key), key
        if match := _SUPER_RECALL.fullmatch(key):
            return 2, int(match[1]), key
        for place, names in ((3, _SHARES), (4, _NUMBERS), (7, _COUNTS)):
            if key in names:
                return place, list(names).index(key), key
        return 5 if _DEFINITION.fullmatch(key) else 6, 0, key

    return sorted(set(keys), key=place)
