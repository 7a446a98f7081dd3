"""Parts of a page that fail by themselves: the page names them, and the rest is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dml_dist.errors import DataError

_Value = TypeVar("_Value")

logger = logging.getLogger(__name__)


class Parts:
    """Makes the parts of a page.

    Attributes:
        failed: What failed and why, one sentence each.
        missing: Names of parts that the folder does not hold.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.missing: list[str] = []

    def make(self, name: str, function: Callable[[], _Value], default: Any) -> _Value:
        """Return a part; the default if it fails, whatever the error: results are unusual."""
        try:
            return function()
        except DataError as error:
            self.failed.append(str(error))
        except Exception as error:  # A drawing must not end a run that has finished.
            text = f"The part {name!r} failed: {type(error).__name__}: {error}."
            logger.warning("report: %s", text)
            self.failed.append(text)
        return default

    def read(self, name: str, function: Callable[[], _Value | None]) -> _Value | None:
        """Return a part of the folder; None when it fails or is missing, which is noted."""
        before = len(self.failed)
        value = self.make(name, function, None)
        if value is None and len(self.failed) == before:
            self.missing.append(name)
        return value


def try_to_write(write: Callable[[Path], Path], folder: Path) -> Path | None:
    """Write the page of a folder; None if that fails, with a warning, as its results are whole."""
    try:
        return write(folder)
    except Exception as error:  # Such as a full disk; what was trained and measured is saved.
        logger.warning(
            "the report of %s could not be written: %s: %s; `dml-dist report` writes it again",
            *(folder, type(error).__name__, error),
        )
        return None
