"""Makes a model of a published shape, of any size, a piece of a tensor in memory at a time.

The weights are drawn as blocks of their type (see :mod:`~pytest_llmperf.models.blocks`). The
constant of :mod:`~pytest_llmperf.models.weights` has a block of its own: the rest of the first
block of each embedding and output row is zero.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.large import LargeTensor
from pytest_llmperf.models.layers import TextTensors, describe_text
from pytest_llmperf.models.metadata import describe, load_gguf
from pytest_llmperf.models.mixtures import FILE_TYPES
from pytest_llmperf.models.projector import describe_projector, projector_tensors
from pytest_llmperf.plan.model import PresetSpec
from pytest_llmperf.plan.shapes import ProjectorShape, Shape

_T = TypeVar("_T")

_PER_TOKEN = 40
"""Bytes that a token takes in the metadata, about: its text, score and type."""

_SETTLE = 1 << 26
"""Bytes that are left to the disk at once; a smaller file stays in memory."""


def weights_of(spec: PresetSpec) -> int:
    """Return the number of weights of a preset."""
    return sum(math.prod(tensor.shape) for tensor in preset_tensors(spec))


def size_of(spec: PresetSpec) -> int:
    """Return the bytes that the file of a preset takes, to a thousandth or a few kilobytes."""
    vocab = spec.shape.vocab if isinstance(spec.shape, Shape) else 0
    return sum(tensor.size for tensor in preset_tensors(spec)) + _PER_TOKEN * vocab


def check_room(spec: PresetSpec, folder: Path) -> None:
    """Check that the file of a preset fits on the disk of `folder`, which exists.

    Raises:
        ModelError: If it does not, with both figures.
        OSError: If the disk cannot be asked.
    """
    need, free = size_of(spec), shutil.disk_usage(folder).free
    if need > free:
        raise ModelError(
            f"{spec.preset} in {spec.quant} takes {need / 1e9:.2f} GB and {folder} has "
            f"{free / 1e9:.2f} GB free: free some space, choose another folder or set fewer layers"
        )


def write_preset(
    spec: PresetSpec, path: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Write the GGUF of a preset, a piece of a tensor in memory at a time.

    The same spec gives the same bytes.

    Args:
        spec: Preset, quant and seed.
        path: The file; replaced if it is there.
        progress: Called with the bytes of each piece of a tensor that is written.

    Raises:
        ModelError: If the package ``gguf`` is missing, or does not know a type.
        OSError: If the file cannot be written.
    """
    gguf = load_gguf()
    shape = spec.shape
    tensors = list(preset_tensors(spec))
    unknown = {one.kind for one in tensors} - set(gguf.GGMLQuantizationType.__members__)
    if unknown:
        raise ModelError(f"this gguf does not know {', '.join(unknown)}: pip install -U gguf")
    architecture = "clip" if isinstance(shape, ProjectorShape) else shape.architecture
    writer = gguf.GGUFWriter(path, architecture)
    try:
        file_type = gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES.get(spec.quant, spec.quant)}"]
        describe(writer, f"synth-{spec.preset}", file_type, gguf.GGML_QUANT_VERSION)
        if isinstance(shape, ProjectorShape):
            describe_projector(writer, shape)
        else:
            writer.add_context_length(spec.context)
            describe_text(writer, shape)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # The writer takes a tensor as a whole, which may be a gigabyte.
        (file,) = writer.fout
        unsettled = 0
        for begins, piece in _ahead(_pieces(tensors)):
            if begins:
                writer.write_padding(file, file.tell())
            file.write(piece.data)
            unsettled += piece.nbytes
            if unsettled >= _SETTLE:
                _settle(file)
                unsettled = 0
            if progress is not None:
                progress(piece.nbytes)
        writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _pieces(tensors: Iterable[LargeTensor]) -> Iterator[tuple[bool, NDArray[Any]]]:
    """Draw all tensors; tell with each piece whether a tensor begins with it."""
    for tensor in tensors:
        for number, piece in enumerate(tensor.pieces()):
            yield number == 0, piece


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Get each item while the one before it is in use: drawing takes as long as writing."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _settle(file: BinaryIO) -> None:
    """Let the disk have what is written, and memory forget it.

    A model of the size of the memory would push all else out of it. Where memory is given to a
    virtual machine as it is touched, this is also several times as fast.
    """
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def preset_tensors(spec: PresetSpec) -> Iterator[LargeTensor]:
    """Yield the tensors of a preset in the order of the file; none is drawn yet."""
    shape = spec.shape
    if isinstance(shape, ProjectorShape):
        return projector_tensors(shape, spec.seed)
    return iter(TextTensors(shape, spec.quant, spec.seed))
