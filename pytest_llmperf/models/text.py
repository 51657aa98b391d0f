"""The text that prompts are cut from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def text() -> str:
    """Return the shipped text: about 26,000 characters of English, with some code and dialogue.

    Prompts are cut from real text, since which experts a mixture-of-experts model routes to,
    and so its speed, depends on the tokens.
    """
    return (files("pytest_llmperf") / "data" / "text.txt").read_text(encoding="utf-8")
