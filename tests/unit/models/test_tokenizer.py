"""Text to tokens and back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.models.text import text
from pytest_llmperf.models.tokenizer import Tokenizer
from pytest_llmperf.models.vocabulary import NORMAL, UNUSED, Vocabulary, vocabulary

WORDS = vocabulary(1024)
TOKENIZER = Tokenizer(WORDS.tokens, WORDS.scores, WORDS.types)

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
likely = st.text(st.sampled_from(" \nthe inand.,'s07é☃"), max_size=40)


def plain(words: Vocabulary, line: str) -> list[str]:
    """Join what scores highest, leftmost first, over the whole text and without a queue."""
    scores = dict(zip(words.tokens, words.scores, strict=True))
    parts = list(line.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in scores
        ]
        if not joins:
            break
        place = min(joins)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        token
        for part in parts
        for token in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]


@given(line=st.one_of(texts, likely))
def test_any_text_comes_back(line: str) -> None:
    """What is no piece is spelt in bytes."""
    assert TOKENIZER.decode(TOKENIZER.encode(line)) == line


@given(line=st.one_of(likely, st.integers(0, 20_000).map(lambda at: text()[at : at + 60])))
def test_cutting_the_text_first_changes_no_token(line: str) -> None:
    """The tokens are those that joining over the whole text gives."""
    assert [WORDS.tokens[number] for number in TOKENIZER.encode(line)] == plain(WORDS, line)


def test_pieces_are_used() -> None:
    """English takes about three characters a token, not one."""
    assert 2.5 < len(text()) / len(TOKENIZER.encode(text())) < 4


def test_control_tokens_in_a_text_are_text() -> None:
    """A document cannot end itself, and a control token that a model says is no text."""
    ids = TOKENIZER.encode("</s><0x41>")
    assert {WORDS.types[number] for number in ids} == {NORMAL}
    assert TOKENIZER.decode([0, 1, 2, *ids]) == "</s><0x41>"


def test_a_line_break_is_a_byte() -> None:
    """As in Llama 2."""
    assert [WORDS.tokens[number] for number in TOKENIZER.encode("\n\n")] == ["<0x0A>"] * 2


def test_half_a_character_is_marked() -> None:
    """A model may say a byte that makes no character."""
    assert TOKENIZER.decode(TOKENIZER.encode("☃")[:2]) == "\N{REPLACEMENT CHARACTER}"


def test_the_text_without_characters_has_no_tokens() -> None:
    """Nothing is put before or after a text."""
    assert TOKENIZER.encode("") == []


def test_a_vocabulary_without_bytes_is_refused() -> None:
    """Without them there would be text that it cannot spell."""
    with pytest.raises(KeyError, match="0x00"):
        Tokenizer(["a"], [0.0], [NORMAL])


def test_unused_tokens_are_not_reached() -> None:
    """Padding has the highest score; no text leads to it."""
    words = vocabulary(9000)
    tokenizer = Tokenizer(words.tokens, words.scores, words.types)
    assert UNUSED not in {words.types[number] for number in tokenizer.encode("<unused1> " + text())}
