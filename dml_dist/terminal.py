"""The console of the command line, on which every text is shown as it is.

Class names, keys, splits and paths come from data sets of others. Square brackets in them are no
markup, and control characters, which could move the cursor or change the window's title, are shown
as escapes.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

# Cc: control, Cs: half of a surrogate pair, which no stream can write.
_HIDDEN = ("Cc", "Cs")
# Marks that reverse the order of what follows, so that a path looks like another.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """Return a text with escapes for its control characters, except line feeds and tabs."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def open_console(*, stderr: bool = False) -> Console:
    """Return a console of standard output or standard error that prints texts as they are."""
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, line: str) -> None:
    """Print a line of any length; the terminal wraps it, so that paths can be copied."""
    console.print(printable(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


def say_styled(console: Console, word: str, style: str, text: str) -> None:
    """Print a line that begins with a word in a style, such as a red `error:`."""
    console.print(Text.assemble((word, style), " ", printable(text)), soft_wrap=True)


class _PlainConsole(Console):
    """A console whose strings, also those of tables, are neither markup nor control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text; rich calls this for every one that it prints."""
        return super().render_str(printable(text), **options)


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN or character in _REORDERING
    if not hidden or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode("ascii")
