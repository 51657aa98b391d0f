"""Which model a config loads: a GGUF file, one the project makes, or one it quantizes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace

from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.plan.shapes import EVERY, PRESETS, ProjectorShape, Shape

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
"""Weight types of every matrix of a preset: those whose blocks the project writes itself."""

MIXTURES = ("Q4_K_M", "MXFP4_MOE")
"""Mixtures that a preset can be made in: ``llama-quantize`` gives each matrix the same type."""

SUPER_BLOCK = 256
"""Values in the largest block of those types; every matrix of a preset has rows of whole ones."""

LEAST_VOCAB = 512
"""Control tokens, 256 bytes, the characters of the text, and some room to merge them."""

GENERATION = 2
"""Part of the digest. Goes up with every change of the recipe or of the text, so that a file
made by the recipe before is never taken for one made by this."""

PRESET_GENERATION = 2
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
class PresetSpec:
    """A model of a published shape whose random weights are written as blocks of their type.

    Attributes:
        preset: Name in :data:`~pytest_llmperf.plan.shapes.PRESETS`.
        quant: Type of every matrix, one of :data:`BLOCK_QUANTS`, or one of :data:`MIXTURES`.
            Without one Q4_K; F16, and nothing else, for a projector.
        seed: Of the weights. Unlike :class:`SynthSpec`, two quants of a seed are two models.
        layers: Transformer blocks, if others than the preset has.
        vocab: Number of tokens, if another than the preset has.
        context: Trained context, in tokens. A projector has none.
        embedding: Of a projector, the width of the hidden state of the text model that it is
            for, if another than the preset has.

    Raises:
        PlanError: If there is no such preset or quant, a number is out of range, or the preset
            does not have what is set.
    """

    preset: str
    quant: str = ""
    seed: int = 1
    layers: int | None = None
    vocab: int | None = None
    context: int = 32768
    embedding: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise PlanError(
                f"no preset `{self.preset}`{nearest(self.preset, PRESETS)}: "
                f"there are {', '.join(PRESETS)}"
            )
        shape = PRESETS[self.preset]
        projects = isinstance(shape, ProjectorShape)
        object.__setattr__(self, "quant", self.quant or ("F16" if projects else "Q4_K"))
        quants = ("F16",) if projects else (*BLOCK_QUANTS, *MIXTURES)
        if self.quant not in quants:
            raise PlanError(
                f"`quant` of {self.preset} must be {'one of ' * (not projects)}"
                f"{', '.join(quants)}, not {self.quant!r}{nearest(self.quant, quants)}"
            )
        _at_least("seed", self.seed, 0)
        _at_least("context", self.context, 1)
        if self.layers is not None:
            _at_least("layers", self.layers, 1)
        if isinstance(shape, ProjectorShape):
            self._check_projector()
        else:
            self._check_text(shape)

    def _check_text(self, shape: Shape) -> None:
        """Check what only a text model has, or lacks."""
        if self.embedding is not None:
            raise PlanError(
                f"`embedding` of {self.preset} is {shape.embedding}, as published: "
                "leave it out, it can be set for a projector alone"
            )
        if self.vocab is not None:
            _at_least("vocab", self.vocab, LEAST_VOCAB)
        if self.quant == "MXFP4_MOE" and not shape.experts:
            raise PlanError(
                f"{self.preset} has no experts, and MXFP4_MOE keeps all else in Q8_0: "
                "use Q8_0, or a preset with experts"
            )
        # llama.cpp keeps a cache and a state for a hybrid, and neither may be empty.
        if shape.linear is not None and self.layers is not None and self.layers < EVERY:
            raise PlanError(
                f"`layers` of {self.preset} must be at least {EVERY}, not {self.layers}: "
                "the fourth is the first that has full attention"
            )

    def _check_projector(self) -> None:
        """Check what only a projector has, or lacks."""
        if self.vocab is not None:
            raise PlanError(
                f"{self.preset} is a projector and has no vocabulary: leave out `vocab`"
            )
        if self.embedding is not None:
            _at_least("embedding", self.embedding, 1)

    @property
    def shape(self) -> Shape | ProjectorShape:
        """The shape of the preset, with what is set otherwise here."""
        shape = PRESETS[self.preset]
        layers = self.layers or shape.layers
        if isinstance(shape, ProjectorShape):
            return replace(shape, layers=layers, projection=self.embedding or shape.projection)
        return replace(shape, layers=layers, vocab=self.vocab or shape.vocab)

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
        projector: Name of the model that makes tokens of images for this one, an ``mmproj`` file.

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
    projector: str | None = None

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


def is_projector(model: Model) -> bool:
    """Return whether a model is known to be a projector; what a file holds is not known here."""
    return isinstance(_shape_of(model), ProjectorShape)


def check_projector(model: Model, projector: Model) -> None:
    """Check that a projector is one and makes tokens of the width that a model reads.

    What a GGUF file holds is not known here, so files pass; the server refuses those.

    Args:
        model: Names the other as its projector.
        projector: The other.

    Raises:
        PlanError: If they do not go together.
    """
    reads = _shape_of(model)
    if isinstance(reads, ProjectorShape):
        raise PlanError(
            f"model `{model.name}` is a projector itself: "
            "name a projector in the text model that it is for"
        )
    writes = _shape_of(projector)
    if writes is None:
        return
    if not isinstance(writes, ProjectorShape):
        raise PlanError(
            f"projector `{projector.name}` of model `{model.name}` is a text model: "
            "name a model of the preset vision-tiny, or an mmproj file"
        )
    if reads is not None and reads.embedding != writes.projection:
        raise PlanError(
            f"projector `{projector.name}` makes tokens {writes.projection} wide and model "
            f"`{model.name}` reads {reads.embedding}: set embedding = {reads.embedding} in the "
            "`synth` of the projector"
        )


def _shape_of(model: Model) -> SynthSpec | Shape | ProjectorShape | None:
    """Return the shape of a model that is made, ``None`` for a file."""
    return model.synth.shape if isinstance(model.synth, PresetSpec) else model.synth


def _at_least(field: str, value: object, least: int) -> None:
    """Check a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        name = field.replace("_", "-")
        raise PlanError(f"`{name}` must be a whole number of at least {least}, not {value!r}")


def _around(value: int, step: int) -> str:
    """Name the multiples of `step` next to `value`."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
