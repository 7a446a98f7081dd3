"""Texts of others, shown as they are: on the console of the command line and in CSV files.

Class names, keys, splits and paths come from data sets of others. Square brackets in them are no
markup, and control characters, which could move the cursor or change the window's title, are shown
as escapes.
"""

from __future__ import annotations

import csv
import io
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from dml_dist.urls import shown_url

# Cc: control, Cs: half of a surrogate pair, which no stream can write.
_HIDDEN = ("Cc", "Cs")
# Marks that reverse the order of what follows, so that a path looks like another.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# First characters of a formula; those of East Asian width count in some spreadsheets.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def printable(text: str) -> str:
    """Return a text without secrets of URLs, and with escapes for its control characters.

    Line feeds and tabs stay.
    """
    text = shown_url(text)
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def open_console(
    *, stderr: bool = False, file: TextIO | None = None, width: int | None = None
) -> Console:
    """Return a console that prints texts as they are, to standard output or elsewhere."""
    return _PlainConsole(
        stderr=stderr, file=file, width=width, markup=False, emoji=False, highlight=False
    )


def log_to(console: Console) -> None:
    """Print warnings of libraries, and our own, that have no other handler."""
    logging.lastResort = _ConsoleHandler(console)


def say(console: Console, line: str) -> None:
    """Print a line of any length; the terminal wraps it, so that paths can be copied."""
    console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


def say_styled(console: Console, word: str, style: str, text: str) -> None:
    """Print a line that begins with a word in a style, such as a red `error:`."""
    console.print(Text.assemble((word, style), " ", printable(text)), soft_wrap=True)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV that a spreadsheet shows and does not compute.

    A text that begins like a formula gets an apostrophe in front, as spreadsheets write it; numbers
    stay as they are.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = printable(value)
    if text.lstrip()[:1] not in _FORMULA or _is_number(text):
        return text
    return f"'{text}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class _PlainConsole(Console):
    """A console whose strings, also those of tables, are neither markup nor control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text; rich calls this for every one that it prints."""
        return super().render_str(printable(text), **options)


class _ConsoleHandler(logging.Handler):
    """Prints records to a console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            say(self._console, self.format(record))
        except Exception:
            self.handleError(record)


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN or character in _REORDERING
    if not hidden or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")
