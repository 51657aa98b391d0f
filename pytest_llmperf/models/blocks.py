"""Random weights, written as the blocks of a quantized type.

A model of billions of weights takes minutes to draw in floats and to encode. Its blocks can be
drawn as they are instead: the quants of a block are random bits, and its scales are chosen so that
the decoded values have mean 0 and the standard deviation that is asked for. What ggml's own
encoder would never write is not written here either.

The layouts are those of ``ggml-common.h``: ``block_q4_0``, ``block_q8_0``, ``block_q4_K``,
``block_q5_K``, ``block_q6_K`` and ``block_mxfp4``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Blocks: TypeAlias = NDArray[np.uint8]
"""Shape (blocks, bytes of a block)."""

BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F16": (1, 2),
        "Q8_0": (32, 34),
        "Q6_K": (256, 210),
        "Q5_K": (256, 176),
        "Q4_K": (256, 144),
        "Q4_0": (32, 18),
        "MXFP4": (32, 17),
    }
)
"""Values and bytes of a block, by type."""

EVEN = 8
"""Blocks are drawn in multiples of this many, so that how they are shared out changes no byte:
the source gives eight bytes at a time."""

# Mean squares of the random integers below.
_Q8_SQUARE = 2 * sum(n * n for n in range(1, 128)) / 256  # -128 is made 0
_Q4_SQUARE = sum(n * n for n in range(-8, 8)) / 16
_Q6_SQUARE = sum(n * n for n in range(-32, 32)) / 64
_SCALE_SQUARE = sum(n * n for n in range(4, 8)) / 4
_FP4_SQUARE = sum(n * n for n in (0, 1, 2, 3, 4, 6, 8, 12)) / 8  # of either sign

_E8M0_BIAS = 128
"""Exponent that stands for 1, for the values above: twice those of FP4."""


class Source(Protocol):
    """A bit generator of numpy, whose raw output numpy promises never to change."""

    def random_raw(self, size: int) -> NDArray[np.uint64]:
        """Return that many words of random bits."""


def row_bytes(kind: str, columns: int) -> int:
    """Return the bytes of a row of `columns` values, which are whole blocks."""
    values, size = BLOCKS[kind]
    return columns // values * size


def random_blocks(kind: str, count: int, deviation: float, source: Source) -> Blocks:
    """Draw blocks of random values.

    Args:
        kind: Type, a key of :data:`BLOCKS`.
        count: Blocks.
        deviation: Standard deviation of the values, met to 1 % above 0.001.
        source: Of random bits. Parts of a tensor are the tensor if all but the last one have a
            multiple of :data:`EVEN` blocks.

    Returns:
        Shape (count, bytes of a block).
    """
    size = BLOCKS[kind][1]
    raw = source.random_raw((count * size + 7) // 8)
    # Little endian on every machine, as the file is.
    blocks = raw.astype("<u8", copy=False).view(np.uint8)[: count * size].reshape(count, size)
    return _DRAWN[kind](blocks, deviation)


def single_blocks(kind: str, values: NDArray[np.float64]) -> Blocks:
    """Return a block for each value: the value, as near as 16 bits come, then zeros.

    MXFP4 is not among the types: the scale of a block is a power of two.
    """
    blocks = np.zeros((len(values), BLOCKS[kind][1]), np.uint8)
    scale = np.asarray(values, "<f2").reshape(-1, 1).view(np.uint8)
    _SINGLE[kind](blocks, scale)
    return blocks


def _half(value: float) -> list[int]:
    """Return the two bytes of a float of 16 bits."""
    return list(np.array([value], "<f2").tobytes())


def _short(value: float, bits: int) -> float:
    """Round to so few bits that the product with a small integer is a float of 16 bits again."""
    exact = float(np.float16(value))
    fraction, exponent = math.frexp(exact)
    # Below 2 ** -14 steps are 2 ** -24, and an odd number of them has no half.
    step = max(2.0 ** (exponent - bits), 2.0**-23)
    return round(math.ldexp(fraction, exponent) / step) * step


def _f16(blocks: Blocks, deviation: float) -> Blocks:
    steps = np.arange(65536, dtype=np.float32) - np.float32(32767.5)
    table = (steps * np.float32(deviation * math.sqrt(3) / 32768)).astype("<f2")
    # In one dimension numpy looks them up several times as fast.
    found: Blocks = table[blocks.reshape(-1).view("<u2")].view(np.uint8)
    return found.reshape(blocks.shape)


def _q8_0(blocks: Blocks, deviation: float) -> Blocks:
    # The encoder never writes -128, and without it the mean is 0.
    values = blocks.view(np.int8)
    np.multiply(values, values != -128, out=values)  # noqa: PLR2004  see above
    blocks[:, :2] = _half(deviation / math.sqrt(_Q8_SQUARE))
    return blocks


def _q4_0(blocks: Blocks, deviation: float) -> Blocks:
    # Values are -8 to 7 steps, so the mean is 0 only over blocks of either sign.
    low, high = _half(deviation / math.sqrt(_Q4_SQUARE))
    blocks[:, 0] = low
    blocks[:, 1] &= 0x80
    blocks[:, 1] |= high
    return blocks


def _q4_k(blocks: Blocks, deviation: float) -> Blocks:
    return _offset(blocks, deviation, 16)


def _q5_k(blocks: Blocks, deviation: float) -> Blocks:
    return _offset(blocks, deviation, 32)


def _offset(blocks: Blocks, deviation: float, levels: int) -> Blocks:
    """Fill in the scales of a type that stores ``d * scale * quant - dmin * min``.

    With equal scale and min, 4 to 7, and ``dmin`` the middle quant times ``d`` the mean is 0.
    """
    square = _SCALE_SQUARE * (levels * levels - 1) / 12
    step = _short(deviation / math.sqrt(square), 12 - levels.bit_length())
    blocks[:, :4] = _half(step) + _half(step * (levels - 1) / 2)
    first = blocks[:, 4:8] & 3 | 4
    blocks[:, 4:8] = first
    blocks[:, 8:12] = first
    # Scales and mins of the last four sub-blocks, their low four bits.
    blocks[:, 12:16] = (blocks[:, 12:16] & 3 | 4) * 0x11
    return blocks


def _q6_k(blocks: Blocks, deviation: float) -> Blocks:
    # Scales -7 to -4 and 4 to 7: values are -32 to 31 steps, so the mean is 0 over both signs.
    drawn = blocks[:, 192:208].view(np.int8)
    sign = drawn >> 7
    drawn[:] = ((drawn & 3 | 4) ^ sign) - sign
    blocks[:, 208:] = _half(deviation / math.sqrt(_SCALE_SQUARE * _Q6_SQUARE))
    return blocks


def _mxfp4(blocks: Blocks, deviation: float) -> Blocks:
    # A scale is a power of two, so some blocks take the one below what is asked for and some the
    # one above, as many as give the mean square.
    fraction, exponent = math.frexp(deviation / math.sqrt(_FP4_SQUARE))
    above = ((2 * fraction) ** 2 - 1) / 3
    drawn = blocks[:, 0]
    drawn[:] = (drawn < round(above * 256)) + np.uint8(exponent - 1 + _E8M0_BIAS)
    return blocks


_DRAWN: Mapping[str, Callable[[Blocks, float], Blocks]] = MappingProxyType(
    {
        "F16": _f16,
        "Q8_0": _q8_0,
        "Q6_K": _q6_k,
        "Q5_K": _q5_k,
        "Q4_K": _q4_k,
        "Q4_0": _q4_0,
        "MXFP4": _mxfp4,
    }
)


# The first value is one step of a scale that is the value, all others are no step.


def _single_f16(blocks: Blocks, scale: Blocks) -> None:
    blocks[:] = scale


def _single_q8_0(blocks: Blocks, scale: Blocks) -> None:
    blocks[:, :2] = scale
    blocks[:, 2] = 1


def _single_q4_0(blocks: Blocks, scale: Blocks) -> None:
    blocks[:, :2] = scale
    blocks[:, 2:] = 0x88  # quants of 8 are 0
    blocks[:, 2] = 0x89


def _single_q4_k(blocks: Blocks, scale: Blocks) -> None:
    blocks[:, :2] = scale
    blocks[:, 4] = 1
    blocks[:, 16] = 1


def _single_q5_k(blocks: Blocks, scale: Blocks) -> None:
    blocks[:, :2] = scale
    blocks[:, 4] = 1
    blocks[:, 48] = 1  # after 32 bytes of high bits


def _single_q6_k(blocks: Blocks, scale: Blocks) -> None:
    blocks[:, 0] = 1
    blocks[:, 128:192] = 0xAA  # high bits of quants of 32, which are 0
    blocks[:, 192] = 1
    blocks[:, 208:] = scale


_SINGLE: Mapping[str, Callable[[Blocks, Blocks], None]] = MappingProxyType(
    {
        "F16": _single_f16,
        "Q8_0": _single_q8_0,
        "Q6_K": _single_q6_k,
        "Q5_K": _single_q5_k,
        "Q4_K": _single_q4_k,
        "Q4_0": _single_q4_0,
    }
)
