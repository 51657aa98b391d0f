"""The shipped text and what it has to be good for."""

from __future__ import annotations

import hashlib
from collections import Counter

from pytest_llmperf.models.text import text
from pytest_llmperf.plan.model import GENERATION


def test_the_text_is_long_enough_for_prompts() -> None:
    """It is about what a prompt of six thousand tokens needs."""
    assert 24_000 <= len(text().encode()) <= 30_000


def test_the_text_is_varied() -> None:
    """No line comes twice, and at least one word in four is new."""
    lines = [line for line in text().splitlines() if len(line) > 30]
    words = text().split()
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    assert len(set(words)) / len(words) > 0.25


def test_the_text_is_mostly_ascii() -> None:
    """A few accented letters, so that more than one byte a character occurs too."""
    accented = [character for character in text() if not character.isascii()]
    assert 5 <= len(accented) <= 100
    assert all(character.isalpha() for character in accented)


def test_the_text_has_code_and_dialogue() -> None:
    """A chat user pastes both."""
    assert "\ndef " in text()
    assert "#!/bin/sh\n" in text()
    assert "\nUser: " in text()
    assert '\n"' in text()


def test_a_changed_text_is_a_new_generation_of_models() -> None:
    """Vocabularies are learnt from it: with the text, GENERATION goes up, and then this hash."""
    pinned = {2: "b5b0041282e7075d20bb904ffb769019b2bf85d62da7f6e3a4d32b98fcb2dcf9"}
    assert pinned == {GENERATION: hashlib.sha256(text().encode()).hexdigest()}
