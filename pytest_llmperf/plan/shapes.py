"""Shapes of models by name: small ones for tests, and those of published models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

Architecture: TypeAlias = Literal["llama", "qwen3moe", "qwen35", "qwen35moe"]
"""As llama.cpp calls them. The last two are hybrids: they mix two kinds of attention."""


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Shape of a layer with gated delta rule (Yang et al. 2024): a state instead of a cache.

    Attributes:
        key_heads: Heads of queries and keys, shared by groups of value heads.
        value_heads: Heads of values, each with a state of ``head_size`` squared.
        head_size: Width of each head.
        kernel: Positions that the convolution before it sees.
    """

    key_heads: int
    value_heads: int
    head_size: int = 128
    kernel: int = 4

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.key_heads * self.head_size

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.value_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a text model of up to billions of weights, as published ones have it.

    Attributes:
        architecture: ``llama``, dense; ``qwen3moe``, a mixture of experts; ``qwen35`` and
            ``qwen35moe``, the same two with linear attention in most layers.
        layers: Transformer blocks.
        embedding: Width of the hidden state.
        heads: Attention heads.
        kv_heads: Key and value heads.
        head_size: Width of one head; ``heads * head_size`` need not be ``embedding``.
        feed_forward: Width of the hidden layer of a dense feed-forward block. A mixture of
            experts has none; ``qwen3moe`` names it all the same.
        vocab: Number of tokens.
        experts: Experts of each block, 0 for a dense model.
        experts_used: Of those, how many work on a token.
        expert_feed_forward: Width of the hidden layer of one expert.
        shared_feed_forward: Width of that of the expert which works on every token, 0 for none.
        linear: Linear attention, in all layers but every fourth one.
    """

    architecture: Architecture
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int
    vocab: int
    experts: int = 0
    experts_used: int = 0
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    linear: LinearAttention | None = None


@dataclass(frozen=True, slots=True)
class ProjectorShape:
    """Shape of what makes tokens of an image: a vision transformer and a projector after it.

    Attributes:
        layers: Transformer blocks. The last is stored and not computed: LLaVA takes what enters it.
        embedding: Width of the hidden state of the vision transformer.
        heads: Attention heads.
        feed_forward: Width of the hidden layer of each feed-forward block.
        image: Height and width that every image is scaled to, in pixels.
        patch: Height and width of a patch; each becomes one token.
        projection: Width of the hidden state of the text model that the tokens are for.
    """

    layers: int
    embedding: int
    heads: int
    feed_forward: int
    image: int
    patch: int
    projection: int

    @property
    def patches(self) -> int:
        """Tokens of an image."""
        return (self.image // self.patch) ** 2


EVERY = 4
"""Of the layers of a hybrid model each fourth has full attention, the others linear attention."""

PRESETS: Mapping[str, Shape | ProjectorShape] = MappingProxyType(
    {
        "llama-10m": Shape("llama", 3, 512, 8, 4, 64, 1280, 2048),
        "llama-150m": Shape("llama", 16, 768, 12, 4, 64, 2048, 32000),
        "llama-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256),
        "llama-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256),
        "llama-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256),
        "qwen3-moe-tiny": Shape("qwen3moe", 2, 512, 6, 2, 128, 1536, 1024, 8, 2, 256),
        "qwen3-moe-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 6144, 151936, 128, 8, 768),
        "qwen35-tiny": Shape(
            *("qwen35", 4, 512, 2, 1, 256, 1024, 1024), linear=LinearAttention(2, 4)
        ),
        "qwen35-27b": Shape(
            *("qwen35", 64, 5120, 24, 4, 256, 17408, 248320), linear=LinearAttention(16, 48)
        ),
        "qwen35-moe-tiny": Shape(
            *("qwen35moe", 4, 512, 2, 1, 256, 0, 1024, 16, 2, 256, 256),
            linear=LinearAttention(2, 4),
        ),
        "qwen35-35b-a3b": Shape(
            *("qwen35moe", 40, 2048, 16, 2, 256, 0, 248320, 256, 8, 512, 512),
            linear=LinearAttention(16, 32),
        ),
        "vision-tiny": ProjectorShape(3, 128, 2, 256, 64, 16, 256),
    }
)
"""Shapes by name. The larger ones are those of Llama 3.2 1B and 3B, Llama 3.1 8B, Qwen3 30B-A3B,
Qwen3.5 27B and 35B-A3B, as their model cards publish them (35B-A3B by the card of Qwen3.6-35B-A3B,
which has its shape; the 48 value heads of 27B are a guess); of the last two the text model alone,
without the layer that drafts. All have an output matrix of their own, which the two of Llama 3.2
share with the embeddings."""
