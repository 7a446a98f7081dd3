"""Published results that are comparable to a comparison: those of its own protocol."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dml_dist.config.base import Section
from dml_dist.config.data import OfficialSection
from dml_dist.config.schema import NoValidationConfig, RunConfig
from dml_dist.config.yaml_text import read_text, read_yaml
from dml_dist.errors import ConfigError

Protocol = Literal["paper", "best_on_test", "fixed_epochs", "mlrc_128", "mlrc_512"]
Percent = Annotated[float, Field(ge=0, le=100)]


class ReferenceRow(Section):
    """A published result, in percent."""

    method: str
    """Name of the method."""

    dataset: str
    """Name of the data set, as in `data.dataset.name`."""

    backbone: str
    """Name of the network, as in `model.backbone.name`; some are not ours."""

    embedding_size: Annotated[int, Field(ge=1)]
    """Number of coordinates of an embedding."""

    protocol: Protocol
    """Protocol of the result: only results of the same protocol are comparable."""

    recall: Annotated[dict[str, Percent], Field(min_length=1)]
    """K and Recall@K."""

    map_at_r: Percent | None = None
    """MAP@R."""

    nmi: Percent | None = None
    """NMI."""

    verified: bool
    """Whether it was checked in the source; else a third party quotes it."""

    source: Annotated[str, Field(min_length=1)]
    """Paper and table."""


class References(Section):
    """The file of published results."""

    protocols: dict[str, str]
    """Protocol and its description."""

    rows: tuple[ReferenceRow, ...]
    """The results."""


@dataclass(frozen=True)
class Published:
    """Published results that are comparable to a comparison.

    Attributes:
        rows: Rows of the same data set, network, embedding size and protocol.
        protocols: Their protocols, each with a description.
        reason: Why there are none, or how many others there are; a sentence.
    """

    rows: tuple[ReferenceRow, ...] = ()
    protocols: tuple[tuple[str, str], ...] = ()
    reason: str = ""


def read_references(path: Path) -> References:
    """Read a file of published rows.

    Raises:
        ConfigError: If it has another form.
    """
    value = read_yaml(read_text(path), str(path)).value
    try:
        found = References.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a file of published results, with protocols and rows: {error}; "
            "configs/references.yaml is an example"
        ) from None
    if unknown := {row.protocol for row in found.rows} - set(found.protocols):
        raise ConfigError(
            f"protocols without a description in {path}: {', '.join(sorted(unknown))}; add a "
            "sentence on each to its section protocols"
        )
    return found


def own_protocols(config: RunConfig) -> tuple[str, ...]:
    """Return the protocols that the runs of a configuration follow."""
    dataset = config.data.dataset
    if not isinstance(dataset, OfficialSection) or dataset.allow_partial:
        return ()
    if not isinstance(config.validation, NoValidationConfig):
        return ()
    watched = config.evaluation.evaluate_test_every is not None
    return ("fixed_epochs", "best_on_test") if watched else ("fixed_epochs",)


def find_published(config: RunConfig, path: Path) -> Published:
    """Return the published rows that are comparable to the runs of a configuration.

    Raises:
        ConfigError: If the file has another form.
    """
    dataset = config.data.dataset
    if dataset is None or not isinstance(dataset, OfficialSection):
        return Published(reason="There are no published results for this data set and split.")
    if not path.is_file():
        return Published(reason="There was no file of published results when the comparison began.")
    table = read_references(path)
    rows = [row for row in table.rows if row.dataset == dataset.name]
    mine = own_protocols(config)
    same = [
        row
        for row in rows
        if row.backbone == config.model.backbone.name
        and row.embedding_size == config.model.embedding_size
        and row.protocol in mine
    ]
    names = dict.fromkeys(row.protocol for row in same)
    return Published(
        rows=tuple(same),
        protocols=tuple((name, table.protocols[name]) for name in names),
        reason=_reason(config, mine, len(rows), len(same)),
    )


def _reason(config: RunConfig, mine: tuple[str, ...], num_rows: int, num_same: int) -> str:
    if num_same == num_rows:
        return ""
    text = (
        f"{num_rows - num_same} published results on this data set are not shown: they have "
        "another network, embedding size or protocol."
    )
    if not mine:
        why = (
            "the split was not complete"
            if isinstance(config.data.dataset, OfficialSection)
            and config.data.dataset.allow_partial
            else "the runs hold out training classes for validation, unlike all published results"
        )
        text += f" None is comparable: {why}."
    return text
