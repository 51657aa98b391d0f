"""How far a candidate's token distributions lie from the base's.

Every number is defined as ``llama-perplexity --kl-divergence`` defines it, so that the two can
be laid side by side. One thing differs: that tool compares its live logits in float32, while
both sides here come from 16-bit streams, which clip at 16 nats below the most likely token (see
:mod:`pytest_llmperf.quality.logits`). On a token that the candidate holds for less likely than
e^-16 of its favourite, its NLL is therefore a lower bound, and the number of those tokens is
told. The tool's ``ln(PPL(Q)/PPL(base))`` sets an unclipped candidate against a clipped base and
is biased by it; here both are clipped alike. Where two tokens are less than a quantum apart in
the candidate, which of them is its most likely is not known from a stream: the first is taken.

The unit of statistics is the chunk: the tokens of one chunk share their context, so an error
computed from single tokens, as the tool prints it, is too small. Both are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.quality.logits import TOP_QUANTUM, LogitsHeader, LogitsReader, RowBlock

CUTOFF = -16.0
"""Base log-probability at and below which llama-perplexity leaves a token out of the KLD."""

MASS_SLACK = 1e-2
"""By how much the probabilities of an unaltered row may exceed 1: rounding of its quanta."""

KLD_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1, 0.0)
DELTA_P_PERCENTILES = (100.0, 99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1, 0.0)

TAIL = 100
"""One scored token in so many is listed by :func:`tails_by_chunk`."""

# Significant digits of a listed value: what a baseline file keeps.
_DIGITS = 6

# Entries worked on at once: two float32 buffers of this length stay in a second-level cache.
SEGMENT = 131072
# Entries summed at once in float32; a divisor of SEGMENT.
STRIP = 8192
# Share of entries above the cutoff below which picking them out is faster than masking the rest.
SPARSE = 0.35


@dataclass(frozen=True, slots=True, eq=False)
class TokenDivergences:
    """What is known of each scored token, in the order of the text.

    Attributes:
        n_scored: Tokens of a chunk; the arrays hold whole chunks, one after the other.
        kld: Kullback-Leibler divergence of the candidate from the base, KLD(base || candidate),
            nats, float32, shape ``(tokens,)``. Rounding may take it a little below 0.
        nll_base: -ln of the base's probability of the token that came next, likewise.
        nll: -ln of the candidate's probability of that token, likewise.
        same_top: Whether both hold the same token for the most likely, bool.
        at_floor_base: Whether ``nll_base`` is that of the lowest log-probability of its row,
            which may have been clipped: ``nll_base`` is then a lower bound, bool.
        at_floor: The same of ``nll``.
    """

    n_scored: int
    kld: NDArray[np.float32]
    nll_base: NDArray[np.float32]
    nll: NDArray[np.float32]
    same_top: NDArray[np.bool_]
    at_floor_base: NDArray[np.bool_]
    at_floor: NDArray[np.bool_]

    @classmethod
    def empty(cls, header: LogitsHeader) -> TokenDivergences:
        """Make room for the scored tokens of a stream."""
        count = header.n_chunk * header.n_scored
        kld, nll_base, nll = (np.empty(count, np.float32) for _ in range(3))
        same_top, at_floor_base, at_floor = (np.empty(count, np.bool_) for _ in range(3))
        return cls(header.n_scored, kld, nll_base, nll, same_top, at_floor_base, at_floor)

    def __len__(self) -> int:
        return len(self.kld)

    @property
    def n_chunk(self) -> int:
        """Chunks."""
        return len(self.kld) // self.n_scored

    @property
    def delta_p(self) -> NDArray[np.float32]:
        """Probability of the token that came next: candidate minus base."""
        difference: NDArray[np.float32] = np.exp(-self.nll) - np.exp(-self.nll_base)
        return difference


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, or a function of means, with its standard errors.

    Attributes:
        value: The estimate.
        error: Standard error as if tokens were independent: what llama-perplexity prints.
        chunk_error: Standard error with the chunk as unit; NaN for a single chunk.
    """

    value: float
    error: float
    chunk_error: float


@dataclass(frozen=True, slots=True, eq=False)
class ChunkMeans:
    """Means over the tokens of each chunk, float64, shape ``(n_chunk,)``: for paired tests.

    Attributes:
        kld: KLD, nats.
        nll_base: NLL of the base, nats.
        nll: NLL of the candidate, nats.
        delta_p: Candidate's minus base's probability of the token that came next.
        delta_p_squared: The square of that.
        same_top: Share of tokens with the same most likely token.
    """

    kld: NDArray[np.float64]
    nll_base: NDArray[np.float64]
    nll: NDArray[np.float64]
    delta_p: NDArray[np.float64]
    delta_p_squared: NDArray[np.float64]
    same_top: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What ``llama-perplexity --kl-divergence`` prints, and the errors by chunk.

    Shares and probabilities are fractions, where the tool prints percent.

    Attributes:
        tokens: Scored tokens.
        chunks: Chunks.
        ppl: Perplexity of the candidate, ``PPL(Q)``.
        ppl_base: Perplexity of the base.
        ppl_correlation: Correlation of the NLLs of both, -1 to 1; NaN if one does not vary.
        ln_ppl_ratio: ``ln(PPL(Q) / PPL(base))``.
        ppl_ratio: ``PPL(Q) / PPL(base)``.
        ppl_difference: ``PPL(Q) - PPL(base)``.
        kld: Mean KLD, nats.
        kld_percentiles: KLD at each of :data:`KLD_PERCENTILES`; 0 is the minimum, 50 the median,
            100 the maximum.
        delta_p: Mean change of the probability of the token that came next.
        delta_p_percentiles: That change at each of :data:`DELTA_P_PERCENTILES`.
        delta_p_rms: Root of its mean square.
        same_top: Share of tokens for which both have the same most likely token.
        at_floor_base: Number of tokens whose NLL in the base is a lower bound only, because the
            format clips; 0 if ``ppl_base`` is exact.
        at_floor: The same of the candidate: where it is not 0, take the perplexity that
            llama-perplexity itself reports.
        by_chunk: The means of each chunk.
    """

    tokens: int
    chunks: int
    ppl: Estimate
    ppl_base: Estimate
    ppl_correlation: float
    ln_ppl_ratio: Estimate
    ppl_ratio: Estimate
    ppl_difference: Estimate
    kld: Estimate
    kld_percentiles: Mapping[float, float]
    delta_p: Estimate
    delta_p_percentiles: Mapping[float, float]
    delta_p_rms: Estimate
    same_top: Estimate
    at_floor_base: int
    at_floor: int
    by_chunk: ChunkMeans


def compare(
    base: LogitsReader,
    candidate: LogitsReader,
    *,
    progress: Callable[[int], None] | None = None,
) -> TokenDivergences:
    """Read two streams in step and compare them token by token.

    Memory is two blocks of rows, two buffers of a fixed length and 15 bytes a scored token.
    Both streams may be pipes whose writers run at the same time. One thread.

    For a token with base probabilities p and candidate probabilities q,
    ``KLD = sum of p_i * (ln p_i - ln q_i)`` over all i with ``ln p_i > -16``, as in
    ``log_softmax`` of llama.cpp's perplexity.cpp.

    Args:
        base: The stream of the base.
        candidate: The stream of the build under test.
        progress: Called with the number of chunks done, after each.

    Raises:
        BaselineError: The streams are about different texts, or one of them is refused.
    """
    header = base.header
    header.check_same(candidate.header, base.name, candidate.name)
    result = TokenDivergences.empty(header)
    kernel = _Kernel(header.n_vocab)
    rows = min(base.block_rows, candidate.block_rows)
    for ours, theirs in zip(base.blocks(rows), candidate.blocks(rows), strict=True):
        start = ours.chunk * header.n_scored + ours.row
        part = slice(start, start + len(ours))
        result.nll_base[part], result.at_floor_base[part] = look_up(ours)
        result.nll[part], result.at_floor[part] = look_up(theirs)
        result.same_top[part] = top_tokens(ours, base.name) == top_tokens(theirs, candidate.name)
        result.kld[part] = kernel.kld(ours, theirs, base.name)
        if progress is not None and ours.row + len(ours) == header.n_scored:
            progress(ours.chunk + 1)
    return result


def look_up(block: RowBlock) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """NLL of the token that came next, nats, and whether it lies at the floor, ``(rows,)`` each."""
    quanta = block.quanta[np.arange(len(block)), block.next_tokens]
    return -(block.scale * quanta + block.floor), quanta == 0


def top_tokens(block: RowBlock, name: str) -> NDArray[np.intp]:
    """The most likely token of each row, the first one of equals, shape ``(rows,)``.

    Raises:
        BaselineError: A row's largest quantum is not the one that every writer gives it.
    """
    # Row by row, because along an axis numpy takes a slower way.
    tops = np.array([quanta.argmax() for quanta in block.quanta], np.intp)
    largest = block.quanta[np.arange(len(block)), tops]
    wrong = (largest != TOP_QUANTUM) & (block.scale > 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise BaselineError(
            f"{name}: {block.place(row)} has {largest[row]} as its largest quantum, not "
            f"{TOP_QUANTUM}: the stream has been altered, write it again"
        )
    return tops


class _Kernel:
    """The sums over the vocabulary, in buffers that are used again for every row.

    Works through a row in segments that stay in the cache. The difference of the two
    log-probabilities is formed entry by entry before it is weighted and summed, because
    the sums of the two alone would cancel to a value a thousand times smaller. Sums are taken
    in float32 over strips and in float64 over the strips.
    """

    def __init__(self, n_vocab: int) -> None:
        width = -(-min(n_vocab, SEGMENT) // STRIP) * STRIP
        self._prob = np.empty(width, np.float32)
        self._gain = np.empty(width, np.float32)
        self._kept = np.empty(width, np.bool_)
        self._ones = np.ones((STRIP, 1), np.float32)

    def kld(self, base: RowBlock, candidate: RowBlock, name: str) -> NDArray[np.float64]:
        """KLD of each row, nats, shape ``(rows,)``."""
        result = np.empty(len(base))
        for row in range(len(base)):
            mass, result[row] = self._row(
                (base.quanta[row], base.scale[row], base.floor[row]),
                (candidate.quanta[row], candidate.scale[row], candidate.floor[row]),
            )
            check_mass(mass, base, row, name)
        return result

    def _row(
        self,
        base: tuple[NDArray[np.uint16], np.float32, np.float32],
        candidate: tuple[NDArray[np.uint16], np.float32, np.float32],
    ) -> tuple[float, float]:
        """Return the base's probability above the cutoff and the KLD of one row."""
        (quanta, scale, floor), (others, other_scale, other_floor) = base, candidate
        cut = cut_quantum(scale, floor)
        total = weighted = 0.0
        for start in range(0, len(quanta), SEGMENT):
            mine, theirs = quanta[start : start + SEGMENT], others[start : start + SEGMENT]
            kept = None
            if cut >= 0:
                kept = np.greater(mine, np.uint16(cut), out=self._kept[: len(mine)])
                count = np.count_nonzero(kept)
                if count == 0:
                    continue
                if count < SPARSE * len(mine):
                    picked = np.flatnonzero(kept)
                    mine, theirs, kept = mine.take(picked), theirs.take(picked), None
            mass, gain = self._segment(mine, scale, theirs, other_scale, kept)
            total += mass
            weighted += gain
        factor = math.exp(floor)
        return factor * total, factor * (weighted + (float(floor) - float(other_floor)) * total)

    def _segment(
        self,
        mine: NDArray[np.uint16],
        scale: np.float32,
        theirs: NDArray[np.uint16],
        other_scale: np.float32,
        kept: NDArray[np.bool_] | None,
    ) -> tuple[float, float]:
        """Sum ``exp(scale * mine)``, and that times the difference of the scaled quanta."""
        size = len(mine)
        strips = -(-size // STRIP)
        prob, gain = self._prob[:size], self._gain[:size]
        np.copyto(prob, mine)
        np.multiply(prob, scale, out=prob)
        np.copyto(gain, theirs)
        np.multiply(gain, other_scale, out=gain)
        np.subtract(prob, gain, out=gain)
        # At most e^16, because a row spans 16 nats; the factor exp(floor) is taken once a row.
        np.exp(prob, out=prob)
        if kept is not None:
            np.multiply(prob, kept, out=prob)
        prob, gain = self._prob[: strips * STRIP], self._gain[: strips * STRIP]
        prob[size:] = 0
        gain[size:] = 0
        # Dot products of this length, unlike longer ones, are not spread over threads by BLAS.
        prob = prob.reshape(strips, 1, STRIP)
        mass = np.matmul(prob, self._ones)
        weighted = np.matmul(prob, gain.reshape(strips, STRIP, 1))
        return float(mass.sum(dtype=np.float64)), float(weighted.sum(dtype=np.float64))


def cut_quantum(scale: np.float32, floor: np.float32) -> int:
    """Largest quantum whose log-probability is at or below :data:`CUTOFF`; -1 if none is."""
    below = CUTOFF - float(floor)
    if below < 0:
        return -1
    return TOP_QUANTUM if scale == 0 else min(TOP_QUANTUM, int(below / float(scale)))


def check_mass(mass: float, block: RowBlock, row: int, name: str) -> None:
    """Check that the probabilities of a row sum to 1, as far as clipping and rounding let them.

    Raises:
        BaselineError: They do not.
    """
    left_out = block.quanta.shape[1] * math.exp(CUTOFF)
    if not 1 - left_out - MASS_SLACK <= mass <= 1 + MASS_SLACK:
        raise BaselineError(
            f"{name}: {block.place(row)} has probabilities that sum to {mass:.4g}: "
            "the stream has been altered, write it again"
        )


def summarize(divergences: TokenDivergences) -> Summary:
    """Summarize as ``llama-perplexity --kl-divergence`` does, with errors by chunk beside.

    The error of a mean over n tokens is ``sqrt(var / n)`` with the unbiased variance; by chunk it
    is the same over the chunks' means. Errors of functions of means follow by the delta method.

    Raises:
        ValueError: There is no token, or the last chunk is incomplete.
    """
    count, per_chunk = len(divergences), divergences.n_scored
    if count == 0 or count % per_chunk:
        raise ValueError(f"{count} tokens are not whole chunks of {per_chunk}")
    kld, nll_base, nll = (
        values.astype(np.float64)
        for values in (divergences.kld, divergences.nll_base, divergences.nll)
    )
    delta = divergences.delta_p.astype(np.float64)
    same = divergences.same_top.astype(np.float64)

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = values.reshape(-1, per_chunk).mean(axis=1)
        return result

    def estimate(values: NDArray[np.float64]) -> Estimate:
        return Estimate(
            float(values.mean()), _standard_error(values), _standard_error(means(values))
        )

    def scaled(source: Estimate, value: float, slope: float) -> Estimate:
        return Estimate(value, slope * source.error, slope * source.chunk_error)

    mean_nll, mean_nll_base, ratio = estimate(nll), estimate(nll_base), estimate(nll - nll_base)
    ppl, ppl_base = math.exp(mean_nll.value), math.exp(mean_nll_base.value)
    difference = estimate(ppl * nll - ppl_base * nll_base)
    square = estimate(delta**2)
    rms = math.sqrt(square.value)
    return Summary(
        tokens=count,
        chunks=divergences.n_chunk,
        ppl=scaled(mean_nll, ppl, ppl),
        ppl_base=scaled(mean_nll_base, ppl_base, ppl_base),
        ppl_correlation=_correlation(nll, nll_base),
        ln_ppl_ratio=ratio,
        ppl_ratio=scaled(ratio, math.exp(ratio.value), math.exp(ratio.value)),
        ppl_difference=scaled(difference, ppl - ppl_base, 1.0),
        kld=estimate(kld),
        kld_percentiles=_percentiles(kld, KLD_PERCENTILES),
        delta_p=estimate(delta),
        delta_p_percentiles=_percentiles(delta, DELTA_P_PERCENTILES),
        delta_p_rms=scaled(square, rms, 0.5 / rms if rms else 0.0),
        same_top=estimate(same),
        at_floor_base=int(divergences.at_floor_base.sum()),
        at_floor=int(divergences.at_floor.sum()),
        by_chunk=ChunkMeans(
            kld=means(kld),
            nll_base=means(nll_base),
            nll=means(nll),
            delta_p=means(delta),
            delta_p_squared=means(delta**2),
            same_top=means(same),
        ),
    )


def tails_by_chunk(divergences: TokenDivergences) -> list[list[float]]:
    """List the largest KLDs of a pass by the chunk they are of.

    Of all scored tokens the largest hundredth is listed, two at least; of equal ones those that
    come first in the text. A chunk that has none of these lists its own largest. From one token
    on, the 99.9 % percentile of all tokens follows exactly from the lists and their number: it lies
    between the listed values of ranks ``k`` and ``k + 1`` for ``k = (tokens - 1) // 1000``, the
    largest of all having rank 0. Takes 4 bytes a token, and 8 more for each that equals the
    smallest listed.

    Returns:
        For each chunk its listed KLDs, nats, largest first, of six significant digits as a baseline
        file holds them; no list is empty.

    Raises:
        ValueError: There is no token, the last chunk is incomplete, or a KLD is no number.
    """
    kld, per_chunk = divergences.kld, divergences.n_scored
    count = len(kld)
    if count == 0 or count % per_chunk:
        raise ValueError(f"{count} tokens are not whole chunks of {per_chunk}")
    if not np.isfinite(kld).all():
        raise ValueError("a KLD is no finite number")
    kept = min(count, max(2, -(-count // TAIL)))
    least = np.partition(kld, count - kept)[count - kept]
    above = np.flatnonzero(kld > least)
    equal = np.flatnonzero(kld == least)[: kept - len(above)]
    tails: list[list[float]] = [[] for _ in range(divergences.n_chunk)]
    for index in (*above, *equal):
        tails[index // per_chunk].append(float(kld[index]))
    largest = kld.reshape(-1, per_chunk).max(axis=1)
    return [
        [float(f"{value:.{_DIGITS}g}") for value in sorted(tail or [float(most)], reverse=True)]
        for tail, most in zip(tails, largest, strict=True)
    ]


def _standard_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean; NaN for a single value."""
    if len(values) < 2:  # noqa: PLR2004 - one value has no spread
        return math.nan
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Pearson's correlation; NaN if one side does not vary."""
    left, right = left - left.mean(), right - right.mean()
    spread = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / spread if spread else math.nan


def _percentiles(
    values: NDArray[np.float64], percentages: tuple[float, ...]
) -> Mapping[float, float]:
    """Linear interpolation between the order statistics around ``p * (n - 1)``."""
    found = np.percentile(values, percentages)
    return MappingProxyType(dict(zip(percentages, (float(value) for value in found), strict=True)))
