"""Is this an image? Asked once, when it enters the shards, not by a run ten hours later."""

from __future__ import annotations

import io
from typing import IO

from PIL import Image

from dml_dist.data.pixels import check_levels
from dml_dist.errors import DataError

# Those of IMAGE_EXTENSIONS; others that PIL knows (EPS, PDF) start programs or are no photographs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def check_image(data: bytes, *, whole: bool) -> tuple[int, int]:
    """Return the width and height of an encoded image, in pixels.

    Args:
        data: The encoded image.
        whole: Also decode it (JPEG at an eighth of its size, which still reads every byte), so that
            a truncated file is found; otherwise its header is all that is read.

    Raises:
        DataError: If it is no image, damaged or truncated, or has pixels of 32 bits; the
            message says why, not where.
    """
    if not data:
        raise DataError("the image is empty (0 bytes)")
    stream: IO[bytes] = io.BytesIO(data)
    try:
        with Image.open(stream, formats=_FORMATS) as image:
            size = image.size
            check_levels(image)
            if whole:
                image.draft("L", (max(1, size[0] // 8), max(1, size[1] // 8)))
                image.load()
    except DataError:
        raise
    # Decoders raise whatever they stumble on: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise DataError(f"the image cannot be decoded ({_reason(error)})") from error
    return size


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is not known"
    return str(error) or type(error).__name__
