"""The tensors of text models of all architectures, and what their files say of their shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.models.large import LargeTensor, floats, matrix, random_floats
from pytest_llmperf.models.metadata import describe_shape, describe_tokenizer
from pytest_llmperf.models.mixtures import type_of
from pytest_llmperf.models.vocabulary import vocabulary
from pytest_llmperf.models.weights import (
    ATTENTION_SPREAD,
    CONSTANT,
    LOGIT_SPREAD,
    VOICE,
    Weights,
    blind,
    even,
)
from pytest_llmperf.plan.shapes import EVERY, LinearAttention, Shape

_SHARP = math.sqrt(ATTENTION_SPREAD)

_SPEEDS = range(2, 10)
"""Heads of a delta rule forget at different speeds: by e in 4, 8, ... 512 tokens, about."""

_ROTATED = 64
"""Of each head of a hybrid, the values that are rotated by position."""

_SECTIONS = (11, 11, 10, 0)
"""Pairs of them that turn with time, height and width."""


def describe_text(writer: Any, shape: Shape) -> None:  # noqa: ANN401  gguf is not typed
    """Add the metadata of a text model, without its name, types and context."""
    describe_shape(writer, shape)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size if shape.linear is None else _ROTATED)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.expert_feed_forward)
    if shape.shared_feed_forward:
        writer.add_expert_shared_feed_forward_length(shape.shared_feed_forward)
    if (linear := shape.linear) is not None:
        writer.add_rope_dimension_sections(_SECTIONS)
        writer.add_rope_freq_base(1e7)
        writer.add_ssm_conv_kernel(linear.kernel)
        writer.add_ssm_state_size(linear.head_size)
        writer.add_ssm_group_count(linear.key_heads)
        writer.add_ssm_time_step_rank(linear.value_heads)
        writer.add_ssm_inner_size(linear.values)
        writer.add_uint32(f"{shape.architecture}.full_attention_interval", EVERY)
    describe_tokenizer(writer, shape.vocab)


class TextTensors:
    """The tensors of a text model.

    Args:
        shape: Of the model.
        quant: Type of the matrices, or a mixture.
        seed: Of the weights.
    """

    def __init__(self, shape: Shape, quant: str, seed: int) -> None:
        self._shape = shape
        self._seed = seed
        self._quant = quant
        # All branches together add about one embedding.
        self._branch = 1 / math.sqrt(2 * shape.layers)

    def __iter__(self) -> Iterator[LargeTensor]:
        """Yield all tensors in the order of the file; none is drawn yet."""
        shape = self._shape
        width, vocab = shape.embedding, shape.vocab
        yield self._matrix("token_embd", (vocab, width), math.sqrt(width), first=_constants)
        yield self._matrix("output", (vocab, width), LOGIT_SPREAD, first=_voices)
        yield _norm("output_norm", even, width)
        for layer in range(shape.layers):
            block = f"blk.{layer}."
            yield _norm(f"{block}attn_norm", blind, width)
            after = "ffn_norm" if shape.linear is None else "post_attention_norm"
            yield _norm(block + after, blind, width)
            if shape.linear is None or (layer + 1) % EVERY == 0:
                yield from self._attention(block)
            else:
                yield from self._linear_attention(block, shape.linear)
            if shape.experts:
                yield from self._experts(block)
            else:
                yield from self._gated(block, "", shape.feed_forward)

    def _attention(self, block: str) -> Iterator[LargeTensor]:
        shape = self._shape
        width, size = shape.embedding, shape.head_size
        heads, keys = shape.heads * size, shape.kv_heads * size
        # A norm of each head stands in for the scale of its matrix.
        normed = shape.architecture != "llama"
        # Queries of a hybrid come with a gate of their size for what the head returns.
        asked = heads if shape.linear is None else 2 * heads
        for name, rows in (("attn_q", asked), ("attn_k", keys)):
            yield self._matrix(block + name, (rows, width), 1.0 if normed else _SHARP)
            if normed:
                yield _norm(f"{block}{name}_norm", partial(even, value=_SHARP), size)
        yield self._matrix(f"{block}attn_v", (keys, width))
        yield self._matrix(f"{block}attn_output", (width, heads), self._branch, writes=True)

    def _linear_attention(self, block: str, linear: LinearAttention) -> Iterator[LargeTensor]:
        """Yield the tensors of a gated delta rule.

        Queries and keys are brought to length 1, so no state grows beyond what is written to it;
        each head forgets at a rate of its own, ``ssm_a``, which is negative.
        """
        width, heads = self._shape.embedding, linear.value_heads
        mixed = 2 * linear.keys + linear.values
        yield self._matrix(f"{block}attn_qkv", (mixed, width))
        yield self._matrix(f"{block}attn_gate", (linear.values, width))
        # Vectors, and what is convolved, are floats: llama.cpp computes them in nothing else.
        yield random_floats(self._seed, f"{block}ssm_conv1d.weight", (mixed, linear.kernel))
        yield floats(f"{block}ssm_dt.bias", (heads,), lambda: even(heads, 0.0))
        yield floats(f"{block}ssm_a", (heads,), lambda: _rates(heads))
        yield self._matrix(f"{block}ssm_alpha", (heads, width))
        yield self._matrix(f"{block}ssm_beta", (heads, width))
        yield _norm(f"{block}ssm_norm", even, linear.head_size)
        yield self._matrix(f"{block}ssm_out", (width, linear.values), self._branch, writes=True)

    def _experts(self, block: str) -> Iterator[LargeTensor]:
        """Yield the matrices of all experts and their router, and of the shared expert."""
        shape = self._shape
        width, experts, hidden = shape.embedding, shape.experts, shape.expert_feed_forward
        # In floats, as every converter leaves it.
        yield random_floats(self._seed, f"{block}ffn_gate_inp.weight", (experts, width))
        yield self._matrix(f"{block}ffn_gate_exps", (experts, hidden, width))
        yield self._matrix(f"{block}ffn_up_exps", (experts, hidden, width))
        # Their shares add up to 1, so what several say together is smaller than what one says.
        gain = self._branch * math.sqrt(shape.experts_used)
        yield self._matrix(f"{block}ffn_down_exps", (experts, width, hidden), gain, writes=True)
        if shape.shared_feed_forward:
            yield random_floats(self._seed, f"{block}ffn_gate_inp_shexp.weight", (width,))
            yield from self._gated(block, "_shexp", shape.shared_feed_forward)

    def _gated(self, block: str, suffix: str, hidden: int) -> Iterator[LargeTensor]:
        """Yield the matrices of a dense feed-forward block."""
        width = self._shape.embedding
        yield self._matrix(f"{block}ffn_gate{suffix}", (hidden, width))
        yield self._matrix(f"{block}ffn_up{suffix}", (hidden, width))
        yield self._matrix(f"{block}ffn_down{suffix}", (width, hidden), self._branch, writes=True)

    def _matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        gain: float = 1.0,
        *,
        writes: bool = False,
        first: Callable[[int], NDArray[np.float64]] | None = None,
    ) -> LargeTensor:
        """Make a matrix in the type that the quant gives it; arguments are those of `matrix`."""
        full = f"{name}.weight"
        kind = type_of(self._quant, full, self._shape)
        return matrix(self._seed, full, shape, kind, gain, writes=writes, first=first)


def _norm(name: str, make: Callable[[int], Weights], width: int) -> LargeTensor:
    """Make the weights of a norm."""
    return floats(f"{name}.weight", (width,), lambda: make(width))


def _rates(heads: int) -> Weights:
    """Return how fast each head forgets: powers of two, the same on every machine."""
    return -np.ldexp(np.float32(1), [-_SPEEDS[head % len(_SPEEDS)] for head in range(heads)])


def _constants(vocab: int) -> NDArray[np.float64]:
    """Return the first value of each embedding."""
    return np.full(vocab, CONSTANT)


def _voices(vocab: int) -> NDArray[np.float64]:
    """Return the weight of the constant in each logit."""
    return np.array([VOICE[voice] for voice in vocabulary(vocab).voices])
