"""Blank figures for commands whose page nobody looks at: drawing takes longer than a small run."""

from __future__ import annotations

from typing import IO, Any

from matplotlib.figure import Figure
from PIL import Image

_SVG = '<svg viewBox="0 0 1 1"></svg>'


def save_blank(_figure: Figure, target: IO[Any], *, format: str, **_options: Any) -> None:
    """Take the place of `Figure.savefig`."""
    if format == "svg":
        target.write(_SVG)
    else:
        Image.new("RGB", (1, 1)).save(target, format)
