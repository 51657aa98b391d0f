"""A small working vocabulary, learnt from the shipped text or from another.

Byte-pair encoding (Sennrich et al. 2016, section 3.2) in the form that llama.cpp calls ``llama``
and SentencePiece calls BPE: a piece's score is minus the rank of the merge that made it, and an
encoder joins the neighbours whose piece scores highest. Each piece is therefore reached only if
the pieces it was merged from are in the vocabulary too; here they are, as merges enter in order.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Literal, TypeAlias

from pytest_llmperf.models.text import text

Voice: TypeAlias = Literal["often", "rarely", "never"]

# Token types of GGUF, `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6

UNK, BOS, EOS = 0, 1, 2
"""Ids of ``<unk>``, ``<s>`` and ``</s>``."""

_CONTROL = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
_NEWLINE = "<0x0A>"
_CHAT = ("<|im_start|>", "<|im_end|>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_ASCII = {chr(code) for code in range(0x21, 0x7F)}

# No merge crosses the end of one of these. A line break stays the byte token that it is in Llama.
_CHUNK = re.compile(r" ?[^\W\d_]+(?:'[^\W\d_]+)*| ?\d| ?[^\w\s]| +|_")
_WORD = re.compile(rf"{_SPACE}?[^\W\d_]+(?:'[^\W\d_]*)?|[.,;?!]")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: Pieces, a space written as U+2581.
        scores: Minus the rank of the merge that makes the piece; 0 for those that no merge makes.
        types: Token types of GGUF.
        voices: How readily a model made by :mod:`~pytest_llmperf.models.synth` says it: ``often``
            for words and the points between them; ``rarely`` for other text, since a server
            may hold a bracket back as the start of a tool call, and a line break back as the
            end of an answer; ``never`` for control tokens and bytes, since a lone byte is no
            text and is held back until its character is complete.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    voices: tuple[Voice, ...]


@lru_cache(maxsize=4)
def vocabulary(size: int) -> Vocabulary:
    """Return a vocabulary of exactly `size` tokens; what the text does not fill is unused.

    Args:
        size: Number of tokens, at least :data:`~pytest_llmperf.plan.model.LEAST_VOCAB`.

    Raises:
        ValueError: If the control tokens, bytes and characters alone are more than `size`.
    """
    return learn(text(), size)


def learn(sample: str, size: int) -> Vocabulary:
    """Return a vocabulary of exactly `size` tokens, its pieces learnt from `sample`.

    Args:
        sample: Text. Every character in it becomes a token, whatever becomes of the merges.
        size: Number of tokens; what `sample` does not fill is unused.

    Raises:
        ValueError: If the control tokens, bytes and characters alone are more than `size`.
    """
    characters = sorted(_ASCII | {_SPACE} | set(sample) - set(" \n"))
    fixed = [*_CONTROL, *((f"<0x{byte:02X}>", BYTE) for byte in range(256))]
    fixed += [(token, CONTROL) for token in _CHAT]
    room = size - len(fixed) - len(characters)
    if room < 0:
        raise ValueError(f"a vocabulary has at least {size - room} tokens, not {size}")
    merged = _merges(sample, room)
    entries = [(token, 0.0, kind) for token, kind in fixed]
    entries += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(merged, 1)]
    entries += [(character, -float(len(merged) + 1), NORMAL) for character in characters]
    entries += [(f"<unused{n}>", 0.0, UNUSED) for n in range(room - len(merged))]
    tokens, scores, types = zip(*entries, strict=True)
    voices = tuple(_voice(piece, kind) for piece, _, kind in entries)
    return Vocabulary(tokens, scores, types, voices)


def _voice(piece: str, kind: int) -> Voice:
    if kind == NORMAL:
        return "often" if _WORD.fullmatch(piece) else "rarely"
    return "rarely" if piece == _NEWLINE else "never"


def _merges(sample: str, most: int) -> list[str]:
    """Learn up to `most` pieces of two characters and more, the most useful first."""
    counts = Counter(chunk.replace(" ", _SPACE) for chunk in _CHUNK.findall(sample))
    words = [(list(word), count) for word, count in sorted(counts.items())]
    total: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, (parts, count) in enumerate(words):
        for pair in pairwise(parts):
            total[pair] += count
            places[pair].add(index)
    # Ties go to the pair that sorts first: the order of a set would differ between processes.
    queue = [(-count, pair) for pair, count in total.items()]
    heapify(queue)
    pieces: dict[str, None] = {}
    while queue and len(pieces) < most:
        count, pair = heappop(queue)
        if total[pair] != -count or not count:
            continue  # counted anew since it was queued
        pieces["".join(pair)] = None  # `th+e` and `t+he` make one piece
        changed = set()
        for index in places.pop(pair):
            parts, times = words[index]
            joined = _join(parts, pair)
            for old in pairwise(parts):
                total[old] -= times
                changed.add(old)
            for new in pairwise(joined):
                total[new] += times
                places[new].add(index)
                changed.add(new)
            parts[:] = joined
        for other in changed - {pair}:
            heappush(queue, (-total[other], other))
    return list(pieces)


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of `pair`, from the left."""
    joined: list[str] = []
    index = 0
    while index < len(parts):
        if tuple(parts[index : index + 2]) == pair:
            joined.append(parts[index] + parts[index + 1])
            index += 2
        else:
            joined.append(parts[index])
            index += 1
    return joined
