"""The picture that is sent along."""

from __future__ import annotations

import hashlib
import struct
import zlib

import pytest

from pytest_llmperf.measure.picture import picture


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG file by name, each with its checksum right."""
    found = {}
    at = 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + content)
        found[kind] = content
        at += 12 + size
    return found


@pytest.mark.parametrize("pixels", [1, 16, 224])
def test_it_is_a_png_of_its_size(pixels: int) -> None:
    """A header, one line of three bytes a pixel for each line, and an end."""
    png = picture(pixels)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    parts = chunks(png)
    assert struct.unpack(">IIBBBBB", parts[b"IHDR"]) == (pixels, pixels, 8, 2, 0, 0, 0)
    lines = zlib.decompress(parts[b"IDAT"])
    assert len(lines) == pixels * (1 + 3 * pixels)
    assert set(lines[:: 1 + 3 * pixels]) == {0}
    assert parts[b"IEND"] == b""


def test_it_is_not_of_one_colour() -> None:
    """Hundreds of colours, so that no encoder has it easy."""
    lines = zlib.decompress(chunks(picture(64))[b"IDAT"])
    rows = [lines[at + 1 : at + 193] for at in range(0, len(lines), 193)]
    assert len({row[at : at + 3] for row in rows for at in range(0, 192, 3)}) > 1000


def test_it_is_always_the_same() -> None:
    """What is sent is pinned by its digest, so it may not depend on anything."""
    digest = hashlib.sha256(picture(64)).hexdigest()[:16]
    assert digest == "2c31c35ecc27181a"
    assert picture(64, 1) != picture(64)
