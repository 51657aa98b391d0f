"""Two passes over the same tokens, judged chunk by chunk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.quality import BY_CHUNK, FEWEST_CHUNKS, compare_chunks
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS

PPL, KLD, TOP = (METRICS[name] for name in BY_CHUNK)

# Chunks differ far more from each other than builds do.
TEXT = [5.0, 9.0, 22.0, 3.5, 7.0, 12.0, 6.0, 15.0]
CHUNKS = st.lists(st.floats(1.0, 1e4), min_size=FEWEST_CHUNKS, max_size=12)


def scaled(factor: float, wobble: float = 0.002) -> list[float]:
    """The chunks of a build that is worse by this factor, not by quite the same everywhere."""
    return [v * factor * (1 + wobble * (-1) ** i) for i, v in enumerate(TEXT)]


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [
        (1.0, Outcome.PASS),
        (1.005, Outcome.PASS),
        (1.0101, Outcome.INCONCLUSIVE),
        (1.05, Outcome.REGRESSION),
        (200.0, Outcome.REGRESSION),
        (0.9, Outcome.IMPROVED),
    ],
)
def test_perplexity(factor: float, outcome: Outcome) -> None:
    """One percent more is allowed; what chunks share cancels, so a little is seen."""
    verdict = compare_chunks(PPL, TEXT, scaled(factor), tolerance=0.01)
    assert verdict.outcome is outcome
    assert verdict.change == pytest.approx(factor - 1, abs=1e-4 * factor)
    assert verdict.mode == "chunks"


@pytest.mark.parametrize(
    ("base", "more", "outcome"),
    [
        (0.0, 0.0, Outcome.PASS),
        (0.0, 1e-4, Outcome.PASS),
        (0.0, 0.02, Outcome.REGRESSION),
        (0.1, 0.005, Outcome.PASS),
        (0.1, 0.03, Outcome.REGRESSION),
        (0.1, -0.03, Outcome.IMPROVED),
    ],
)
def test_divergence(base: float, more: float, outcome: Outcome) -> None:
    """A tenth of the baseline's is allowed, and two thousandths of a nat where that is nothing."""
    before = [base * (1 + 0.1 * (-1) ** i) for i in range(8)]
    after = [v + more * (1 + 0.05 * (-1) ** i) for i, v in enumerate(before)]
    verdict = compare_chunks(KLD, before, after, tolerance=0.1)
    assert verdict.outcome is outcome
    assert (verdict.change is None) == (base == 0)


def test_flipped_answers() -> None:
    """Three of a hundred tokens with another likeliest successor are seen, half a point is not."""
    before = [97.0, 95.5, 98.0, 96.0, 97.5, 96.5]
    assert (
        compare_chunks(TOP, before, [v - 3 for v in before], tolerance=0.005).outcome
        is Outcome.REGRESSION
    )
    assert (
        compare_chunks(TOP, before, [v - 0.2 for v in before], tolerance=0.005).outcome
        is Outcome.PASS
    )


def test_the_token_is_not_the_unit() -> None:
    """A change that only some chunks show stays unclear, however many tokens a chunk has."""
    after = [v * (1.2 if i == 0 else 1.0) for i, v in enumerate(TEXT)]
    verdict = compare_chunks(PPL, TEXT, after, tolerance=0.01)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "more chunk" in verdict.reason


@pytest.mark.parametrize(
    ("budget", "outcome", "words"),
    [
        (0.2, Outcome.PASS, "shown to be within"),
        (0.05, Outcome.REGRESSION, "beyond the budget of 0.05 nat, whatever the baseline"),
        (0.1005, Outcome.INCONCLUSIVE, "not shown to be within the budget"),
    ],
)
def test_a_budget_bounds_the_value_itself(budget: float, outcome: Outcome, words: str) -> None:
    """A build like its baseline fails all the same where the value is too much."""
    same = [0.1 + 0.01 * (-1) ** i for i in range(10)]
    verdict = compare_chunks(KLD, same, same, tolerance=0.1, budget=budget)
    assert verdict.outcome is outcome
    assert words in verdict.reason


def test_a_budget_of_what_should_be_high() -> None:
    """The least share of equal tops is a budget from below."""
    same = [90.0 + (-1) ** i for i in range(10)]
    below = compare_chunks(TOP, same, same, tolerance=0.005, budget=95.0)
    assert below.outcome is Outcome.REGRESSION
    assert compare_chunks(TOP, same, same, tolerance=0.005, budget=80.0).outcome is Outcome.PASS
    assert compare_chunks(PPL, TEXT, TEXT, tolerance=0.01, budget=4.0).outcome is Outcome.REGRESSION


@given(CHUNKS, st.randoms(use_true_random=False))
def test_swapping_negates_the_effect(base: list[float], rng: object) -> None:
    """What is worse one way is better the other, by as much in logs."""
    del rng
    new = [v * (1 + 0.1 * math.sin(7 * v)) + 1 for v in base]
    one = compare_chunks(PPL, base, new, tolerance=0.01)
    other = compare_chunks(PPL, new, base, tolerance=0.01)
    effect, swapped = one.evidence["effect"], other.evidence["effect"]
    assert isinstance(effect, float)
    assert isinstance(swapped, float)
    assert effect == pytest.approx(-swapped, abs=1e-12)
    assert (one.outcome is Outcome.REGRESSION) <= (other.outcome is not Outcome.REGRESSION)


@given(CHUNKS)
def test_a_build_is_no_worse_than_itself(chunks: list[float]) -> None:
    """Equal chunks pass on every metric, and the verdict survives JSON."""
    for metric in (PPL, KLD, TOP):
        verdict = compare_chunks(metric, chunks, chunks, tolerance=0.01)
        assert verdict.outcome is Outcome.PASS
        assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@given(st.integers(0, 10**6))
def test_errors_are_rare_at_the_margin(seed: int) -> None:
    """A loss of just the tolerance is a REGRESSION or PASS only by a chance of one percent each."""
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in range(20):
        nll = rng.normal(2, 0.5, 10)
        new = nll + math.log1p(0.01) + rng.normal(0, 0.003, 10)
        base = np.exp(nll).clip(1.1)
        outcomes.append(
            compare_chunks(PPL, base.tolist(), np.exp(new).clip(1.1).tolist(), tolerance=0.01)
        )
    decided = [v for v in outcomes if v.outcome is not Outcome.INCONCLUSIVE]
    # Twenty verdicts at 2 %: six or more of them would be a chance of one in four hundred thousand.
    assert len(decided) < 6


@pytest.mark.parametrize(
    ("base", "new", "what"),
    [
        ([2.0] * 5, [2.0] * 4, "5 chunks of the baseline, 4 of the build under test"),
        ([2.0] * 3, [2.0] * 3, "3 chunks tell nothing, pass 4 at least"),
        ([2.0] * 4, [2.0, 2.0, math.nan, 2.0], "chunk 3 of the build under test has a value of"),
        ([2.0, 0.5, 2.0, 2.0], [2.0] * 4, "chunk 2 of the baseline has a value of 0.5"),
    ],
)
def test_chunks_that_cannot_be_judged(base: list[float], new: list[float], what: str) -> None:
    """An error that says which, never a pass."""
    verdict = compare_chunks(PPL, base, new, tolerance=0.01)
    assert verdict.outcome is Outcome.ERROR
    assert what in verdict.reason


def test_only_means_over_chunks() -> None:
    """A maximum over tokens has no standard error by chunk."""
    with pytest.raises(ValueError, match="kld_max is not a mean over chunks"):
        compare_chunks(METRICS["kld_max"], [1.0] * 4, [1.0] * 4, tolerance=0.1)
    with pytest.raises(ValueError, match="a tolerance is a share"):
        compare_chunks(PPL, TEXT, TEXT, tolerance=-1.0)
