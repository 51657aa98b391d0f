"""A base model's token distributions, small enough to keep, and what they cost in accuracy.

Of each scored token a reference keeps the most likely tokens (the *kept* ones) with their exact
16-bit log-probabilities, and of the rest (the *tail*) its mass, its ``sum of p ln p``, its
number of tokens and a sample drawn in proportion to p. A candidate's KLD is then

* exact on the kept tokens;
* on the tail, of mass P, estimated from the sample. With ``d = ln p - ln q`` of a sampled token,
  ``P mean(d)`` has the right expectation but much noise. With ``r = q / p``,
  ``P (mean(r) - 1)`` estimates how much mass the candidate has on the tail beyond P; and that
  is nearly known from the mass that it has on the kept tokens. As r - 1 is nearly -d, what
  it is off tells what the other is off (a control variate): of
  ``P mean(d + c (r - 1)) - c (known gain of mass)`` the noise is a small part of what it was.

The error that this adds has a bound that holds for certain, whatever the sample. From below, by
the log-sum inequality (the tail seen as one symbol): ``P ln(P / Q)``, where Q is the most mass
that the candidate can have on the tail. From above, because no log-probability of the candidate
lies below its floor: ``sum of p ln p - P * floor``. Both are returned for each token. They
are wide, as they must be when nothing is assumed of the candidate; the standard error of the
estimate, returned too, tells what to expect. By default that is below 1 % of the mean
KLD from a few hundred tokens on, and falls with the root of their number. Where the mean KLD is
below about 1e-4 nats, the rounding of the 16-bit streams, which the exact comparison has too,
is what limits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.files import replacing
from pytest_llmperf.quality._reference_file import (
    AGAIN,
    LEAST_SAMPLED,
    CondensedRow,
    Facts,
    ReferenceRows,
    ReferenceSettings,
    checksum,
    decode,
    decompress,
    encode,
    read_header,
    read_section,
    write_header,
    write_section,
)
from pytest_llmperf.quality.divergence import (
    TokenDivergences,
    check_mass,
    cut_quantum,
    look_up,
    top_tokens,
)
from pytest_llmperf.quality.logits import LogitsHeader, LogitsReader, RowBlock

__all__ = [
    "Reference",
    "ReferenceDivergences",
    "ReferenceSettings",
    "build_reference",
    "compare_reference",
    "own_divergences",
]

GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDING = 1e-5
"""Float32 rounding of a log-probability, nats, with room to spare."""

MOST_POOLED = 100.0  # e to the power of this is still a number, and c has long been 0


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A reference file. Its chunks are read when asked for, so that memory stays small.

    Attributes:
        path: The file.
        facts: Hashes of model and text, sizes, and how much was kept.
        header: The text and its chunks, as in the logits stream that was recorded.
        nbytes: Size of the file.
        sections: Place in the file, length and CRC-32 of each chunk's payload.
    """

    path: Path
    facts: Facts
    header: LogitsHeader
    nbytes: int
    sections: tuple[tuple[int, int, int], ...]

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a reference's header and text, and check every byte of the rest.

        Raises:
            BaselineError: The file cannot be read, is no reference, is of another format,
                truncated or altered; names the place.
        """
        try:
            with path.open("rb") as file:
                return _load(path, file)
        except OSError as error:
            raise BaselineError(f"{path}: cannot be read ({error.strerror}): {AGAIN}") from error

    def check_base(self, *, model_sha256: str, corpus_sha256: str) -> None:
        """Check that the reference was recorded from this model and this text.

        Raises:
            BaselineError: It was not; names which of the two differs.
        """
        for what, mine, asked in (
            ("model", self.facts.model_sha256, model_sha256),
            ("text", self.facts.corpus_sha256, corpus_sha256),
        ):
            if mine != asked:
                raise BaselineError(
                    f"{self.path}: recorded from another {what} (sha256 {mine[:12]}, "
                    f"not {asked[:12]}): {AGAIN} or use the {what} it was recorded from"
                )

    def rows(self, chunk: int) -> ReferenceRows:
        """Read one chunk.

        Raises:
            BaselineError: The file was altered since it was loaded.
        """
        offset, length, expected = self.sections[chunk]
        place = f"{self.path}: chunk {chunk}"
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                payload = file.read(length)
        except OSError as error:
            raise BaselineError(f"{place} cannot be read ({error.strerror}): {AGAIN}") from error
        if len(payload) != length or checksum(chunk + 1, payload) != expected:
            raise BaselineError(f"{place} has been altered: {AGAIN}")
        raw = decompress(payload, self.facts.most_raw, place)
        return decode(raw, self.header.n_scored, self.header.n_vocab, place)


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceDivergences:
    """Divergences from a reference, and the error that the reference adds to them.

    Attributes:
        tokens: What is known of each token; its KLD is the estimate. NLLs, same-top and change
            of probability are exact. The estimate of a single token may be below 0.
        lower: KLD is not below this, nats, float64, shape ``(tokens,)``.
        upper: KLD is not above this, likewise.
        variance: Variance of each token's KLD that comes from estimating the tail, likewise.
    """

    tokens: TokenDivergences
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    variance: NDArray[np.float64]

    @property
    def kld_error(self) -> float:
        """Standard error of the mean KLD that comes from the reference alone, nats."""
        return math.sqrt(float(self.variance.sum())) / len(self.variance)

    @property
    def kld_bounds(self) -> tuple[float, float]:
        """Between which the mean KLD lies for certain, nats."""
        return float(self.lower.mean()), float(self.upper.mean())


def build_reference(
    reader: LogitsReader,
    path: Path,
    *,
    model_sha256: str,
    corpus_sha256: str,
    settings: ReferenceSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Record a stream as a reference, chunk by chunk, replacing the file as a whole.

    Args:
        reader: The base's stream.
        path: Where to; its folder is made if need be.
        model_sha256: Hash of the model file, 64 hexadecimal digits.
        corpus_sha256: Hash of the text file, likewise.
        settings: How much to keep.
        progress: Called with the number of chunks done, after each.

    Raises:
        BaselineError: The stream is refused or the file cannot be written.
        ValueError: A hash is none.
    """
    settings = settings or ReferenceSettings()
    header = reader.header
    facts = Facts(
        model_sha256, corpus_sha256, header.n_ctx, header.n_vocab, header.n_chunk, settings
    )
    try:
        with replacing(path) as file:
            write_header(file, facts)
            write_section(file, 0, header.tokens.astype("<i4").tobytes())
            rows: list[CondensedRow] = []
            for block in reader.blocks():
                rows += _condense(block, settings, reader.name)
                if len(rows) == header.n_scored:
                    write_section(file, block.chunk + 1, encode(rows))
                    rows = []
                    if progress is not None:
                        progress(block.chunk + 1)
    except OSError as error:
        raise BaselineError(f"{path}: cannot be written ({error.strerror})") from error
    return Reference.load(path)


def compare_reference(
    reference: Reference,
    candidate: LogitsReader,
    *,
    progress: Callable[[int], None] | None = None,
) -> ReferenceDivergences:
    """Compare a candidate's stream with a reference, token by token.

    The KLD is that of :func:`pytest_llmperf.quality.divergence.compare`, but for the tail's part:
    see this module's text for the estimate, its standard error and the bounds.

    Args:
        reference: The base.
        candidate: The stream of the build under test.
        progress: Called with the number of chunks done, after each.

    Raises:
        BaselineError: The two are about different texts, or one of them is refused.
    """
    header = reference.header
    header.check_same(candidate.header, str(reference.path), candidate.name)
    count = header.n_chunk * header.n_scored
    result = ReferenceDivergences(
        TokenDivergences.empty(header),
        np.empty(count),
        np.empty(count),
        np.empty(count),
    )
    rows, parts = None, []  # type: ReferenceRows | None, list[_Part]
    for block in candidate.blocks():
        if rows is None or block.row == 0:
            rows, parts = reference.rows(block.chunk), []
        parts.append(_compare_block(rows, block, candidate.name, result))
        if block.row + len(block) == header.n_scored:
            _finish_chunk(rows, parts, result, block.chunk)
            if progress is not None:
                progress(block.chunk + 1)
    return result


def own_divergences(reference: Reference) -> TokenDivergences:
    """Return the base's divergences from itself: none, and its own NLLs.

    Raises:
        BaselineError: The file was altered since it was loaded.
    """
    found = TokenDivergences.empty(reference.header)
    found.kld[:] = 0.0
    found.same_top[:] = True
    n_scored = reference.header.n_scored
    for chunk in range(reference.header.n_chunk):
        rows, mine = reference.rows(chunk), slice(chunk * n_scored, (chunk + 1) * n_scored)
        nll = -(rows.scale * rows.next_quanta + rows.floor)
        found.nll[mine] = found.nll_base[mine] = nll
        found.at_floor[mine] = found.at_floor_base[mine] = rows.next_quanta == 0
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What the tails of some rows are estimated from, float64.

    Attributes:
        exact: KLD of the kept tokens, shape ``(rows,)``.
        kept_p: Probability of the kept tokens in the base, likewise.
        kept_q: Their probability in the candidate, likewise.
        rounding: Variance of ``kept_q - kept_p`` that comes from rounding to 16 bits, likewise.
        gains: ``ln p - ln q`` of the sampled tokens, shape ``(entries,)``.
    """

    exact: NDArray[np.float64]
    kept_p: NDArray[np.float64]
    kept_q: NDArray[np.float64]
    rounding: NDArray[np.float64]
    gains: NDArray[np.float64]

    @classmethod
    def join(cls, parts: list[_Part]) -> _Part:
        """Put the parts of a chunk together."""
        return cls(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            )
        )


def _compare_block(
    rows: ReferenceRows, block: RowBlock, name: str, result: ReferenceDivergences
) -> _Part:
    """Write into ``result`` what a block alone tells of its tokens."""
    mine = slice(block.row, block.row + len(block))
    start = block.chunk * result.tokens.n_scored + block.row
    part = slice(start, start + len(block))
    scale, floor = rows.scale[mine].astype(np.float64), rows.floor[mine].astype(np.float64)
    kept = _Entries.of(rows.kept, rows.kept_ids, rows.kept_quanta, mine)
    sampled = _Entries.of(rows.sampled, rows.sampled_ids, rows.sampled_quanta, mine)

    result.tokens.nll_base[part] = -(rows.scale[mine] * rows.next_quanta[mine] + rows.floor[mine])
    result.tokens.at_floor_base[part] = rows.next_quanta[mine] == 0
    result.tokens.nll[part], result.tokens.at_floor[part] = look_up(block)
    result.tokens.same_top[part] = kept.first_largest() == top_tokens(block, name)

    log_p, log_q, quanta = kept.log_probs(scale, floor, block)
    p, q = np.exp(log_p), np.exp(log_q)
    exact = kept.sums(p * (log_p - log_q))
    unclipped = kept.sums(np.where(quanta > 0, q, 0.0))
    result.lower[part] = exact + _least_of_tail(rows, mine, unclipped, block)
    result.upper[part] = exact + rows.tail_plogp[mine] - rows.tail_mass[mine] * block.floor

    # A value rounded to steps of s is off by a variance of s^2 / 12.
    theirs = block.scale.astype(np.float64)
    rounding = (scale**2 * kept.sums(p**2) + theirs**2 * kept.sums(q**2)) / 12
    log_p, log_q, _ = sampled.log_probs(scale, floor, block)
    return _Part(exact, kept.sums(p), kept.sums(q), rounding, log_p - log_q)


def _finish_chunk(
    rows: ReferenceRows, parts: list[_Part], result: ReferenceDivergences, chunk: int
) -> None:
    """Estimate the tails of a chunk, see this module's text, and write KLD and variance.

    The coefficient c is that of a regression of -d on r where r is log-normal,
    ``s^2 / (e^(s^2) - 1)`` with the variance s^2 of d, pooled over the chunk's tails; for a token
    whose gain of mass is itself uncertain it is made smaller in proportion. It hardly depends on
    a token's own sample, as it would have to for the estimate to be biased.
    """
    part = _Part.join(parts)
    row = np.repeat(np.arange(len(rows.sampled)), rows.sampled)
    number = np.maximum(rows.sampled, 1)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = _sums(row, values, len(number)) / number
        return result

    def variance(values: NDArray[np.float64]) -> NDArray[np.float64]:
        spread: NDArray[np.float64] = mean((values - mean(values)[row]) ** 2)
        spread *= number / np.maximum(number - 1, 1)
        return spread

    mass = rows.tail_mass
    freedom = np.maximum(rows.sampled - 1, 0)
    pooled = float(variance(part.gains) @ freedom) / max(int(freedom.sum()), 1)
    # What the candidate lost on the kept tokens it gained on the tail and on the tokens that
    # the KLD leaves out: in proportion to their masses, unless it is known better.
    lost = part.kept_p - part.kept_q
    others = np.maximum(1 - part.kept_p, mass)
    gained = lost * np.divide(mass, others, out=np.ones_like(mass), where=others > 0)
    uncertain = part.rounding + (lost - gained) ** 2
    sampling = mass**2 * pooled / number
    weight = np.divide(sampling, sampling + uncertain, out=np.zeros_like(mass), where=sampling > 0)
    if pooled > 0:
        weight *= pooled / math.expm1(min(pooled, MOST_POOLED))
    corrected = part.gains + weight[row] * np.expm1(-part.gains)
    done = slice(chunk * len(number), (chunk + 1) * len(number))
    result.tokens.kld[done] = part.exact + mass * mean(corrected) - weight * gained
    result.variance[done] = mass**2 * variance(corrected) / number + weight**2 * uncertain


def _least_of_tail(
    rows: ReferenceRows, mine: slice, unclipped: NDArray[np.float64], block: RowBlock
) -> NDArray[np.float64]:
    """``P ln(P / Q)`` with the most that Q can be, shape ``(rows,)``.

    Unclipped, a quantum is half a quantum at most from the candidate's log-probability, so
    the unclipped probabilities sum to ``exp(scale / 2)`` at most: what the kept tokens do not
    have of that, the tail can have. A clipped token has the probability of the floor, and
    the tail can have no more of those than it has tokens.
    """
    scale, least = block.scale.astype(np.float64), np.exp(block.floor.astype(np.float64))
    # Row by row, because along an axis numpy takes a slower way.
    clipped = np.array([len(quanta) - np.count_nonzero(quanta) for quanta in block.quanta])
    count, mass = rows.tail_count[mine], rows.tail_mass[mine]
    most = np.maximum(np.exp(scale / 2 + ROUNDING) - unclipped, 0)
    most = np.maximum(most + np.minimum(clipped, count) * least, count * least)
    some = mass > 0  # P ln P is 0 where there is no tail
    ratio = np.divide(mass, most, out=np.ones_like(mass), where=some)
    result: NDArray[np.float64] = mass * np.log(ratio)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Entries of some rows, one after the other.

    Attributes:
        counts: Entries of each row.
        row: The row of each entry, counted from the first of these rows.
        ids: Tokens.
        quanta: Their quanta in the base.
    """

    counts: NDArray[np.int64]
    row: NDArray[np.int64]
    ids: NDArray[np.int64]
    quanta: NDArray[np.uint16]

    @classmethod
    def of(
        cls,
        counts: NDArray[np.int64],
        ids: NDArray[np.int64],
        quanta: NDArray[np.uint16],
        rows: slice,
    ) -> _Entries:
        """Take the entries of ``rows`` out of those of a chunk."""
        begin = int(counts[: rows.start].sum())
        end = begin + int(counts[rows].sum())
        row = np.repeat(np.arange(len(counts[rows])), counts[rows])
        return cls(counts[rows], row, ids[begin:end], quanta[begin:end])

    def log_probs(
        self, scale: NDArray[np.float64], floor: NDArray[np.float64], block: RowBlock
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint16]]:
        """Log-probabilities in base and candidate, and the candidate's quanta."""
        theirs = block.quanta[self.row, self.ids]
        log_q = block.scale.astype(np.float64)[self.row] * theirs
        log_q += block.floor.astype(np.float64)[self.row]
        return scale[self.row] * self.quanta + floor[self.row], log_q, theirs

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over the entries of each row, shape ``(rows,)``."""
        return _sums(self.row, values, len(self.counts))

    def first_largest(self) -> NDArray[np.int64]:
        """The most likely token of each row, the first of equals; no row may be empty."""
        starts = np.cumsum(self.counts) - self.counts
        largest = np.maximum.reduceat(self.quanta, starts)
        at = np.flatnonzero(self.quanta == largest[self.row])
        _, first = np.unique(self.row[at], return_index=True)
        return self.ids[at[first]]


def _sums(row: NDArray[np.int64], values: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """Sum the values of each row, shape ``(rows,)``."""
    sums: NDArray[np.float64] = np.bincount(row, weights=values, minlength=rows).astype(np.float64)
    return sums


def _condense(block: RowBlock, settings: ReferenceSettings, name: str) -> list[CondensedRow]:
    """Choose what is kept of each row of a block."""
    top_tokens(block, name)  # checks the block
    return [_condense_row(block, row, settings, name) for row in range(len(block))]


def _condense_row(
    block: RowBlock, row: int, settings: ReferenceSettings, name: str
) -> CondensedRow:
    quanta, scale, floor = block.quanta[row], block.scale[row], block.floor[row]
    cut = cut_quantum(scale, floor)
    ids = np.flatnonzero(quanta > cut) if cut >= 0 else np.arange(len(quanta))
    mine = quanta[ids]
    log_prob = scale * mine + floor
    prob = np.exp(log_prob).astype(np.float64)
    mass = float(prob.sum())
    check_mass(mass, block, row, name)
    order = _largest(mine, settings.most_kept)
    covered = np.cumsum(prob[order])
    count = 1 + int(np.searchsorted(covered, mass - settings.tail_mass))
    in_tail = np.ones(len(mine), np.bool_)
    in_tail[order[:count]] = False
    kept, tail = np.flatnonzero(~in_tail), np.flatnonzero(in_tail)
    part = prob[tail]
    tail_mass = float(part.sum())
    turn = (block.chunk * 7919 + block.row + row) * GOLDEN % 1
    sampled = tail[_sample(part, settings, turn)]
    return CondensedRow(
        float(scale),
        float(floor),
        int(quanta[block.next_tokens[row]]),
        len(tail),
        tail_mass,
        float(part @ log_prob[tail].astype(np.float64)),
        ids[kept],
        mine[kept],
        ids[sampled],
        mine[sampled],
    )


def _largest(quanta: NDArray[np.uint16], most: int) -> NDArray[np.intp]:
    """Places of the ``most`` largest, largest first, the first of equals first."""
    if len(quanta) > most:
        least = np.partition(quanta, len(quanta) - most)[len(quanta) - most]
        above = np.flatnonzero(quanta > least)
        equal = np.flatnonzero(quanta == least)[: most - len(above)]
        places = np.sort(np.concatenate([above, equal]))
    else:
        places = np.arange(len(quanta))
    order = np.argsort(-quanta[places].astype(np.int32), kind="stable")
    chosen: NDArray[np.intp] = places[order]
    return chosen


def _sample(
    prob: NDArray[np.float64], settings: ReferenceSettings, turn: float
) -> NDArray[np.intp]:
    """Draw places in proportion to ``prob``, evenly spaced along their cumulative sum.

    ``turn``, 0 to 1, shifts the grid. It runs through multiples of the golden ratio from row to
    row: as even as random shifts are on average, and the same wherever it is computed.
    """
    if not len(prob):
        return np.empty(0, np.intp)
    along = np.cumsum(prob)
    wanted = math.ceil(along[-1] / settings.mass_per_sample)
    number = min(max(wanted, LEAST_SAMPLED), settings.most_sampled)
    points = (np.arange(number) + turn) * (along[-1] / number)
    places: NDArray[np.intp] = np.searchsorted(along, points, side="right")
    return np.minimum(places, len(prob) - 1)


def _load(path: Path, file: BinaryIO) -> Reference:
    facts = read_header(file, path)
    count = facts.n_ctx * facts.n_chunk
    place = f"{path}: the text"
    _, _, payload = read_section(file, 0, place)
    text = decompress(payload, 4 * count, place)
    tokens = np.frombuffer(text[: len(text) // 4 * 4], "<i4").astype(np.int32)
    if len(text) != 4 * count or tokens.min() < 0 or tokens.max() >= facts.n_vocab:
        raise BaselineError(f"{place} is not what the header says: {AGAIN}")
    tokens.setflags(write=False)
    sections = []
    for chunk in range(facts.n_chunk):
        offset, expected, payload = read_section(file, chunk + 1, f"{path}: chunk {chunk}")
        sections.append((offset, len(payload), expected))
    if file.read(1):
        raise BaselineError(f"{path}: bytes follow chunk {facts.n_chunk - 1}, the last: {AGAIN}")
    header = LogitsHeader(
        facts.n_ctx, facts.n_vocab, facts.n_chunk, tokens.reshape(facts.n_chunk, facts.n_ctx)
    )
    return Reference(path, facts, header, file.tell(), tuple(sections))
