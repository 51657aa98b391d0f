"""Finds the line of a TOML key, so that an error can point at it.

``tomllib`` gives no positions. Suite files are written by hand in the plain style of
headers and ``key = value`` lines, which is what this reads; a key inside an inline table is
given the line of the key that holds the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*="""
)
_PART = re.compile(r""""([^"]*)"|'([^']*)'|([A-Za-z0-9_-]+)""")


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(a or b or c for a, b, c in _PART.findall(dotted))


def line_of(text: str, path: Sequence[str]) -> int | None:
    """Return the 1-based line that defines ``path``, or the nearest table above it.

    A table that only its own tables spell out (``[configs.c7.options]`` for ``configs.c7``) is
    given the line of the first of them.

    Args:
        text: The TOML source.
        path: Keys from the root, such as ``("configs", "c7", "options", "threads")``.
    """
    wanted = tuple(path)
    best: tuple[int, bool] | None = None
    found: int | None = None
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = here = _split(header.group(1))
        elif key := _KEY.match(line):
            here = table + _split(key.group(1))
        else:
            continue
        shared = _shared(here, wanted)
        rank = (shared, here == wanted[:shared])
        if shared and (best is None or rank > best):
            best, found = rank, number
    return found


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many keys the two have in common, from the root."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count
