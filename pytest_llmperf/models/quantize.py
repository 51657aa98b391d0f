"""Makes a model from another one, with every matrix in one weight type.

The values are computed by ggml itself, in the library that the wheel ``xllamacpp`` brings, so the
file holds what ``llama-quantize --pure`` writes. ggml ends the process on a mistake, so it works in
a process of its own::

    python -m pytest_llmperf.models.quantize SOURCE TARGET TYPE
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.locate import parts, sha256
from pytest_llmperf.models.once import make_once
from pytest_llmperf.plan.model import FLOATS

_Bytes: TypeAlias = NDArray[np.uint8]

GENERATION = 1
"""Part of a file's name. Goes up with every change here that changes the files."""

_MEND = "pip install 'pytest-llmperf[embedded]'"

_FLOAT_ONLY = re.compile(
    r"_norm\.weight|ffn_gate_inp|altup|laurel|per_layer_model_proj|position_embd|token_types"
    r"|pos_embd|rel_pos|attn_rel_b|ssm_conv1d|shortconv\.conv|patch_embd|patch_merger|sam\."
    r"|time_mix_(?:first|lerp_fused|decay_w[12]|[wavg][012])\.weight"
)
"""Matrices that every type of ``llama-quantize`` leaves as they are: norms, routers of experts,
positions, convolutions and other small ones, which llama.cpp in part computes in floats only."""

_FILE_TYPES = {"Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S", "Q3_K": "Q3_K_S", "MXFP4": "MXFP4_MOE"}
"""Names in ``general.file_type`` where they differ: it knows mixtures only. The smallest one is
nearest to a single type."""

_STEP = 1 << 22
"""Values that are quantized at once: 16 MiB of floats."""


def quantize_model(source: Path, kind: str, cache: Path) -> Path:
    """Return the GGUF file of a model in another weight type, made if it is not there yet.

    Every matrix becomes `kind`; vectors stay as they are, and so do those few matrices that
    ``llama-quantize`` leaves alone too. The same source and wheel give the same bytes. Several
    processes may ask at once: one makes the file and the others wait for it.

    Args:
        source: A GGUF file of floats; of a split one, its first part.
        kind: One of :data:`~pytest_llmperf.plan.model.WEIGHT_TYPES`.
        cache: The file is kept in ``cache/models``, and the hash of the source beside that.

    Returns:
        ``cache/models/NAME-KIND-DIGEST.gguf``, absolute.

    Raises:
        ModelError: If the extra ``embedded`` is not installed, the source is no GGUF of floats,
            a matrix does not fit the type, or the file cannot be written.
    """
    version = _wheel_version()
    parent = sha256(source, cache)
    digest = hashlib.sha256(json.dumps([GENERATION, parent, kind, version]).encode()).hexdigest()
    name = re.sub(r"-\d{5}-of-\d{5}\Z", "", source.stem)
    target = cache.absolute() / "models" / f"{name}-{kind}-{digest[:12]}.gguf"
    return make_once(target, lambda path: _run(source.absolute(), path, kind))


def _wheel_version() -> str:
    """Return the version of xllamacpp, having seen that all that is needed is installed."""
    try:
        version = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"quantizing a model needs the package `xllamacpp`: {_MEND}") from error
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"quantizing a model needs the package `gguf`: {_MEND}")
    return version


def _run(source: Path, target: Path, kind: str) -> None:
    """Quantize in a process of its own."""
    # -P: nothing in the current folder may pose as a package.
    command = [sys.executable, "-P", "-m", __name__, str(source), str(target), kind]
    done = subprocess.run(  # noqa: S603  this interpreter and this module
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        # Without it ggml's last words are a list of addresses.
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace").strip().splitlines()
    reason = said[-1].strip() if said else f"exit status {done.returncode}"
    if done.returncode < 0:
        reason = f"{signal.Signals(-done.returncode).name}: {reason}"
    raise ModelError(f"{source} cannot be quantized to {kind}: {reason}")


# --- in the process of its own ------------------------------------------------------------


class _Ggml:
    """The functions of ggml that quantize.

    Raises:
        ModelError: If the wheel does not have them.
    """

    def __init__(self, folder: Path, number: int, kind: str) -> None:
        self._number = number
        library = _library(folder)
        self._chunk = library.ggml_quantize_chunk
        self._chunk.restype = ctypes.c_size_t
        floats, sizes = ctypes.c_void_p, [ctypes.c_int64] * 3
        self._chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *sizes, floats]
        self._row = library.ggml_row_size
        self._row.restype = ctypes.c_size_t
        self._row.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.ggml_type_name.restype = ctypes.c_char_p
        library.ggml_type_name.argtypes = [ctypes.c_int]
        named = (library.ggml_type_name(number) or b"").decode()
        if named.upper() != kind:
            raise ModelError(f"this xllamacpp calls type {number} {named!r}, not {kind}: {_MEND}")
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_init(number)

    def row_size(self, values: int) -> int:
        """Return the bytes of a row."""
        return int(self._row(self._number, values))

    def quantize(self, values: NDArray[np.float32], into: _Bytes) -> None:
        """Quantize rows.

        Args:
            values: (rows, values of a row), in one piece.
            into: (rows, bytes of a row), in one piece.
        """
        rows, columns = values.shape
        done = self._chunk(
            self._number, values.ctypes.data, into.ctypes.data, 0, rows, columns, None
        )
        if done != into.nbytes:
            raise ModelError(f"ggml wrote {done} bytes instead of {into.nbytes}")


def _library(folder: Path) -> ctypes.CDLL:
    """Load the library of a wheel that has ggml in it."""
    needed = ("ggml_quantize_chunk", "ggml_quantize_init", "ggml_row_size", "ggml_type_name")
    for path in sorted(folder.glob("*.so")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ModelError(f"cannot load {path.name} of xllamacpp: {error}") from error
        if all(hasattr(library, name) for name in needed):
            return library
    raise ModelError(
        f"this xllamacpp lets nobody call ggml_quantize_chunk: {_MEND} installs one that does"
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the source, and whether it is to be quantized."""

    tensor: Any  # gguf.ReaderTensor
    quantized: bool


def write_quantized(source: Path, target: Path, kind: str) -> None:
    """Write a model in another weight type, one tensor in memory at a time.

    Args:
        source: A GGUF file of floats; of a split one, its first part.
        target: The file to write, in one piece.
        kind: As for :func:`quantize_model`.

    Raises:
        ModelError: If a package or a function is missing, or a tensor does not fit.
    """
    try:
        import gguf  # noqa: PLC0415  optional, and slow to import
    except ImportError as error:
        raise ModelError(f"quantizing a model needs the package `gguf`: {_MEND}") from error
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ModelError(f"quantizing a model needs the package `xllamacpp`: {_MEND}")
    if kind not in gguf.GGMLQuantizationType.__members__:
        raise ModelError(f"this gguf does not know the type {kind}: pip install --upgrade gguf")
    number = gguf.GGMLQuantizationType[kind]
    ggml = _Ggml(Path(found.origin).parent, int(number), kind)
    readers = [gguf.GGUFReader(part) for part in parts(source)]
    block, _ = gguf.GGML_QUANT_SIZES[number]
    tensors = [_judge(tensor, kind, block) for reader in readers for tensor in reader.tensors]
    writer = gguf.GGUFWriter(target, str(readers[0].fields["general.architecture"].contents()))
    try:
        _copy_metadata(gguf, readers[0], writer)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES.get(kind, kind)}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for part in tensors:
            shape = [int(size) for size in reversed(part.tensor.shape)]
            size, dtype = int(part.tensor.n_bytes), part.tensor.tensor_type
            if part.quantized:
                size, dtype = math.prod(shape[:-1]) * ggml.row_size(shape[-1]), number
            # With the shape in values the type of numpy has no say.
            plain = np.dtype(np.float32)
            writer.add_tensor_info(part.tensor.name, shape, plain, size, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in tensors:
            data = part.tensor.data
            writer.write_tensor_data(_quantize(gguf, ggml, part.tensor) if part.quantized else data)
    finally:
        writer.close()


def _judge(tensor: Any, kind: str, block: int) -> _Part:  # noqa: ANN401  gguf is not typed
    """Decide on a tensor; shapes are as in the file, the row length first."""
    columns, *others = (int(size) for size in tensor.shape)
    if math.prod(others) == 1 or _FLOAT_ONLY.search(tensor.name):
        return _Part(tensor, quantized=False)
    if tensor.tensor_type.name not in FLOATS:
        raise ModelError(
            f"tensor {tensor.name} is {tensor.tensor_type.name} already, and rounding twice adds "
            f"up: quantize from the original, in {', '.join(FLOATS)}"
        )
    if columns % block:
        raise ModelError(
            f"tensor {tensor.name} has rows of {columns} values, no multiple of {block}, "
            f"the block of {kind}: use a type with a smaller block"
        )
    return _Part(tensor, quantized=True)


def _copy_metadata(gguf: Any, reader: Any, writer: Any) -> None:  # noqa: ANN401  as above
    """Copy all keys but those that the writer writes, or that speak of types or parts."""
    own = ("GGUF.", "split.")
    for key, field in reader.fields.items():
        if key.startswith(own) or key in {
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        }:
            continue
        value = field.contents()
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif field.types[0] != gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, value, field.types[0])
        elif value:  # the package cannot write an empty array
            writer.add_key_value(key, value, field.types[0], field.types[-1])


def _quantize(gguf: Any, ggml: _Ggml, tensor: Any) -> _Bytes:  # noqa: ANN401  as above
    """Return the bytes of a tensor, (rows, bytes of a row)."""
    columns = int(tensor.shape[0])
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    into = np.empty((len(data), ggml.row_size(columns)), np.uint8)

    def work(rows: slice) -> None:
        values = gguf.quants.dequantize(data[rows], tensor.tensor_type)
        values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"tensor {tensor.name} holds values that are no finite numbers")
        ggml.quantize(values, into[rows])

    # Rows are quantized each on its own, so how they are shared out changes no byte.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(work, _slices(len(data), max(1, _STEP // columns))))
    return into


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def main(arguments: Sequence[str]) -> int:
    """Run the program; see the module's text.

    Args:
        arguments: Source, target and type.

    Returns:
        The exit status.
    """
    source, target, kind = arguments
    try:
        write_quantized(Path(source), Path(target), kind)
    except ModelError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
