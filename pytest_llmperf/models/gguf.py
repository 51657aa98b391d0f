"""Writes and reads small GGUF files of plain floats, with nothing but numpy.

The layout is that of GGUF version 3, little endian: a header, key-value pairs, one description
for each tensor, and the values, each tensor starting at a multiple of 32 bytes. See
``docs/gguf.md`` in the repository of ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError

Value: TypeAlias = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
"""What a key can hold here. Whole numbers are written with 32 bits, as llama.cpp expects them."""

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32

# Types of values; only the first seven are written.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32, _INT32, _FLOAT32 = 4, 5, 6
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    _UINT32: "<I",
    _INT32: "<i",
    _FLOAT32: "<f",
    _BOOL: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

_TENSORS = {"float32": 0, "float16": 1}
"""Types of tensors by the name of their dtype: GGML_TYPE_F32 and GGML_TYPE_F16."""


def write_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Write a GGUF file.

    Args:
        path: The file; replaced if it is there.
        metadata: Values by key, written in this order. A whole number becomes a UINT32 by itself
            and an INT32 in a sequence; a sequence has one type, that of its first item.
        tensors: float32 or float16 arrays by name, written in this order. A matrix has the shape
            (rows out, columns in); GGUF names the dimensions the other way round.

    Raises:
        ValueError: If a value or a tensor has a type that is not written here.
        OSError: If the file cannot be written.
    """
    head = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(key, value)
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _TENSORS:
            raise ValueError(f"tensor {name}: {tensor.dtype} is neither float32 nor float16")
        sizes = tensor.shape[::-1]
        head += _string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        head += struct.pack("<IQ", _TENSORS[tensor.dtype.name], offset)
        offset += tensor.nbytes + _gap(tensor.nbytes)
    with path.open("wb") as file:
        file.write(head + bytes(_gap(len(head))))
        for tensor in tensors.values():
            file.write(tensor.astype(tensor.dtype.newbyteorder("<")).tobytes())
            file.write(bytes(_gap(tensor.nbytes)))


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Read a GGUF file of float32 and float16 tensors, all of it into memory.

    Args:
        path: The file.

    Returns:
        The metadata, sequences as lists, and the tensors in 32 bits, (rows out, columns in).

    Raises:
        ModelError: If the file cannot be read, is no GGUF or cut short, or holds other tensors.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if not data.startswith(_MAGIC):
        raise ModelError(f"{path} is no GGUF file, it starts with {data[:4]!r}: make it again")
    try:
        return _read(_Cursor(data, len(_MAGIC)))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}: make it again") from error


def _gap(size: int) -> int:
    """Return how many bytes lie between `size` and the next boundary."""
    return -size % _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Value) -> bytes:
    """Return a value with its type before it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind = _kind(key, value)
        return struct.pack("<I", kind) + _item(kind, value)
    if not value:
        raise ValueError(f"{key}: an empty sequence has no type")
    kind = _kind(key, value[0])
    if kind == _UINT32:
        kind = _INT32
    head = struct.pack("<IIQ", _ARRAY, kind, len(value))
    return head + b"".join(_item(kind, item) for item in value)


def _kind(key: str, value: object) -> int:
    """Return the type to write a value of no sequence with."""
    # A bool is an int too, so it is asked for first.
    for plain, kind in ((bool, _BOOL), (int, _UINT32), (float, _FLOAT32), (str, _STRING)):
        if isinstance(value, plain):
            return kind
    raise ValueError(f"{key}: {type(value).__name__} is not written")


def _item(kind: int, value: object) -> bytes:
    return _string(str(value)) if kind == _STRING else struct.pack(_NUMBERS[kind], value)


class _Cursor:
    """A place in a file that has been read."""

    __slots__ = ("data", "place")

    def __init__(self, data: bytes, place: int) -> None:
        self.data = data
        self.place = place

    def number(self, layout: str) -> Any:  # noqa: ANN401  what the file holds
        """Read one number."""
        (value,) = struct.unpack_from(layout, self.data, self.place)
        self.place += struct.calcsize(layout)
        return value

    def string(self) -> str:
        """Read a length and that many bytes of text."""
        length = self.number("<Q")
        if length > len(self.data) - self.place:
            raise ValueError("it is cut short")
        self.place += length
        return self.data[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:  # noqa: ANN401  what the file holds
        """Read a value of a type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.number("<I"), self.number("<Q")
            return [self.value(item) for _ in range(length)]
        if kind not in _NUMBERS:
            raise ValueError(f"there is no type {kind}")
        return self.number(_NUMBERS[kind])


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Read all that follows the magic."""
    version = cursor.number("<I")
    if version != _VERSION:
        raise ValueError(f"it has version {version}, not {_VERSION}")
    count, pairs = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    described = []
    for _ in range(count):
        name = cursor.string()
        sizes = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
        described.append((name, sizes[::-1], cursor.number("<I"), cursor.number("<Q")))
    start = cursor.place + _gap(cursor.place)
    types = {kind: np.dtype(name).newbyteorder("<") for name, kind in _TENSORS.items()}
    tensors = {}
    for name, shape, kind, offset in described:
        if kind not in types:
            raise ValueError(f"tensor {name} has type {kind}, neither F32 nor F16")
        size = int(np.prod(shape, dtype=np.int64))
        values = np.frombuffer(cursor.data, types[kind], size, start + offset)
        tensors[name] = values.reshape(shape).astype(np.float32)
    return metadata, tensors
