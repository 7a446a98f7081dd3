"""Importer of a CSV or parquet table with the columns path, label, split[, super_class, role]."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dml_dist.config.data import TableConfig
from dml_dist.data.datasets.expected import check_expected, expected_facts
from dml_dist.data.labels import class_text, class_texts, optional_texts
from dml_dist.data.sample import ROLES, DatasetFacts, FileSource, Sample, facts_of, make_keys
from dml_dist.data.table_file import read_table, refuse
from dml_dist.errors import DataError

REQUIRED = ("path", "label", "split")
OPTIONAL = ("super_class", "role")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableImporter:
    """Images listed in a table; messages count rows from 1, without the header."""

    config: TableConfig

    def samples(self) -> list[Sample]:
        """List the images in the order of the table.

        Raises:
            DataError: If a column, a value or an image file is missing, a role is unknown, or a
                path is listed twice.
        """
        return self._samples

    def facts(self) -> DatasetFacts:
        """Count the images of each class; without the source, return the expected counts."""
        return expected_facts(self.config) or facts_of(self._samples)

    @cached_property
    def _samples(self) -> list[Sample]:
        samples = self._listed()
        check_expected(self.config.expected, samples, self.config.source)
        return samples

    def _listed(self) -> list[Sample]:
        file = Path(os.path.abspath(self.config.source))
        table = read_table(file)
        missing = [name for name in REQUIRED if name not in table.column_names]
        unknown = [name for name in table.column_names if name not in REQUIRED + OPTIONAL]
        if missing:
            raise DataError(
                f"{file}: a table needs the columns {', '.join(REQUIRED)} and may have "
                f"{', '.join(OPTIONAL)}, got {', '.join(table.column_names)}; "
                f"add {', '.join(missing)}"
            )
        if unknown:
            _log.warning("%s: the columns %s are not used", file, ", ".join(unknown))
        columns = {name: table[name].to_pylist() for name in table.column_names}
        empty = [""] * table.num_rows
        super_classes = optional_texts(columns.get("super_class", empty))
        roles = [role.strip() or "both" for role in columns.get("role", empty)]
        for name in REQUIRED:
            bad = [row for row, value in enumerate(columns[name], 1) if not value.strip()]
            _refuse_rows(
                file, f"every row needs a {name}, but these have none", bad, columns["path"]
            )
        bad = [row for row, role in enumerate(roles, 1) if role not in ROLES]
        _refuse_rows(file, f"role must be one of {', '.join(ROLES)}", bad, roles)
        labels = _labels(file, columns["label"])
        _refuse_repeated(file, columns["path"])
        full = [os.path.join(file.parent, path) for path in columns["path"]]
        bad = [row for row, path in enumerate(full, 1) if not os.path.isfile(path)]
        _refuse_rows(file, "every path must be an image file, these do not exist", bad, full)
        return [
            Sample(key, label, split, FileSource(path, name), super_class or None, role)
            for key, label, split, path, name, super_class, role in zip(
                make_keys(columns["path"]),
                labels,
                [split.strip() for split in columns["split"]],
                full,
                columns["path"],
                super_classes,
                roles,
                strict=True,
            )
        ]


def _refuse_rows(file: Path, rule: str, rows: list[int], values: Sequence[str]) -> None:
    """Raise a DataError that names the first of the wrong rows, if there are any."""
    refuse(f"{file}: {rule}", [f"row {row}: {values[row - 1]!r}" for row in rows], "; ")


def _labels(file: Path, given: Sequence[str]) -> list[str]:
    """Return the class of each row by the label rule."""
    wrong: list[int] = []
    for row, label in enumerate(given, start=1):
        try:
            class_text(label)
        except DataError:
            wrong.append(row)
    _refuse_rows(file, "every label must name a class, these do not", wrong, given)
    return class_texts(given, str(file))


def _refuse_repeated(file: Path, paths: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for row, path in enumerate(paths, start=1):
        if first.setdefault(path, row) != row:
            raise DataError(
                f"{file}: an image may be listed only once, but {path!r} is in rows {first[path]} "
                f"and {row}; remove one (use the role `both` for a query that is also in the "
                "gallery)"
            )
