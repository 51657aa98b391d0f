"""The file that keeps a reference: its columns, sections and checks. No numbers are judged here.

Little-endian: magic, u32 format, u32 length and text of a JSON header, u32 CRC-32 of all that;
then the text's tokens and each chunk, each as u32 length, u32 CRC-32 of section number, length
and payload, and the payload, compressed. A chunk holds its columns one after the other and each
column byte plane by byte plane, ids as gaps to the one before: what is alike stands together
and compresses.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.quality.logits import MOST_TOKENS, MOST_VOCAB

MAGIC = b"llmpref\n"
FORMAT = 1

TAIL_MASS = 0.01
"""Default mass that the tail of a token may have."""

MOST_KEPT = 512
"""Default most kept tokens; a flat distribution has a larger tail instead."""

MASS_PER_SAMPLE = 0.001
"""Default tail mass that one sampled token stands for."""

MOST_SAMPLED = 128
"""Default most sampled tokens of a tail."""

LEAST_SAMPLED = 2  # one value would have no standard deviation
ENTRY_LIMIT = 65535  # counts are 16 bits wide
HEADER_LIMIT = 4096
AGAIN = "record the reference again"

ROW_COLUMNS = {
    "scale": "<f4",
    "floor": "<f4",
    "next_quanta": "<u2",
    "kept": "<u2",
    "sampled": "<u2",
    "tail_count": "<u4",
    "tail_mass": "<f4",
    "tail_plogp": "<f4",
}
ROW_BYTES = sum(np.dtype(kind).itemsize for kind in ROW_COLUMNS.values())
_HEADER = struct.Struct("<II")
_CRC = struct.Struct("<I")
_SECTION = struct.Struct("<II")
ENTRY_BYTES = 5  # a gap of 24 bits and a quantum of 16
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 20, "lc": 0, "pb": 0}]


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """How much of a distribution is kept.

    Attributes:
        tail_mass: Tokens are kept until the others have no more probability than this.
        most_kept: Most kept tokens, 1 to 65535.
        mass_per_sample: One tail token is sampled for each such part of the tail's mass, ...
        most_sampled: ... but no more than these, 2 to 65535, and no fewer than 2.

    Raises:
        ValueError: A value is out of range.
    """

    tail_mass: float = TAIL_MASS
    most_kept: int = MOST_KEPT
    mass_per_sample: float = MASS_PER_SAMPLE
    most_sampled: int = MOST_SAMPLED

    def __post_init__(self) -> None:
        if not (
            0 <= self.tail_mass < 1
            and 1 <= self.most_kept <= ENTRY_LIMIT
            and self.mass_per_sample > 0
            and LEAST_SAMPLED <= self.most_sampled <= ENTRY_LIMIT
        ):
            raise ValueError(f"out of range: {self}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the header says.

    Attributes:
        model_sha256: Hash of the base's model file, 64 hexadecimal digits.
        corpus_sha256: Hash of the text file, likewise.
        n_ctx: Tokens of a chunk.
        n_vocab: Tokens of the vocabulary.
        n_chunk: Chunks.
        settings: How much was kept.

    Raises:
        ValueError: A value is out of range.
    """

    model_sha256: str
    corpus_sha256: str
    n_ctx: int
    n_vocab: int
    n_chunk: int
    settings: ReferenceSettings

    def __post_init__(self) -> None:
        for name in ("model_sha256", "corpus_sha256"):
            if not re.fullmatch("[0-9a-f]{64}", getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not 64 hexadecimal digits")
        if not (
            self.n_ctx > 2  # noqa: PLR2004 - as in a logits stream
            and 1 < self.n_vocab <= MOST_VOCAB
            and self.n_chunk > 0
            and self.n_ctx * self.n_chunk <= MOST_TOKENS
        ):
            raise ValueError(f"out of range: {self}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Facts:
        """Read what :func:`write_header` wrote.

        Raises:
            ValueError: A value is out of range.
            TypeError: A field is missing, unknown or of another type.
        """
        settings = ReferenceSettings(**values.pop("settings"))
        facts = cls(**values, settings=settings)
        if not all(isinstance(size, int) for size in (facts.n_ctx, facts.n_vocab, facts.n_chunk)):
            raise TypeError("sizes are whole numbers")
        return facts

    @property
    def n_scored(self) -> int:
        """Scored tokens of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def most_raw(self) -> int:
        """Most bytes of a chunk before compression."""
        entries = self.settings.most_kept + self.settings.most_sampled
        return self.n_scored * (ROW_BYTES + entries * ENTRY_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRows:
    """The scored tokens of one chunk.

    Arrays of entries hold the rows one after the other, ids ascending within a row.

    Attributes:
        scale: Nats of one quantum, float32, shape ``(n_scored,)``.
        floor: Log-probability of quantum 0, likewise.
        next_quanta: Quantum of the token that came next, uint16, likewise.
        kept: Number of kept tokens, likewise.
        sampled: Number of sampled tail tokens, likewise.
        tail_count: Number of tokens in the tail, likewise.
        tail_mass: Probability of the tail, likewise.
        tail_plogp: ``sum of p ln p`` over the tail, nats, likewise.
        kept_ids: Kept tokens, int64, shape ``(kept.sum(),)``.
        kept_quanta: Their quanta, uint16.
        sampled_ids: Sampled tokens, int64, shape ``(sampled.sum(),)``; one may occur twice.
        sampled_quanta: Their quanta, uint16.
    """

    scale: NDArray[np.float32]
    floor: NDArray[np.float32]
    next_quanta: NDArray[np.uint16]
    kept: NDArray[np.int64]
    sampled: NDArray[np.int64]
    tail_count: NDArray[np.int64]
    tail_mass: NDArray[np.float64]
    tail_plogp: NDArray[np.float64]
    kept_ids: NDArray[np.int64]
    kept_quanta: NDArray[np.uint16]
    sampled_ids: NDArray[np.int64]
    sampled_quanta: NDArray[np.uint16]


@dataclass(frozen=True, slots=True, eq=False)
class CondensedRow:
    """One scored token, condensed. Fields as in :class:`ReferenceRows`."""

    scale: float
    floor: float
    next_quantum: int
    tail_count: int
    tail_mass: float
    tail_plogp: float
    kept_ids: NDArray[np.int64]
    kept_quanta: NDArray[np.uint16]
    sampled_ids: NDArray[np.int64]
    sampled_quanta: NDArray[np.uint16]


def encode(rows: list[CondensedRow]) -> bytes:
    """Lay out the rows of one chunk."""
    columns = {
        "scale": [row.scale for row in rows],
        "floor": [row.floor for row in rows],
        "next_quanta": [row.next_quantum for row in rows],
        "kept": [len(row.kept_ids) for row in rows],
        "sampled": [len(row.sampled_ids) for row in rows],
        "tail_count": [row.tail_count for row in rows],
        "tail_mass": [row.tail_mass for row in rows],
        "tail_plogp": [row.tail_plogp for row in rows],
    }
    parts = [_planes(np.array(columns[name], kind)) for name, kind in ROW_COLUMNS.items()]
    for ids, quanta in (
        ([row.kept_ids for row in rows], [row.kept_quanta for row in rows]),
        ([row.sampled_ids for row in rows], [row.sampled_quanta for row in rows]),
    ):
        gaps = np.concatenate([np.diff(part, prepend=0) for part in ids])
        # The fourth plane of a gap is all zeros, because ids are below 2^23.
        parts += [_planes(gaps.astype("<u4"))[: 3 * len(gaps)]]
        parts += [_planes(np.concatenate(quanta).astype("<u2"))]
    return b"".join(parts)


def decode(raw: bytes, rows: int, n_vocab: int, place: str) -> ReferenceRows:
    """Read what :func:`encode` laid out, trusting nothing but the number of rows.

    Raises:
        BaselineError: The bytes are not what a chunk of so many rows and such a vocabulary has.
    """
    wrong = BaselineError(f"{place} does not hold what a reference holds: {AGAIN}")
    view = memoryview(raw)

    def take(kind: str, count: int, planes: int) -> NDArray[np.generic]:
        nonlocal view
        if len(view) < planes * count:
            raise wrong
        size = np.dtype(kind).itemsize
        stacked = np.zeros((count, size), np.uint8)
        stacked[:, :planes] = np.frombuffer(view, np.uint8, planes * count).reshape(planes, -1).T
        view = view[planes * count :]
        return stacked.view(kind).reshape(-1)

    columns = {
        name: take(kind, rows, np.dtype(kind).itemsize) for name, kind in ROW_COLUMNS.items()
    }
    entries = []
    for name in ("kept", "sampled"):
        counts = columns[name].astype(np.int64)
        total = int(counts.sum())
        gaps = take("<u4", total, 3).astype(np.int64)
        along = np.cumsum(gaps)
        starts = (np.cumsum(counts) - counts)[counts > 0]
        ids = along - np.repeat(along[starts] - gaps[starts], counts[counts > 0])
        if total and int(ids.max()) >= n_vocab:
            raise wrong
        entries.append((counts, ids, take("<u2", total, 2).astype(np.uint16)))
    (kept, kept_ids, kept_quanta), (sampled, sampled_ids, sampled_quanta) = entries
    if len(view) > 0 or not kept.all():
        raise wrong
    return ReferenceRows(
        scale=columns["scale"].astype(np.float32),
        floor=columns["floor"].astype(np.float32),
        next_quanta=columns["next_quanta"].astype(np.uint16),
        kept=kept,
        sampled=sampled,
        tail_count=columns["tail_count"].astype(np.int64),
        tail_mass=columns["tail_mass"].astype(np.float64),
        tail_plogp=columns["tail_plogp"].astype(np.float64),
        kept_ids=kept_ids,
        kept_quanta=kept_quanta,
        sampled_ids=sampled_ids,
        sampled_quanta=sampled_quanta,
    )


def _planes(values: NDArray[np.generic]) -> bytes:
    """The lowest byte of every value, then the next byte of every value, and so on."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def _compress(raw: bytes) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=FILTERS)


def decompress(payload: bytes, most: int, place: str) -> bytes:
    """Decompress to ``most`` bytes or fewer: a small file must not fill the memory.

    Raises:
        BaselineError: The payload is not what :func:`write_section` writes, or is larger.
    """
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTERS)
    try:
        raw = unpacker.decompress(payload, max_length=most + 1)
    except lzma.LZMAError as error:
        raise BaselineError(f"{place} cannot be decompressed: {AGAIN}") from error
    if len(raw) > most or not unpacker.eof:
        raise BaselineError(f"{place} is not as large as its header says: {AGAIN}")
    return raw


def checksum(section: int, payload: bytes) -> int:
    """CRC-32 of a section's number, length and payload."""
    return zlib.crc32(payload, zlib.crc32(struct.pack("<II", section, len(payload))))


def write_section(file: BinaryIO, section: int, raw: bytes) -> None:
    """Append a section: 0 is the text, 1 and on are the chunks."""
    payload = _compress(raw)
    file.write(struct.pack("<II", len(payload), checksum(section, payload)) + payload)


def read_section(file: BinaryIO, section: int, place: str) -> tuple[int, int, bytes]:
    """Read a section; return where its payload lies, its CRC-32 and the payload.

    Raises:
        BaselineError: The section is truncated or altered.
    """
    head = file.read(_SECTION.size)
    if len(head) < _SECTION.size:
        raise BaselineError(f"{place} is truncated: {AGAIN}")
    length, expected = _SECTION.unpack(head)
    offset = file.tell()
    if length > os.fstat(file.fileno()).st_size - offset:
        raise BaselineError(f"{place} is truncated or has been altered: {AGAIN}")
    payload = file.read(length)
    if checksum(section, payload) != expected:
        raise BaselineError(f"{place} has been altered: {AGAIN}")
    return offset, expected, payload


def write_header(file: BinaryIO, facts: Facts) -> None:
    """Write what comes before the sections."""
    text = json.dumps(asdict(facts), sort_keys=True).encode()
    start = MAGIC + _HEADER.pack(FORMAT, len(text)) + text
    file.write(start + _CRC.pack(zlib.crc32(start)))


def read_header(file: BinaryIO, path: Path) -> Facts:
    """Read what comes before the sections.

    Raises:
        BaselineError: It is no reference, of another format, truncated or altered.
    """
    start = file.read(len(MAGIC) + _HEADER.size)
    if start[: len(MAGIC)] != MAGIC[: len(start)]:
        raise BaselineError(f"{path}: this is no reference: {AGAIN}")
    if len(start) < len(MAGIC) + _HEADER.size:
        raise BaselineError(f"{path}: truncated in the header: {AGAIN}")
    version, length = _HEADER.unpack(start[len(MAGIC) :])
    if version != FORMAT:
        raise BaselineError(
            f"{path}: header: format {version}, and this version reads {FORMAT}: {AGAIN}"
        )
    text = file.read(min(length, HEADER_LIMIT))
    rest = file.read(_CRC.size)
    if len(text) < length or len(rest) < _CRC.size:
        raise BaselineError(f"{path}: truncated in the header, or altered: {AGAIN}")
    if _CRC.pack(zlib.crc32(start + text)) != rest:
        raise BaselineError(f"{path}: the header has been altered: {AGAIN}")
    try:
        return Facts.of(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BaselineError(f"{path}: the header cannot be understood: {AGAIN}") from error
