"""Text of others, made harmless."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.plain import plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("60 °C … a\u00a0b\n\tc 日本", "60 °C … a\u00a0b\n\tc 日本"),
        ("\x1b[2J\x00\r\x7f", "?[2J???"),
        ("a\udc80b", "a?b"),
        ("exe\u202egpj", "exe?gpj"),
        ("a\u2028b\u2029c", "a?b?c"),
    ],
)
def test_what_cannot_be_seen_becomes_a_question_mark(text: str, shown: str) -> None:
    """Escape sequences, bytes that are no UTF-8, and what turns the direction of a line."""
    assert plain(text) == shown


def test_a_line_stays_a_line() -> None:
    """Where nothing is to be kept."""
    assert plain("a\nb", kept="") == "a?b"


@given(st.text(st.characters()))
def test_whatever_comes_can_be_written(text: str) -> None:
    """As UTF-8, and no longer than before."""
    assert len(plain(text).encode().decode()) == len(text)
