"""The vocabulary that made models speak."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from pytest_llmperf.models.text import text
from pytest_llmperf.models.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, learn, vocabulary


def encode(line: str, size: int) -> list[str]:
    """Tokenize as llama.cpp does for the type `llama`: join what scores highest, leftmost first."""
    words = vocabulary(size)
    scores = {
        token: score
        for token, score, kind in zip(words.tokens, words.scores, words.types, strict=True)
        if kind == NORMAL
    }
    parts = list(line.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], index)
            for index, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not joins:
            return parts
        index = min(joins)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


@pytest.mark.parametrize("size", [512, 2048, 9000])
def test_the_size_is_exact_and_no_token_comes_twice(size: int) -> None:
    """Every id has one token, and every token one id."""
    words = vocabulary(size)
    assert len(words.tokens) == len(words.scores) == len(words.types) == len(words.voices) == size
    assert len(set(words.tokens)) == size


def test_too_small_a_size_is_refused() -> None:
    """Bytes and characters have to fit."""
    with pytest.raises(ValueError, match="at least"):
        vocabulary(300)


def test_control_tokens_and_bytes_come_first() -> None:
    """The order is that of Llama 2."""
    words = vocabulary(512)
    assert words.tokens[:4] == ("<unk>", "<s>", "</s>", "<0x00>")
    assert words.types[3:259] == (BYTE,) * 256
    assert words.tokens[258:261] == ("<0xFF>", "<|im_start|>", "<|im_end|>")
    assert words.types[259:261] == (CONTROL,) * 2


def test_what_the_text_does_not_fill_is_unused() -> None:
    """A large vocabulary is padded at its end."""
    words = vocabulary(9000)
    unused = words.types.count(UNUSED)
    assert unused > 1000
    assert set(words.types[-unused:]) == {UNUSED}


@pytest.mark.parametrize("size", [512, 2048])
def test_each_piece_is_reached_by_joining_shorter_ones(size: int) -> None:
    """A piece of two characters and more splits in two known ones that were there before it."""
    words = vocabulary(size)
    scores = {
        token: score
        for token, score, kind in zip(words.tokens, words.scores, words.types, strict=True)
        if kind == NORMAL
    }
    for piece, score in scores.items():
        if len(piece) > 1:
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            assert any(
                all(len(half) == 1 or scores.get(half, -1e9) > score for half in split)
                for split in splits
            ), piece


def test_a_token_is_three_to_four_characters_of_the_text() -> None:
    """As real vocabularies do on English, so prompts of N tokens have a natural length."""
    lines = [line for line in text().splitlines() if line][:12]
    tokens = sum(len(encode(line, 2048)) for line in lines)
    assert 3 < sum(map(len, lines)) / tokens < 4.5


def test_printable_ascii_needs_no_bytes() -> None:
    """Any English prompt is text, token by token."""
    assert {chr(code) for code in range(0x21, 0x7F)} <= set(vocabulary(512).tokens)


def test_only_text_is_ever_spoken() -> None:
    """Bytes, control tokens and padding are never said; words are said often."""
    words = vocabulary(9000)
    for token, kind, voice in zip(words.tokens, words.types, words.voices, strict=True):
        assert (voice == "never") == (kind != NORMAL and token != "<0x0A>"), token  # noqa: S105  a token, no password
    voices = dict(zip(words.tokens, words.voices, strict=True))
    assert [voices[token] for token in ("▁the", "e", ".", "é")] == ["often"] * 4
    assert [voices[token] for token in ("<", "▁", "{", "7", "<0x0A>")] == ["rarely"] * 5


def test_the_vocabulary_is_the_same_in_every_process() -> None:
    """Hashes of strings, and so the order of sets, differ between processes; it does not."""
    script = (
        "from pytest_llmperf.models.vocabulary import vocabulary; import hashlib;"
        "print(hashlib.sha256(repr(vocabulary(2048)).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_a_vocabulary_is_learnt_from_any_text() -> None:
    """Its pieces are those of that text; the shipped text is the one that is taken by default."""
    words = learn("spam ham spam jam spam ü", 370)
    assert {"▁spam", "ü"} <= set(words.tokens)
    assert "▁the" not in words.tokens
    assert learn(text(), 512) == vocabulary(512)
