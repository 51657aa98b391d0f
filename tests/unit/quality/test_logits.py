"""The stream of llama-perplexity: written as the tool writes it, read back, refused when cut."""

import io
import math
import os
import struct
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.quality.logits import (
    LogitsReader,
    pack_rows,
    read_header,
    row_words,
    write_stream,
)

N_CTX, N_CHUNK, N_VOCAB = 9, 3, 7
N_SCORED = 4  # positions 4 to 7 of 9
HEADER_BYTES = 8 + 12 + 4 * N_CTX * N_CHUNK
ROW_BYTES = 2 * (8 + 4)

SHAPES = st.tuples(st.integers(3, 12), st.integers(1, 4), st.integers(2, 33))
LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
    elements=st.integers(-60000, 60000).map(lambda number: number / 1000),
)


def text(n_chunk: int = N_CHUNK, n_ctx: int = N_CTX, n_vocab: int = N_VOCAB) -> NDArray[np.int32]:
    """Tokens that run through the vocabulary."""
    return (np.arange(n_chunk * n_ctx, dtype=np.int32) % n_vocab).reshape(n_chunk, n_ctx)


def random_logits(rows: int, n_vocab: int = N_VOCAB, seed: int = 0) -> NDArray[np.float32]:
    """Logits that spread over more than the format's depth."""
    return np.random.default_rng(seed).normal(0, 6, (rows, n_vocab)).astype(np.float32)


def written(seed: int = 0) -> bytes:
    """A small stream."""
    stream = io.BytesIO()
    write_stream(stream, text(), [random_logits(N_CHUNK * N_SCORED, seed=seed)], n_vocab=N_VOCAB)
    return stream.getvalue()


def read_all(data: bytes, name: str = "base.bin") -> NDArray[np.float32]:
    """All log-probabilities of a stream."""
    reader = LogitsReader(io.BytesIO(data), name)
    return np.concatenate([block.log_probs() for block in reader.blocks()])


def clipped_log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the format stands for, in float64: clipped, but normalized as if it were not."""
    exact = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(exact).sum(axis=1, keepdims=True))
    clipped: NDArray[np.float64] = np.maximum(exact, -16) - total
    return clipped


def pack_by_the_letter(logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """One row as the C++ computes it: a number at a time, rounded by adding 1.5 * 2^23."""
    one, depth, top = np.float32(1), np.float32(16), np.float32(65535)
    largest, smallest = logits.max(), logits.min()
    smallest = max(smallest, np.float32(largest - depth))
    total = sum(float(np.exp(np.float32(value - largest))) for value in logits)
    floor = np.float32(np.float32(smallest - largest) - np.float32(math.log(total)))
    scale = np.float32(np.float32(largest - smallest) / top)
    quanta = np.zeros(2 * ((len(logits) + 1) // 2), np.uint16)
    if scale:
        per_nat = np.float32(one / scale)
        for index, value in enumerate(logits):
            if value > smallest:
                shifted = np.float32(
                    np.float32(per_nat * np.float32(value - smallest)) + np.float32(12582912)
                )
                bits = struct.unpack("<i", struct.pack("<f", shifted))[0]
                quanta[index] = (bits & 0x007FFFFF) - 0x00400000
    return np.concatenate([np.array([scale, floor], np.float32).view(np.uint16), quanta])


@given(SHAPES, st.integers(0, 2**32 - 1))
def test_reading_gives_back_what_was_written(shape: tuple[int, int, int], seed: int) -> None:
    """Header and tokens come back as they were, log-probabilities to half a quantum."""
    n_ctx, n_chunk, n_vocab = shape
    n_scored = n_ctx - 1 - n_ctx // 2
    logits = random_logits(n_chunk * n_scored, n_vocab, seed)
    stream = io.BytesIO()
    write_stream(stream, text(n_chunk, n_ctx, n_vocab), [logits], n_vocab=n_vocab)
    reader = LogitsReader(io.BytesIO(stream.getvalue()), "base.bin")
    header = reader.header
    assert (header.n_ctx, header.n_chunk, header.n_vocab) == (n_ctx, n_chunk, n_vocab)
    assert header.n_scored == n_scored
    assert header.total_bytes == len(stream.getvalue())
    np.testing.assert_array_equal(header.tokens, text(n_chunk, n_ctx, n_vocab))
    got = np.concatenate([block.log_probs() for block in reader.blocks()])
    np.testing.assert_allclose(got, clipped_log_softmax(logits), rtol=0, atol=1.3e-4)


@given(LOGITS)
def test_rows_are_packed_to_the_bit_as_the_tool_packs_them(logits: NDArray[np.float32]) -> None:
    """Quanta and scale equal those of the scalar code; the floor but for the last bit of expf."""
    packed = pack_rows(logits)
    for row, values in zip(packed, logits, strict=True):
        expected = pack_by_the_letter(values)
        np.testing.assert_array_equal(row[4:], expected[4:])
        np.testing.assert_array_equal(row[:2], expected[:2])
        np.testing.assert_allclose(
            row[2:4].view(np.float32), expected[2:4].view(np.float32), rtol=3e-7, atol=1e-7
        )


@given(st.integers(0, 2**32 - 1), st.integers(-64, 64))
def test_a_shift_of_the_logits_changes_nothing(seed: int, shift: int) -> None:
    """A distribution does not depend on what is added to all logits."""
    logits = np.round(random_logits(5, 20, seed) * 64) / 64  # so that float32 adds exactly
    np.testing.assert_array_equal(pack_rows(logits), pack_rows(logits + np.float32(shift)))


def test_equal_logits_are_packed_flat() -> None:
    """A row whose logits are equal has scale 0 and the probability 1 / n_vocab everywhere."""
    packed = pack_rows(np.zeros((1, 5)))
    scale, floor = packed[0, :4].view(np.float32)
    assert scale == 0
    assert floor == pytest.approx(-math.log(5))
    assert not packed[0, 4:].any()


def test_a_forbidden_token_lies_at_the_floor() -> None:
    """A logit of -inf is clipped as any other that is far below the largest."""
    packed = pack_rows([[0.0, -np.inf, -1.0]])
    assert packed[0, 4:7].tolist() == [65535, 0, 61439]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    """NaN and +inf are refused with their row."""
    with pytest.raises(BaselineError, match="row 1 of the logits has no finite maximum"):
        pack_rows([[0.0, 1.0], [value, 0.0]])


@pytest.mark.parametrize(("rows", "n_vocab"), [(11, 7), (13, 7), (12, 8)])
def test_writing_refuses_logits_that_do_not_fit_the_tokens(rows: int, n_vocab: int) -> None:
    """Too few or too many rows, or rows of another vocabulary, are the caller's mistake."""
    with pytest.raises(ValueError, match="rows of"):
        write_stream(io.BytesIO(), text(), [random_logits(rows, n_vocab)], n_vocab=N_VOCAB)


@given(st.integers(0, HEADER_BYTES + N_CHUNK * N_SCORED * ROW_BYTES - 1))
def test_every_cut_is_refused_with_its_place(length: int) -> None:
    """A stream that ends early is refused by name, and the message says where it ends."""
    data = written()[:length]
    with pytest.raises(BaselineError) as caught:
        read_all(data)
    message = str(caught.value)
    assert message.startswith("base.bin: truncated in ")
    assert "--kl-divergence-base" in message
    if length < HEADER_BYTES:
        assert "the header" in message
    else:
        row = (length - HEADER_BYTES) // ROW_BYTES
        assert f"chunk {row // N_SCORED} row {row % N_SCORED} " in message


def test_a_text_that_was_too_short_is_guessed() -> None:
    """llama-perplexity leaves after 12 bytes if the text is too short: the message says so."""
    with pytest.raises(BaselineError, match="at least twice the context size"):
        read_all(written()[:12])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGUF", "header: this is no logits stream"),
        (8, struct.pack("<i", 2), "header: n_ctx 2, n_vocab 7, n_chunk 3 cannot be"),
        (8, struct.pack("<i", -1), "header: n_ctx -1"),
        (12, struct.pack("<i", 1), "header: n_ctx 9, n_vocab 1,"),
        (12, struct.pack("<i", 2**30), "header: n_ctx 9, n_vocab 1073741824"),
        (16, struct.pack("<i", 0), "n_chunk 0 cannot be"),
        (16, struct.pack("<i", 2**31 - 1), "n_chunk 2147483647 cannot be"),
        (20 + 4 * 13, struct.pack("<i", -1), "header: chunk 1 token 4 is -1, outside"),
        (20 + 4 * 13, struct.pack("<i", 7), "header: chunk 1 token 4 is 7, outside"),
        (HEADER_BYTES, struct.pack("<f", math.nan), "chunk 0 row 0 has no number as scale"),
        (HEADER_BYTES, struct.pack("<f", -1e-4), "chunk 0 row 0 has a scale that is negative"),
        (HEADER_BYTES, struct.pack("<f", 3e-4), "chunk 0 row 0 has a scale that"),
        (HEADER_BYTES, struct.pack("<f", 0), "chunk 0 row 0 has no token as likely"),
        (
            HEADER_BYTES + 6 * ROW_BYTES + 4,
            struct.pack("<f", math.nan),
            "chunk 1 row 2 has no number as min_log_prob: did the model compute NaN",
        ),
        (HEADER_BYTES + 4, struct.pack("<f", -math.inf), "row 0 has no number as min_log_prob"),
        (HEADER_BYTES + 4, struct.pack("<f", 0.5), "row 0 has a min_log_prob above 0"),
        (HEADER_BYTES + 4, struct.pack("<f", -0.5), "row 0 has a probability above 1"),
    ],
)
def test_what_no_writer_can_have_written_is_refused(
    offset: int, value: bytes, message: str
) -> None:
    """An altered header or row is refused by name, with the place and what is wrong there."""
    data = written()
    with pytest.raises(BaselineError, match=r"base\.bin: ") as caught:
        read_all(data[:offset] + value + data[offset + len(value) :])
    assert message in str(caught.value)


def test_bytes_after_the_last_row_are_refused() -> None:
    """A stream that goes on is not the one that its header announces."""
    with pytest.raises(BaselineError, match=r"base\.bin: bytes follow chunk 2 row 3, the last"):
        read_all(written() + b"\0")


@given(st.integers(20, HEADER_BYTES + N_CHUNK * N_SCORED * ROW_BYTES - 9), st.integers(1, 8))
@example(148, 7).via("a signalling NaN as scale")
def test_lost_and_doubled_bytes_are_refused(place: int, count: int) -> None:
    """Bytes that a pipe lost or gave twice are noticed, at the end if not before."""
    data = written()
    for damaged in (data[:place] + data[place + count :], data[: place + count] + data[place:]):
        with pytest.raises(BaselineError, match=r"base\.bin: "):
            read_all(damaged)


@given(st.integers(1, 2000))
def test_rows_do_not_depend_on_the_size_of_a_block(block_bytes: int) -> None:
    """Blocks hold rows of one chunk, in order, with the tokens that came next."""
    reader = LogitsReader(io.BytesIO(written()), "base.bin", block_bytes=block_bytes)
    rows, places, tokens = [], [], []
    for block in reader:
        rows.append(block.log_probs())
        places += [(block.chunk, block.row + row) for row in range(len(block))]
        tokens += block.next_tokens.tolist()
    np.testing.assert_array_equal(np.concatenate(rows), read_all(written()))
    assert places == [(chunk, row) for chunk in range(N_CHUNK) for row in range(N_SCORED)]
    assert tokens == text()[:, 5:].reshape(-1).tolist()


def test_a_stream_is_read_once() -> None:
    """Asking for the rows again is a mistake of the program, not an empty answer."""
    reader = LogitsReader(io.BytesIO(written()), "base.bin")
    list(reader)
    with pytest.raises(RuntimeError, match=r"base\.bin has been read"):
        list(reader)


class Broken(io.BytesIO):
    """A stream whose device fails."""

    def readinto(self, _buffer: object, /) -> int:
        """Fail."""
        raise OSError(5, "Input/output error")


def test_a_stream_that_cannot_be_read_is_named() -> None:
    """An error of the system becomes one line with the stream's name."""
    with pytest.raises(BaselineError, match=r"base\.bin: cannot be read \(Input/output error\)"):
        LogitsReader(Broken(), "base.bin")


class Endless:
    """Serves a stream of any number of chunks from one row, and notes what it is asked for."""

    def __init__(self, n_chunk: int, n_vocab: int) -> None:
        n_ctx = 32
        row = pack_rows(random_logits(1, n_vocab)).tobytes()
        head = b"_logits_" + np.array([n_ctx, n_vocab, n_chunk], np.int32).tobytes()
        self._head = head + text(n_chunk, n_ctx, n_vocab).tobytes()
        self._row = row
        self._size = len(self._head) + n_chunk * 15 * len(row)
        self._at = 0
        self.largest = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Give part of what is asked for, as a pipe does."""
        self.largest = max(self.largest, len(buffer))
        if self._at < len(self._head):
            part = self._head[self._at : self._at + len(buffer)]
        else:
            place = (self._at - len(self._head)) % len(self._row)
            part = self._row[place : place + min(len(buffer), self._size - self._at)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def peak(n_chunk: int) -> int:
    """Bytes allocated at most while a stream is read, beyond its source and its tokens."""
    source = Endless(n_chunk, 4000)
    tracemalloc.start()
    rows = sum(len(block) for block in LogitsReader(source, "pipe", block_bytes=1 << 16))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 15 * n_chunk
    assert source.largest <= 1 << 16
    return most - 4 * 32 * n_chunk


def test_memory_does_not_grow_with_the_number_of_chunks() -> None:
    """No request is larger than a block, and a long stream needs no more than a short one."""
    assert peak(200) < peak(2) + (1 << 16)


def test_a_pipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A FIFO that cannot seek and gives a few bytes at a time is read to its end."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            data = written()
            for start in range(0, len(data), 37):
                pipe.write(data[start : start + 37])

    writer = threading.Thread(target=write)
    writer.start()
    with path.open("rb", buffering=0) as pipe:
        rows = np.concatenate([block.log_probs() for block in LogitsReader(pipe, "pipe")])
    writer.join()
    np.testing.assert_array_equal(rows, read_all(written()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_vocab", 8, "base has n_vocab 7 and candidate has 8"),
        ("n_ctx", 8, "base has n_ctx 9 and candidate has 8"),
        ("n_chunk", 2, "base has n_chunk 3 and candidate has 2"),
        ("token", 0, "base and candidate differ in the text, first at chunk 1 token 4"),
    ],
)
def test_streams_about_different_texts_are_told_apart(field: str, value: int, message: str) -> None:
    """The message names both streams and what differs first."""
    size = {"n_vocab": N_VOCAB, "n_ctx": N_CTX, "n_chunk": N_CHUNK}
    if field in size:
        size[field] = value
    tokens = text(size["n_chunk"], size["n_ctx"], N_VOCAB)
    if field == "token":
        tokens[1, 4] = value
    numbers = np.array([size["n_ctx"], size["n_vocab"], size["n_chunk"]], np.int32)
    other = read_header(io.BytesIO(b"_logits_" + numbers.tobytes() + tokens.tobytes()), "other")
    mine = read_header(io.BytesIO(written()), "base")
    with pytest.raises(BaselineError, match=message):
        mine.check_same(other, "base", "candidate")
    mine.check_same(mine, "base", "candidate")


def test_rows_start_on_a_whole_float() -> None:
    """An odd vocabulary is padded to an even number of words."""
    assert [row_words(n_vocab) for n_vocab in (2, 3, 248320)] == [6, 8, 248324]
