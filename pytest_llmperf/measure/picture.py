"""A picture to send along: always the same bytes, and not of one colour."""

from __future__ import annotations

import base64
import struct
import zlib
from functools import cache

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TRUE_COLOUR = 2
_STEP = 37


@cache
def picture(pixels: int, number: int = 0) -> bytes:
    """Return a square picture as a PNG file of 8 bits a channel.

    Args:
        pixels: Width and height.
        number: Tells pictures of one size apart.
    """
    at = np.arange(pixels, dtype=np.uint32)
    x, y = at[None, :], at[:, None]
    channels = (x ^ y, x * 3 + y + number * _STEP, (x * y) // 16 + y)
    colours = np.stack([np.broadcast_to(c, (pixels, pixels)) for c in channels], axis=-1)
    lines = np.zeros((pixels, 1 + 3 * pixels), np.uint8)  # each begins with its filter, none
    lines[:, 1:] = (colours % 256).astype(np.uint8).reshape(pixels, 3 * pixels)
    header = struct.pack(">IIBBBBB", pixels, pixels, 8, _TRUE_COLOUR, 0, 0, 0)
    # Stored as it is: what a deflate makes of it differs between versions of zlib.
    data = zlib.compress(lines.tobytes(), 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def base64_picture(pixels: int, number: int = 0) -> str:
    """Return :func:`picture` in base64."""
    return base64.b64encode(picture(pixels, number)).decode()


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
