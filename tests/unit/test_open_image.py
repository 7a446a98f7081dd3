"""Images are opened in one place, and only in the formats of photographs."""

from __future__ import annotations

import ast
import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import dml_dist
from dml_dist.data.decode import decode_image
from dml_dist.data.image_check import inspect_image, shrink_image
from dml_dist.data.pixels import open_image
from dml_dist.errors import DataError
from dml_dist.export.export import thumbnail
from dml_dist.export.search_figure import Tile, write_picture
from dml_dist.report.gallery import Gallery, GalleryQuery, write_gallery
from dml_dist.report.tiles import TileMaker

ROOT = Path(dml_dist.__file__).parent
IMAGE = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    IMAGE.save(file, kind)
    return file.getvalue()


# EPS with the header of a preview in front, as Windows programs write it.
_PREVIEW = (
    b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + (999).to_bytes(4, "little") + bytes(20)
)
REFUSED = {
    "eps": encoded("EPS"),
    "eps with preview": _PREVIEW + encoded("EPS"),
    "pdf": encoded("PDF"),
    "icns": encoded("ICNS"),
    "ico": encoded("ICO"),
    "tga": encoded("TGA"),
    "sgi": encoded("SGI"),
    "pcx": encoded("PCX"),
    "msp": b"DanM" + bytes(60),
    "bufr": b"BUFR" + bytes(60),
}


def _gallery(data: bytes, folder: Path) -> None:
    write_gallery(folder, (GalleryQuery(0, "a", data, ()),), ())


ENTRANCES: dict[str, Callable[[bytes, Path], Any]] = {
    "decode": lambda data, folder: decode_image(data, "an image"),
    "import": lambda data, folder: inspect_image(data),
    "shrink": lambda data, folder: shrink_image(data, 8),
    "export": lambda data, folder: thumbnail(data),
    "search": lambda data, folder: write_picture(folder / "a.png", [[Tile(data, "", "")]], ""),
    "report gallery": _gallery,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_other_formats_are_refused_and_start_no_program(
    entrance: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1) or IMAGE.im
    )
    for name in ("Popen", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: started.append(1))
    with pytest.raises((DataError, OSError)):
        ENTRANCES[entrance](REFUSED[kind], tmp_path)
    assert not started


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_photographs_are_read(kind: str) -> None:
    assert decode_image(encoded(kind), "an image").shape == (3, 16, 16)
    with open_image(encoded(kind)) as image:
        assert image.format == kind


def test_the_page_leaves_out_a_thumbnail_of_another_format(tmp_path: Path) -> None:
    gallery = Gallery((GalleryQuery(0, "a", REFUSED["eps"], ()),))
    (group,) = TileMaker(gallery).by_outcome(gallery.queries)
    assert "data:image" not in repr(group)


def test_no_other_module_opens_images() -> None:
    opening = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    }
    assert opening == {"data/pixels.py"}
