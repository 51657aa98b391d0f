"""Recorded launches: which launch is wanted, when it ends, and how often it errs."""

import json
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_llmperf.judge import simulate
from pytest_llmperf.judge._common import Launches
from pytest_llmperf.judge.sequential import Decision
from pytest_llmperf.judge.simulate import Noise
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.stored import DEFAULT_STORED, decide_stored, stored_plan
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS, Metric

DECODE = METRICS["decode_tps"]
TTFT = METRICS["ttft_ms"]
VRAM = METRICS["vram_mib"]
PRIOR = Prior(0.015, 8.0)
BASE = [[100.0, 101.0, 99.0]] * 3

# Eight launches with an sd of about 1.1 %, as good as measurements get.
STEADY = [[v, v * 1.002, v * 0.998] for v in (100, 101, 99, 100.5, 98.5, 101.5, 99.5, 100)]

LAUNCH = st.lists(st.floats(10, 1000), min_size=1, max_size=4)
LAUNCHES = st.lists(LAUNCH, min_size=1, max_size=5)

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
    for count in range(DEFAULT_STORED.first_screen):
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


def test_a_suspicion_that_is_neither_confirmed_nor_refuted_is_told() -> None:
    """There is one confirmation; after its last launch the verdict is open."""
    decision = decide([-0.35] * 3, [-0.03] * 6)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, None)
    assert "suspected but not confirmed on fresh launches" in decision.verdict.reason


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


def test_slack_passes_a_small_difference_of_the_rule() -> None:
    """A difference below the slack passes whatever the tolerance."""
    decision = decide_stored(
        VRAM, [[1000.0]] * 3, [[1050.0]] * 3, [], tolerance=0.02, prior=Prior(0.001, 100)
    )
    assert decision.verdict.outcome is Outcome.PASS
    assert "slack of 64 MiB" in decision.verdict.reason


def test_too_few_recorded_launches_of_the_rule() -> None:
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


def test_the_shared_base_forbids_to_multiply() -> None:
    """Both looks compare with the same recorded launches, so they may be wrong together."""
    plan = DEFAULT_STORED
    assert plan.false_regression_bound == min(plan.screen_alpha, plan.confirm_alpha)
    with pytest.raises(ValueError, match="first_screen"):
        stored_plan(0)


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


def scaled(launches: Sequence[Sequence[float]], factor: float) -> list[list[float]]:
    """The launches with every sample multiplied."""
    return [[factor * v for v in launch] for launch in launches]


def first_look(verdict: Verdict) -> dict[str, Any]:
    """What the first look saw, as JSON."""
    looks: list[dict[str, Any]] = json.loads(json.dumps(verdict.evidence["looks"]))
    return looks[0]


def once(
    metric: Metric,
    base: Launches,
    launches: Launches,
    *,
    tolerance: float,
    prior: Prior | None = None,
) -> Verdict:
    """One look at these launches, and the same again where a confirmation is wanted."""
    plan = stored_plan(max(len(launches), 1))
    return decide_stored(
        metric, base, launches, launches, tolerance=tolerance, prior=prior, plan=plan, last=True
    ).verdict


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [
        (0.65, Outcome.REGRESSION),
        (0.90, Outcome.REGRESSION),
        (0.955, Outcome.INCONCLUSIVE),
        (1.0, Outcome.PASS),
        (1.02, Outcome.PASS),
        (1.30, Outcome.IMPROVED),
    ],
)
def test_stored_outcomes(factor: float, outcome: Outcome) -> None:
    """Slower is a regression, faster an improvement, the same passes, the edge is unclear."""
    verdict = once(DECODE, STEADY, scaled(STEADY[:4], factor), tolerance=0.05)
    assert verdict.outcome is outcome
    assert verdict.mode == "stored"
    assert verdict.change == pytest.approx(factor - 1, abs=0.01)


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.35, Outcome.REGRESSION), (1.0, Outcome.PASS), (0.7, Outcome.IMPROVED)],
)
def test_lower_is_better(factor: float, outcome: Outcome) -> None:
    """For latency the directions are the other way round."""
    verdict = once(TTFT, STEADY, scaled(STEADY[:4], factor), tolerance=0.05)
    assert verdict.outcome is outcome


@given(LAUNCHES, LAUNCHES, st.floats(0, 0.5))
def test_change_is_the_ratio_of_the_points(
    base: list[list[float]], new: list[list[float]], tolerance: float
) -> None:
    """``change`` is new / base - 1 and lies inside its interval."""
    verdict = once(DECODE, base, new, tolerance=tolerance, prior=Prior(0.03, 4))
    assert verdict.base is not None
    assert verdict.new is not None
    assert verdict.change is not None
    assert verdict.change == pytest.approx(verdict.new / verdict.base - 1, abs=1e-9)
    assert verdict.interval is not None
    assert verdict.interval[0] <= verdict.change <= verdict.interval[1]


@given(LAUNCHES, LAUNCHES, st.floats(0, 0.5), st.booleans())
def test_swapping_the_arms_inverts_the_verdict(
    base: list[list[float]],
    new: list[list[float]],
    tolerance: float,
    lower: bool,  # noqa: FBT001 - drawn by Hypothesis
) -> None:
    """Swapped, the log effect is negated, and no two builds are each slower than the other."""
    metric = TTFT if lower else DECODE
    prior = Prior(0.03, 4)
    one = once(metric, base, new, tolerance=tolerance, prior=prior)
    other = once(metric, new, base, tolerance=tolerance, prior=prior)
    mine, swapped = first_look(one), first_look(other)
    assume(not any([*mine["set_aside"].values(), *swapped["set_aside"].values()]))
    assert mine["effect"] == pytest.approx(-swapped["effect"], abs=1e-12)
    assert mine["se"] == pytest.approx(swapped["se"])
    assert {one.outcome, other.outcome} != {Outcome.REGRESSION}


@given(LAUNCHES, LAUNCHES, st.floats(0.01, 100))
def test_scaling_both_arms_keeps_the_verdict(
    base: list[list[float]], new: list[list[float]], factor: float
) -> None:
    """The unit of measurement does not matter."""
    prior = Prior(0.03, 4)
    one = once(DECODE, base, new, tolerance=0.05, prior=prior)
    other = once(DECODE, scaled(base, factor), scaled(new, factor), tolerance=0.05, prior=prior)
    mine, theirs = first_look(one), first_look(other)
    assert theirs["statistic"] == pytest.approx(mine["statistic"], abs=1e-6)
    # At the very edge rounding may tip it.
    limits = [limit for limit in mine["threshold"].values() if limit is not None]
    assume(all(abs(abs(mine["statistic"]) - limit) > 1e-5 for limit in limits))
    assume(other.outcome is one.outcome or one.outcome is not Outcome.PASS)
    assert other.change == pytest.approx(one.change, abs=1e-9)


@given(LAUNCHES, LAUNCHES)
def test_verdicts_can_be_written(base: list[list[float]], new: list[list[float]]) -> None:
    """Every verdict survives JSON, evidence included."""
    verdict = once(DECODE, base, new, tolerance=0.05)
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_evidence_recomputes_the_statistic() -> None:
    """The launches in the evidence give the statistic and the p values again."""
    verdict = once(DECODE, STEADY, scaled(STEADY[:2], 0.93), tolerance=0.05, prior=Prior(0.02, 4))
    evidence = json.loads(json.dumps(verdict.evidence))
    base, new = (
        [math.log(median(launch)) for launch in evidence[name]]
        for name in ("base_samples", "screen_samples")
    )
    means = [sum(logs) / len(logs) for logs in (base, new)]
    squares = sum((y - means[0]) ** 2 for y in base) + sum((y - means[1]) ** 2 for y in new)
    s2 = (4 * 0.02**2 + squares) / (4 + 8)
    se = math.sqrt(s2 * (1 / 8 + 1 / 2))
    statistic = (means[0] - means[1] - math.log(1.05)) / se
    look = first_look(verdict)
    assert look["statistic"] == pytest.approx(statistic)
    assert look["df"] == 12


@pytest.mark.parametrize("launches", [1, 2])
def test_too_few_recorded_launches(launches: int) -> None:
    """Fewer than three recorded launches and no prior decide nothing, however large the gap."""
    verdict = once(DECODE, STEADY[:launches], scaled(STEADY, 0.5), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert f"record {3 - launches} more" in verdict.reason
    assert verdict.evidence["missing"] == {"base": 3 - launches, "new": 0}
    assert verdict.interval is None


def test_a_prior_stands_in_for_launches() -> None:
    """With the variance known from other configs even one launch each shows a gross slowdown."""
    verdict = once(
        DECODE, STEADY[:1], scaled(STEADY[:1], 0.65), tolerance=0.05, prior=Prior(0.02, 20)
    )
    assert verdict.outcome is Outcome.REGRESSION


def test_an_odd_request_decides_nothing() -> None:
    """One stalled request in each new launch is no regression."""
    new = [[*launch, launch[0] / 3] for launch in STEADY[:4]]
    assert once(DECODE, STEADY, new, tolerance=0.05).outcome is Outcome.PASS


def test_missing_launches_of_the_build_under_test() -> None:
    """Where more new launches can decide it, their number is given."""
    verdict = once(DECODE, STEADY, scaled(STEADY[:1], 0.93), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    lack = verdict.evidence["missing"]
    assert isinstance(lack, dict)
    assert lack["base"] == 0
    assert lack["new"] > 0
    assert f"{lack['new']} more of the build under test" in verdict.reason


def test_missing_launches_of_the_baseline() -> None:
    """Where the few recorded launches are the bottleneck, more of them are asked for."""
    base = [[90.0], [100.0], [110.0]]
    verdict = once(DECODE, base, scaled(base, 0.88), tolerance=0.05)
    lack = verdict.evidence["missing"]
    assert isinstance(lack, dict)
    assert lack["base"] > 0
    assert f"{lack['base']} more of the baseline" in verdict.reason


def test_a_change_right_at_the_margin_is_hopeless() -> None:
    """A change that equals the tolerance is not promised to be settled."""
    base = [[90.0], [100.0], [110.0]]
    verdict = once(DECODE, base, scaled(base, 1 / 1.05), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.evidence["missing"] is None
    assert "even 64 launches" in verdict.reason


def test_slack_passes_a_small_difference() -> None:
    """A difference below the slack passes even where the ratio is beyond the tolerance."""
    base = [[1000.0], [1000.0], [1000.0]]
    for new in (1060.0, 940.0):
        verdict = once(VRAM, base, [[new]], tolerance=0.02)
        assert verdict.outcome is Outcome.PASS
        assert "slack of 64 MiB" in verdict.reason
    assert once(VRAM, base, [[1070.0]], tolerance=0.02).outcome is Outcome.REGRESSION


def test_equal_launches_are_no_proof_of_no_noise() -> None:
    """Launches without any spread still give a finite statistic and an interval of some width."""
    base = [[1000.0]] * 3
    verdict = once(VRAM, base, base, tolerance=0.02)
    assert verdict.outcome is Outcome.PASS
    assert verdict.interval is not None
    assert verdict.interval[0] < 0 < verdict.interval[1]


@pytest.mark.parametrize(
    ("launch", "what"),
    [([], "has no samples"), ([math.nan], "has a sample of nan"), ([-1.0], "has a sample of -1.0")],
)
def test_unusable_samples_are_errors(launch: list[float], what: str) -> None:
    """A launch that cannot be judged is an error that says which, on either side."""
    verdict = once(DECODE, [*STEADY, launch], STEADY, tolerance=0.05)
    assert verdict.outcome is Outcome.ERROR
    assert f"launch 9 of the baseline {what}" in verdict.reason
    verdict = once(DECODE, STEADY, [launch], tolerance=0.05)
    assert verdict.outcome is Outcome.ERROR
    assert f"launch 1 of the build under test {what}" in verdict.reason


def test_zero_passes_against_zero_only() -> None:
    """No GPU memory on both sides is no change; some against none cannot be a ratio."""
    none = [[0.0]] * 3
    assert once(VRAM, none, none, tolerance=0.02).outcome is Outcome.PASS
    within = once(VRAM, none, [[60.0]], tolerance=0.02)
    assert (within.outcome, within.change) == (Outcome.PASS, None)
    verdict = once(VRAM, none, [[900.0]], tolerance=0.02)
    assert verdict.outcome is Outcome.ERROR
    assert "samples of 0" in verdict.reason


def test_no_launches_at_all() -> None:
    """An empty baseline is missing, an empty measurement an error: neither passes."""
    assert once(DECODE, [], STEADY, tolerance=0.05).outcome is Outcome.MISSING
    assert once(DECODE, STEADY, [], tolerance=0.05).outcome is Outcome.ERROR


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_tolerance_is_checked(tolerance: float) -> None:
    """A tolerance that means nothing is refused."""
    with pytest.raises(ValueError, match="a tolerance is a share"):
        once(DECODE, STEADY, STEADY, tolerance=tolerance)
