"""Checks of encoded images on import, so that a broken one is found before training."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from dml_dist.data.fingerprint import fingerprint
from dml_dist.data.jpeg import check_jpeg
from dml_dist.data.pixels import (
    check_levels,
    exif_orientation,
    open_image,
    orientation_mark,
    rgb_image,
)
from dml_dist.errors import DataError

# A fingerprint is taken from at least as many pixels a side.
_MIN_DRAFT_PIXELS = 32
_JPEG = b"\xff\xd8\xff"
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageFacts:
    """Facts of a decoded image."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    fingerprint: str | None
    """Of `dml_dist.data.fingerprint`; None if it is all one colour."""

    orientation: int
    """EXIF orientation 1..8; 1 is upright."""


def inspect_image(data: bytes) -> ImageFacts:
    """Decode an image, JPEG at an eighth of its size, which still reads every byte.

    Raises:
        DataError: If it is no image, damaged or truncated, has pixels of 32 bits, or its colours
            cannot become RGB; the message says why, not where.
    """
    with _opened(data) as image:
        width, height = image.size
        smallest = (max(_MIN_DRAFT_PIXELS, width // 8), max(_MIN_DRAFT_PIXELS, height // 8))
        image.draft("L", smallest)
        image.load()
        if data.startswith(_JPEG):
            check_jpeg(image, data, smallest)
        grey_or_rgb = image if image.mode == "L" else rgb_image(image)
        return ImageFacts(width, height, fingerprint(grey_or_rgb), exif_orientation(image))


def shrink_image(data: bytes, max_side: int) -> bytes | None:
    """Return an image as JPEG with its longer side of `max_side` pixels; None if it is no larger.

    Resampled bicubically with antialiasing, in RGB, and stored at quality 95. Of EXIF data
    only the orientation is kept, so that the image is read upright, or not, as before.

    Args:
        data: The encoded image.
        max_side: Pixels, >= 1.

    Raises:
        DataError: As `inspect_image`.
    """
    with _opened(data) as image:
        longer = max(image.size)
        if longer <= max_side:
            return None
        image.load()
        width, height = (max(1, round(side * max_side / longer)) for side in image.size)
        small = rgb_image(image).resize((width, height), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        mark = exif_orientation(image)
        exif = {} if mark == 1 else {"exif": orientation_mark(mark)}
        small.save(stream, "JPEG", quality=_JPEG_QUALITY, **exif)
        return stream.getvalue()


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong with it is a DataError."""
    if not data:
        raise DataError("the image is empty (0 bytes)")
    try:
        with open_image(data) as image:
            check_levels(image)
            yield image
    except DataError:
        raise
    # Decoders raise many kinds of errors: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise DataError(f"the image cannot be decoded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is not known"
    return str(error) or type(error).__name__
