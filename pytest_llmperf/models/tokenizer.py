"""Text to tokens and back, as llama.cpp does it for a tokenizer of type ``llama``.

The neighbours whose piece has the highest score are joined first, the leftmost of equals, until no
two can be joined; a character that is no token becomes the bytes it is written with. This is
SentencePiece's BPE without its normalization and, as in the models made here, without a space put
before the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from pytest_llmperf.models.vocabulary import BYTE, CONTROL, UNKNOWN

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class Tokenizer:
    """A tokenizer.

    Args:
        tokens: Pieces by id, a space written as U+2581; all 256 bytes (``<0x00>``) are among them.
        scores: Of two pieces that could be made, the one of higher score is made first.
        types: Token types of GGUF.
    """

    def __init__(
        self, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
    ) -> None:
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._scores = scores
        self._bytes = [self._ids[f"<0x{byte:02X}>"] for byte in range(256)]
        self._texts = [_text(token, kind) for token, kind in zip(tokens, types, strict=True)]
        # Text is cut wherever no piece can hold both neighbours: no join ever crosses such a
        # place, so the parts can be encoded one by one, and each different one only once.
        self._neighbours = {pair for token in tokens for pair in pairwise(token)}
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; none is added at either end, control tokens are text.

        The way back gives the same text, except that U+2581 comes back as a space.

        Args:
            text: Any text without lone surrogates.
        """
        found: list[int] = []
        for part in self._parts(text.replace(" ", _SPACE)):
            ids = self._known.get(part)
            if ids is None:
                ids = self._known[part] = tuple(self._encode(part))
            found += ids
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens; control tokens have none, broken characters become U+FFFD."""
        return b"".join(self._texts[number] for number in ids).decode(errors="replace")

    def _parts(self, text: str) -> Iterator[str]:
        """Cut text where no join is possible."""
        start = 0
        for place, pair in enumerate(pairwise(text), 1):
            if pair not in self._neighbours:
                yield text[start:place]
                start = place
        if text:
            yield text[start:]

    def _encode(self, part: str) -> Iterator[int]:
        """Join characters to tokens."""
        pieces = list(part)
        before, after = list(range(-1, len(part) - 1)), list(range(1, len(part) + 1))
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(part):
                return
            joined = pieces[left] + pieces[right]
            if joined in self._ids:
                heappush(queue, (-self._scores[self._ids[joined]], left, right, len(joined)))

        for place in range(1, len(part)):
            offer(place - 1, place)
        while queue:
            _, left, right, length = heappop(queue)
            whole = pieces[left] and pieces[right]
            if not whole or len(pieces[left]) + len(pieces[right]) != length:
                continue  # one of the two has been joined with another since
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[right] < len(part):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        for piece in pieces:
            if piece in self._ids:
                yield self._ids[piece]
            else:
                yield from (self._bytes[byte] for byte in piece.encode())


def _text(token: str, kind: int) -> bytes:
    """Return what a token stands for in the text."""
    if kind == BYTE:
        return bytes([int(token[1:-1], 16)])
    return b"" if kind in (CONTROL, UNKNOWN) else token.replace(_SPACE, " ").encode()
