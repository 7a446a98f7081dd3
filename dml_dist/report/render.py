"""Rendering of report pages: one HTML file that needs no network, and its figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dml_dist.files import write_bytes_atomic, write_text_atomic
from dml_dist.report.figures import Picture
from dml_dist.urls import shown_url

_FOLDER = Path(__file__).parent


def write_page(report_dir: Path, template: str, pictures: Sequence[Picture], **values: Any) -> Path:
    """Write a page as index.html, and all its figures next to it.

    Args:
        report_dir: The folder, made if it is missing.
        template: File of the template below this package; it extends base.html.
        pictures: Figures of the page. The template places them with the macro `figures`.
        values: Variables of the template and of base.html; a missing one is an error.

    Returns:
        Path of the page.
    """
    page = _environment().get_template(template).render(**values)
    report_dir.mkdir(exist_ok=True)
    for picture in pictures:
        write_bytes_atomic(report_dir / f"{picture.name}.png", picture.png)
    path = report_dir / "index.html"
    write_text_atomic(path, page)
    return path


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown_url
    environment.filters["breakable"] = _breakable
    environment.globals["style"] = Markup((_FOLDER / "base.css").read_text("utf-8"))
    return environment


def _breakable(path: str) -> Markup:
    """Return a dotted path that a narrow column may break after its dots and underscores."""
    text = escape(path)
    return Markup(text.replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>")))
