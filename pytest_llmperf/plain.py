"""Text that came from elsewhere, such as a process's name or a log, made harmless to show."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"


def plain(text: str, kept: str = _KEPT) -> str:
    """Return a text with a question mark for whatever is no character that can be seen.

    A terminal would obey control characters, and a file cannot hold the lone surrogates that stand
    for bytes which are no UTF-8.

    Args:
        text: What may hold such.
        kept: Characters to keep all the same.
    """
    return "".join("?" if _hidden(one) and one not in kept else one for one in text)


def _hidden(one: str) -> bool:
    # Beside control characters and the like, what separates lines and paragraphs.
    kind = unicodedata.category(one)
    return kind.startswith("C") or kind in {"Zl", "Zp"}
