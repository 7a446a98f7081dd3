"""The label rule: what counts as one class, in tar shards, tables, folders and importers alike.

* A whole number is an integer, however it is written: 3, 3.0, "3" and "3.0" are one class.
* Everything else is a text: spaces around it are dropped and Unicode is brought to its composed
  form (NFC). "007" is a text and not the number 7; so are "7a" and "1e3".
* NaN, infinity, null, an empty text, lists and objects are no labels and are refused. So are the
  texts "nan", "NaN", "inf" and "-inf", as which programs write such numbers into tables.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence

from dml_dist.errors import DataError

_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
_NO_LABELS = ("", "nan", "NaN", "inf", "-inf")
_SHOWN = 3
_log = logging.getLogger(__name__)


def class_text(value: object, what: str = "label") -> str:
    """Return the text that stands for a class.

    Args:
        value: A label or class name.
        what: Its name in the message.

    Raises:
        DataError: If it is no label; the message says why, not where.
    """
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, float):
        text = str(int(value)) if value.is_integer() else str(value)
    elif isinstance(value, str):
        text = unicodedata.normalize("NFC", value).strip()
    else:
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"a {what} must be a number or a text, got {kind}; give each sample one")
    if text in _NO_LABELS:
        raise DataError(
            f"the {what} {value!r} names no class (it is empty or not a number); correct it, or "
            "rename the class"
        )
    match = _WHOLE.fullmatch(text)
    return str(int(match[1])) if match else text


def whole_number(text: str) -> int | None:
    """Return the number that a text of `class_text` stands for, None if it is not a number."""
    return int(text) if _WHOLE.fullmatch(text) else None


def class_texts(names: Sequence[str], where: str, what: str = "label") -> list[str]:
    """Return the text of each name, and log how many differ from another only in their spelling.

    Raises:
        DataError: If one is no label, with `where`.
    """
    text_of: dict[str, str] = {}
    for name in names:
        if name not in text_of:
            try:
                text_of[name] = class_text(name, what)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
    if line := joined_line(text_of.items()):
        _log.warning("%s: %s", where, line)
    return [text_of[name] for name in names]


def joined_line(spellings: Iterable[tuple[str, str]]) -> str | None:
    """Return a line on names that became one class with another name, None if there are none.

    Args:
        spellings: (name as given, text of its class).
    """
    names_of: dict[str, set[str]] = {}
    for name, text in spellings:
        names_of.setdefault(text, set()).add(name)
    joined = [
        (name, text)
        for text, names in sorted(names_of.items())
        if len(names) > 1
        for name in sorted(names - {text} if text in names else sorted(names)[1:])
    ]
    if not joined:
        return None
    first = ", ".join(f"{name!r} is {text!r}" for name, text in joined[:_SHOWN])
    return (
        f"{len(joined):,} class names were joined with another one that differs in spaces, Unicode "
        f"form or notation of a number only: {first}{', ...' if len(joined) > _SHOWN else ''}"
    )


def optional_texts(names: Sequence[str]) -> list[str]:
    """Return the text of each super-class, "" where there is none."""
    text_of = {name: class_text(name, "super class") if name.strip() else "" for name in set(names)}
    return [text_of[name] for name in names]
