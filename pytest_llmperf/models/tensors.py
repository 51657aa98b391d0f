"""Reads the header of a GGUF file: what it says of itself, and name, shape and size of each tensor.

For files of any size, type and number of parts; not a byte of a tensor's values is read. The layout
is that of GGUF version 2 and 3, little endian: see ``docs/gguf.md`` in the repository of ggml.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.locate import parts

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_LONGEST = 4096
"""Items of the longest array that is kept: more than layers, fewer than tokens."""

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    **dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))),
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Types of values other than strings and arrays."""

TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
        42: ("Q2_0", 64, 18),
    }
)
"""Name, values of a block and bytes of a block of each type that ggml has: ``enum ggml_type`` in
``ggml.h``, and the structures of ``ggml-common.h``."""

BYTES: Mapping[str, float] = MappingProxyType(
    {name: size / values for name, values, size in TYPES.values()}
)
"""Bytes of one value by the name of its type, its share of the block's scales included."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a header describes it.

    Attributes:
        name: As in GGUF.
        shape: Rows out, columns in; before them the experts, if it has them. GGUF names the
            dimensions the other way round.
        kind: Type, by its name in GGUF; ``type 99`` for one that is not known here.
        size: Bytes. Of an unknown type those up to the next tensor, padding included.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    size: int

    @property
    def row(self) -> int:
        """Bytes of one item of the first dimension, such as the embedding of one token."""
        return self.size // max(self.shape[0], 1) if self.shape else self.size


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """What the header of a GGUF file says, of a split one those of all its parts.

    Attributes:
        tensors: In the order of the file.
        metadata: Values by key, of a split file those of the first part. Arrays are tuples of
            numbers; those of texts and those of more than 4096 numbers are left out, as the
            tokenizer's are.
    """

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture, ``""`` where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str) -> Any:  # noqa: ANN401  what the file holds
        """Return the value of ``ARCHITECTURE.KEY``, None if there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_tensors(path: Path) -> ModelTensors:
    """Read the headers of a GGUF file and of its further parts, and nothing else of them.

    Args:
        path: A GGUF file; of a split one, its first part.

    Raises:
        ModelError: If a part is missing, cannot be read, is no GGUF of version 2 or 3, or is cut
            short, be it behind the header.
    """
    found = [_read_part(part) for part in parts(path)]
    tensors = tuple(tensor for _, described in found for tensor in described)
    return ModelTensors(tensors, found[0][0])


def _read_part(path: Path) -> tuple[dict[str, Any], list[Tensor]]:
    """Read the header of one file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if (magic := file.read(len(_MAGIC))) != _MAGIC:
                raise ModelError(f"{path} is no GGUF file, it starts with {magic!r}: name another")
            return _Header(file, size).read()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}: fetch it again") from error


@dataclass(frozen=True, slots=True)
class _Described:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Header:
    """A header that is being read.

    Args:
        file: Open, behind its magic.
        size: Of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size - len(_MAGIC)
        self._size = size

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Read all that follows the magic.

        Raises:
            ValueError: If it is no header, or the file ends too early.
        """
        version = self._number("<I")
        if version not in _VERSIONS:
            # A number of another byte order has its bits at the other end.
            order = " or is big endian" if version >= 1 << 16 else ""
            raise ValueError(f"it has version {version}, neither 2 nor 3{order}")
        count, pairs = self._number("<Q"), self._number("<Q")
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            value = self._value(self._number("<I"))
            if value is not None:
                metadata[key] = value
        described = [self._described() for _ in range(count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}, no power of two")
        place = self._size - self._left
        return metadata, _sized(described, self._size - place - (-place % alignment))

    def _bytes(self, length: int) -> bytes:
        # Asked for before reading: a length may be any number in a file that is damaged.
        if length > self._left:
            raise ValueError("it is cut short")
        data = self._file.read(length)
        if len(data) < length:
            raise ValueError("it is cut short")
        self._left -= length
        return data

    def _skip(self, length: int) -> None:
        # Not read: in a file that is damaged it may be as long as all weights together.
        if length > self._left:
            raise ValueError("it is cut short")
        self._file.seek(length, os.SEEK_CUR)
        self._left -= length

    def _number(self, layout: str) -> Any:  # noqa: ANN401  what the file holds
        (value,) = struct.unpack(layout, self._bytes(struct.calcsize(layout)))
        return value

    def _string(self) -> str:
        # A name that is no text is still a name.
        return self._bytes(self._number("<Q")).decode(errors="replace")

    def _value(self, kind: int) -> Any:  # noqa: ANN401  what the file holds
        """Read a value; None for an array that is not kept."""
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<I"), self._number("<Q"))
        if kind not in _NUMBERS:
            raise ValueError(f"there is no type of values {kind}")
        return self._number(_NUMBERS[kind])

    def _array(self, kind: int, length: int) -> tuple[Any, ...] | None:
        if kind == _STRING:
            for _ in range(length):
                self._bytes(self._number("<Q"))
            return None
        if kind not in _NUMBERS:
            raise ValueError(f"there is no type of items {kind}")
        letter = _NUMBERS[kind][1]
        size = length * struct.calcsize(f"<{letter}")
        if length > _LONGEST:
            self._skip(size)
            return None
        return struct.unpack(f"<{length}{letter}", self._bytes(size))

    def _described(self) -> _Described:
        name = self._string()
        count = self._number("<I")
        if count > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {count} dimensions")
        sizes = tuple(self._number("<Q") for _ in range(count))
        return _Described(name, sizes[::-1], self._number("<I"), self._number("<Q"))


def _sized(described: list[_Described], room: int) -> list[Tensor]:
    """Return tensors with their bytes.

    Args:
        described: In the order of the header.
        room: Bytes of the file behind the header.

    Raises:
        ValueError: If a tensor ends behind the file, or its rows are no whole blocks.
    """
    starts = sorted({one.offset for one in described} | {max(room, 0)})
    ends = dict(pairwise(starts))
    tensors = []
    for one in described:
        if one.kind in TYPES:
            kind, values, block = TYPES[one.kind]
            if one.shape and one.shape[-1] % values:
                raise ValueError(
                    f"tensor {one.name!r} has rows of {one.shape[-1]} values in {kind}"
                )
            size = math.prod(one.shape) // values * block
        else:
            kind = f"type {one.kind}"
            size = ends.get(one.offset, one.offset) - one.offset
        if one.offset + size > room:
            raise ValueError(f"it is cut short, it ends before tensor {one.name!r} does")
        tensors.append(Tensor(one.name, one.shape, kind, size))
    return tensors
