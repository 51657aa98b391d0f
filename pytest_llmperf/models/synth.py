"""Makes a model: a real architecture and a working tokenizer around random weights.

It says nothing that makes sense, but it computes what a trained model of its shape computes, so it
serves to measure speed and memory, and divergence between builds, with nothing to download.

A small model is drawn here, in floats, and encoded. One of billions of weights, a preset, is drawn
as blocks of its type: see :mod:`~pytest_llmperf.models.presets`. What is not random in either is
told in :mod:`~pytest_llmperf.models.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pytest_llmperf.models.metadata import (
    describe,
    describe_shape,
    describe_tokenizer,
    load_gguf,
)
from pytest_llmperf.models.once import make_once
from pytest_llmperf.models.presets import check_room, write_preset
from pytest_llmperf.models.vocabulary import vocabulary
from pytest_llmperf.models.weights import (
    ATTENTION_SPREAD,
    CONSTANT,
    LOGIT_SPREAD,
    VOICE,
    Weights,
    blind,
    even,
    uniform,
)
from pytest_llmperf.plan.model import PresetSpec, SynthSpec


def make_model(spec: SynthSpec | PresetSpec, folder: Path) -> Path:
    """Return the GGUF file of a model, made if it is not there yet.

    The same spec gives the same bytes. Several processes may ask at once: one makes the file and
    the others wait for it.

    Args:
        spec: Shape, quant and seed, or a preset.
        folder: Where the file is kept; created if missing.

    Returns:
        ``folder/synth-llama-DIGEST.gguf``, of a preset ``folder/PRESET-QUANT-DIGEST.gguf``.

    Raises:
        ModelError: If the package ``gguf`` is missing, the disk is too full for a preset, or the
            file cannot be written.
    """
    if isinstance(spec, SynthSpec):
        return make_once(folder / f"synth-llama-{spec.digest()}.gguf", partial(_write, spec))

    def write(path: Path) -> None:
        check_room(spec, folder)
        write_preset(spec, path)

    return make_once(folder / f"{spec.preset}-{spec.quant}-{spec.digest()}.gguf", write)


def _write(spec: SynthSpec, path: Path) -> None:
    """Write the GGUF of `spec`, one tensor in memory at a time."""
    gguf = load_gguf()
    quant = gguf.GGMLQuantizationType[spec.quant]
    plain = gguf.GGMLQuantizationType.F32
    file_type = "ALL_F32" if spec.quant == "F32" else f"MOSTLY_{spec.quant}"
    writer = gguf.GGUFWriter(path, "llama")
    try:
        describe(writer, "synth-llama", gguf.LlamaFileType[file_type], gguf.GGML_QUANT_VERSION)
        writer.add_context_length(spec.context)
        describe_shape(writer, spec)
        writer.add_rope_dimension_count(spec.head_size)
        describe_tokenizer(writer, spec.vocab)
        tensors = list(_tensors(spec))
        types = [quant if len(tensor.shape) > 1 else plain for tensor in tensors]
        for tensor, kind in zip(tensors, types, strict=True):
            values, size = gguf.GGML_QUANT_SIZES[kind]
            length = math.prod(tensor.shape) // values * size
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), length, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, types, strict=True):
            writer.write_tensor_data(gguf.quants.quantize(tensor.make(), kind))
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to be written: its values are made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Weights]


def _tensors(spec: SynthSpec) -> Iterator[_Tensor]:
    """Yield the tensors in the order of the file; shapes are (rows out, columns in)."""
    width, hidden = spec.embedding, spec.feed_forward
    keys = spec.head_size * spec.kv_heads
    sharp = math.sqrt(ATTENTION_SPREAD)
    branch = 1 / math.sqrt(2 * spec.layers)  # all branches together add about one embedding

    yield _embeddings(spec)
    yield _output(spec)
    yield _Tensor("output_norm.weight", (width,), lambda: even(width))
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            yield _Tensor(f"{block}{norm}.weight", (width,), lambda: blind(width))
        for name, rows, columns, gain, writes in (
            ("attn_q", width, width, sharp, False),
            ("attn_k", keys, width, sharp, False),
            ("attn_v", keys, width, 1.0, False),
            ("attn_output", width, width, branch, True),
            ("ffn_gate", hidden, width, 1.0, False),
            ("ffn_up", hidden, width, 1.0, False),
            ("ffn_down", width, hidden, branch, True),
        ):
            yield _matrix(spec, f"{block}{name}.weight", (rows, columns), gain, writes=writes)


def _embeddings(spec: SynthSpec) -> _Tensor:
    """Make the rows that the hidden state starts from, the constant first."""
    name, shape = "token_embd.weight", (spec.vocab, spec.embedding)

    def make() -> Weights:
        values = uniform(spec.seed, name, shape, 1.0)
        values[:, 0] = CONSTANT
        return values

    return _Tensor(name, shape, make)


def _output(spec: SynthSpec) -> _Tensor:
    """Make the rows that logits come from; they read the constant to keep tokens back."""
    name, shape = "output.weight", (spec.vocab, spec.embedding)

    def make() -> Weights:
        values = uniform(spec.seed, name, shape, LOGIT_SPREAD / math.sqrt(spec.embedding))
        values[:, 0] = [VOICE[voice] for voice in vocabulary(spec.vocab).voices]
        return values

    return _Tensor(name, shape, make)


def _matrix(
    spec: SynthSpec, name: str, shape: tuple[int, int], gain: float, *, writes: bool
) -> _Tensor:
    """Make a random matrix; one that writes to the hidden state leaves the constant alone."""

    def make() -> Weights:
        values = uniform(spec.seed, name, shape, gain / math.sqrt(shape[1]))
        if writes:
            values[0] = 0
        return values

    return _Tensor(name, shape, make)
