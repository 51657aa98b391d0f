"""Two passes over the same tokens, judged chunk by chunk."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.judge import quality
from pytest_llmperf.judge.chunks import BY_CHUNK, QUALITY, pooled
from pytest_llmperf.judge.decide import compare_published, failed, missing
from pytest_llmperf.judge.quality import (
    ALPHA,
    FEWEST_CHUNKS,
    REGRESSION_ALPHA,
    compare_chunks,
    compare_quality,
    compare_tails,
    within_budget,
)
from pytest_llmperf.judge.statistics import student_t_ppf
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS

PPL, KLD, TOP, TAIL = (METRICS[name] for name in QUALITY)

# Chunks differ far more from each other than builds do.
TEXT = [5.0, 9.0, 22.0, 3.5, 7.0, 12.0, 6.0, 15.0]
CHUNKS = st.lists(st.floats(1.0, 1e4), min_size=FEWEST_CHUNKS, max_size=12)

TOKENS = 256
TAILS = st.lists(
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=6), min_size=FEWEST_CHUNKS, max_size=10
)


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
        compare_chunks(TOP, before, [v - 6 for v in before], tolerance=0.005).outcome
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
        (0.2, Outcome.PASS, "; shown to be within the budget of 0.2 nat"),
        (0.05, Outcome.REGRESSION, "beyond the budget of 0.05 nat, whatever the baseline"),
        (0.1005, Outcome.INCONCLUSIVE, "not shown to be within the budget"),
        # Beyond by the usual bound, 0.091, but not by the sure one, 0.086.
        (0.088, Outcome.INCONCLUSIVE, "not shown to be within the budget"),
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
    assert compare_chunks(PPL, TEXT, TEXT, tolerance=0.01, budget=3.0).outcome is Outcome.REGRESSION


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
    """A loss of just the tolerance is a PASS by a chance of one percent, hardly a REGRESSION."""
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
    # Twenty verdicts at 1.1 %: six or more would be a chance of one in seventeen million.
    assert len(decided) < 6


def between(wobble: float) -> Verdict:
    """The verdict on a loss of 1.2 %, where 1 % is allowed, that chunks show more or less alike."""
    return compare_chunks(PPL, TEXT, scaled(1.012, wobble), tolerance=0.01)


def test_a_regression_is_surer_than_a_pass() -> None:
    """What lies beyond by the usual bound alone is told, and takes more chunks to be said."""
    assert between(0.001).outcome is Outcome.REGRESSION
    verdict = between(0.0015)
    assert verdict.interval is not None
    assert verdict.interval[0] > 0.01
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "beyond the tolerance of 1 % by all appearances" in verdict.reason
    assert "not as surely as a REGRESSION has to be, 99.9 %" in verdict.reason
    assert "neither within nor beyond" in between(0.004).reason


def test_missing_chunks_are_counted_for_the_claim_that_lies_near() -> None:
    """With as many more of the same kind it is a REGRESSION, or a PASS."""
    for factor, wobble, outcome in (
        (1.012, 0.003, Outcome.REGRESSION),
        (1.008, 0.003, Outcome.PASS),
    ):
        short = compare_chunks(PPL, TEXT, scaled(factor, wobble), tolerance=0.01)
        assert short.outcome is Outcome.INCONCLUSIVE
        more = short.evidence["missing"]
        assert isinstance(more, int)
        times = math.ceil(1 + more / len(TEXT))
        longer = compare_chunks(PPL, TEXT * times, scaled(factor, wobble) * times, tolerance=0.01)
        assert longer.outcome is outcome
    # A loss as far beyond as the other is within takes more of them.
    beyond, within = (
        compare_chunks(PPL, TEXT, scaled(1.01 * by, 0.003), tolerance=0.01).evidence["missing"]
        for by in (1.002, 1 / 1.002)
    )
    assert isinstance(beyond, int)
    assert isinstance(within, int)
    assert beyond > within


def test_an_improvement_is_as_sure_as_a_regression() -> None:
    """A gain that one bound in a hundred would show is a PASS."""
    assert between(0.001).outcome is Outcome.REGRESSION
    for wobble, outcome in ((0.001, Outcome.IMPROVED), (0.0015, Outcome.PASS)):
        better = compare_chunks(PPL, TEXT, scaled(1 / 1.012, wobble), tolerance=0.01)
        assert better.outcome is outcome


@pytest.mark.parametrize(("budget", "bound"), [(None, 0.001), (5.0, 0.002)])
def test_the_bound_counts_the_ways_to_a_regression(budget: float | None, bound: float) -> None:
    """One against the baseline, one against the budget."""
    evidence = compare_chunks(PPL, TEXT, TEXT, tolerance=0.01, budget=budget).evidence
    assert evidence["false_regression_bound"] == pytest.approx(bound)
    assert (evidence["alpha"], evidence["regression_alpha"]) == (ALPHA, REGRESSION_ALPHA)
    assert evidence["level"] == pytest.approx(0.98)


def test_false_regressions_of_means_are_as_rare_as_said() -> None:
    """Where the true loss is just what is allowed, one verdict in a thousand is a REGRESSION."""
    rng = np.random.default_rng(14)
    outcomes = []
    for _ in range(2000):
        nll = rng.normal(2.5, 0.4, 8).clip(0.1)
        new = nll + math.log1p(0.01) + rng.normal(0, 0.003, 8)
        pair = (np.exp(nll).tolist(), np.exp(new).tolist())
        outcomes.append(compare_chunks(PPL, *pair, tolerance=0.01).outcome)
    # Two are expected, and twenty of the other: eight would be one chance in a thousand.
    assert outcomes.count(Outcome.REGRESSION) < 8
    assert outcomes.count(Outcome.PASS) < 40


def test_a_slack_of_shares_is_told_in_points() -> None:
    """Four percent of a share and four percentage points are not the same."""
    before = [90.0 + 0.1 * i for i in range(8)]
    verdict = compare_chunks(TOP, before, [v - 8 for v in before], tolerance=0.005)
    assert "beyond the tolerance of 4 points:" in verdict.reason
    wide = compare_chunks(TOP, before, [v - 20 for v in before], tolerance=0.1)
    assert "beyond the tolerance of 10 %:" in wide.reason


@pytest.mark.parametrize(
    ("base", "new", "what"),
    [
        ([2.0] * 5, [2.0] * 4, "5 chunks of the baseline, 4 of the build under test"),
        ([2.0] * 3, [2.0] * 3, "3 chunks tell nothing, pass 4 at least"),
        (
            [2.0] * 4,
            [2.0, 2.0, math.nan, 2.0],
            "the build under test has chunk 3 with a value of nan",
        ),
        ([2.0, 0.5, 2.0, 2.0], [2.0] * 4, "the baseline has chunk 2 with a value of 0.5"),
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


# --- The percentile of tokens -------------------------------------------------------------------


def tails(kld: NDArray[np.float64]) -> list[list[float]]:
    """The largest hundredth of the tokens of a pass, shape (chunks, tokens), by chunk."""
    least = np.sort(kld, axis=None)[-max(2, kld.size // 100)]
    return [sorted(row[row >= least], reverse=True) or [row.max()] for row in kld]


def tail_pair(rng: np.random.Generator, chunks: int, factor: float) -> list[list[list[float]]]:
    """Two passes over chunks of differing hardness, the second worse by this factor in truth."""
    text = rng.normal(-4, 1.5, (chunks, TOKENS)) + rng.normal(0, 0.5, (chunks, 1))
    return [tails(np.exp(text + rng.normal(0, 0.3, text.shape)) * worse) for worse in (1.0, factor)]


def judge_tails(base: list[list[float]], new: list[list[float]], **over: float) -> Verdict:
    """The verdict with a tenth of tolerance, of short chunks."""
    return compare_tails(TAIL, base, new, tokens=10, tolerance=0.1, **over)


@given(TAILS)
def test_a_tail_is_no_worse_than_itself(chunks: list[list[float]]) -> None:
    """Equal lists pass, the values are those of the pass, and the verdict survives JSON."""
    verdict = judge_tails(chunks, chunks)
    assert verdict.outcome is Outcome.PASS
    assert verdict.base == verdict.new == pooled(TAIL, chunks, 10)
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@given(TAILS, st.floats(1.001, 5.0))
def test_a_shift_of_a_whole_tail(chunks: list[list[float]], excess: float) -> None:
    """By more than the margin it is flagged, one way and the other; by less it passes."""
    level = pooled(TAIL, chunks, 10)
    margin = max(0.1 * level, TAIL.slack)
    worse, little = (
        [[v + by for v in chunk] for chunk in chunks] for by in (excess * margin, margin / 2)
    )
    assert judge_tails(chunks, worse).outcome is Outcome.REGRESSION
    assert judge_tails(chunks, little).outcome is Outcome.PASS
    # The margin is a share of the baseline's value, which here is the larger one.
    back = max(0.1 * (level + excess * margin), TAIL.slack)
    better = judge_tails(worse, chunks).outcome
    assert better is Outcome.IMPROVED or excess * margin <= back * (1 + 1e-9)


@given(TAILS, TAILS, st.integers(-20, 20))
def test_the_unit_of_a_tail_does_not_matter(
    base: list[list[float]], new: list[list[float]], power: int
) -> None:
    """Without a slack in that unit the verdict is the same for values in any."""
    chunks = min(len(base), len(new))
    metric = replace(TAIL, slack=0.0)
    pairs = [
        [[[v * scale + scale for v in chunk] for chunk in side[:chunks]] for side in (base, new)]
        for scale in (1.0, 2.0**power)
    ]
    one, other = (compare_tails(metric, *pair, tokens=10, tolerance=0.1) for pair in pairs)
    assert one.outcome is other.outcome
    assert one.change == pytest.approx(other.change)


@given(TAILS, TAILS)
def test_a_tail_is_judged_alike_every_time(base: list[list[float]], new: list[list[float]]) -> None:
    """The draws are fixed; swapping the sides turns the bounds about; both are in order."""
    chunks = min(len(base), len(new))
    one = judge_tails(base[:chunks], new[:chunks])
    assert one == judge_tails(base[:chunks], new[:chunks])
    low, high = bounds(one)
    other_low, other_high = bounds(judge_tails(new[:chunks], base[:chunks]))
    assert (low, high) == pytest.approx((-other_high, -other_low), abs=1e-9)
    assert one.base is not None
    assert one.new is not None
    assert low <= one.new - one.base <= high


def bounds(verdict: Verdict) -> tuple[float, float]:
    """The bounds of the difference."""
    found = verdict.evidence["bounds"]
    assert isinstance(found, list)
    return found[0], found[1]


def test_tails_take_turns_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many passes are drawn at once is a matter of memory alone."""
    base, new = tail_pair(np.random.default_rng(3), 12, 1.3)
    whole = compare_tails(TAIL, base, new, tokens=TOKENS, tolerance=0.25)
    monkeypatch.setattr(quality, "_BATCH", 999)
    assert compare_tails(TAIL, base, new, tokens=TOKENS, tolerance=0.25) == whole


def test_false_alarms_and_power_of_tails() -> None:
    """Of forty chunks equal builds are not flagged; a doubled tail is, one time in two.

    One two and a half times as long is found nine times in ten.
    """
    rng = np.random.default_rng(11)

    def share(factor: float, pairs: int) -> float:
        flagged = [
            compare_tails(TAIL, *tail_pair(rng, 40, factor), tokens=TOKENS, tolerance=0.25).outcome
            is Outcome.REGRESSION
            for _ in range(pairs)
        ]
        return sum(flagged) / pairs

    assert share(1.0, 300) == 0
    assert share(2.0, 100) > 0.5
    assert share(2.5, 100) > 0.9


def test_a_false_verdict_at_the_margin_is_rare() -> None:
    """Where the true loss is just what is allowed: one PASS in a hundred, hardly a REGRESSION."""
    rng = np.random.default_rng(12)
    outcomes = []
    for _ in range(300):
        pair = tail_pair(rng, 24, 1.25)
        outcomes.append(compare_tails(TAIL, *pair, tokens=TOKENS, tolerance=0.25).outcome)
    # At one in a thousand three would be a chance of one in three hundred, and at one in a hundred
    # ten would be one in a thousand.
    assert outcomes.count(Outcome.REGRESSION) < 3
    assert outcomes.count(Outcome.PASS) < 10


def test_few_chunks_widen_the_bounds() -> None:
    """With four chunks the bootstrap's own width is more than doubled."""
    even = np.linspace(-1, 1, 2001)
    low, high = quality._bootstrapped(even, 0.0, 4).usual
    assert (low, high) == pytest.approx((-2.2, 2.2), abs=0.05)
    low, high = quality._bootstrapped(even, 0.0, 4000).usual
    assert (low, high) == pytest.approx((-0.98, 0.98), abs=0.002)
    assert quality._bootstrapped(np.linspace(1, 2, 101), 0.0, 8).usual[0] == 0


@pytest.mark.parametrize("chunks", [4, 40, 4000])
def test_sure_bounds_are_stretched_from_the_usual_ones(chunks: int) -> None:
    """By the ratio of Student's quantiles, about the median: too few draws lie beyond them."""
    drawn = np.random.default_rng(5).lognormal(0, 0.5, 2000)
    middle = float(np.median(drawn))
    bounds = quality._bootstrapped(drawn, middle, chunks)
    ratio = student_t_ppf(0.999, chunks - 1) / student_t_ppf(0.99, chunks - 1)
    stretched = [middle + ratio * (end - middle) for end in bounds.usual]
    assert list(bounds.sure) == pytest.approx(stretched)


@pytest.mark.parametrize(
    ("budget", "outcome", "words"),
    [
        (2.0, Outcome.PASS, "shown to be within"),
        (0.5, Outcome.REGRESSION, "beyond the budget of 0.5 nat, whatever the baseline"),
        (1.075, Outcome.INCONCLUSIVE, "not shown to be within the budget"),
    ],
)
def test_a_budget_of_a_tail(budget: float, outcome: Outcome, words: str) -> None:
    """It bounds the percentile itself."""
    same = [[0.9 + 0.02 * i, 0.8] for i in range(10)]
    verdict = judge_tails(same, same, budget=budget)
    assert verdict.outcome is outcome
    assert words in verdict.reason


def test_one_bad_chunk_is_not_a_tail() -> None:
    """Tokens that went wrong in a single chunk leave it open, and more chunks are asked for."""
    base = [[0.5, 0.4, 0.3] for _ in range(8)]
    new = [[5.0, 4.0, 3.0], *base[1:]]
    verdict = compare_tails(TAIL, base, new, tokens=TOKENS, tolerance=0.25)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "chunk" in verdict.reason


WEIRD = st.lists(st.lists(st.floats() | st.just(-1e-5), max_size=3), max_size=6)


@given(WEIRD, WEIRD, st.sampled_from(QUALITY), st.integers(-1, 300))
def test_weird_chunks_are_judged_or_refused(
    base: list[list[float]], new: list[list[float]], name: str, tokens: int
) -> None:
    """Nothing crashes, and what is no divergence never passes."""
    verdict = compare_quality(METRICS[name], base, new, tokens=tokens, tolerance=0.1)
    values = [value for side in (base, new) for chunk in side for value in chunk]
    bad = any(not value >= -0.01 or math.isinf(value) for value in values)
    if bad or len(base) != len(new) or len(base) < FEWEST_CHUNKS or not all([*base, *new]):
        assert verdict.outcome is Outcome.ERROR
    assert verdict.reason.startswith(name)


@pytest.mark.parametrize(
    ("base", "tokens", "what"),
    [
        ([[1.0], [1.0], [], [1.0]], 9, "the baseline has chunk 3 with 0 values, not 1 to 9"),
        ([[1.0] * 3] * 4, 2, "chunk 1 with 3 values, not 1 to 2"),
        ([[1.0]] * 4, 0, "chunks of 0 scored tokens"),
        ([[1.0]] * 4, True, "chunks of True scored tokens"),
        ([[-0.5]] * 4, 9, "chunk 1 with a value of -0.5"),
        ([[1.0]] * 4, 1000, "4 values listed of 4000 tokens, 5 at least needed"),
        ([[1.0]] * 3, 9, "3 chunks tell nothing"),
    ],
)
def test_tails_that_cannot_be_judged(base: list[list[float]], tokens: int, what: str) -> None:
    """An error that says why, never a pass."""
    verdict = compare_tails(TAIL, base, base, tokens=tokens, tolerance=0.1)
    assert verdict.outcome is Outcome.ERROR
    assert what in verdict.reason


def test_a_baseline_that_is_its_own_reference() -> None:
    """Zeros say that all tokens are 0, however many; then the slack alone is allowed."""
    nothing = [[0.0]] * 8
    for new, outcome in ((0.0, Outcome.PASS), (0.04, Outcome.PASS), (0.2, Outcome.REGRESSION)):
        lists = [[new + 1e-4 * i] * 40 for i in range(8)]
        verdict = compare_tails(TAIL, nothing, lists, tokens=4096, tolerance=0.25)
        assert verdict.outcome is outcome
        assert verdict.change is None
        assert "the tolerance of 0.1 nat" in verdict.reason


def test_one_entry_for_all_metrics() -> None:
    """Lists of one value a chunk for means, of the largest for the percentile."""
    means = [[2.0 + 0.1 * i] for i in range(6)]
    for name in BY_CHUNK:
        verdict = compare_quality(METRICS[name], means, means, tokens=9, tolerance=0.1)
        flat = [chunk[0] for chunk in means]
        assert verdict == compare_chunks(METRICS[name], flat, flat, tolerance=0.1)
        assert verdict.new == pooled(METRICS[name], means, 9)
        two = compare_quality(METRICS[name], means, [[1.0, 1.0]] * 6, tokens=9, tolerance=0.1)
        assert two.outcome is Outcome.ERROR
        assert "chunk 1 with 2 values, not 1" in two.reason
    verdict = compare_quality(TAIL, means, means, tokens=10, tolerance=0.1)
    assert verdict == judge_tails(means, means)
    with pytest.raises(ValueError, match="kld_max is not judged by chunk: ppl, kld_mean"):
        compare_quality(METRICS["kld_max"], means, means, tokens=9, tolerance=0.1)
    with pytest.raises(ValueError, match="ppl is a mean over chunks"):
        compare_tails(PPL, means, means, tokens=9, tolerance=0.1)


# --- A budget without a baseline's chunks -------------------------------------------------------

SAME = [[0.1 + 0.01 * (-1) ** i] for i in range(10)]


def published(value: float, new: float = 0.1) -> Verdict:
    """The verdict on a mean divergence against a figure from a report."""
    return compare_published(KLD, value, [[new]], tolerance=0.1)


@pytest.mark.parametrize(
    ("figure", "budget", "outcome", "words"),
    [
        (0.1, 0.2, Outcome.PASS, "; shown to be within the budget of 0.2 nat"),
        (0.1, 0.1005, Outcome.INCONCLUSIVE, "but not shown to be within the budget"),
        (0.1, 0.05, Outcome.REGRESSION, "beyond the budget of 0.05 nat, whatever the baseline; "),
        (0.2, 0.2, Outcome.IMPROVED, "; shown to be within the budget of 0.2 nat"),
        (0.2, 0.05, Outcome.REGRESSION, "beyond the budget of 0.05 nat"),
        (0.05, 0.2, Outcome.REGRESSION, "beyond the tolerance of 10 %"),
        (0.05, 0.05, Outcome.REGRESSION, "beyond the budget of 0.05 nat"),
    ],
)
def test_a_budget_beside_a_published_figure(
    figure: float, budget: float, outcome: Outcome, words: str
) -> None:
    """The worse of the two counts, and both are in the reason."""
    plain = published(figure)
    verdict = within_budget(plain, KLD, SAME, tokens=9, budget=budget)
    assert verdict.outcome is outcome
    assert words in verdict.reason
    assert plain.reason in verdict.reason
    assert verdict.evidence == {
        **plain.evidence,
        "alpha": ALPHA,
        "regression_alpha": REGRESSION_ALPHA,
        "false_regression_bound": REGRESSION_ALPHA,
        "budget": budget,
        "new_chunks": SAME,
        "tokens": 9,
    }
    same = ("mode", "base", "new", "change", "tolerance")
    assert [getattr(verdict, name) for name in same] == [getattr(plain, name) for name in same]


def test_without_a_budget_or_a_comparison_a_verdict_stays() -> None:
    """Nothing can be made worse of what fails already."""
    plain = published(0.1)
    assert within_budget(plain, KLD, SAME, tokens=9, budget=None) is plain
    for verdict in (failed(KLD, "the tool died"), missing(KLD, "record it"), published(0.0)):
        assert within_budget(verdict, KLD, SAME, tokens=9, budget=1e-6) is verdict


def test_a_budget_where_a_report_gives_no_figure() -> None:
    """The value is told and may be beyond all the same; being within shows nothing more."""
    unknown = replace(missing(KLD, "no figure"), outcome=Outcome.INCONCLUSIVE)
    beyond = within_budget(unknown, KLD, SAME, tokens=9, budget=0.05)
    assert beyond.outcome is Outcome.REGRESSION
    assert beyond.new == pytest.approx(0.1)
    within = within_budget(unknown, KLD, SAME, tokens=9, budget=0.2)
    assert (within.outcome, within.reason) == (Outcome.INCONCLUSIVE, "no figure")


@given(st.sampled_from(QUALITY), TAILS, st.floats(0.01, 30.0))
def test_a_budget_is_the_same_with_and_without_a_baseline(
    name: str, chunks: list[list[float]], budget: float
) -> None:
    """Chunks are held against it in one way, whatever else they are compared with."""
    metric = METRICS[name]
    if name in BY_CHUNK:
        chunks = [[chunk[0] + 1] for chunk in chunks]
    plain = compare_quality(metric, chunks, chunks, tokens=10, tolerance=0.1)
    both = compare_quality(metric, chunks, chunks, tokens=10, tolerance=0.1, budget=budget)
    after = within_budget(plain, metric, chunks, tokens=10, budget=budget)
    assert (after.outcome, after.reason) == (both.outcome, both.reason)


@pytest.mark.parametrize(
    ("chunks", "what"),
    [
        (SAME[:3], "held against its budget: 3 chunks tell nothing, pass 4 at least"),
        ([[math.nan]] * 4, "held against its budget: chunk 1 with a value of nan"),
    ],
)
def test_chunks_that_cannot_be_held_against_a_budget(chunks: list[list[float]], what: str) -> None:
    """An error that says which, never a pass."""
    verdict = within_budget(published(0.1), KLD, chunks, tokens=9, budget=1.0)
    assert verdict.outcome is Outcome.ERROR
    assert what in verdict.reason


def test_only_metrics_by_chunk_are_held_against_a_budget() -> None:
    """A largest divergence of one token has no bounds."""
    with pytest.raises(ValueError, match="kld_max is not judged by chunk"):
        within_budget(published(0.1), METRICS["kld_max"], SAME, tokens=9, budget=1.0)
