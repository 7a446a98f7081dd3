"""Decoding of images to uint8 tensors.

JPEG and PNG go through torchvision.io, two to three times as fast as PIL with the same pixels; PIL
takes all other formats and whatever torchvision refuses. Every image becomes three channels: grey
levels and palettes are expanded, CMYK is converted, transparency is dropped without blending, of
16-bit channels the high byte is kept, of an animation the first frame. Images are turned upright by
their EXIF orientation unless `data.exif` is `ignore`, as in the reference code of most papers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dml_dist.config.data import ExifRule
from dml_dist.data.pixels import open_image, rgb_image
from dml_dist.errors import DataError

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_RGB = 3  # ImageReadMode.RGB.value


def _torchvision_decoder() -> Callable[[Tensor, int, bool], Tensor] | None:
    """Return torchvision's decoder, None where there is none or it was built for another torch.

    The operator itself, because its Python wrapper warns of its deprecation (torchvision 0.29) for
    every image; a torchvision that has dropped it leaves PIL in its place.
    """
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        return torch.ops.image.decode_image
    except (ImportError, RuntimeError, AttributeError):
        return None


_decode_torchvision = _torchvision_decoder()


def decode_image(data: bytes, where: str, exif: ExifRule = "apply") -> Tensor:
    """Decode an image file's bytes; the content decides on the format, not the name.

    Args:
        data: The whole file.
        where: Names the image in an error, as "sample 'a' of shard.tar".
        exif: Whether the image is turned by its EXIF orientation.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        DataError: If the bytes are not an image that can be decoded.
    """
    if _decode_torchvision is not None and data.startswith((_JPEG, _PNG)):
        try:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image = _decode_torchvision(buffer, _RGB, exif == "apply")
        except RuntimeError:  # PIL may still decode it, and has the better messages.
            return _decode_pil(data, where, exif)
        return _high_byte(image) if image.dtype == torch.uint16 else image
    return _decode_pil(data, where, exif)


def _decode_pil(data: bytes, where: str, exif: ExifRule) -> Tensor:
    try:
        with open_image(data) as image:
            pixels = np.array(rgb_image(image, exif))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    # PIL reports damage by any of these, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where} cannot be decoded: {error}; its {len(data)} bytes start with "
            f"{data[:8].hex()}. Convert it to JPEG, PNG or another format that PIL reads"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _high_byte(image: Tensor) -> Tensor:
    """Reduce uint16 channels to uint8, keeping memory order."""
    return torch.from_numpy((image.numpy() >> 8).astype(np.uint8))
