"""Tensors that are too large to be drawn in one piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.models.blocks import (
    BLOCKS,
    EVEN,
    Blocks,
    random_blocks,
    row_bytes,
    single_blocks,
)
from pytest_llmperf.models.weights import Weights, seed_of, uniform

_PIECE = 1 << 22
"""Bytes of a large tensor that are drawn at once, about: what a cache of the processor holds."""


@dataclass(frozen=True, slots=True)
class LargeTensor:
    """A tensor of a preset, to be written piece by piece.

    Attributes:
        name: As in GGUF.
        shape: Rows out, columns in; before them the experts, if it has them.
        kind: Type, by its name in GGUF.
        size: Bytes.
        pieces: Makes the bytes anew, in pieces.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    size: int
    pieces: Callable[[], Iterator[NDArray[Any]]]


def floats(name: str, shape: tuple[int, ...], make: Callable[[], Weights]) -> LargeTensor:
    """Make a tensor of floats of 32 bits, small enough for one piece."""

    def pieces() -> Iterator[NDArray[Any]]:
        yield make().astype("<f4", copy=False)

    return LargeTensor(name, shape, "F32", 4 * math.prod(shape), pieces)


def random_floats(seed: int, name: str, shape: tuple[int, ...]) -> LargeTensor:
    """Make a tensor of random floats, scaled by their columns."""
    return floats(name, shape, lambda: uniform(seed, name, shape, shape[-1] ** -0.5))


def matrix(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    kind: str,
    gain: float,
    *,
    writes: bool = False,
    first: Callable[[int], NDArray[np.float64]] | None = None,
) -> LargeTensor:
    """Make a matrix, or one of each expert, of random blocks.

    Args:
        seed: Of the model.
        name: As in GGUF.
        shape: As for :class:`LargeTensor`.
        kind: Type, a key of :data:`~pytest_llmperf.models.blocks.BLOCKS`.
        gain: Standard deviation of the values, over one by the root of the columns.
        writes: Whether it writes to the hidden state, and leaves the constant alone.
        first: Gives the first value of each row, which has a block of its own then.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    width = row_bytes(kind, columns)
    step = max(EVEN, _PIECE // width // EVEN * EVEN)

    def pieces() -> Iterator[Blocks]:
        source = np.random.SFC64(seed_of(seed, name))
        size = BLOCKS[kind][1]
        values = first(rows) if first is not None else None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            count = (stop - start) * width // size
            piece = random_blocks(kind, count, gain / math.sqrt(columns), source)
            piece = piece.reshape(stop - start, width)
            if values is not None:
                piece[:, :size] = single_blocks(kind, values[start:stop])
            if writes:  # the first row of each expert is the first value of what it writes
                piece[-start % shape[-2] :: shape[-2]] = 0
            yield piece

    return LargeTensor(name, shape, kind, rows * width, pieces)
