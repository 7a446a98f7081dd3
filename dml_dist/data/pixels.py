"""Opening of images and their conversion to 8-bit RGB, without torch: reports use it too."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

from dml_dist.config.data import ExifRule
from dml_dist.errors import DataError

# All that is ever opened. Others that PIL knows start programs (EPS runs Ghostscript), or are no
# photographs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")

# PIL's word for 16 bits in these formats is its mode of 32 bits (PNG: before version 11).
_WIDENED_FORMATS = ("PNG", "PPM")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image; the only place that does, since PIL by itself takes any format.

    The caller closes it, or loads it whole.

    Raises:
        UnidentifiedImageError: If it is of none of these formats.
        Exception: Of many kinds, if it is damaged.
    """
    return Image.open(io.BytesIO(data), formats=_known_formats())


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Return the formats that this build of PIL reads; it raises KeyError for another."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def check_levels(image: Image.Image) -> None:
    """Refuse an image whose pixels have no fixed range.

    Raises:
        DataError: If its pixels have 32 bits; the message says why, not where.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in _WIDENED_FORMATS):
        kind = "floating-point" if image.mode == "F" else "integer"
        raise DataError(
            f"the image has {kind} pixels of 32 bits, whose black and white are not known; "
            "convert it to 8 or 16 bits a channel"
        )


def rgb_image(image: Image.Image, exif: ExifRule = "ignore") -> Image.Image:
    """Return an image in mode RGB: of one channel of 16 bits the high byte, else PIL's conversion.

    Args:
        image: An opened image.
        exif: Whether it is turned by its EXIF orientation.

    Raises:
        DataError: If its pixels have 32 bits (`check_levels`).
    """
    check_levels(image)
    if exif == "apply":
        image.load()  # a PNG may have its EXIF data behind its pixels
        turn = _TURNS.get(exif_orientation(image))
        image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # PIL would clip to 255
        levels = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(levels)
    return image.convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation mark 1..8 of a decoded image; 1 is upright, or there is no mark.

    Only EXIF counts, as in torchvision; PIL's own function reads XMP, too. PIL turns TIFF upright
    itself when it decodes.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        value = exif.get(_ORIENTATION)
    # A damaged mark, of which PIL raises many kinds of errors, is none.
    except Exception:
        return 1
    return value if value in _TURNS else 1


def orientation_mark(value: int) -> Image.Exif:
    """Return EXIF data with an orientation only."""
    exif = Image.Exif()
    exif[_ORIENTATION] = value
    return exif
