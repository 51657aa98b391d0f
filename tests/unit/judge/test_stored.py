"""Recorded launches: which launch is wanted, when it ends, and how often it errs."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge import simulate
from pytest_llmperf.judge.sequential import Decision
from pytest_llmperf.judge.simulate import Noise
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.stored import DEFAULT_STORED, StoredPlan, decide_stored
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS, Metric

DECODE = METRICS["decode_tps"]
TTFT = METRICS["ttft_ms"]
VRAM = METRICS["vram_mib"]
PRIOR = Prior(0.015, 8.0)
BASE = [[100.0, 101.0, 99.0]] * 3

CHANGES = st.lists(st.floats(-0.5, 0.5), max_size=8)


def new(changes: list[float]) -> list[list[float]]:
    """Launches whose samples lie this much higher than the recorded ones."""
    return [[v * (1 + change) for v in BASE[0]] for change in changes]


def decide(
    screen: list[float],
    confirm: list[float],
    *,
    metric: Metric = DECODE,
    prior: Prior | None = PRIOR,
    last: bool = False,
) -> Decision:
    """The decision on launches with these changes."""
    return decide_stored(
        metric, BASE, new(screen), new(confirm), tolerance=0.05, prior=prior, last=last
    )


def test_begins_with_the_fewest_launches() -> None:
    """Nothing is claimed before the first look, however gross the change."""
    for count in range(DEFAULT_STORED.min_launches):
        decision = decide([-0.5] * count, [])
        assert decision.wants == "screen"
        assert decision.verdict.outcome in (Outcome.INCONCLUSIVE, Outcome.ERROR)


def test_equal_launches_pass() -> None:
    """Launches like the recorded ones pass."""
    decision = decide([0.0] * 3, [])
    assert (decision.verdict.outcome, decision.wants) == (Outcome.PASS, None)


@pytest.mark.parametrize(("metric", "change"), [(DECODE, -0.35), (TTFT, 0.35)])
def test_a_slowdown_is_confirmed_on_fresh_launches(metric: Metric, change: float) -> None:
    """A suspicion asks for three fresh launches and is a regression after them."""
    for count in range(3):
        decision = decide([change] * 3, [change] * count, metric=metric)
        assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, "confirm")
    decision = decide([change] * 3, [change] * 3, metric=metric)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.REGRESSION, None)


def test_a_refuted_suspicion_is_never_confirmed_again() -> None:
    """Launches that do not confirm join the others, and there is one confirmation only."""
    decision = decide([-0.35] * 6, [0.0] * 3)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, None)
    assert "fresh launches did not confirm" in decision.verdict.reason


def test_improved_wins_over_pass() -> None:
    """A speed-up beyond the tolerance is measured on until it is shown."""
    assert decide([0.4] * 3, []).verdict.outcome is Outcome.IMPROVED
    open_ = decide([0.06] * 3, [])
    assert (open_.verdict.outcome, open_.wants) == (Outcome.PASS, "screen")
    assert decide([0.06] * 3, [], last=True).verdict.outcome is Outcome.PASS


def test_an_odd_launch_is_set_aside() -> None:
    """One launch at 40 % speed, recorded or new, does not spoil the comparison."""
    one = decide([0.0, 0.0, 0.0, -0.6, 0.0], [0.0] * 3)
    assert one.verdict.outcome is Outcome.PASS
    odd_base = [*BASE, [40.0, 40.0, 40.0]]
    two = decide_stored(DECODE, odd_base, new([0.0] * 3), [], tolerance=0.05, prior=PRIOR)
    assert two.verdict.outcome is Outcome.PASS
    assert "without 1 launch far off" in two.verdict.reason


def test_slack_passes_a_small_difference() -> None:
    """A difference below the slack passes whatever the tolerance."""
    decision = decide_stored(
        VRAM, [[1000.0]] * 3, [[1050.0]] * 3, [], tolerance=0.02, prior=Prior(0.001, 100)
    )
    assert decision.verdict.outcome is Outcome.PASS
    assert "slack of 64 MiB" in decision.verdict.reason


def test_too_few_recorded_launches() -> None:
    """Without a prior two recorded launches say nothing, and more new ones do not help."""
    decision = decide_stored(DECODE, BASE[:2], new([0.0] * 3), [], tolerance=0.05)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, None)
    assert decision.verdict.evidence["missing"] == {"base": 1, "new": 0}


def test_nothing_to_compare() -> None:
    """No recorded launch is MISSING, no new one an error, and so is a sample without a log."""
    assert decide_stored(DECODE, [], BASE, [], tolerance=0.05).verdict.outcome is Outcome.MISSING
    assert decide([], [], last=True).verdict.outcome is Outcome.ERROR
    bad = decide_stored(DECODE, BASE, [[math.nan]], [], tolerance=0.05)
    assert (bad.verdict.outcome, bad.wants) == (Outcome.ERROR, None)


def test_the_budget_ends_early() -> None:
    """What is still open ends INCONCLUSIVE and says why."""
    ended = decide([-0.048] * 3, [], last=True)
    assert (ended.verdict.outcome, ended.wants) == (Outcome.INCONCLUSIVE, None)
    assert "the budget was spent" in ended.verdict.reason
    assert decide([0.0] * 3, [], last=True) == decide([0.0] * 3, [])


@given(CHANGES, CHANGES, st.booleans())
def test_the_decision_is_a_pure_function(
    screen: list[float],
    confirm: list[float],
    last: bool,  # noqa: FBT001 - drawn by Hypothesis
) -> None:
    """The same launches give the same decision, which survives JSON."""
    decision = decide(screen, confirm, last=last)
    assert decide(screen, confirm, last=last) == decision
    written = json.loads(json.dumps(decision.verdict.to_json()))
    assert Verdict.from_json(written) == decision.verdict
    if decision.verdict.outcome is Outcome.REGRESSION:
        assert decision.verdict.launches_new >= 6


def test_no_more_is_spent_than_stated() -> None:
    """The parts add up, and the shared recorded arm forbids to multiply."""
    plan = DEFAULT_STORED
    sizes = range(plan.min_launches, plan.max_launches + plan.confirm_launches + 1)
    spent = sum(plan.pass_look_alpha(size) + 2 * plan.odd_alpha for size in sizes)
    assert spent == pytest.approx(plan.pass_alpha)
    screening = (plan.screen_look_alpha + 2 * plan.odd_alpha) * plan.screen_looks
    assert screening == pytest.approx(plan.screen_alpha)
    assert plan.false_regression_bound == min(plan.screen_alpha, plan.confirm_alpha)


def test_plans_are_checked() -> None:
    """A plan that could not end, or would bound nothing, is refused."""
    with pytest.raises(ValueError, match="min_launches"):
        StoredPlan(min_launches=7)
    with pytest.raises(ValueError, match="one launch"):
        StoredPlan(confirm_launches=0)
    with pytest.raises(ValueError, match="pass_alpha"):
        StoredPlan(pass_alpha=0.5)
    with pytest.raises(ValueError, match="odd_alpha"):
        StoredPlan(odd_alpha=0.003)


def test_errors_stay_below_the_bounds() -> None:
    """At a slowdown of just the tolerance few are regressions and few pass."""
    runs = 250
    cell = simulate.stored(Noise("independent"), 0.05, 0.05, runs=runs, seed=3)
    regressions = DEFAULT_STORED.false_regression_bound * runs
    assert cell.counts[Outcome.REGRESSION] <= regressions + 3.1 * math.sqrt(regressions) + 1
    passes = DEFAULT_STORED.pass_alpha * runs
    assert cell.counts[Outcome.PASS] <= passes + 3.1 * math.sqrt(passes)
    gross = simulate.stored(Noise("independent"), 0.05, 0.35, runs=20, seed=3)
    assert gross.rate(Outcome.REGRESSION) == 1
