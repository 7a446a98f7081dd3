"""Which characters of matplotlib's fonts are classes of the glyphs data set.

Letters, decimal digits, letter-like numbers, currency and mathematical signs, without those that
Unicode defines as variants of other characters (styled, superscript, presentation forms).
Characters that look the same in some family's regular cut are one class, named after the first of
them.
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageFont

# Family -> font files of its cuts, the regular one first.
FAMILIES = {
    "DejaVu Sans": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
    ),
    "DejaVu Serif": (
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "DejaVuSerif-BoldItalic",
    ),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "STIX": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
}
_CATEGORIES = {"Lu", "Ll", "Lt", "Lo", "Nd", "Nl", "Sc", "Sm"}
# First word of a Unicode name -> script, where they differ.
_SCRIPTS = {
    "DIGIT": "LATIN",
    "OLD": "OLD ITALIC",
    "ARABIC-INDIC": "ARABIC",
    "EXTENDED": "ARABIC",
}
_RENDER_PIXELS = 48
_THUMBNAIL_PIXELS = 24
# Squared difference of two thumbnails over the larger one's squared ink. All pairs below it that
# were inspected have the same shape (Latin o with acute and Greek omicron with tonos: 0.003); pairs
# of different characters start at 0.02 (position of an accent).
_SAME_SHAPE = 0.01


@dataclass(frozen=True)
class GlyphClass:
    """One class: a shape, the character that represents it, and the cuts that contain it."""

    codepoint: int
    name: str
    """The character's Unicode name."""

    script: str
    cuts: tuple[str, ...]
    """Font files without extension."""


def font_path(cut: str) -> str:
    """Return the file of a font cut that matplotlib ships."""
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{cut}.ttf")


@lru_cache(maxsize=1)
def glyph_classes() -> tuple[GlyphClass, ...]:
    """Return all available classes by code point (over 3,000; takes about a second)."""
    characters = {cut: _characters(cut) for cuts in FAMILIES.values() for cut in cuts}
    first: dict[int, int] = {}
    for regular, *_ in FAMILIES.values():
        codepoints, same = _same_shapes(regular, sorted(characters[regular]))
        for codepoint in codepoints:
            first.setdefault(codepoint, codepoint)
        for one, other in same:
            low, high = sorted((_root(first, one), _root(first, other)))
            first[high] = low
    return tuple(
        GlyphClass(
            codepoint,
            unicodedata.name(chr(codepoint)),
            _script(codepoint),
            tuple(cut for cut, have in characters.items() if codepoint in have),
        )
        for codepoint in sorted(first)
        if first[codepoint] == codepoint
    )


def _characters(cut: str) -> set[int]:
    """Return the code points of a cut that may be classes."""
    from matplotlib.ft2font import FT2Font

    return {
        codepoint for codepoint in FT2Font(font_path(cut)).get_charmap() if _eligible(codepoint)
    }


@cache
def _eligible(codepoint: int) -> bool:
    character = chr(codepoint)
    return (
        unicodedata.category(character) in _CATEGORIES
        and unicodedata.name(character, "") != ""
        and not unicodedata.decomposition(character).startswith("<")
    )


def _root(first: dict[int, int], codepoint: int) -> int:
    while first[codepoint] != codepoint:
        codepoint = first[codepoint]
    return codepoint


def _same_shapes(cut: str, codepoints: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the code points with ink in this cut, and the pairs of them that look the same.

    A glyph's position on its line is ignored, because images are centered on the glyph.
    """
    font = ImageFont.truetype(font_path(cut), _RENDER_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    inked: list[int] = []
    sizes: list[tuple[int, int]] = []
    thumbnails: list[np.ndarray] = []
    for codepoint in codepoints:
        mask = font.getmask(chr(codepoint), mode="L")
        box = mask.getbbox()
        if box is None:
            continue
        image = Image.frombytes("L", mask.size, bytes(mask)).crop(box)
        thumbnail = image.resize((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.BOX)
        inked.append(codepoint)
        sizes.append(image.size)
        thumbnails.append(np.asarray(thumbnail, dtype=np.float32).reshape(-1) / 255)
    ink = np.stack(thumbnails)
    squares = (ink * ink).sum(axis=1)
    difference = squares[:, None] + squares[None, :] - 2 * (ink @ ink.T)
    near = difference < _SAME_SHAPE * np.maximum(squares[:, None], squares[None, :])
    one, other = np.nonzero(np.triu(near, 1))
    size = np.array(sizes)
    same_size = np.abs(size[one] - size[other]).max(axis=1) <= 1
    pairs = zip(one[same_size].tolist(), other[same_size].tolist(), strict=True)
    return inked, [(inked[a], inked[b]) for a, b in pairs]


def _script(codepoint: int) -> str:
    """Return the super-class: the script of a letter, else the kind of sign."""
    character = chr(codepoint)
    category = unicodedata.category(character)
    if category in ("Sm", "Sc"):
        return {"Sm": "MATHEMATICAL", "Sc": "CURRENCY"}[category]
    if 0x2100 <= codepoint <= 0x218F:
        return "LETTERLIKE"
    word = unicodedata.name(character).split()[0]
    return {
        "DIGIT": "LATIN",
        "OLD": "OLD ITALIC",
        "ARABIC-INDIC": "ARABIC",
        "EXTENDED": "ARABIC",
    }.get(word, word)
