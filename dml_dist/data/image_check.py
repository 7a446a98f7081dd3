"""Checks of encoded images on import, so that a broken one is found before training."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from dml_dist.data.fingerprint import fingerprint
from dml_dist.data.pixels import check_levels, open_image, rgb_image
from dml_dist.errors import DataError

# A fingerprint is taken from at least as many pixels a side.
_MIN_DRAFT_PIXELS = 32
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


def check_image(data: bytes, *, whole: bool) -> tuple[int, int]:
    """Return the width and height of an encoded image, in pixels.

    Args:
        data: The encoded image.
        whole: Also decode it, so that a truncated file is found; otherwise its header is all that
            is read.

    Raises:
        DataError: If it is no image, damaged or truncated, or has pixels of 32 bits; the
            message says why, not where.
    """
    if whole:
        facts = inspect_image(data)
        return facts.width, facts.height
    with _opened(data) as image:
        return image.size


def inspect_image(data: bytes) -> ImageFacts:
    """Decode an image, JPEG at an eighth of its size, which still reads every byte.

    Raises:
        DataError: As `check_image`, or if its colours cannot become RGB.
    """
    with _opened(data) as image:
        width, height = image.size
        smallest = (max(_MIN_DRAFT_PIXELS, width // 8), max(_MIN_DRAFT_PIXELS, height // 8))
        image.draft("L", smallest)
        image.load()
        grey_or_rgb = image if image.mode == "L" else rgb_image(image)
        return ImageFacts(width, height, fingerprint(grey_or_rgb))


def shrink_image(data: bytes, max_side: int) -> bytes | None:
    """Return an image as JPEG with its longer side of `max_side` pixels; None if it is no larger.

    Resampled bicubically with antialiasing, in RGB, and stored at quality 95. Like reading, it does
    not apply rotation marks (EXIF), and drops them.

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
        small.save(stream, "JPEG", quality=_JPEG_QUALITY)
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
