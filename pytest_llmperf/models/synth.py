"""Makes a model: a real architecture and a working tokenizer around random weights.

It says nothing that makes sense, but it computes what a trained model of its shape computes, so it
serves to measure speed and memory, and divergence between builds, with nothing to download.

Two things are arranged rather than random. The first dimension of the hidden state is a constant:
every embedding has it, and no block reads or changes it. The output layer subtracts a multiple of
it from each token that no client should see generated (see :class:`Vocabulary`), so that every
generated token is a piece of text on its own. And the weights are scaled by their fan-in, so that
activations keep their size from block to block.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.vocabulary import BOS, EOS, UNK, vocabulary
from pytest_llmperf.plan.model import SynthSpec

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

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(spec: SynthSpec, folder: Path) -> Path:
    """Return the GGUF file of a model, made if it is not there yet.

    The same spec gives the same bytes. Several processes may ask at once: one makes the file and
    the others wait for it.

    Args:
        spec: Shape, quant and seed.
        folder: Where the file is kept; created if missing.

    Returns:
        ``folder/synth-llama-DIGEST.gguf``.

    Raises:
        ModelError: If the package ``gguf`` is missing, or the file cannot be written.
    """
    target = folder / f"synth-llama-{spec.digest()}.gguf"
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
        # A file cut short by a power failure would be taken for whole ever after.
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
    finally:
        writer.close()


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
    writer.add_embedding_length(spec.embedding)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_dimension_count(spec.head_size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(spec.vocab)

    words = vocabulary(spec.vocab)
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
