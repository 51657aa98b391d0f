"""Divergence between two streams: the numbers of llama-perplexity --kl-divergence."""

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.quality import divergence
from pytest_llmperf.quality.divergence import (
    TokenDivergences,
    compare,
    summarize,
    tails_by_chunk,
)
from pytest_llmperf.quality.logits import LogitsReader, write_stream

N_CTX, N_CHUNK, N_VOCAB = 12, 4, 301
N_SCORED = 5
ROWS = N_CHUNK * N_SCORED
ROW_BYTES = 2 * (302 + 4)
SEEDS = st.integers(0, 2**32 - 1)


def pair(
    seed: int, *, n_vocab: int = N_VOCAB, noise: float = 0.3, spread: float = 5.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits of a base and of a candidate near it; a large spread is clipped by the format."""
    random = np.random.default_rng(seed)
    base = random.normal(0, spread, (ROWS, n_vocab)).astype(np.float32)
    return base, base + random.normal(0, noise, base.shape).astype(np.float32)


def tokens(n_vocab: int = N_VOCAB, seed: int = 5) -> NDArray[np.int64]:
    """A text."""
    return np.random.default_rng(seed).integers(0, n_vocab, (N_CHUNK, N_CTX))


def stream(logits: NDArray[np.float32], text: NDArray[np.int64] | None = None) -> bytes:
    """The logits as a stream."""
    sink = io.BytesIO()
    n_vocab = logits.shape[1]
    text = tokens(n_vocab) if text is None else text
    write_stream(sink, text, [logits], n_vocab=n_vocab)
    return sink.getvalue()


def reader(data: bytes, name: str = "base", block_bytes: int = 1 << 20) -> LogitsReader:
    """A reader of a stream in memory."""
    return LogitsReader(io.BytesIO(data), name, block_bytes=block_bytes)


def compared(base: NDArray[np.float32], candidate: NDArray[np.float32]) -> TokenDivergences:
    """The divergences of two arrays of logits."""
    return compare(reader(stream(base)), reader(stream(candidate), "candidate"))


def dequantized(data: bytes) -> NDArray[np.float64]:
    """Log-probabilities of a stream."""
    rows = [block.log_probs() for block in reader(data)]
    return np.concatenate(rows).astype(np.float64)


def by_the_letter(base: bytes, candidate: bytes) -> NDArray[np.float64]:
    """KLD as llama.cpp defines it, in float64 and with no thought of speed."""
    log_p, log_q = dequantized(base), dequantized(candidate)
    terms = np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0.0)
    result: NDArray[np.float64] = terms.sum(axis=1)
    return result


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Exact log-probabilities."""
    exact = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    return result


@pytest.mark.parametrize("sparse", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("segment", [64, 32768])
@given(seed=SEEDS, spread=st.floats(0.1, 12))
def test_the_kld_is_that_of_the_definition(
    sparse: float, segment: int, seed: int, spread: float
) -> None:
    """Whatever the way through a row: masked or picked out, in one segment or in several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "SPARSE", sparse)
        patch.setattr(divergence, "SEGMENT", segment)
        base, candidate = (stream(logits) for logits in pair(seed, spread=spread))
        got = compare(reader(base), reader(candidate, "candidate"))
    np.testing.assert_allclose(got.kld, by_the_letter(base, candidate), rtol=1e-5, atol=5e-6)


@given(SEEDS, st.floats(0.5, 3), st.floats(0.01, 1))
def test_quantization_hardly_changes_the_kld(seed: int, spread: float, noise: float) -> None:
    """Where nothing is clipped, the KLD is that of the exact distributions."""
    base, candidate = pair(seed, spread=spread, noise=noise)
    log_p, log_q = log_softmax(base), log_softmax(candidate)
    exact = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    np.testing.assert_allclose(compared(base, candidate).kld, exact, rtol=1e-3, atol=2e-4)


@given(SEEDS, st.floats(0.1, 2), st.floats(0, 2))
def test_a_divergence_is_not_negative(seed: int, spread: float, noise: float) -> None:
    """But for rounding, as long as clipping lends the candidate no probability."""
    base, candidate = pair(seed, spread=spread, noise=noise)
    assert compared(base, candidate).kld.min() > -2e-4


@given(SEEDS, st.floats(0, 12))
def test_a_base_does_not_diverge_from_itself(seed: int, spread: float) -> None:
    """The same stream on both sides gives 0 exactly and the same most likely tokens."""
    base, _ = pair(seed, spread=spread)
    got = compared(base, base)
    assert not got.kld.any()
    assert not got.delta_p.any()
    assert got.same_top.all()
    np.testing.assert_array_equal(got.nll, got.nll_base)


@given(SEEDS, st.integers(-50, 50))
def test_a_shift_of_the_logits_does_not_matter(seed: int, shift: int) -> None:
    """What a model adds to all its logits says nothing of its distribution."""
    base, candidate = (np.round(logits * 64) / np.float32(64) for logits in pair(seed))
    plain, shifted = compared(base, candidate), compared(base, candidate + np.float32(shift))
    np.testing.assert_array_equal(plain.kld, shifted.kld)
    np.testing.assert_array_equal(plain.nll, shifted.nll)


def test_each_token_is_looked_up_where_it_came_next() -> None:
    """NLL, same-top and change of probability are those of the exact distributions."""
    base, candidate = pair(1, spread=2.0)
    text = tokens()
    following = text[:, N_CTX // 2 + 1 :].reshape(-1)
    got = compared(base, candidate)
    rows = np.arange(ROWS)
    log_p, log_q = log_softmax(base), log_softmax(candidate)
    np.testing.assert_allclose(got.nll_base, -log_p[rows, following], atol=1.3e-4)
    np.testing.assert_allclose(got.nll, -log_q[rows, following], atol=1.3e-4)
    np.testing.assert_array_equal(got.same_top, log_p.argmax(1) == log_q.argmax(1))
    expected = np.exp(log_q[rows, following]) - np.exp(log_p[rows, following])
    np.testing.assert_allclose(got.delta_p, expected, atol=1e-5)
    assert 0 < got.same_top.sum() < ROWS


def test_a_clipped_token_is_told() -> None:
    """A token more than 16 nats below the most likely has the floor's NLL, and is marked."""
    base = np.zeros((ROWS, N_VOCAB), np.float32)
    text = tokens()
    following = text[:, N_CTX // 2 + 1 :].reshape(-1)
    base[:, 7] = 3.0
    base[3, following[3]] = -20.0
    got = compare(reader(stream(base, text)), reader(stream(-base, text), "candidate"))
    assert np.flatnonzero(got.at_floor_base & (got.nll_base > 10)).tolist() == [3]
    assert got.nll_base[3] == pytest.approx(16 + math.log(1 + 299 * math.exp(-3)), abs=1e-3)
    assert got.at_floor.sum() == (following == 7).sum()


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_size_of_a_block_does_not_matter(first: int, second: int) -> None:
    """Row by row and all at once give the same, also if the two sides differ in it."""
    base, candidate = (stream(logits) for logits in pair(2))
    whole = compare(reader(base), reader(candidate, "candidate"))
    parts = compare(
        reader(base, block_bytes=first * ROW_BYTES),
        reader(candidate, "candidate", block_bytes=second * ROW_BYTES),
    )
    for name in ("kld", "nll", "nll_base", "same_top", "at_floor", "at_floor_base"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_progress_is_told_after_each_chunk() -> None:
    """Once a chunk, whatever the blocks."""
    done: list[int] = []
    base = stream(pair(0)[0])
    compare(reader(base, block_bytes=2 * ROW_BYTES), reader(base), progress=done.append)
    assert done == [1, 2, 3, 4]


def test_streams_about_different_texts_are_refused() -> None:
    """A divergence between answers to different questions is none."""
    base, candidate = pair(0)
    other = tokens(seed=6)
    with pytest.raises(BaselineError, match="base and candidate differ in the text"):
        compare(reader(stream(base)), reader(stream(candidate, other), "candidate"))


@pytest.mark.parametrize("which", ["base", "candidate"])
@pytest.mark.parametrize("damage", ["truncated in", "bytes follow"])
def test_the_side_that_is_damaged_is_named(which: str, damage: str) -> None:
    """A cut or prolonged stream is refused by its own name, on either side."""
    whole = stream(pair(0)[0])
    broken = whole[:-1] if damage == "truncated in" else whole + b"x"
    sides = {"base": whole, "candidate": whole, which: broken}
    with pytest.raises(BaselineError, match=f"^{which}: {damage}"):
        compare(*(reader(data, name) for name, data in sides.items()))


@pytest.mark.parametrize("which", ["base", "candidate"])
def test_a_row_without_its_largest_quantum_is_refused(which: str) -> None:
    """Every writer gives the most likely token the quantum 65535."""
    whole = stream(pair(0)[0])
    start = len(whole) - ROW_BYTES * 3
    words = np.frombuffer(whole[start + 8 : start + ROW_BYTES], np.uint16).copy()
    words[words.argmax()] = 60000
    broken = whole[: start + 8] + words.tobytes() + whole[start + ROW_BYTES :]
    sides = {"base": whole, "candidate": whole, which: broken}
    with pytest.raises(BaselineError, match=f"^{which}: chunk 3 row 2 has [0-9]+ as its largest"):
        compare(*(reader(data, name) for name, data in sides.items()))


def test_a_base_row_whose_probabilities_do_not_sum_to_one_is_refused() -> None:
    """The sum is known on the way, so a base row that is altered enough is noticed."""
    whole = stream(pair(0)[0])
    broken = whole[:-400] + b"\xff" * 300 + whole[-100:]
    with pytest.raises(BaselineError, match="base: chunk 3 row 4 has probabilities that sum to"):
        compare(reader(broken), reader(whole, "candidate"))


def divergences(seed: int, *, n_chunk: int = 40, n_scored: int = 25) -> TokenDivergences:
    """Made-up results of single tokens, alike within a chunk."""
    random = np.random.default_rng(seed)
    count = n_chunk * n_scored
    shared = np.repeat(random.gamma(2, 1, n_chunk), n_scored)
    nll_base = (shared * random.gamma(2, 0.5, count)).astype(np.float32)
    nll = np.abs(nll_base + random.normal(0, 0.2, count)).astype(np.float32)
    kld = (shared * random.gamma(0.5, 0.1, count)).astype(np.float32)
    same_top, at_floor_base, at_floor = (random.random(count) < share for share in (0.9, 0.1, 0.2))
    return TokenDivergences(n_scored, kld, nll_base, nll, same_top, at_floor_base, at_floor)


def mean_and_uncertainty(values: NDArray[np.float32]) -> tuple[float, float]:
    """As the tool computes them, from the sums of values and squares."""
    exact = values.astype(np.float64)
    mean = exact.sum() / len(exact)
    return mean, math.sqrt(((exact**2).sum() / len(exact) - mean**2) / (len(exact) - 1))


def interpolated(values: NDArray[np.float32], percent: float) -> float:
    """As the tool computes a percentile."""
    ordered = np.sort(values).astype(np.float64)
    place = percent / 100 * (len(ordered) - 1)
    low = int(place)
    part = place - low
    return float((1 - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)])


@given(SEEDS)
def test_a_summary_is_what_the_tool_prints(seed: int) -> None:
    """Every number of its three tables, from its own formulas."""
    given_ = divergences(seed)
    got = summarize(given_)
    nll, nll_error = mean_and_uncertainty(given_.nll)
    base, base_error = mean_and_uncertainty(given_.nll_base)
    product = (given_.nll.astype(np.float64) * given_.nll_base).mean()
    covariance = (product - nll * base) / (len(given_) - 1)
    ratio_error = math.sqrt(nll_error**2 + base_error**2 - 2 * covariance)
    ppl, ppl_base = math.exp(nll), math.exp(base)
    difference_error = math.sqrt(
        (ppl * nll_error) ** 2 + (ppl_base * base_error) ** 2 - 2 * ppl * ppl_base * covariance
    )
    square, square_error = mean_and_uncertainty(given_.delta_p**2)
    same = given_.same_top.mean()
    expected = {
        "ppl": (ppl, ppl * nll_error),
        "ppl_base": (ppl_base, ppl_base * base_error),
        "ln_ppl_ratio": (nll - base, ratio_error),
        "ppl_ratio": (math.exp(nll - base), math.exp(nll - base) * ratio_error),
        "ppl_difference": (ppl - ppl_base, difference_error),
        "kld": mean_and_uncertainty(given_.kld),
        "delta_p": mean_and_uncertainty(given_.delta_p),
        "delta_p_rms": (math.sqrt(square), 0.5 / math.sqrt(square) * square_error),
        "same_top": (same, math.sqrt(same * (1 - same) / (len(given_) - 1))),
    }
    for name, value_and_error in expected.items():
        estimate = getattr(got, name)
        assert (estimate.value, estimate.error) == pytest.approx(value_and_error, rel=1e-5), name
    assert got.ppl_correlation == pytest.approx(covariance / (nll_error * base_error))
    for percentiles, values in (
        (got.kld_percentiles, given_.kld),
        (got.delta_p_percentiles, given_.delta_p),
    ):
        for percent, value in percentiles.items():
            assert value == pytest.approx(interpolated(values, percent), abs=1e-7)
    assert got.at_floor_base == given_.at_floor_base.sum()
    assert got.at_floor == given_.at_floor.sum()
    assert got.kld_percentiles[50.0] == pytest.approx(np.median(given_.kld))
    assert got.kld_percentiles[100.0] == given_.kld.max()
    assert got.delta_p_percentiles[0.0] == given_.delta_p.min()


@given(SEEDS)
def test_errors_by_chunk_treat_a_chunk_as_one_observation(seed: int) -> None:
    """They are those of the chunks' means, and larger where the tokens of a chunk are alike."""
    given_ = divergences(seed)
    got = summarize(given_)
    means = given_.kld.reshape(40, 25).mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(got.by_chunk.kld, means, rtol=1e-6)
    assert got.kld.chunk_error == pytest.approx(means.std(ddof=1) / math.sqrt(40))
    assert got.ppl_base.chunk_error > got.ppl_base.error
    assert (got.tokens, got.chunks) == (1000, 40)
    assert got.by_chunk.nll_base.mean() == pytest.approx(math.log(got.ppl_base.value))
    ratio = got.by_chunk.nll - got.by_chunk.nll_base
    assert got.ln_ppl_ratio.chunk_error == pytest.approx(ratio.std(ddof=1) / math.sqrt(40))
    rms = math.sqrt(got.by_chunk.delta_p_squared.mean())
    assert got.delta_p_rms.value == pytest.approx(rms)
    assert got.same_top.value == pytest.approx(got.by_chunk.same_top.mean())


def test_equal_models_have_a_summary_too() -> None:
    """Nothing is divided by a change that is 0, and a correlation without spread is unknown."""
    flat = np.full(10, 0.5, np.float32)
    got = summarize(TokenDivergences(5, flat * 0, flat, flat, flat > 0, flat < 0, flat < 0))
    assert (got.delta_p_rms.value, got.delta_p_rms.error) == (0, 0)
    assert math.isnan(got.ppl_correlation)
    assert got.same_top.value == 1
    assert got.ppl_ratio.value == 1


def test_one_chunk_has_no_error_by_chunk() -> None:
    """One observation has no spread: the error is unknown, not 0."""
    got = summarize(divergences(0, n_chunk=1))
    assert math.isnan(got.kld.chunk_error)
    assert got.kld.error > 0


@pytest.mark.parametrize("count", [0, 24])
def test_a_part_of_a_chunk_is_refused(count: int) -> None:
    """The last chunk must be complete, and there must be one."""
    values = np.zeros(count, np.float32)
    given_ = TokenDivergences(25, values, values, values, values > 0, values > 0, values > 0)
    with pytest.raises(ValueError, match=f"{count} tokens are not whole chunks of 25"):
        summarize(given_)


def of_kld(kld: list[float] | NDArray[np.float32], n_scored: int) -> TokenDivergences:
    """Divergences of which only the KLD matters."""
    values = np.asarray(kld, np.float32)
    blank, flags = np.zeros_like(values), np.zeros(len(values), np.bool_)
    return TokenDivergences(n_scored, values, blank, blank, flags, flags, flags)


@given(
    chunks=st.integers(1, 8),
    n_scored=st.integers(1, 300),
    seed=SEEDS,
    ties=st.booleans(),
)
def test_the_tails_hold_the_worst_tokens(
    chunks: int,
    n_scored: int,
    seed: int,
    ties: bool,  # noqa: FBT001 - drawn by Hypothesis
) -> None:
    """From the lists alone comes numpy's 99.9 % percentile of all tokens; they stay short."""
    kld = np.random.default_rng(seed).lognormal(-4, 2, chunks * n_scored).astype(np.float32)
    kld = np.round(kld, 1) if ties else kld
    tails = tails_by_chunk(of_kld(kld, n_scored))
    assert len(tails) == chunks
    listed = sorted((value for tail in tails for value in tail), reverse=True)
    rank, rest = divmod(len(kld) - 1, 1000)
    upper, lower = listed[rank], listed[min(rank + 1, len(listed) - 1)]
    assert upper + (lower - upper) * rest / 1000 == pytest.approx(
        np.percentile(kld.astype(np.float64), 99.9), rel=1e-5
    )
    assert len(listed) <= max(2, math.ceil(len(kld) / 100)) + chunks
    for tail, row in zip(tails, kld.reshape(chunks, n_scored), strict=True):
        assert tail == sorted(tail, reverse=True)
        assert tail[0] == pytest.approx(row.max(), rel=1e-5)


def test_a_tail_by_hand() -> None:
    """Of 300 tokens the three largest, by chunk, of equal ones the first; six digits."""
    kld = np.full(300, 0.25)
    kld[[10, 150, 170]] = 1 / 3, 2, 1
    assert tails_by_chunk(of_kld(kld, 100)) == [[0.333333], [2.0, 1.0], [0.25]]
    assert tails_by_chunk(of_kld([-1e-6] * 4, 2)) == [[-1e-6, -1e-6], [-1e-6]]


def test_tails_of_nothing() -> None:
    """No tokens, part of a chunk, or no number."""
    for kld in ([], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="are not whole chunks of 2"):
            tails_by_chunk(of_kld(kld, 2))
    with pytest.raises(ValueError, match="no finite number"):
        tails_by_chunk(of_kld([1.0, math.nan], 2))
