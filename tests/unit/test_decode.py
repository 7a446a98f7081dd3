"""Decoding: the pixels that PIL gives, for every kind of image, and messages for damage."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from dml_dist.data import decode
from dml_dist.data.decode import decode_image
from dml_dist.data.image_check import inspect_image
from dml_dist.errors import DataError

HEIGHT, WIDTH = 37, 50
_Y, _X = np.mgrid[:HEIGHT, :WIDTH]
PIXELS = np.stack([_X * 5, _Y * 6, (_X + _Y) * 2], axis=-1).astype(np.uint8)


def picture(mode: str) -> Image.Image:
    image = Image.fromarray(PIXELS)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((_X * 5).astype(np.uint8)))
    if mode == "P":
        return image.quantize(16)
    return image.convert(mode)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def by_pil(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


KINDS = [
    ("RGB", "JPEG", {}),
    ("RGB", "JPEG", {"subsampling": 0, "quality": 95}),
    ("RGB", "JPEG", {"progressive": True}),
    ("L", "JPEG", {}),
    ("CMYK", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("L", "PNG", {}),
    ("1", "PNG", {}),
    ("P", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("P", "PNG", {"bits": 4}),
    ("RGB", "WEBP", {"lossless": True}),
    ("RGB", "BMP", {}),
    ("RGB", "TIFF", {}),
    ("P", "GIF", {}),
]


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize(("mode", "file_format", "options"), KINDS)
def test_pixels_are_those_of_pil(
    mode: str,
    file_format: str,
    options: dict[str, Any],
    torchvision: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not torchvision:
        monkeypatch.setattr(decode, "_decode_torchvision", None)
    data = encoded(picture(mode), file_format, **options)
    image = decode_image(data, "here")
    assert image.shape == (3, HEIGHT, WIDTH)
    assert image.dtype == torch.uint8
    expected = by_pil(data)
    # Two builds of libjpeg may round differently.
    tolerance = 1 if file_format == "JPEG" else 0
    assert (image.int() - expected.int()).abs().max() <= tolerance


def test_torchvision_decodes_where_it_is_installed() -> None:
    assert decode._decode_torchvision is not None


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_of_16_bits_the_high_byte_is_kept(
    file_format: str, torchvision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torchvision:
        monkeypatch.setattr(decode, "_decode_torchvision", None)
    levels = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 35).astype(np.uint16)
    image = decode_image(encoded(Image.fromarray(levels), file_format), "here")
    expected = torch.from_numpy((levels >> 8).astype(np.uint8))
    assert torch.equal(image, expected.expand(3, -1, -1))


def test_of_a_16_bit_pgm_the_high_byte_is_kept() -> None:
    data = b"P5 2 1 65535\n" + bytes([1, 200, 255, 0])
    assert decode_image(data, "here")[0].tolist() == [[1, 255]]
    assert (inspect_image(data).width, inspect_image(data).height) == (2, 1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode: str) -> None:
    data = encoded(picture("L").convert(mode), "TIFF")
    with pytest.raises(DataError, match=r"^here: the image has .* pixels of 32 bits.*convert it"):
        decode_image(data, "here")
    with pytest.raises(DataError, match=r"^the image has .* pixels of 32 bits"):
        inspect_image(data)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    first, second = picture("P"), picture("P").rotate(180)
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert torch.equal(decode_image(data, "here"), by_pil(data))


def test_pil_takes_over_what_torchvision_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not this one")

    monkeypatch.setattr(decode, "_decode_torchvision", refuse)
    data = encoded(picture("RGB"), "PNG")
    assert torch.equal(decode_image(data, "here"), by_pil(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello world",
        encoded(picture("RGB"), "JPEG")[:-100],
        encoded(picture("RGB"), "PNG")[:-100],
        encoded(picture("RGB"), "BMP")[:-100],
    ],
)
def test_damage_names_the_sample(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^sample 'a' of b.tar cannot be decoded: .*\d+ bytes"):
        decode_image(data, "sample 'a' of b.tar")


def test_no_warning_reaches_the_user(recwarn: pytest.WarningsRecorder) -> None:
    decode_image(encoded(picture("RGB"), "PNG"), "here")
    assert not recwarn.list


def png(levels: np.ndarray, color_type: int, bits: int, transparent: bytes = b"") -> bytes:
    """Encode (H, W[, C]) levels as PNG by hand; PIL writes no 16-bit colours."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    rows = levels.astype(">u2" if bits == 16 else "u1")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, color_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


GREY_16 = (_X * 1300 + _Y * 3).astype(np.uint16)
RGB_16 = np.stack([GREY_16, GREY_16[::-1], GREY_16 // 2], axis=-1)
SIXTEEN_BITS = {
    "grey": (png(GREY_16, 0, 16), GREY_16),
    "grey and transparent": (png(GREY_16, 0, 16, b"\0\5"), GREY_16),
    "colour": (png(RGB_16, 2, 16), RGB_16),
    "grey and alpha": (png(np.stack([GREY_16, GREY_16], axis=-1), 4, 16), GREY_16),
    "colour and alpha": (png(np.dstack([RGB_16, GREY_16]), 6, 16), RGB_16),
    "grey in TIFF": (encoded(Image.fromarray(GREY_16), "TIFF"), GREY_16),
}


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled_and_not_clipped(
    kind: str, torchvision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torchvision:
        monkeypatch.setattr(decode, "_decode_torchvision", None)
    data, levels = SIXTEEN_BITS[kind]
    expected = np.broadcast_to((levels >> 8).reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3))
    image = decode_image(data, "here").permute(1, 2, 0).numpy()
    assert np.array_equal(image, expected)
    assert inspect_image(data).width == WIDTH


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encoded(picture("RGB"), "JPEG", exif=exif)


def ycck() -> bytes:
    """A CMYK JPEG whose marker says that its first three channels are YCbCr."""
    data = encoded(picture("CMYK"), "JPEG")
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


RARE = {
    "EXIF": turned(),
    "YCCK": ycck(),
    "MPO": encoded(picture("RGB"), "MPO", save_all=True, append_images=[picture("L")]),
    "CMYK in TIFF": encoded(picture("CMYK"), "TIFF"),
    "YCbCr in TIFF": encoded(picture("YCbCr"), "TIFF", compression="tiff_lzw"),
    "1 bit in BMP": encoded(picture("1"), "BMP"),
    "transparent colour in PNG": png(PIXELS, 2, 8, b"\0\5\0\6\0\2"),
    "alpha in WebP": encoded(picture("RGBA"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("torchvision", [True, False])
@pytest.mark.parametrize("kind", RARE)
def test_rare_kinds_are_what_pil_makes_of_them(
    kind: str, torchvision: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torchvision:
        monkeypatch.setattr(decode, "_decode_torchvision", None)
    image = decode_image(RARE[kind], "here", "ignore")
    expected = by_pil(RARE[kind])
    assert image.shape == expected.shape == (3, HEIGHT, WIDTH)  # EXIF turns nothing
    assert (image.int() - expected.int()).abs().max() <= 2
    assert inspect_image(RARE[kind]).height == HEIGHT


def test_ycbcr_in_a_tiff_without_compression() -> None:
    data = encoded(picture("YCbCr"), "TIFF")
    if int(PIL.__version__.split(".")[0]) < 13:  # PIL takes it for a file that is cut off
        with pytest.raises(DataError, match="here cannot be decoded"):
            decode_image(data, "here")
    else:
        assert (decode_image(data, "here").int() - by_pil(data).int()).abs().max() <= 2
