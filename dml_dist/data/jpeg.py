"""Detection of JPEGs whose data end too early, which libjpeg only warns of.

A file that was cut off and closed by an end marker, as upload tools and editors leave it, decodes
to an image with a grey rest, without an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from PIL import Image

from dml_dist.data.pixels import open_image
from dml_dist.errors import DataError

_END, _SCAN, _RESTART_INTERVAL = 0xD9, 0xDA, 0xDD
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_PROGRESSIVE = 0xC2
# Entropy-coded data end at a marker that is neither a stuffed byte, a fill byte nor a restart.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_SMALL_BYTES = 1 << 14
# Not 0xFF, which begins markers.
_PADDING = bytes(number * 151 % 255 for number in range(1, 512))


@dataclass
class _Structure:
    """What the markers of a JPEG say."""

    end: int = -1
    """Position of the end marker, -1 if there is none."""

    progressive: bool = False
    num_mcus: int = 0
    """Minimum coded units of an interleaved scan."""

    restart_interval: int = 0
    num_restarts: int = 0
    num_scans: int = 0

    missing: dict[int, set[int]] = field(default_factory=dict)
    """Component -> its coefficients 0..63 that no scan has brought to full precision."""


def check_jpeg(image: Image.Image, data: bytes, scaled: tuple[int, int]) -> None:
    """Refuse a JPEG whose data end early.

    It is decoded once more with other bytes behind its data. They take part only where libjpeg
    runs out of data; a whole image does not depend on them.

    Args:
        image: Decoded from `data` in grey with a draft of size `scaled`.
        data: The whole file, which PIL accepts.
        scaled: Size given to `draft`.

    Raises:
        DataError: If it was cut.
        OSError: If it cannot be decoded at all.
    """
    found = _structure(data)
    restarts = -(-found.num_mcus // found.restart_interval) - 1 if found.restart_interval else 0
    is_cut = (
        found.end < 0
        or any(found.missing.values())
        or (found.num_scans == 1 and found.num_restarts < restarts)
    )
    if not is_cut:
        longer = data[: found.end] + _PADDING + data[found.end : found.end + 2]
        if found.progressive or len(data) <= _SMALL_BYTES:
            # A small scale has only the average of each block, which the last scans do not change.
            is_cut = _pixels(data, None) != _pixels(longer, None)
        else:
            is_cut = image.tobytes() != _pixels(longer, scaled)
    if is_cut:
        raise DataError(
            "the image cannot be decoded (its JPEG data end before the image does, although an "
            "end marker follows)"
        )


def _pixels(data: bytes, scaled: tuple[int, int] | None) -> bytes:
    with open_image(data) as image:
        if scaled is not None:
            image.draft("L", scaled)
        return image.tobytes()


def _structure(data: bytes) -> _Structure:
    """Walk over the markers of the first image in a file."""
    found = _Structure()
    at = 2
    while at < len(data) - 3:
        if data[at] != 0xFF:  # libjpeg skips bytes between segments, too
            at = data.find(b"\xff", at)
            if at < 0:
                break
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _END:
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker in _FRAMES:
            _read_frame(found, segment, marker == _PROGRESSIVE)
        elif marker == _RESTART_INTERVAL and len(segment) >= 2:
            found.restart_interval = int.from_bytes(segment[:2], "big")
        elif marker == _SCAN:
            _read_scan(found, segment)
            following = _NEXT_MARKER.search(data, at)
            if following is None:
                return found
            if found.restart_interval:
                found.num_restarts += len(_RESTART.findall(data, at, following.start()))
            at = following.end() - 2
    if data[at : at + 2] == b"\xff\xd9" and found.num_scans:
        found.end = at
    return found


def _read_frame(found: _Structure, segment: bytes, progressive: bool) -> None:
    found.progressive = progressive
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    parts = [segment[at : at + 3] for at in range(6, len(segment) - 2, 3)]
    across = max((part[1] >> 4 for part in parts), default=1)
    down = max((part[1] & 15 for part in parts), default=1)
    if len(parts) == 1:  # One component is never interleaved: its units are single blocks.
        across = down = 1
    found.num_mcus = -(-width // (8 * max(across, 1))) * -(-height // (8 * max(down, 1)))
    found.missing = {part[0]: set(range(64)) for part in parts}


def _read_scan(found: _Structure, segment: bytes) -> None:
    found.num_scans += 1
    if not segment or len(segment) < 4 + 2 * segment[0]:
        return
    first, last, precision = segment[1 + 2 * segment[0] :][:3]
    if not found.progressive:
        first, last, precision = 0, 63, 0
    for number in range(segment[0]):
        if precision & 15 == 0:
            coefficients = found.missing.get(segment[1 + 2 * number], set())
            coefficients -= set(range(first, last + 1))
