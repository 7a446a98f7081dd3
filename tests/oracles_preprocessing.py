"""The preprocessing that a bundle describes, reimplemented with PIL and numpy."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def apply_steps(preprocessing: Mapping[str, Any], data: bytes) -> np.ndarray:
    """Return an encoded image as an input of the network, (3, H, W) float32.

    Only what the steps say is used, as another program would that knows nothing else; a step that
    is not known, or known under other names, is an error.

    Args:
        preprocessing: Content of preprocessing.json.
        data: The image file.
    """
    names = [name for step in preprocessing["steps"] for name in step]
    assert names == ["decode", "resize", "center_crop", "scale", "normalize"]
    decode, resize, crop, scale, normalize = (
        step[name] for step, name in zip(preprocessing["steps"], names, strict=True)
    )
    begin = "RGB, 8 bits a channel; of 16 the high byte; EXIF orientation "
    applied = {"applied": True, "not applied": False}[decode.removeprefix(begin)]
    with Image.open(io.BytesIO(data)) as opened:
        image = (ImageOps.exif_transpose(opened) if applied else opened).convert("RGB")
    assert (resize["interpolation"], resize["antialias"]) == ("bilinear", True)
    shorter = min(image.size)
    width, height = (resize["shorter_side"] * side // shorter for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)  # PIL's is antialiased
    left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
    image = image.crop((left, top, left + crop["width"], top + crop["height"]))
    value, sign, divisor = scale.split()
    assert (value, sign) == ("value", "/")
    pixels = np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / float(divisor)
    mean, std = (np.array(normalize[key])[:, None, None] for key in ("mean", "std"))
    result = ((pixels - mean) / std).astype(np.float32)
    assert [*result.shape] == preprocessing["input"]["shape"][1:]
    assert preprocessing["input"]["dtype"] == "float32"
    return result
