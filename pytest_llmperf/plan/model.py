"""Which model a config loads: a GGUF file, one the project makes, or one it quantizes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Literal

from pytest_llmperf.errors import PlanError, nearest

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Weight types that a model can be made in: those the package `gguf` can encode and that
every build since 2025 runs on every device."""

BLOCK = 32
"""Values in one block of each of those types, and of each type of quantized KV cache."""

FLOATS = ("F32", "F16", "BF16")
"""Weight types of a model that another one can be quantized from."""

WEIGHT_TYPES = (
    *("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    *("Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4"),
)
"""Weight types that a model can be quantized to from another one: each of them ggml encodes
without an importance matrix."""

BLOCK_QUANTS = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
"""Weight types that a preset can be made in: those whose blocks the project writes itself."""

SUPER_BLOCK = 256
"""Values in the largest block of those types; every matrix of a preset has rows of whole ones."""

LEAST_VOCAB = 512
"""Control tokens, 256 bytes, the characters of the text, and some room to merge them."""

GENERATION = 1
"""Part of the digest. Goes up with every change of the recipe or of the text, so that a file
made by the recipe before is never taken for one made by this."""

PRESET_GENERATION = 1
"""The same for presets."""

_MIXTURE = re.compile(r"(?P<kind>\w+?)_(?:S|M|L|XS|XL|MOE)")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")


@dataclass(frozen=True, slots=True)
class SynthSpec:
    """Shape of a model that the project makes itself: random weights, real architecture.

    Attributes:
        layers: Transformer blocks.
        embedding: Width of the hidden state.
        heads: Attention heads; ``embedding / heads`` is the head size.
        kv_heads: Key and value heads, shared by groups of attention heads.
        feed_forward: Width of the hidden layer of each feed-forward block.
        vocab: Number of tokens, exactly.
        context: Trained context, in tokens.
        quant: Type of the weights, one of :data:`QUANTS`.
        seed: Of the weights. The same seed and shape in two quants is one model, rounded twice.

    Raises:
        PlanError: If a value is out of range or does not fit the others.
    """

    layers: int = 4
    embedding: int = 256
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    vocab: int = 2048
    context: int = 32768
    quant: str = "Q8_0"
    seed: int = 1

    def __post_init__(self) -> None:
        for field in ("layers", "embedding", "heads", "kv_heads", "feed_forward", "context"):
            self._at_least(field, 1)
        self._at_least("vocab", LEAST_VOCAB)
        self._at_least("seed", 0)
        if self.quant not in QUANTS:
            raise PlanError(
                f"`quant` must be one of {', '.join(QUANTS)}, not {self.quant!r}: "
                "models in other types are made from an F16 one with llama-quantize"
            )
        # The head size is a multiple of the block, so that the KV cache can be quantized too.
        if self.embedding % (self.heads * BLOCK):
            step = self.heads * BLOCK
            raise PlanError(
                f"`embedding` ({self.embedding}) must be a multiple of {BLOCK} per head: with "
                f"`heads` {self.heads} use {_around(self.embedding, step)}"
            )
        if self.heads % self.kv_heads:
            fitting = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise PlanError(
                f"`kv-heads` ({self.kv_heads}) must divide `heads` ({self.heads}): "
                f"use one of {', '.join(map(str, fitting))}"
            )
        if self.feed_forward % BLOCK:
            raise PlanError(
                f"`feed-forward` ({self.feed_forward}) must be a multiple of {BLOCK}: "
                f"use {_around(self.feed_forward, BLOCK)}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.embedding // self.heads

    def digest(self) -> str:
        """Return 12 hexadecimal digits that stand for the content of the file to be made."""
        shape = json.dumps([GENERATION, asdict(self)], sort_keys=True)
        return hashlib.sha256(shape.encode()).hexdigest()[:12]

    def _at_least(self, field: str, least: int) -> None:
        _at_least(field, getattr(self, field), least)


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a model of billions of weights, as published ones have it.

    Attributes:
        architecture: ``llama``, dense, or ``qwen3moe``, a mixture of experts.
        layers: Transformer blocks.
        embedding: Width of the hidden state.
        heads: Attention heads.
        kv_heads: Key and value heads.
        head_size: Width of one head; ``heads * head_size`` need not be ``embedding``.
        feed_forward: Width of the hidden layer of a dense feed-forward block. A mixture of
            experts has none and names it all the same.
        vocab: Number of tokens.
        experts: Experts of each block, 0 for a dense model.
        experts_used: Of those, how many work on a token.
        expert_feed_forward: Width of the hidden layer of one expert.
    """

    architecture: Literal["llama", "qwen3moe"]
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


PRESETS: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-10m": Shape("llama", 3, 512, 8, 4, 64, 1280, 2048),
        "llama-150m": Shape("llama", 16, 768, 12, 4, 64, 2048, 32000),
        "llama-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256),
        "llama-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256),
        "llama-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256),
        "qwen3-moe-tiny": Shape("qwen3moe", 2, 512, 6, 2, 128, 1536, 1024, 8, 2, 256),
        "qwen3-moe-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 6144, 151936, 128, 8, 768),
    }
)
"""Shapes by name. The larger ones are those of Llama 3.2 1B and 3B, Llama 3.1 8B and Qwen3 30B-A3B,
all with an output matrix of their own, which the two of Llama 3.2 share with the embeddings."""


@dataclass(frozen=True, slots=True)
class PresetSpec:
    """A model of a published shape whose random weights are written as blocks of their type.

    Attributes:
        preset: Name in :data:`PRESETS`.
        quant: Type of every matrix, one of :data:`BLOCK_QUANTS`.
        seed: Of the weights. Unlike :class:`SynthSpec`, two quants of a seed are two models.
        layers: Transformer blocks, if others than the preset has.
        vocab: Number of tokens, if another than the preset has.
        context: Trained context, in tokens.

    Raises:
        PlanError: If there is no such preset or quant, or a number is out of range.
    """

    preset: str
    quant: str = "Q4_K"
    seed: int = 1
    layers: int | None = None
    vocab: int | None = None
    context: int = 32768

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise PlanError(
                f"no preset `{self.preset}`{nearest(self.preset, PRESETS)}: "
                f"there are {', '.join(PRESETS)}"
            )
        if self.quant not in BLOCK_QUANTS:
            raise PlanError(
                f"`quant` of a preset must be one of {', '.join(BLOCK_QUANTS)}, "
                f"not {self.quant!r}{nearest(self.quant, BLOCK_QUANTS)}"
            )
        _at_least("seed", self.seed, 0)
        _at_least("context", self.context, 1)
        if self.layers is not None:
            _at_least("layers", self.layers, 1)
        if self.vocab is not None:
            _at_least("vocab", self.vocab, LEAST_VOCAB)

    @property
    def shape(self) -> Shape:
        """The shape of the preset, with what is set otherwise here."""
        shape = PRESETS[self.preset]
        return replace(shape, layers=self.layers or shape.layers, vocab=self.vocab or shape.vocab)

    def digest(self) -> str:
        """Return 12 hexadecimal digits that stand for the content of the file to be made."""
        content = [PRESET_GENERATION, asdict(self.shape), self.quant, self.seed, self.context]
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Model:
    """A name in ``[models]``.

    Attributes:
        name: As in ``[models.NAME]``.
        file: File name or path of a GGUF, looked up in the model folders; of a split one, its
            first part.
        synth: Shape of a model to be made instead, or the name of one.
        source: Name of the model to be quantized instead; the key ``from``.
        quantize: What its matrices become, all of them, one of :data:`WEIGHT_TYPES`.
        sha256: What the file must hash to, 64 hexadecimal digits, kept in lower case.
        help: One line for people.

    Raises:
        PlanError: If there is not exactly one of ``file``, ``synth`` and ``from`` with
            ``quantize``, or no such weight type, or no such hash.
    """

    name: str
    file: str | None = None
    synth: SynthSpec | PresetSpec | None = None
    sha256: str | None = None
    help: str = ""
    source: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        keys = {"file": self.file, "synth": self.synth, "from": self.source}
        found = [f"`{key}`" for key, value in keys.items() if value is not None]
        if len(found) != 1:
            raise PlanError(
                f"model `{self.name}` needs one of `file`, `synth`, and `from` with `quantize`, "
                f"has {' and '.join(found) or 'none'}"
            )
        self._check_quantize()
        if self.file is not None and not self.file.strip():
            raise PlanError(f"`file` of model `{self.name}` is empty: name a GGUF file")
        if self.sha256 is not None:
            if not _SHA256.match(self.sha256):
                raise PlanError(
                    f"`sha256` of model `{self.name}` must be 64 hexadecimal digits, "
                    f"not {self.sha256!r}: print them with sha256sum"
                )
            object.__setattr__(self, "sha256", self.sha256.lower())

    def _check_quantize(self) -> None:
        """Check that there is a weight type where a model is quantized, and only there."""
        types = ", ".join(WEIGHT_TYPES)
        if self.quantize is None:
            if self.source is not None:
                raise PlanError(
                    f"model `{self.name}` has `from` and lacks `quantize`: name one of {types}"
                )
            return
        if self.source is None:
            raise PlanError(
                f"model `{self.name}` has `quantize` and lacks `from`: "
                "name the model in [models] that is to be quantized"
            )
        if self.quantize in WEIGHT_TYPES:
            return
        mixture = _MIXTURE.fullmatch(self.quantize.upper())
        if mixture and mixture["kind"] in WEIGHT_TYPES:
            raise PlanError(
                f"`quantize` of model `{self.name}`: {self.quantize} is a mixture of types, and "
                f"here every matrix gets the same type: write {mixture['kind']}, or make the "
                "mixture with llama-quantize and name its file with `file`"
            )
        raise PlanError(
            f"`quantize` of model `{self.name}` must be one of {types}, "
            f"not {self.quantize!r}{nearest(self.quantize.upper(), WEIGHT_TYPES)}"
        )


def _at_least(field: str, value: object, least: int) -> None:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        name = field.replace("_", "-")
        raise PlanError(f"`{name}` must be a whole number of at least {least}, not {value!r}")


def _around(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
