"""Trains the tiny language model that quality is gated on, and writes it as GGUF.

The model is a Llama of 3.7 million parameters over a vocabulary of 1024 tokens. It learns from what
every Python brings along, the sources and docstrings of the standard library, so there is nothing
to download. Docstrings of some modules are kept from it and written to a text file of about 250 KB,
on which it is then judged; the text in ``pytest_llmperf/data/text.txt`` is kept from it too. With
PyTorch and a GPU, in the repository's root::

    PYTHONPATH=. python scripts/train_tiny.py

Every row of every matrix is a multiple of 256 values, so llama-quantize finds nothing that it
cannot write as Q2_K to Q6_K. To see that llama.cpp computes what was trained, without PyTorch::

    PYTHONPATH=. python scripts/train_tiny.py --check path/to/llama-perplexity
    PYTHONPATH=. python scripts/train_tiny.py --check xllamacpp

The same seed on the same machine gives nearly the same model, not the same bytes: sums on a GPU are
taken in no fixed order. The texts and the vocabulary depend on the version of Python alone.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import itertools
import math
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.models.gguf import Value, read_gguf, write_gguf
from pytest_llmperf.models.text import text
from pytest_llmperf.models.tokenizer import Tokenizer
from pytest_llmperf.models.vocabulary import BOS, EOS, UNK, Vocabulary, learn

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]
Forward: TypeAlias = Callable[[Ids], Floats]
"""Tokens (sequences, positions) to logits (sequences, positions, vocabulary)."""

_DATA = Path("pytest_llmperf") / "data"
_CHUNK = 512
"""Tokens of a chunk of llama-perplexity, its option ``-c``."""


# --- text -------------------------------------------------------------------------------------

_QUALITY_SIZE = 250_000
_VALIDATION_SIZE = 60_000
_LEAST_TRAINING = 3_000_000
_LEAST_DOC = 40

# Packages that distributions leave out, tables, and what is no source of its own.
_LEFT_OUT = frozenset(
    [
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "tkinter",
        "turtle",
        "turtledemo",
    ]
)
_NOTICE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
_HEAD = """\
Docstrings of the standard library of Python {version}, collected by scripts/train_tiny.py.
Copyright (c) 2001 Python Software Foundation; All Rights Reserved. Used under the PSF License
Agreement, version 2: https://docs.python.org/3/license.html

"""


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the standard library.

    Attributes:
        name: Its path below the library's folder, with slashes.
        source: All of it.
        docs: Its docstrings in order, indentation taken off, those of a line or less left out.
    """

    name: str
    source: str
    docs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is learnt from, what the best state is chosen by, and what the model is judged on."""

    train: tuple[str, ...]
    validation: str
    quality: str


def modules(folder: Path) -> list[Module]:
    """Return the modules of a standard library in the order of their names.

    Args:
        folder: That of ``os.py``. Tests, third-party packages and generated files are left out.
    """
    wanted = sys.stdlib_module_names - _LEFT_OUT
    files: list[Path] = []
    for top in folder.iterdir():
        if top.stem in wanted:
            files += [top] if top.suffix == ".py" else top.rglob("*.py")
    found = []
    for file in files:
        path = file.relative_to(folder)
        if {"test", "tests", "site-packages"} & set(path.parts):
            continue
        try:
            source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the few that are written in another encoding
            continue
        found.append(Module(path.as_posix(), source, tuple(_docstrings(source))))
    return sorted(found, key=lambda module: module.name)


def _docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a module from its first line to its last."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        doc = ast.get_docstring(node) or ""
        if len(doc) >= _LEAST_DOC:
            yield "\n".join(line.rstrip() for line in doc.strip().splitlines())


def corpus(
    found: Sequence[Module], quality: int = _QUALITY_SIZE, validation: int = _VALIDATION_SIZE
) -> Corpus:
    """Split modules in three; which goes where depends on their names.

    Args:
        found: Modules by name.
        quality: Characters of docstrings to be judged on, taken from modules that name no holder
            of rights of their own, and in ASCII, so that the text can be shipped and read.
        validation: Characters of docstrings to choose the best state by.
    """
    order = sorted(found, key=lambda module: hashlib.sha256(module.name.encode()).digest())
    judged, rest = _held(order, quality, lambda module: not _NOTICE.search(module.source))
    chosen, rest = _held(rest, validation, lambda _: True)
    train = []
    for module in sorted(rest, key=lambda module: module.name):
        train += [module.source, "\n\n".join(module.docs)]
    head = _HEAD.format(version=".".join(map(str, sys.version_info[:2])))
    return Corpus(
        tuple(document for document in train if document),
        "\n\n".join(doc for _, docs in sorted(chosen.items()) for doc in docs) + "\n",
        head + "\n\n".join(doc for _, docs in sorted(judged.items()) for doc in docs) + "\n",
    )


def _held(
    order: Sequence[Module], size: int, fits: Callable[[Module], bool]
) -> tuple[dict[str, list[str]], list[Module]]:
    """Take docstrings of the first modules until there are `size` characters.

    Returns:
        The docstrings by module, and the modules that none were taken from.
    """
    held: dict[str, list[str]] = {}
    rest = []
    for module in order:
        docs = [doc for doc in module.docs if doc.isascii()]
        if size <= 0 or not docs or not fits(module):
            rest.append(module)
            continue
        held[module.name] = []
        for doc in docs:
            if len(doc) <= size:
                held[module.name].append(doc)
            size -= len(doc) + 2
    return held, rest


def vocabulary_of(documents: Sequence[str], size: int) -> Vocabulary:
    """Learn the vocabulary from the ASCII part of documents; the rest is left to bytes."""
    return learn(re.sub(r"[^\n -~]+", "\n", "\n".join(documents)), size)


def encode_all(tokenizer: Tokenizer, documents: Sequence[str]) -> Ids:
    """Return the tokens of documents, each followed by the end-of-text token."""
    found: list[int] = []
    for document in documents:
        found += [*tokenizer.encode(document), EOS]
    return np.array(found, np.int64)


# --- the model --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a Llama; sizes are numbers of values.

    Attributes:
        vocab: Tokens.
        context: Positions that it is trained for.
        embedding: Width of the hidden state.
        layers: Blocks.
        heads: Heads of attention.
        kv_heads: Heads of keys and values; each serves ``heads / kv_heads`` heads in a row.
        feed_forward: Width inside the feed-forward part.
        epsilon: Added to the mean square in a norm.
        rope_base: Base of the angles of rotary embeddings.
    """

    vocab: int = 1024
    context: int = 1024
    embedding: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    epsilon: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_size(self) -> int:
        """Values of one head."""
        return self.embedding // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by GGUF name; a matrix is (rows out, columns in)."""
        width, hidden = self.embedding, self.feed_forward
        keys = self.head_size * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, width),
            "output.weight": (self.vocab, width),
            "output_norm.weight": (width,),
        }
        for layer in range(self.layers):
            for name, sizes in (
                ("attn_norm", (width,)),
                ("attn_q", (width, width)),
                ("attn_k", (keys, width)),
                ("attn_v", (keys, width)),
                ("attn_output", (width, width)),
                ("ffn_norm", (width,)),
                ("ffn_gate", (hidden, width)),
                ("ffn_up", (hidden, width)),
                ("ffn_down", (width, hidden)),
            ):
                shapes[f"blk.{layer}.{name}.weight"] = sizes
        return shapes

    def frequencies(self) -> NDArray[np.float64]:
        """Return the angle that each pair of a head turns by from one position to the next."""
        return self.rope_base ** (-np.arange(0, self.head_size, 2) / self.head_size)


def metadata(shape: Shape, words: Vocabulary) -> dict[str, Value]:
    """Return the GGUF metadata of a model."""
    return {
        "general.architecture": "llama",
        "general.name": "tiny-quality",
        "general.description": "Trained on the standard library of Python for tests of quality",
        "general.file_type": 1,  # mostly F16
        "general.quantization_version": 2,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.embedding,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.feed_forward,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.epsilon,
        "llama.rope.dimension_count": shape.head_size,
        "llama.rope.freq_base": shape.rope_base,
        "llama.vocab_size": shape.vocab,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words.tokens,
        "tokenizer.ggml.scores": words.scores,
        "tokenizer.ggml.token_type": words.types,
        "tokenizer.ggml.unknown_token_id": UNK,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        # Windows of the training start anywhere, so no token marks a start here either.
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def export(
    path: Path, shape: Shape, words: Vocabulary, weights: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """Write a model, matrices in F16 and norms in F32, and return the weights as written."""
    rounded = {
        name: weights[name].astype(np.float16 if len(sizes) > 1 else np.float32)
        for name, sizes in shape.tensors().items()
    }
    write_gguf(path, metadata(shape, words), rounded)
    return {name: values.astype(np.float32) for name, values in rounded.items()}


def load(path: Path) -> tuple[Shape, Tokenizer, dict[str, Floats]]:
    """Read a model that :func:`export` wrote."""
    keys, weights = read_gguf(path)
    shape = Shape(
        vocab=keys["llama.vocab_size"],
        context=keys["llama.context_length"],
        embedding=keys["llama.embedding_length"],
        layers=keys["llama.block_count"],
        heads=keys["llama.attention.head_count"],
        kv_heads=keys["llama.attention.head_count_kv"],
        feed_forward=keys["llama.feed_forward_length"],
        epsilon=keys["llama.attention.layer_norm_rms_epsilon"],
        rope_base=keys["llama.rope.freq_base"],
    )
    names = ("tokens", "scores", "token_type")
    return shape, Tokenizer(*(keys[f"tokenizer.ggml.{name}"] for name in names)), weights


def reference(shape: Shape, weights: Mapping[str, Floats]) -> Forward:
    """Return the model as numpy computes it, against which PyTorch and llama.cpp are held.

    Rotary embeddings turn the values 2i and 2i+1 of a head, as llama.cpp does for the architecture
    ``llama``; so the rows of ``attn_q`` and ``attn_k`` are stored in the order they are used in.
    """

    def norm(state: Floats, name: str) -> Floats:
        mean = np.mean(state * state, axis=-1, keepdims=True)
        result: Floats = state / np.sqrt(mean + np.float32(shape.epsilon)) * weights[name]
        return result

    def sequence(ids: Ids) -> Floats:
        length = len(ids)
        angles = np.arange(length)[:, None, None] * shape.frequencies()
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

        def split(values: Floats, heads: int) -> Floats:
            return values.reshape(length, heads, shape.head_size)

        def turn(values: Floats) -> Floats:
            even, odd = values[..., 0::2], values[..., 1::2]
            pairs = np.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
            return pairs.reshape(values.shape)

        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        shared = shape.heads // shape.kv_heads
        state = weights["token_embd.weight"][ids]
        for layer in range(shape.layers):
            block = {
                name.split(".")[2]: values
                for name, values in weights.items()
                if name.startswith(f"blk.{layer}.")
            }
            seen = norm(state, f"blk.{layer}.attn_norm.weight")
            query = turn(split(seen @ block["attn_q"].T, shape.heads))
            key = turn(split(seen @ block["attn_k"].T, shape.kv_heads)).repeat(shared, axis=1)
            value = split(seen @ block["attn_v"].T, shape.kv_heads).repeat(shared, axis=1)
            scores = query.transpose(1, 0, 2) @ key.transpose(1, 2, 0)
            scores = scores / np.float32(math.sqrt(shape.head_size)) + future
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            mixed = (scores @ value.transpose(1, 0, 2)).transpose(1, 0, 2)
            state = state + mixed.reshape(length, shape.embedding) @ block["attn_output"].T
            seen = norm(state, f"blk.{layer}.ffn_norm.weight")
            gate = seen @ block["ffn_gate"].T
            with np.errstate(over="ignore"):  # infinite below the line is what is meant: zero
                gate = gate / (1 + np.exp(-gate))
            gate = gate * (seen @ block["ffn_up"].T)
            state = state + gate @ block["ffn_down"].T
        logits: Floats = norm(state, "output_norm.weight") @ weights["output.weight"].T
        return logits

    return lambda windows: np.stack([sequence(ids) for ids in windows])


# --- perplexity -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The perplexity of a text, its standard error, and the chunks it was taken over."""

    value: float
    error: float
    chunks: int

    def __str__(self) -> str:
        return f"{self.value:.4f} +/- {self.error:.5f} over {self.chunks} chunks"


def chunks_of(ids: Sequence[int] | Ids, most: int | None = None) -> Ids:
    """Cut tokens into chunks as llama-perplexity does: no overlap, the rest left out.

    Returns:
        An array (chunks, 512).
    """
    count = min(len(ids) // _CHUNK, most or len(ids))
    return np.array(ids[: count * _CHUNK], np.int64).reshape(count, _CHUNK)


def perplexity(chunks: Ids, forward: Forward) -> Perplexity:
    """Return the perplexity as llama-perplexity computes it for a model that adds no BOS.

    Each chunk is read from its start, and of its second half every token but the first is scored:
    255 of 512. The error is that of the mean of their logarithms, times the perplexity.
    """
    losses = []
    for batch in np.array_split(chunks, math.ceil(len(chunks) / 16)):
        logits = forward(batch)[:, _CHUNK // 2 : -1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=-1))
        said = np.take_along_axis(logits, batch[:, _CHUNK // 2 + 1 :, None], axis=-1)[..., 0]
        losses.append((total - said).ravel())
    return _summary(np.concatenate(losses), len(chunks))


def _summary(losses: NDArray[np.float64], chunks: int) -> Perplexity:
    value = float(np.exp(losses.mean()))
    return Perplexity(value, value * float(losses.std()) / math.sqrt(len(losses) - 1), chunks)


def unigram(train: Ids, chunks: Ids, vocab: int) -> Perplexity:
    """Return the perplexity of a model that knows only how often each token comes."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    losses = -np.log(counts / counts.sum())[chunks[:, _CHUNK // 2 + 1 :]].ravel()
    return _summary(losses, len(chunks))


def without_last_newline(document: str) -> str:
    """Return what llama.cpp's option ``-f`` reads of a text: one newline at the end is dropped."""
    return document.removesuffix("\n")


# --- training ---------------------------------------------------------------------------------

_RATE = 2e-3
_WARM_UP = 100
_DECAY = 0.1
_DROPOUT = 0.1
_CLIP = 1.0
_START = 0.02
_PROGRESS_S = 5.0
_CHECKS = 20
_DEFAULTS = {"cuda": (3000, 32), "cpu": (300, 4)}
"""Steps and windows a step, by kind of device."""


def torch_logits(
    torch: Any,  # noqa: ANN401  PyTorch is not there where types are checked
    shape: Shape,
    weights: Mapping[str, Any],
    ids: Any,  # noqa: ANN401  as above
    dropout: float = 0.0,
) -> Any:  # noqa: ANN401  as above
    """Compute logits (sequences, positions, vocabulary) of tokens (sequences, positions)."""
    linear, drop = torch.nn.functional.linear, torch.nn.functional.dropout
    batch, length = ids.shape
    shared = shape.heads // shape.kv_heads
    places = torch.arange(length, device=ids.device, dtype=torch.float64)
    turns = torch.tensor(shape.frequencies().tolist(), device=ids.device, dtype=torch.float64)
    angles = places[:, None, None] * turns  # (positions, 1, pairs): the same for every head
    cos, sin = angles.cos().float(), angles.sin().float()

    def norm(state: Any, name: str) -> Any:  # noqa: ANN401  as above
        mean = state.square().mean(-1, keepdim=True)
        return state * torch.rsqrt(mean + shape.epsilon) * weights[name]

    def turn(values: Any) -> Any:  # noqa: ANN401  as above
        even, odd = values[..., 0::2], values[..., 1::2]
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return pairs.flatten(-2)

    state = drop(torch.nn.functional.embedding(ids, weights["token_embd.weight"]), dropout)
    for layer in range(shape.layers):
        block = f"blk.{layer}."

        def heads(seen: Any, name: str, count: int, block: str = block) -> Any:  # noqa: ANN401
            values = linear(seen, weights[f"{block}{name}.weight"])
            return values.reshape(batch, length, count, shape.head_size)

        seen = norm(state, f"{block}attn_norm.weight")
        value = heads(seen, "attn_v", shape.kv_heads)
        # Turning is done in 32 bits, attention in the type of the values.
        query = turn(heads(seen, "attn_q", shape.heads)).to(value.dtype)
        key = turn(heads(seen, "attn_k", shape.kv_heads)).to(value.dtype)
        key = key.repeat_interleave(shared, dim=2)
        value = value.repeat_interleave(shared, dim=2)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, shape.embedding)
        state = state + drop(linear(mixed, weights[f"{block}attn_output.weight"]), dropout)
        seen = norm(state, f"{block}ffn_norm.weight")
        gate = torch.nn.functional.silu(linear(seen, weights[f"{block}ffn_gate.weight"]))
        gate = gate * linear(seen, weights[f"{block}ffn_up.weight"])
        state = state + drop(linear(gate, weights[f"{block}ffn_down.weight"]), dropout)
    return linear(norm(state, "output_norm.weight"), weights["output.weight"])


def torch_forward(
    torch: Any,  # noqa: ANN401  PyTorch is not there where types are checked
    shape: Shape,
    weights: Mapping[str, Floats],
    device: str,
) -> Forward:
    """Return the model as PyTorch computes it in 32 bits."""
    there = {name: torch.from_numpy(values).to(device) for name, values in weights.items()}

    def forward(windows: Ids) -> Floats:
        with torch.no_grad():
            logits = torch_logits(torch, shape, there, torch.from_numpy(windows).to(device))
        result: Floats = logits.cpu().numpy()
        return result

    return forward


def _initial(torch: Any, shape: Shape, seed: int, device: str) -> dict[str, Any]:  # noqa: ANN401
    """Draw the weights to start from; norms are one."""
    generator = torch.Generator().manual_seed(seed)
    branch = _START / math.sqrt(2 * shape.layers)
    weights = {}
    for name, sizes in shape.tensors().items():
        if len(sizes) == 1:
            values = torch.ones(sizes)
        else:
            deviation = branch if "attn_output" in name or "ffn_down" in name else _START
            values = torch.randn(sizes, generator=generator) * deviation
        weights[name] = values.to(device).requires_grad_()
    return weights


def _optimizer(torch: Any, weights: Sequence[Any]) -> Any:  # noqa: ANN401  as above
    """Make the optimizer; norms are not pulled towards zero."""
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": _DECAY},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95))


def _rate(step: int, done: float) -> float:
    """Return the learning rate: a short rise, then down along a cosine to zero."""
    return _RATE * min((step + 1) / _WARM_UP, 1.0) * (1 + math.cos(math.pi * done)) / 2


def train(
    shape: Shape,
    ids: Ids,
    held: Ids,
    *,
    steps: int,
    batch: int,
    minutes: float,
    seed: int,
    device: str,
) -> dict[str, Floats]:
    """Train a model and return its best weights in 32 bits.

    The rate falls along a cosine that ends after `steps`, or after `minutes` where that is sooner.

    Args:
        shape: Of the model.
        ids: Tokens to learn from.
        held: Tokens that the best state is chosen by, at least one context and one more.
        steps: Updates, at most.
        batch: Windows of ``shape.context`` tokens in an update.
        minutes: Time, at most.
        seed: Of weights, windows and dropout.
        device: ``cuda`` or ``cpu``.

    Raises:
        SystemExit: If the loss is no number any more.
    """
    torch: Any = importlib.import_module("torch")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = _initial(torch, shape, seed, device)
    optimizer = _optimizer(torch, list(weights.values()))
    stream, window = torch.from_numpy(ids).to(device), torch.arange(shape.context + 1).to(device)
    rows = (len(held) - 1) // shape.context
    starts = torch.arange(rows)[:, None].to(device) * shape.context
    exam = torch.from_numpy(held).to(device)[starts + window]

    def loss_of(windows: Any, dropout: float) -> Any:  # noqa: ANN401  as above
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = torch_logits(torch, shape, weights, windows[:, :-1], dropout)
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), windows[:, 1:].flatten()
        )

    def examine() -> float:
        with torch.no_grad():
            losses = [float(loss_of(part, 0.0)) * len(part) for part in exam.split(batch)]
        return sum(losses) / rows

    best, kept = math.inf, {name: w.detach().clone() for name, w in weights.items()}
    began = told = time.monotonic()
    due, seen = 0.0, math.nan
    for step in itertools.count():
        now = time.monotonic()
        done = min(max(step / steps, (now - began) / (60 * minutes)), 1.0)
        if done >= min(due, 1.0):
            due += 1 / _CHECKS
            seen = examine()
            if seen < best:
                best, kept = seen, {name: w.detach().clone() for name, w in weights.items()}
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, done)
        places = torch.randint(len(ids) - shape.context, (batch, 1), generator=generator)
        loss = loss_of(stream[places.to(device) + window], _DROPOUT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), _CLIP)
        optimizer.step()
        if now - told > _PROGRESS_S:
            told, shown = now, float(loss)
            if not math.isfinite(shown):
                raise SystemExit(f"step {step}: the loss is {shown}: try another --seed")
            _say(
                f"step {step}/{steps}, {now - began:.0f} s: loss {shown:.3f}, "
                f"held out {seen:.3f} (best {best:.3f})"
            )
    _say(f"{step} steps in {time.monotonic() - began:.0f} s: held out {seen:.3f}, best {best:.3f}")
    return {name: values.cpu().numpy() for name, values in kept.items()}


# --- llama.cpp --------------------------------------------------------------------------------

_TOLERANCE = 0.005
"""llama.cpp keeps activations and the KV cache in 16 bits; relative difference of perplexities."""
_ATTEMPTS = 10
"""llama-perplexity of b11434 often exits with status 0 before its last lines are written."""
_ESTIMATE = re.compile(r"Final estimate: PPL = (\d+\.\d+)")


def check(model: Path, document: Path, tool: str, most: int) -> int:
    """Compare perplexities of numpy and llama.cpp, and return the exit status.

    Args:
        model: A GGUF file that this script wrote.
        document: The text.
        tool: Path of a llama-perplexity, or ``xllamacpp`` for the installed wheel.
        most: Chunks to compare on.
    """
    shape, tokenizer, weights = load(model)
    ids = tokenizer.encode(without_last_newline(document.read_text(encoding="utf-8")))
    chunks = chunks_of(ids, most)
    expected = perplexity(chunks, reference(shape, weights))
    _say(f"numpy: {expected}")
    if tool == "xllamacpp":
        found = _embedded(model, tokenizer, chunks, shape.vocab)
    else:
        found = _estimate(tool, model, document, len(chunks))
    difference = abs(found / expected.value - 1)
    _say(f"llama.cpp: {found:.4f}, which is {difference:.4%} off; {_TOLERANCE:.1%} is allowed")
    return int(difference > _TOLERANCE)


def _estimate(tool: str, model: Path, document: Path, chunks: int) -> float:
    """Return the final estimate of a llama-perplexity."""
    command = [tool, "-m", str(model), "-f", str(document), "-c", str(_CHUNK), "-b", str(_CHUNK)]
    command += ["--chunks", str(chunks)]
    for _ in range(_ATTEMPTS):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  the tool that was named
        if estimate := _ESTIMATE.search(answer.stdout + answer.stderr):
            return float(estimate[1])
    raise SystemExit(f"{tool} gave no estimate: {answer.stderr[-500:]}")


def _embedded(model: Path, tokenizer: Tokenizer, chunks: Ids, vocab: int) -> float:
    """Return the perplexity that the wheel's server gives, asked token by token."""
    import httpx  # noqa: PLC0415  not needed for training
    import xllamacpp  # noqa: PLC0415  as above

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 2 * _CHUNK
    params.n_parallel = 1
    params.port = 0
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    losses = []
    with httpx.Client(base_url=server.listening_address, timeout=60) as client:

        def ask(path: str, **body: object) -> Any:  # noqa: ANN401  what the server says
            return client.post(path, json=body).raise_for_status().json()

        content = tokenizer.decode(chunks.ravel().tolist())
        theirs = ask("/tokenize", content=content, add_special=False, parse_special=False)
        ours = tokenizer.encode(content)
        if theirs["tokens"] != ours:
            raise SystemExit("llama.cpp cuts the text into other tokens than the training did")
        _say(f"{len(ours)} tokens are the same")
        # The token that is said is forced, for one that ends the answer comes without
        # probabilities. These are of the logits before that.
        (plain,) = tokenizer.encode("e")
        for chunk in chunks.tolist():
            for place in range(_CHUNK // 2, _CHUNK - 1):
                answer = ask(
                    "/completion",
                    prompt=chunk[: place + 1],
                    n_predict=1,
                    temperature=0,
                    logit_bias=[[plain, 1000]],
                    n_probs=vocab,
                    cache_prompt=True,
                )
                said = answer["completion_probabilities"][0]["top_logprobs"]
                losses += [-row["logprob"] for row in said if row["id"] == chunk[place + 1]]
    if len(losses) != len(chunks) * (_CHUNK - 1 - _CHUNK // 2):
        raise SystemExit("the server did not give the probability of every token")
    return math.exp(sum(losses) / len(losses))


# --- the program ------------------------------------------------------------------------------


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=_DATA / "tiny-quality.gguf", help="the model (%(default)s)"
    )
    parser.add_argument(
        "--text-out",
        type=Path,
        default=_DATA / "quality.txt",
        help="the text that it is judged on (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and order (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    parser.add_argument("--steps", type=int, help="updates, at most (3000, on a CPU 300)")
    parser.add_argument("--batch", type=int, help="windows of 1024 tokens a step (32, CPU: 4)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="time for training, at most (%(default)s)"
    )
    parser.add_argument(
        "--text-only", action="store_true", help="write the text and stop; needs no PyTorch"
    )
    parser.add_argument(
        "--check",
        metavar="TOOL",
        help="train nothing: compare the perplexity of --out on --text-out with that of this "
        "llama-perplexity, or of the wheel, `xllamacpp`",
    )
    parser.add_argument(
        "--chunks", type=int, default=8, help="chunks of 512 tokens for --check (%(default)s)"
    )
    return parser.parse_args()


def _texts() -> Corpus:
    """Collect the texts of the running Python."""
    found = corpus(modules(Path(sysconfig.get_path("stdlib"))))
    pages = tuple(page for _, page in sorted(topics.items()))
    texts = Corpus(found.train + pages, found.validation, found.quality)
    characters = sum(map(len, texts.train))
    if characters < _LEAST_TRAINING or len(texts.quality) < _QUALITY_SIZE * 0.9:
        raise SystemExit(
            f"this Python brings {characters} characters to learn from and {len(texts.quality)} "
            "to be judged on, too few: use one with its whole standard library"
        )
    _say(f"{characters} characters to learn from, {len(texts.quality)} to be judged on")
    return texts


def main() -> int:
    """Train and export, or check."""
    arguments = _arguments()
    if arguments.check:
        return check(arguments.out, arguments.text_out, arguments.check, arguments.chunks)
    if not arguments.text_only:
        # Before the minute that texts take: PyTorch may be missing.
        torch: Any = importlib.import_module("torch")
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    texts = _texts()
    arguments.text_out.write_text(texts.quality, encoding="utf-8")
    if arguments.text_only:
        return 0

    shape = Shape()
    began = time.monotonic()
    words = vocabulary_of(texts.train, shape.vocab)
    tokenizer = Tokenizer(words.tokens, words.scores, words.types)
    ids = encode_all(tokenizer, texts.train)
    _say(f"{len(ids)} tokens to learn from, after {time.monotonic() - began:.0f} s; on {device}")

    steps, batch = _DEFAULTS[device]
    weights = train(
        shape,
        ids,
        np.array(tokenizer.encode(texts.validation), np.int64),
        steps=arguments.steps or steps,
        batch=arguments.batch or batch,
        minutes=arguments.minutes,
        seed=arguments.seed,
        device=device,
    )
    written = export(arguments.out, shape, words, weights)
    _say(f"{arguments.out}: {arguments.out.stat().st_size} bytes")

    forward = torch_forward(torch, shape, written, device)
    for name, document in (("quality.txt", texts.quality), ("text.txt", text())):
        chunks = chunks_of(tokenizer.encode(without_last_newline(document)))
        _say(f"{name}: unigram model {unigram(ids, chunks, shape.vocab)}")
        _say(f"{name}: PPL = {perplexity(chunks, forward)}")
    chunks = chunks_of(tokenizer.encode(texts.quality), arguments.chunks)
    _say(f"quality.txt, PyTorch: PPL = {perplexity(chunks, forward)}")
    _say(f"quality.txt, numpy: PPL = {perplexity(chunks, reference(shape, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
