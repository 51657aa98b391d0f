"""A pass as lists, and the value that follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.chunks import QUALITY, Tail, complaint, pooled
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.quality.divergence import TokenDivergences, tails_by_chunk

PPL, KLD, TOP, TAIL = (METRICS[name] for name in QUALITY)
MEANS = [[2.0], [8.0], [4.0]]


def test_the_value_of_a_pass() -> None:
    """Geometric of perplexities, arithmetic of the other means."""
    assert pooled(PPL, MEANS, 10) == pytest.approx(4.0)
    assert pooled(KLD, MEANS, 10) == pooled(TOP, MEANS, 10) == pytest.approx(14 / 3)
    assert pooled(TAIL, MEANS, 1) == pytest.approx(np.percentile([2, 8, 4], 99.9))
    with pytest.raises(ValueError, match="decode_tps is not judged by chunk"):
        pooled(METRICS["decode_tps"], MEANS, 10)


@given(
    chunks=st.integers(1, 9),
    tokens=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sampled_from([2, 50, 10**6]),
)
def test_the_percentile_of_a_pass(chunks: int, tokens: int, seed: int, kinds: int) -> None:
    """From the lists alone it is numpy's over all tokens, ties or not."""
    values = np.random.default_rng(seed).integers(0, kinds, chunks * tokens).astype(np.float32)
    blank = np.zeros(len(values), np.float32)
    flags = blank > 0
    lists = tails_by_chunk(TokenDivergences(tokens, values, blank, blank, flags, flags, flags))
    assert complaint(TAIL, lists, tokens) == ""
    assert pooled(TAIL, lists, tokens) == pytest.approx(np.percentile(values, 99.9), rel=1e-9)


@given(seed=st.integers(0, 2**32 - 1))
def test_the_percentile_of_a_drawn_pass(seed: int) -> None:
    """A pass made of the same chunks, some more than once, has the percentile of its tokens."""
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=(6, 500))
    drawn = rng.integers(0, 6, (20, 6))
    counts = np.array([np.bincount(row, minlength=6) for row in drawn])
    found = Tail(values.tolist(), 500).percentiles(counts)
    expected = [np.percentile(values[row], 99.9) for row in drawn]
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_drawn_pass_that_lists_too_little() -> None:
    """What is not listed is taken to be as large as the smallest that is."""
    tail = Tail([[9.0, 8.0, 7.0, 6.0], [1.0], [1.5]], 1000)
    assert tail.percentiles(np.array([[0, 3, 0], [0, 1, 2]])).tolist() == [1.0, 1.0]


def test_a_divergence_may_be_negative_by_rounding() -> None:
    """By a thousandth of a nat; more is no divergence, and a perplexity is 1 at least."""
    assert complaint(KLD, [[-1e-4]], 5) == complaint(TAIL, [[-1e-4]], 5) == ""
    assert complaint(PPL, [[1 - 1e-4]], 5) == ""
    assert pooled(PPL, [[1 - 1e-4]], 5) == 1.0
    assert complaint(KLD, [[0.0], [-0.1]], 5) == "chunk 2 with a value of -0.1"
    assert complaint(PPL, [[0.9]], 5) == "chunk 1 with a value of 0.9"
    assert complaint(TOP, [[math.inf]], 5) == "chunk 1 with a value of inf"
