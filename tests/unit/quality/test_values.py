"""What a pass says by chunk, from its stream and from what its program told."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.judge.chunks import QUALITY, complaint, pooled
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.quality.divergence import TokenDivergences, compare, tails_by_chunk
from pytest_llmperf.quality.logits import LogitsReader, write_stream
from pytest_llmperf.quality.perplexity import Perplexity
from pytest_llmperf.quality.values import all_figures, base_values, chunk_values

CHUNKS, CONTEXT, VOCAB = 3, 12, 60
SCORED = CONTEXT - 1 - CONTEXT // 2


def told(*running: float) -> Perplexity:
    """Return a pass whose program told these perplexities after each chunk."""
    value = running[-1] if running else math.nan
    return Perplexity(value, None, running, len(running), "", "tool", "log", 1.0)


def streams(seed: int, depth: float = 2.0) -> tuple[NDArray[np.float32], TokenDivergences]:
    """Return a candidate's logits, and its divergences from a base near it.

    Args:
        seed: Of both.
        depth: Standard deviation of the logits; of a large one some tokens are clipped.
    """
    random = np.random.default_rng(seed)
    base = random.normal(0, depth, (CHUNKS, SCORED, VOCAB)).astype(np.float32)
    candidate = base + random.normal(0, 0.3, base.shape).astype(np.float32)
    text = random.integers(0, VOCAB, (CHUNKS, CONTEXT))
    readers = []
    for name, logits in (("base", base), ("candidate", candidate)):
        sink = io.BytesIO()
        write_stream(sink, text, logits, n_vocab=VOCAB)
        readers.append(LogitsReader(io.BytesIO(sink.getvalue()), name))
    following = readers[0].header.tokens[:, CONTEXT // 2 + 1 :]
    assert following.shape == (CHUNKS, SCORED)
    return nll_of(candidate, following), compare(*readers)


def nll_of(logits: NDArray[np.float32], following: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return -ln of the probability of the token that followed, nats, shape of ``following``."""
    wide = logits.astype(np.float64)
    log_p = wide - np.log(np.exp(wide).sum(axis=2, keepdims=True))
    found = -np.take_along_axis(log_p, following[:, :, None].astype(np.int64), axis=2)[:, :, 0]
    return found.astype(np.float32)


def made(nll: Sequence[Sequence[float]], *clipped: int) -> TokenDivergences:
    """Return tokens with these NLLs on either side; one of each clipped chunk is at the floor."""
    found = np.asarray(nll, np.float32)
    at_floor = np.zeros(found.shape, np.bool_)
    at_floor[list(clipped), 0] = True
    flat, floors = found.ravel(), at_floor.ravel()
    zeros, same = np.zeros_like(flat), np.ones_like(floors)
    return TokenDivergences(found.shape[1], zeros, flat, flat, same, floors, floors)


def ppl(values: dict[str, list[list[float]]]) -> list[float]:
    """Return the perplexity of each chunk."""
    return [one for [one] in values["ppl"]]


@given(st.integers(0, 2**32 - 1))
def test_a_chunk_that_is_not_clipped_has_the_perplexity_of_its_stream(seed: int) -> None:
    """The exponential of the mean NLL, whatever the program told, which is rounded."""
    nll, tokens = streams(seed)
    clipped = tokens.at_floor.reshape(CHUNKS, SCORED).any(axis=1)
    found = ppl(chunk_values(told(1.0, 1.0, 1.0), tokens))
    exact = np.exp(nll.mean(axis=1, dtype=np.float64))
    np.testing.assert_allclose(np.asarray(found)[~clipped], exact[~clipped], rtol=1e-3)
    stream = np.exp(tokens.nll.reshape(CHUNKS, SCORED).mean(axis=1, dtype=np.float64))
    np.testing.assert_allclose(np.asarray(found)[~clipped], stream[~clipped], rtol=1e-9)


def test_a_clipped_chunk_has_the_perplexity_that_the_program_told() -> None:
    """Its stream knows a token at the floor for likelier than it is."""
    nll, tokens = streams(7, depth=12.0)
    clipped = tokens.at_floor.reshape(CHUNKS, SCORED).any(axis=1)
    assert clipped.any()
    means = nll.mean(axis=1, dtype=np.float64)
    running = np.exp(np.cumsum(means) / np.arange(1, CHUNKS + 1))
    found = ppl(chunk_values(told(*running.tolist()), tokens))
    np.testing.assert_allclose(found, np.exp(means), rtol=1e-3)
    stream = np.exp(tokens.nll.reshape(CHUNKS, SCORED).mean(axis=1, dtype=np.float64))
    assert (stream[clipped] < 0.9 * np.exp(means)[clipped]).all()


def test_only_the_clipped_chunk_is_taken_from_what_was_told() -> None:
    """What the others have from the stream has more digits."""
    tokens = made([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], 1)
    running = told(math.exp(1.5), math.exp(2.5), math.exp(2.5))
    found = ppl(chunk_values(running, tokens))
    # Two chunks of 2.5 on the average after one of 1.5: the second has 3.5.
    assert found == pytest.approx([math.exp(1.0), math.exp(3.5), math.exp(3.0)])


@pytest.mark.parametrize(
    "running",
    [
        (),
        (math.e,),
        (math.e, math.nan, math.e),
        (math.e, math.inf, math.e),
        (math.e, 0.0, math.e),
        (math.e, -1.0, math.e),
    ],
)
def test_where_nothing_was_told_the_stream_counts(running: tuple[float, ...]) -> None:
    """From the first chunk on whose perplexity is missing or none; the one before is told."""
    tokens = made([[3.0, 3.0]] * 3, 0, 1, 2)
    first = math.e if running else math.exp(3.0)
    found = ppl(chunk_values(told(*running), tokens))
    assert found == pytest.approx([first, math.exp(3.0), math.exp(3.0)])


def test_a_perplexity_beyond_all_numbers_is_a_number() -> None:
    """So that it is told as what it is, not as an overflow."""
    [first, second] = ppl(chunk_values(told(), made([[5000.0] * 2, [1.0] * 2])))
    assert second == pytest.approx(math.e)
    assert math.isfinite(first)
    assert first > 1e100


NLLS = st.lists(st.floats(0.01, 40.0), min_size=1, max_size=30)


@given(NLLS)
def test_chunks_that_are_clipped_make_up_what_was_told(means: list[float]) -> None:
    """The value of the pass is the final running perplexity, and every chunk's its own."""
    running = np.exp(np.cumsum(means) / np.arange(1, len(means) + 1)).tolist()
    tokens = made([[0.5, 0.5]] * len(means), *range(len(means)))
    chunks = chunk_values(told(*running), tokens)["ppl"]
    assert pooled(METRICS["ppl"], chunks, 2) == pytest.approx(running[-1], rel=1e-9)
    assert [math.log(one) for [one] in chunks] == pytest.approx(means, abs=1e-9)


@given(NLLS)
def test_four_decimals_are_enough_for_a_chunk(means: list[float]) -> None:
    """As the program rounds them: a chunk is off by that times the chunks before it."""
    running = [round(value, 4) for value in np.exp(np.cumsum(means) / np.arange(1, len(means) + 1))]
    tokens = made([[0.5, 0.5]] * len(means), *range(len(means)))
    chunks = chunk_values(told(*running), tokens)["ppl"]
    worst = 2 * len(means) * 5.1e-5
    assert [math.log(one) for [one] in chunks] == pytest.approx(means, abs=worst)


@given(st.integers(0, 2**32 - 1))
def test_values_are_in_the_units_of_the_metrics(seed: int) -> None:
    """One list a chunk of every metric, which a baseline can hold."""
    _, tokens = streams(seed)
    values = chunk_values(told(), tokens)
    assert values.keys() == set(QUALITY)
    for name, chunks in values.items():
        assert len(chunks) == CHUNKS
        assert complaint(METRICS[name], chunks, SCORED) == ""
    kld = tokens.kld.reshape(CHUNKS, SCORED).mean(axis=1, dtype=np.float64)
    same = 100 * tokens.same_top.reshape(CHUNKS, SCORED).mean(axis=1)
    assert [one for [one] in values["kld_mean"]] == pytest.approx(kld.tolist())
    assert [one for [one] in values["same_top"]] == pytest.approx(same.tolist())
    assert values["kld_p999"] == tails_by_chunk(tokens)


@given(st.integers(0, 2**32 - 1))
def test_the_base_does_not_diverge_and_has_its_own_perplexity(seed: int) -> None:
    """Which is that of its own tokens, not of the candidate's."""
    _, tokens = streams(seed, depth=1.0)
    values = base_values(told(), tokens)
    nll = tokens.nll_base.reshape(CHUNKS, SCORED).mean(axis=1, dtype=np.float64)
    assert ppl(values) == pytest.approx(np.exp(nll).tolist())
    assert ppl(values) != ppl(chunk_values(told(), tokens))
    assert values["kld_mean"] == [[0.0]] * CHUNKS
    assert values["same_top"] == [[100.0]] * CHUNKS
    for name in QUALITY:
        assert complaint(METRICS[name], values[name], SCORED) == ""
    assert pooled(METRICS["kld_p999"], values["kld_p999"], SCORED) == 0


def test_all_that_the_tool_prints_is_told() -> None:
    """In numbers that JSON can hold."""
    _, tokens = streams(1)
    found = all_figures(tokens)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    kld = found["kld"]
    assert isinstance(kld, dict)
    assert kld["value"] == pytest.approx(float(tokens.kld.astype(np.float64).mean()))
    assert set(kld) == {"value", "se", "se_chunks"}
    percentiles = found["kld_percentiles"]
    assert isinstance(percentiles, dict)
    assert percentiles["50"] == pytest.approx(float(np.median(tokens.kld)))
    assert {"99.9", "99", "95", "90", "100"} <= set(percentiles)
    assert {"ln_ppl_ratio", "delta_p_rms", "same_top", "ppl_correlation"} <= set(found)


def test_what_is_no_number_is_left_out() -> None:
    """One chunk has no spread."""
    _, tokens = streams(1)
    one = replace(
        tokens,
        **{
            field: getattr(tokens, field)[: tokens.n_scored]
            for field in ("kld", "nll_base", "nll", "same_top", "at_floor_base", "at_floor")
        },
    )
    kld = all_figures(one)["kld"]
    assert isinstance(kld, dict)
    assert "se_chunks" not in kld
