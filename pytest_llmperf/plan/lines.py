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

    Args:
        text: The TOML source.
        path: Keys from the root, such as ``("configs", "c7", "options", "threads")``.
    """
    wanted = tuple(path)
    best: tuple[int, int] | None = None
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = here = _split(header.group(1))
        elif key := _KEY.match(line):
            here = table + _split(key.group(1))
        else:
            continue
        if here == wanted[: len(here)] and (best is None or len(here) > best[0]):
            best = (len(here), number)
    return best[1] if best else None
