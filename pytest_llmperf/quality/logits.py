"""The log-probabilities that ``llama-perplexity --kl-divergence-base`` writes.

Layout, in the byte order of the machine that wrote it::

    "_logits_"   i32 n_ctx   i32 n_vocab   i32 n_chunk   i32 tokens[n_chunk][n_ctx]
    for each chunk, for each scored token:
        f32 scale   f32 min_log_prob   u16 quanta[n_vocab]   u16 padding if n_vocab is odd

The log-probability of token i is ``scale * quanta[i] + min_log_prob``. Whatever lies more than 16
nats below the most likely token is raised to that floor. A chunk is scored from its middle on,
so that each token has a context: positions ``n_ctx // 2`` to ``n_ctx - 2``, and the row of
position p is about the token at p + 1.

A stream is read front to back, a block of rows at a time, so it may be a pipe of any length.
The format has no checksum: what is refused is what no writer of it can have written (see
:class:`LogitsReader`), which is every cut and every shift, but not one changed quantum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pytest_llmperf.errors import BaselineError

MAGIC = b"_logits_"
DEPTH = 16.0
"""Nats below the most likely token at which the format clips."""

TOP_QUANTUM = 65535
"""The quantum of the most likely token of every row that is not flat."""

BLOCK_BYTES = 2 << 20
"""Default size of a block: small enough for two of them to stay in a processor's cache."""

MOST_TOKENS = 1 << 22
"""Most tokens in all chunks: a header that says more has been altered."""

MOST_VOCAB = 1 << 23
"""Largest vocabulary: a header that says more has been altered."""

FIXED = len(MAGIC) + 12
WORDS = 4  # u16 words before the quanta: scale and min_log_prob, an f32 each
SLACK = 1e-3  # float32 rounding of scale and min_log_prob at logits of any sane size
AGAIN = "write it again with llama-perplexity --kl-divergence-base and look at its log"


class ByteSource(Protocol):
    """A binary stream that is read front to back: a file, a pipe or bytes in memory."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the start of ``buffer``; 0 at the end of the stream."""


class ByteSink(Protocol):
    """A binary stream that is written front to back."""

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``."""


@dataclass(frozen=True, slots=True, eq=False)
class LogitsHeader:
    """What a stream is about.

    Attributes:
        n_ctx: Tokens of a chunk.
        n_vocab: Tokens of the vocabulary.
        n_chunk: Chunks.
        tokens: The text, int32, shape ``(n_chunk, n_ctx)``, read-only.
    """

    n_ctx: int
    n_vocab: int
    n_chunk: int
    tokens: NDArray[np.int32]

    @property
    def n_scored(self) -> int:
        """Scored tokens of a chunk, which is its number of rows."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def row_words(self) -> int:
        """Size of a row in 16-bit words."""
        return row_words(self.n_vocab)

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return 2 * self.row_words

    @property
    def total_bytes(self) -> int:
        """Size of the whole stream in bytes."""
        rows = self.n_chunk * self.n_scored
        return FIXED + 4 * self.n_chunk * self.n_ctx + rows * self.row_bytes

    def next_tokens(self, chunk: int) -> NDArray[np.int32]:
        """The tokens that came next after each scored position, shape ``(n_scored,)``."""
        return self.tokens[chunk, self.n_ctx // 2 + 1 :]

    def check_same(self, other: LogitsHeader, name: str, other_name: str) -> None:
        """Check that two streams are about the same text in the same chunks.

        Raises:
            BaselineError: They are not; names both and what differs.
        """
        for field in ("n_vocab", "n_ctx", "n_chunk"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise BaselineError(
                    f"{name} has {field} {mine} and {other_name} has {theirs}: "
                    "they need the same tokenizer, text, context size and number of chunks"
                )
        differing = np.argwhere(self.tokens != other.tokens)
        if len(differing):
            chunk, position = (int(index) for index in differing[0])
            raise BaselineError(
                f"{name} and {other_name} differ in the text, first at chunk {chunk} "
                f"token {position}: both need the same text and tokenizer"
            )


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """Consecutive rows of one chunk. Its arrays are valid until the next block is asked for.

    Attributes:
        chunk: Index of the chunk.
        row: Index of the first row within the chunk.
        scale: Nats of one quantum, float32, shape ``(rows,)``.
        floor: Log-probability of quantum 0, float32, shape ``(rows,)``.
        quanta: uint16, shape ``(rows, n_vocab)``.
        next_tokens: The token that came next, int32, shape ``(rows,)``.
    """

    chunk: int
    row: int
    scale: NDArray[np.float32]
    floor: NDArray[np.float32]
    quanta: NDArray[np.uint16]
    next_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.scale)

    def log_probs(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Log-probabilities, float32, shape ``(rows, n_vocab)``; into ``out`` if it is given."""
        result = np.multiply(self.quanta, self.scale[:, None], out=out, dtype=np.float32)
        result += self.floor[:, None]
        return result

    def place(self, row: int) -> str:
        """Name a row of the block for an error text."""
        return f"chunk {self.chunk} row {self.row + row}"


def row_words(n_vocab: int) -> int:
    """Size of a row in 16-bit words: even, because a row starts with float32 values."""
    return 2 * ((n_vocab + 1) // 2) + WORDS


def _fill(stream: ByteSource | BinaryIO, buffer: NDArray[Any], name: str) -> int:
    """Read until ``buffer`` is full or the stream ends; return the bytes read."""
    view = buffer.data.cast("B")
    done = 0
    while done < len(view):
        try:
            # BinaryIO, as a type, has no readinto; every real binary stream has it.
            got: int | None = stream.readinto(view[done:])  # type: ignore[union-attr]
        except OSError as error:
            raise BaselineError(f"{name}: cannot be read ({error.strerror}): {AGAIN}") from error
        if not got:
            break
        done += got
    return done


def read_header(
    stream: ByteSource | BinaryIO, name: str, *, block_bytes: int = BLOCK_BYTES
) -> LogitsHeader:
    """Read what comes before the rows.

    Args:
        stream: The stream, at its start.
        name: What to call it in an error text: the path, or the build that writes it.
        block_bytes: Most bytes to ask the stream for at once.

    Raises:
        BaselineError: The header is truncated, is none, or says what cannot be.
    """
    fixed = np.empty(FIXED, np.uint8)
    got = _fill(stream, fixed, name)
    if fixed[: min(got, len(MAGIC))].tobytes() != MAGIC[:got]:
        raise BaselineError(f"{name}: header: this is no logits stream: {AGAIN}")
    if got < FIXED:
        # llama-perplexity writes the magic and n_ctx, then leaves if the text is too short.
        raise BaselineError(
            f"{name}: truncated in the header ({got} of {FIXED} bytes): "
            f"is the text at least twice the context size? {AGAIN}"
        )
    n_ctx, n_vocab, n_chunk = (int(number) for number in fixed[len(MAGIC) :].view(np.int32))
    if not (
        n_ctx > 2  # noqa: PLR2004 - below that no token has both a context and a successor
        and 1 < n_vocab <= MOST_VOCAB
        and n_chunk > 0
        and n_ctx * n_chunk <= MOST_TOKENS
    ):
        raise BaselineError(
            f"{name}: header: n_ctx {n_ctx}, n_vocab {n_vocab}, n_chunk {n_chunk} cannot be: "
            f"the stream has been altered, {AGAIN}"
        )
    tokens = np.empty(n_ctx * n_chunk, np.int32)
    step = max(1, block_bytes // 4)
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        got = _fill(stream, part, name)
        if got < part.nbytes:
            place = divmod(start + got // 4, n_ctx)
            raise BaselineError(
                f"{name}: truncated in the header at chunk {place[0]} token {place[1]}: {AGAIN}"
            )
    foreign = np.flatnonzero((tokens < 0) | (tokens >= n_vocab))
    if len(foreign):
        at = int(foreign[0])
        raise BaselineError(
            f"{name}: header: chunk {at // n_ctx} token {at % n_ctx} is {tokens[at]}, "
            f"outside the vocabulary of {n_vocab}: the stream has been altered, {AGAIN}"
        )
    tokens.setflags(write=False)
    return LogitsHeader(n_ctx, n_vocab, n_chunk, tokens.reshape(n_chunk, n_ctx))


class LogitsReader:
    """Reads a stream once, front to back, in blocks of rows of one chunk.

    Memory is the header and one block, whatever the number of chunks. Refused are: a header or
    row that is cut; bytes after the last row; a row whose scale or floor is not a number, whose
    scale exceeds 16 nats over 65535 quanta, or whose largest representable log-probability lies
    outside ``[-ln n_vocab, 0]``, where that of every distribution lies.

    Args:
        stream: The stream, at its start.
        name: What to call it in an error text: the path, or the build that writes it.
        block_bytes: Most bytes of a block; a block has at least one row.

    Raises:
        BaselineError: The header is refused, as by :func:`read_header`.
    """

    def __init__(
        self, stream: ByteSource | BinaryIO, name: str, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.name = name
        self.header = read_header(stream, name, block_bytes=block_bytes)
        self._stream = stream
        rows = min(self.header.n_scored, max(1, block_bytes // self.header.row_bytes))
        self._buffer = np.empty((rows, self.header.row_words), np.uint16)
        self._started = False

    @property
    def block_rows(self) -> int:
        """Most rows of a block."""
        return len(self._buffer)

    def __iter__(self) -> Iterator[RowBlock]:
        return self.blocks()

    def blocks(self, rows: int | None = None) -> Iterator[RowBlock]:
        """Yield all rows, in blocks that do not span chunks; only once.

        Args:
            rows: Most rows of a block, if fewer than :attr:`block_rows` are wanted: two readers
                with the same value yield blocks of the same rows.

        Raises:
            BaselineError: A row is truncated or cannot be, or bytes follow the last row.
            RuntimeError: The stream has been read before.
        """
        if self._started:
            raise RuntimeError(f"{self.name} has been read: a stream is read once")
        self._started = True
        header = self.header
        most = self.block_rows if rows is None else max(1, min(rows, self.block_rows))
        for chunk in range(header.n_chunk):
            tokens = header.next_tokens(chunk)
            for row in range(0, header.n_scored, most):
                count = min(most, header.n_scored - row)
                yield self._block(chunk, row, tokens[row : row + count])
        if _fill(self._stream, np.empty(1, np.uint8), self.name):
            raise BaselineError(
                f"{self.name}: bytes follow chunk {header.n_chunk - 1} "
                f"row {header.n_scored - 1}, the last: the stream has been altered, {AGAIN}"
            )

    def _block(self, chunk: int, row: int, next_tokens: NDArray[np.int32]) -> RowBlock:
        header = self.header
        words = self._buffer[: len(next_tokens)]
        got = _fill(self._stream, words, self.name)
        if got < words.nbytes:
            full, rest = divmod(got, header.row_bytes)
            raise BaselineError(
                f"{self.name}: truncated in chunk {chunk} row {row + full} of {header.n_chunk} "
                f"chunks of {header.n_scored} rows ({rest} of {header.row_bytes} bytes of the "
                f"row): did its writer fail or the disk fill up? {AGAIN}"
            )
        heads = words[:, :WORDS].copy().view(np.float32)
        block = RowBlock(
            chunk,
            row,
            heads[:, 0],
            heads[:, 1],
            words[:, WORDS : WORDS + header.n_vocab],
            next_tokens,
        )
        self._check(block)
        return block

    def _check(self, block: RowBlock) -> None:
        # A signalling NaN complains when it is cast, so does inf - inf: the row is refused for it.
        with np.errstate(invalid="ignore"):
            scale, floor = block.scale.astype(np.float64), block.floor.astype(np.float64)
            top = scale * TOP_QUANTUM + floor
        checks = (
            (~np.isfinite(scale), "has no number as scale"),
            (~np.isfinite(floor), "has no number as min_log_prob: did the model compute NaN?"),
            (floor > SLACK, "has a min_log_prob above 0"),
            (
                (scale < 0) | (scale > DEPTH / TOP_QUANTUM * (1 + SLACK)),
                "has a scale that is negative or spans more than 16 nats",
            ),
            (top > SLACK, "has a probability above 1"),
            (
                top < -math.log(self.header.n_vocab) - SLACK,
                "has no token as likely as one of the vocabulary's must be",
            ),
        )
        bad = np.logical_or.reduce([failed for failed, _ in checks])
        if not bad.any():
            return
        row = int(np.argmax(bad))
        reason = next(text for failed, text in checks if failed[row])
        raise BaselineError(
            f"{self.name}: {block.place(row)} {reason} (scale {scale[row]:g}, "
            f"min_log_prob {floor[row]:g}): the stream has been altered or its model is broken, "
            f"{AGAIN}"
        )


def pack_rows(logits: ArrayLike) -> NDArray[np.uint16]:
    """Quantize logits as llama-perplexity does: 16 bits, from 16 nats below the largest.

    Follows ``log_softmax(n_vocab, logits, log_prob, tok)`` of llama.cpp's perplexity.cpp in its
    float32 arithmetic, with the sum of exponentials in float64.

    Args:
        logits: Logits or log-probabilities, shape ``(rows, n_vocab)``; -inf is allowed.

    Returns:
        The rows as they are written, uint16, shape ``(rows, row_words(n_vocab))``.

    Raises:
        BaselineError: A row holds NaN or +inf, or nothing but -inf.
    """
    values = np.atleast_2d(np.asarray(logits, np.float32))
    rows, n_vocab = values.shape
    largest = values.max(axis=1)
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        raise BaselineError(
            f"row {row} of the logits has no finite maximum: the model computed NaN or infinity"
        )
    smallest = np.maximum(values.min(axis=1), largest - np.float32(DEPTH))
    total = np.exp(values - largest[:, None]).sum(axis=1, dtype=np.float64)
    floor = smallest - largest - np.log(total).astype(np.float32)
    scale = (largest - smallest) / np.float32(TOP_QUANTUM)
    with np.errstate(divide="ignore", over="ignore"):
        per_nat = np.float32(1) / scale
    flat = ~np.isfinite(per_nat)  # all logits equal, or nearly beyond what float32 can tell
    scale[flat] = 0
    per_nat[flat] = 0
    words = np.zeros((rows, row_words(n_vocab)), np.uint16)
    words[:, :WORDS] = np.stack([scale, floor], axis=1).view(np.uint16)
    above = np.maximum(values, smallest[:, None])
    above -= smallest[:, None]
    above *= per_nat[:, None]
    words[:, WORDS : WORDS + n_vocab] = np.rint(above, out=above)
    return words


def write_stream(
    stream: ByteSink | BinaryIO, tokens: ArrayLike, logits: Iterable[ArrayLike], *, n_vocab: int
) -> None:
    """Write logits as ``llama-perplexity --kl-divergence-base`` does.

    Args:
        stream: Where to.
        tokens: The text, shape ``(n_chunk, n_ctx)``.
        logits: Logits of the scored tokens, in order, in parts of any number of rows: each of
            shape ``(rows, n_vocab)``. The parts are written as they come.
        n_vocab: Tokens of the vocabulary.

    Raises:
        BaselineError: A row has no finite maximum, see :func:`pack_rows`.
        ValueError: The rows are not as many, or not as wide, as the tokens ask for.
    """
    text = np.ascontiguousarray(tokens, np.int32)
    n_chunk, n_ctx = text.shape
    header = LogitsHeader(n_ctx, n_vocab, n_chunk, text)
    stream.write(MAGIC + np.array([n_ctx, n_vocab, n_chunk], np.int32).tobytes())
    stream.write(text.tobytes())
    asked, given = n_chunk * header.n_scored, 0
    for part in logits:
        rows = np.atleast_2d(np.asarray(part, np.float32))
        if rows.shape[1] != n_vocab:
            raise ValueError(f"rows of {rows.shape[1]} logits for a vocabulary of {n_vocab}")
        given += len(rows)
        stream.write(pack_rows(rows).tobytes())
    if given != asked:
        raise ValueError(f"the tokens ask for {asked} rows of logits, {given} were given")
