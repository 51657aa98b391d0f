"""Makes a model: a real architecture and a working tokenizer around random weights.

It says nothing that makes sense, but it computes what a trained model of its shape computes, so it
serves to measure speed and memory, and divergence between builds, with nothing to download.

Two things are arranged rather than random. The first dimension of the hidden state is a constant:
every embedding has it, and no block reads or changes it. The output layer subtracts a multiple of
it from each token that no client should see generated (see :class:`Vocabulary`), so that every
generated token is a piece of text on its own. And the weights are scaled by their fan-in, so that
activations keep their size from block to block.

A small model is drawn in floats and encoded. One of billions of weights, a preset, is drawn as
blocks of its type (see :mod:`~pytest_llmperf.models.blocks`), a piece at a time. There the constant
has a block of its own: the rest of the first block of each embedding and output row is zero.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.blocks import (
    BLOCKS,
    EVEN,
    Blocks,
    random_blocks,
    row_bytes,
    single_blocks,
)
from pytest_llmperf.models.vocabulary import BOS, EOS, UNK, vocabulary
from pytest_llmperf.plan.model import PresetSpec, Shape, SynthSpec

_Weights: TypeAlias = NDArray[np.float32]

_log = logging.getLogger(__name__)

_CONSTANT = 2.0
"""First value of each embedding. The largest of its row, so every quant keeps it."""

_VOICE = {"often": 0.0, "rarely": -3.0, "never": -24.0}
"""Its weight in the logit of a token. The constant is about 1.4 after the last norm, so tokens of
the other two kinds trail by about 4 and 34: out of reach of sampling, yet with a logarithm of
their probability that is a number in 32 bits, as the perplexity of real text needs."""

_LOGIT_SPREAD = 2.0
"""Standard deviation of the logits, near that of trained models, so that quality metrics move."""

_ATTENTION_SPREAD = 2.0
"""Standard deviation of the attention scores: each position attends to few others, not to all."""

_PIECE = 1 << 24
"""Bytes of a large tensor that are drawn at once, about."""

_PER_TOKEN = 40
"""Bytes that a token takes in the metadata, about: its text, score and type."""

_MIXTURES = {"Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S"}
"""Names in ``general.file_type`` where they differ from the type's: it knows mixtures only."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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
    name = f"{spec.preset}-{spec.quant}" if isinstance(spec, PresetSpec) else "synth-llama"
    target = folder / f"{name}-{spec.digest()}.gguf"
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_file():
                return target
            _log.info("making %s: %s", target, spec)
            part = target.with_suffix(".part")
            try:
                if isinstance(spec, PresetSpec):
                    check_room(spec, folder)
                    write_preset(spec, part)
                else:
                    _write(spec, part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(
            f"cannot make the model {target}: {error.strerror or error}; "
            "free some space or choose another cache folder"
        ) from error
    return target


def _write(spec: SynthSpec, path: Path) -> None:
    """Write the GGUF of `spec`, one tensor in memory at a time."""
    gguf = _gguf()
    quant = gguf.GGMLQuantizationType[spec.quant]
    plain = gguf.GGMLQuantizationType.F32
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _describe(gguf, writer, spec)
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
        _settle(writer)
    finally:
        writer.close()


def weights_of(spec: PresetSpec) -> int:
    """Return the number of weights of a preset."""
    return sum(math.prod(tensor.shape) for tensor in _large_tensors(spec))


def size_of(spec: PresetSpec) -> int:
    """Return the bytes that the file of a preset takes, to a thousandth or a few kilobytes."""
    shape = spec.shape
    return sum(tensor.size for tensor in _large_tensors(spec)) + _PER_TOKEN * shape.vocab


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
        ModelError: If the package ``gguf`` is missing.
        OSError: If the file cannot be written.
    """
    gguf = _gguf()
    writer = gguf.GGUFWriter(path, spec.shape.architecture)
    try:
        _describe_preset(gguf, writer, spec)
        tensors = list(_large_tensors(spec))
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
        for tensor in tensors:
            writer.write_padding(file, file.tell())
            for piece in tensor.pieces():
                file.write(piece.data)
                if progress is not None:
                    progress(piece.nbytes)
        writer.write_padding(file, file.tell())
        _settle(writer)
    finally:
        writer.close()


def _settle(writer: Any) -> None:  # noqa: ANN401  gguf is not typed
    """Let the disk have all: a file cut short by a power failure would be taken for whole."""
    for file in writer.fout or ():
        file.flush()
        os.fsync(file.fileno())


def _gguf() -> Any:  # noqa: ANN401  the package is not typed for mypy --strict
    """Import the package ``gguf``, which is optional."""
    try:
        import gguf  # noqa: PLC0415  optional, and slow to import
    except ImportError as error:
        raise ModelError(
            "making a model needs the package `gguf`: pip install 'pytest-llmperf[embedded]'"
        ) from error
    return gguf


def _describe(gguf: Any, writer: Any, spec: SynthSpec) -> None:  # noqa: ANN401  as above
    """Add the metadata: shape, tokenizer and chat template."""
    file_type = "ALL_F32" if spec.quant == "F32" else f"MOSTLY_{spec.quant}"
    writer.add_name("synth-llama")
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(spec.context)
    _describe_shape(writer, spec)
    _describe_tokenizer(writer, spec.vocab)


def _describe_preset(gguf: Any, writer: Any, spec: PresetSpec) -> None:  # noqa: ANN401  as above
    """Add the metadata of a preset."""
    shape = spec.shape
    writer.add_name(f"synth-{spec.preset}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_MIXTURES.get(spec.quant, spec.quant)}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(spec.context)
    _describe_shape(writer, shape)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.expert_feed_forward)
    _describe_tokenizer(writer, shape.vocab)


def _describe_shape(writer: Any, shape: SynthSpec | Shape) -> None:  # noqa: ANN401  as above
    """Add what both architectures have."""
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)


def _describe_tokenizer(writer: Any, vocab: int) -> None:  # noqa: ANN401  as above
    """Add the tokens and the chat template."""
    words = vocabulary(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in words.tokens])
    writer.add_token_scores(list(words.scores))
    writer.add_token_types(list(words.types))
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    # Neither is added, so that text to tokens and back is the same text.
    writer.add_add_bos_token(value=False)
    writer.add_add_space_prefix(value=False)
    writer.add_chat_template(_CHAT_TEMPLATE)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to be written: its values are made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], _Weights]


def _tensors(spec: SynthSpec) -> Iterator[_Tensor]:
    """Yield the tensors in the order of the file; shapes are (rows out, columns in)."""
    width, hidden = spec.embedding, spec.feed_forward
    keys = spec.head_size * spec.kv_heads
    sharp = math.sqrt(_ATTENTION_SPREAD)
    branch = 1 / math.sqrt(2 * spec.layers)  # all branches together add about one embedding

    yield _embeddings(spec)
    yield _output(spec)
    yield _Tensor("output_norm.weight", (width,), lambda: np.ones(width, np.float32))
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            yield _Tensor(f"{block}{norm}.weight", (width,), lambda: _blind(width))
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

    def make() -> _Weights:
        values = _uniform(spec.seed, name, shape, 1.0)
        values[:, 0] = _CONSTANT
        return values

    return _Tensor(name, shape, make)


def _output(spec: SynthSpec) -> _Tensor:
    """Make the rows that logits come from; they read the constant to keep tokens back."""
    name, shape = "output.weight", (spec.vocab, spec.embedding)

    def make() -> _Weights:
        values = _uniform(spec.seed, name, shape, _LOGIT_SPREAD / math.sqrt(spec.embedding))
        values[:, 0] = [_VOICE[voice] for voice in vocabulary(spec.vocab).voices]
        return values

    return _Tensor(name, shape, make)


def _matrix(
    spec: SynthSpec, name: str, shape: tuple[int, int], gain: float, *, writes: bool
) -> _Tensor:
    """Make a random matrix; one that writes to the hidden state leaves the constant alone."""

    def make() -> _Weights:
        values = _uniform(spec.seed, name, shape, gain / math.sqrt(shape[1]))
        if writes:
            values[0] = 0
        return values

    return _Tensor(name, shape, make)


def _blind(width: int) -> _Weights:
    """Make the weights of a norm that hides the constant from its block."""
    values = np.ones(width, np.float32)
    values[0] = 0
    return values


def _even(width: int, value: float) -> _Weights:
    """Make the weights of a norm that scales all alike."""
    return np.full(width, value, np.float32)


def _uniform(seed: int, name: str, shape: tuple[int, ...], deviation: float) -> _Weights:
    """Draw uniform values of mean 0 and the given standard deviation.

    Taken from the raw output of PCG64, which numpy promises never to change; its distributions
    may change with any release, and then the same spec would give another file.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    count = math.prod(shape)
    raw = np.random.PCG64(int.from_bytes(key[:16], "big")).random_raw((count + 3) // 4)
    steps = raw.astype("<u8").view("<u2")[:count].astype(np.float32)
    steps -= np.float32(32767.5)
    steps *= np.float32(deviation * math.sqrt(3) / 32768)
    return steps.reshape(shape)


# --- presets ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LargeTensor:
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


def _large_tensors(spec: PresetSpec) -> Iterator[_LargeTensor]:
    """Yield the tensors of a preset in the order of the file."""
    shape = spec.shape
    width, heads = shape.embedding, shape.heads * shape.head_size
    keys = shape.kv_heads * shape.head_size
    sharp = math.sqrt(_ATTENTION_SPREAD)
    branch = 1 / math.sqrt(2 * shape.layers)

    yield _large(
        spec, "token_embd.weight", (shape.vocab, width), math.sqrt(width), first=_constants
    )
    yield _large(spec, "output.weight", (shape.vocab, width), _LOGIT_SPREAD, first=_voices)
    yield _plain("output_norm.weight", (width,), lambda: np.ones(width, np.float32))
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            yield _plain(f"{block}{norm}.weight", (width,), lambda: _blind(width))
        # A norm of each head stands in for the scale of its matrix.
        normed = shape.architecture == "qwen3moe"
        for name, rows in (("attn_q", heads), ("attn_k", keys)):
            gain = 1.0 if normed else sharp
            yield _large(spec, f"{block}{name}.weight", (rows, width), gain)
            if normed:
                norm = f"{block}{name}_norm.weight"
                yield _plain(norm, (shape.head_size,), lambda: _even(shape.head_size, sharp))
        yield _large(spec, f"{block}attn_v.weight", (keys, width), 1.0)
        yield _large(spec, f"{block}attn_output.weight", (width, heads), branch, writes=True)
        yield from _feed_forward(spec, block, branch)


def _feed_forward(spec: PresetSpec, block: str, branch: float) -> Iterator[_LargeTensor]:
    """Yield the matrices of a feed-forward block, or of all its experts and their router."""
    shape = spec.shape
    width = shape.embedding
    if not shape.experts:
        hidden = shape.feed_forward
        yield _large(spec, f"{block}ffn_gate.weight", (hidden, width), 1.0)
        yield _large(spec, f"{block}ffn_up.weight", (hidden, width), 1.0)
        yield _large(spec, f"{block}ffn_down.weight", (width, hidden), branch, writes=True)
        return
    experts, hidden = shape.experts, shape.expert_feed_forward
    router, routes = f"{block}ffn_gate_inp.weight", (experts, width)
    # In floats, as every converter leaves it.
    yield _plain(router, routes, lambda: _uniform(spec.seed, router, routes, width**-0.5))
    yield _large(spec, f"{block}ffn_gate_exps.weight", (experts, hidden, width), 1.0)
    yield _large(spec, f"{block}ffn_up_exps.weight", (experts, hidden, width), 1.0)
    # Their shares add up to 1, so what several say together is smaller than what one says.
    gain = branch * math.sqrt(shape.experts_used)
    down = (experts, width, hidden)
    yield _large(spec, f"{block}ffn_down_exps.weight", down, gain, writes=True)


def _plain(name: str, shape: tuple[int, ...], make: Callable[[], _Weights]) -> _LargeTensor:
    """Make a tensor of floats, small enough for one piece."""

    def pieces() -> Iterator[NDArray[Any]]:
        yield make().astype("<f4", copy=False)

    return _LargeTensor(name, shape, "F32", 4 * math.prod(shape), pieces)


def _constants(vocab: int) -> NDArray[np.float64]:
    """Return the first value of each embedding."""
    return np.full(vocab, _CONSTANT)


def _voices(vocab: int) -> NDArray[np.float64]:
    """Return the weight of the constant in each logit."""
    return np.array([_VOICE[voice] for voice in vocabulary(vocab).voices])


def _large(
    spec: PresetSpec,
    name: str,
    shape: tuple[int, ...],
    gain: float,
    *,
    writes: bool = False,
    first: Callable[[int], NDArray[np.float64]] | None = None,
) -> _LargeTensor:
    """Make a matrix, or one of each expert, of random blocks.

    Args:
        spec: Quant and seed.
        name: As in GGUF.
        shape: As for :class:`_LargeTensor`.
        gain: Standard deviation of the values, over one by the root of the columns.
        writes: Whether it writes to the hidden state, and leaves the constant alone.
        first: Gives the first value of each row, which has a block of its own then.
    """
    kind = spec.quant
    rows, columns = math.prod(shape[:-1]), shape[-1]
    width = row_bytes(kind, columns)
    step = max(EVEN, _PIECE // width // EVEN * EVEN)

    def pieces() -> Iterator[Blocks]:
        key = hashlib.sha256(f"{spec.seed}/{name}".encode()).digest()
        source = np.random.SFC64(int.from_bytes(key[:16], "big"))
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

    return _LargeTensor(name, shape, kind, rows * width, pieces)
