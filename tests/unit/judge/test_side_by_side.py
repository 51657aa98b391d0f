"""Side by side: which block is wanted, when it ends, and how often it errs."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_llmperf.judge.sequential import Decision, finish
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior, student_t_sf
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS, Metric

DECODE = METRICS["decode_tps"]
TTFT = METRICS["ttft_ms"]
VRAM = METRICS["vram_mib"]

TOLERANCE = 0.05
MARGIN = math.log1p(TOLERANCE)
Rng = np.random.Generator

CHANGES = st.lists(st.floats(-0.5, 0.5), max_size=8)


def block(change: float, *, base: float = 100.0) -> Block:
    """A block of four noiseless pairs in which the new value is ``change`` higher."""
    samples = tuple(base * factor for factor in (1.0, 1.02, 0.98, 1.01))
    return Block(samples, tuple(v * (1 + change) for v in samples), paired=True, order="bnnb")


def decide(
    screen: list[float], confirm: list[float], *, metric: Metric = DECODE, last: bool = False
) -> Decision:
    """The decision on blocks with these changes."""
    return decide_side_by_side(
        metric,
        [block(change) for change in screen],
        [block(change) for change in confirm],
        tolerance=TOLERANCE,
        last=last,
    )


def play(make: Callable[[], Block], metric: Metric = DECODE) -> tuple[Verdict, int, int]:
    """Measure the blocks that are wanted until the decision is final."""
    screen: list[Block] = []
    confirm: list[Block] = []
    while True:
        decision = decide_side_by_side(metric, screen, confirm, tolerance=TOLERANCE)
        if decision.wants is None:
            return decision.verdict, len(screen), len(confirm)
        (screen if decision.wants == "screen" else confirm).append(make())


def noisy(rng: Rng, worsening: float, sd: float, *, metric: Metric = DECODE) -> Block:
    """A block whose launches differ, whose host drifts and whose requests jitter.

    ``sd`` is that of the block's log effect, from both launches together.
    """
    drift = rng.normal(0, 0.1)
    jitter = rng.normal(0, 0.01, (2, 4))
    launches = rng.normal(0, sd / math.sqrt(2), 2)
    sign = 1 if metric.better == "lower" else -1
    base = 100 * np.exp(drift + launches[0] + jitter[0])
    new = 100 * np.exp(drift + launches[1] + jitter[1] + sign * worsening)
    return Block(tuple(base.tolist()), tuple(new.tolist()), paired=True, order="bnnb")


def test_begins_with_a_screening_block() -> None:
    """With nothing measured a screening block is wanted and nothing is known."""
    decision = decide([], [])
    assert decision.wants == "screen"
    assert decision.verdict.outcome is Outcome.INCONCLUSIVE
    assert decision.verdict.change is None


def test_one_block_never_passes() -> None:
    """However equal the builds look, one block is not enough for PASS or IMPROVED."""
    assert decide([0.0], []).wants == "screen"
    assert decide([0.6], []).wants == "screen"


def test_equal_builds_pass() -> None:
    """Blocks without a difference end in PASS."""
    decision = decide([0.0] * 4, [])
    assert (decision.verdict.outcome, decision.wants) == (Outcome.PASS, None)


@pytest.mark.parametrize(("metric", "change"), [(DECODE, -0.35), (TTFT, 0.35)])
def test_a_gross_slowdown_is_confirmed_after_one_block(metric: Metric, change: float) -> None:
    """A 35 % slowdown asks for confirmation at once and is a regression after it."""
    assert decide([change], [], metric=metric).wants == "confirm"
    assert decide([change], [change], metric=metric).wants == "confirm"
    decision = decide([change], [change] * 2, metric=metric)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.REGRESSION, None)
    assert decision.verdict.launches_new == 3


def test_a_gross_improvement_is_improved() -> None:
    """A build much faster in two blocks passes as IMPROVED and calls the baseline stale."""
    verdict = decide([0.4, 0.4], []).verdict
    assert verdict.outcome is Outcome.IMPROVED
    assert "the baseline is stale" in verdict.reason


def test_a_slowdown_that_is_not_confirmed_is_no_regression() -> None:
    """One bad block, refuted by fresh ones: the pool of all of them passes in the end."""
    decision = decide([-0.3], [0.0, 0.0])
    assert decision.wants == "confirm"
    assert decision.verdict.launches_new == 3
    decision = decide([-0.3], [0.0] * 16)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.PASS, None)


def test_one_confirmation_ends_it() -> None:
    """Fresh blocks that neither confirm nor refute end INCONCLUSIVE, and the reason tells both."""
    decision = decide([-0.35], [-0.048] * DEFAULT_PLAN.max_confirm)
    assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, None)
    assert "suspected but not confirmed on fresh blocks" in decision.verdict.reason


def test_the_confirmation_is_judged_alone() -> None:
    """The change that a REGRESSION states is that of the fresh blocks, not of the selected one."""
    verdict = decide([-0.5], [-0.2, -0.2]).verdict
    assert verdict.outcome is Outcome.REGRESSION
    assert verdict.change == pytest.approx(-0.2)


def test_ends_inconclusive_after_the_last_block() -> None:
    """A change at the margin stays unclear and ends after the last block."""
    most = DEFAULT_PLAN.max_screen
    decision = decide([-0.048] * most, [])
    assert (decision.verdict.outcome, decision.wants) == (Outcome.INCONCLUSIVE, None)
    assert f"after {most} blocks" in decision.verdict.reason
    assert "missing" in decision.verdict.evidence


def test_blocks_after_the_end_change_nothing() -> None:
    """Blocks that another metric needed do not reopen a final verdict."""
    done = decide([0.0] * 4, [])
    assert decide([0.0] * 4 + [-0.5] * 2, [-0.5] * 2) == done


@given(CHANGES, CHANGES)
def test_the_decision_is_a_pure_function(screen: list[float], confirm: list[float]) -> None:
    """The same blocks give the same decision, which survives JSON."""
    decision = decide(screen, confirm)
    assert decide(screen, confirm) == decision
    written = json.loads(json.dumps(decision.verdict.to_json()))
    assert Verdict.from_json(written) == decision.verdict


@given(CHANGES, CHANGES)
def test_only_wanted_blocks_count(screen: list[float], confirm: list[float]) -> None:
    """An open decision claims nothing bad, a final one has looked at enough of both kinds."""
    decision = decide(screen, confirm)
    verdict = decision.verdict
    if decision.wants is not None:
        assert verdict.outcome in (Outcome.INCONCLUSIVE, Outcome.PASS)
    if verdict.outcome is Outcome.REGRESSION:
        assert verdict.launches_new >= 1 + DEFAULT_PLAN.first_confirm
    if verdict.outcome in (Outcome.PASS, Outcome.IMPROVED):
        assert verdict.launches_new >= DEFAULT_PLAN.first_pass


@given(CHANGES, CHANGES)
def test_mirrored_metrics_agree(screen: list[float], confirm: list[float]) -> None:
    """Speed that falls and latency that rises by the same factor are judged alike."""
    # At the very edge rounding may tip it.
    assume(all(change == 0 or abs(change) > 1e-3 for change in screen + confirm))
    plain = decide(screen, confirm)
    mirrored = decide(
        [1 / (1 + change) - 1 for change in screen],
        [1 / (1 + change) - 1 for change in confirm],
        metric=TTFT,
    )
    assert (plain.verdict.outcome, plain.wants) == (mirrored.verdict.outcome, mirrored.wants)


@given(CHANGES, st.floats(1e-2, 1e2))
def test_scaling_both_builds_changes_nothing(changes: list[float], factor: float) -> None:
    """The unit of measurement does not matter."""
    plain = decide(changes, [])
    scaled = decide_side_by_side(
        DECODE,
        [block(change, base=100 * factor) for change in changes],
        [],
        tolerance=TOLERANCE,
    )
    assert (scaled.verdict.outcome, scaled.wants) == (plain.verdict.outcome, plain.wants)
    assert scaled.verdict.change == pytest.approx(plain.verdict.change, abs=1e-9)


@pytest.mark.parametrize(
    ("screen", "reason"),
    [
        ([], "before the first look"),
        ([0.0], "neither within nor beyond the tolerance of 5 %"),
        ([-0.35], "waits for its confirmation"),
    ],
)
def test_the_budget_ends_early(screen: list[float], reason: str) -> None:
    """An unfinished decision ends INCONCLUSIVE and says that the budget was spent."""
    ended = decide(screen, [], last=True)
    assert (ended.verdict.outcome, ended.wants) == (Outcome.INCONCLUSIVE, None)
    assert "the budget was spent" in ended.verdict.reason
    assert reason in ended.verdict.reason
    assert ended == finish(decide(screen, []))
    assert finish(ended) == ended


def test_a_final_decision_does_not_care_for_the_budget() -> None:
    """A clear verdict stays what it is when the budget ends with it."""
    assert decide([0.0] * 4, [], last=True) == decide([0.0] * 4, [])


def test_unpaired_blocks() -> None:
    """Sizes, of which each launch has one, are compared without pairs."""
    blocks = [Block((1000.0,), (1200.0,), paired=False, order="bn")] * 3
    wants = decide_side_by_side(VRAM, blocks[:2], [], tolerance=0.02).wants
    assert wants == "confirm"
    decision = decide_side_by_side(VRAM, blocks[:2], blocks[:3], tolerance=0.02)
    assert decision.verdict.outcome is Outcome.REGRESSION


@pytest.mark.parametrize("new", [1050.0, 950.0])
def test_slack_passes_a_small_difference(new: float) -> None:
    """A difference below the slack passes, once there are the fewest blocks."""
    blocks = [Block((1000.0,), (new,), paired=False, order="bn")] * 2
    prior = Prior(0.001, 100)
    first = decide_side_by_side(VRAM, blocks[:1], [], tolerance=0.02, prior=prior)
    assert first.wants == "screen"
    decision = decide_side_by_side(VRAM, blocks, [], tolerance=0.02, prior=prior)
    assert decision.verdict.outcome is Outcome.PASS
    assert "slack of 64 MiB" in decision.verdict.reason


def test_samples_of_zero() -> None:
    """No GPU memory on both sides passes, some against none is an error."""
    none = Block((0.0,), (0.0,), paired=False, order="bn")
    some = Block((0.0,), (900.0,), paired=False, order="bn")
    passed = decide_side_by_side(VRAM, [none], [], tolerance=0.02)
    assert (passed.verdict.outcome, passed.wants) == (Outcome.PASS, None)
    wrong = decide_side_by_side(VRAM, [some], [], tolerance=0.02)
    assert (wrong.verdict.outcome, wrong.wants) == (Outcome.ERROR, None)


def test_blocks_are_checked() -> None:
    """A block with an empty side, or with pairs that do not match, is refused."""
    with pytest.raises(ValueError, match="samples of both builds"):
        Block((), (1.0,), paired=False, order="")
    with pytest.raises(ValueError, match="1 of the baseline, 2 of the build under test"):
        Block((1.0,), (1.0, 2.0), paired=True, order="")


def test_a_prior_without_weight_is_refused() -> None:
    """A look at one block needs to know something of its spread."""
    with pytest.raises(ValueError, match="d0 above 0"):
        decide_side_by_side(DECODE, [], [], tolerance=0.05, prior=Prior(0.02, 0))


def test_the_bound_is_stated() -> None:
    """Fresh blocks of both builds err independently, so the probabilities multiply."""
    assert DEFAULT_PLAN.false_regression_bound == pytest.approx(0.001)
    evidence = decide([0.0], []).verdict.evidence
    assert evidence["false_regression_bound"] == DEFAULT_PLAN.false_regression_bound


def test_evidence_tells_the_whole_story() -> None:
    """Blocks in the order in which they were looked at, and every look with its statistic."""
    evidence = json.loads(json.dumps(decide([-0.35, 0.0], [0.0, 0.0]).verdict.evidence))
    phases = [entry["phase"] for entry in evidence["blocks"]]
    assert phases[:3] == ["screen", "confirm", "confirm"]
    first, confirmation = evidence["looks"][:2]
    assert (first["claim"], confirmation["claim"]) == ("slower", "open")
    # The effect less the margin, in units of the prior's sd: there is nothing else yet.
    expected = (-math.log(0.65) - MARGIN) / 0.025
    assert first["statistic"] == pytest.approx(expected)
    assert first["df"] == 4


def test_an_odd_start_is_set_aside() -> None:
    """One block far off does not keep equal builds from passing, and the reason tells of it."""
    for odd in (-0.6, 1.5):
        verdict = decide([0.0, odd, 0.0, 0.0], []).verdict
        assert verdict.outcome is Outcome.PASS
        assert "without 1 block far off" in verdict.reason
        looks = json.loads(json.dumps(verdict.evidence["looks"]))
        assert looks[-1]["set_aside"] == {"blocks": [1]}


def test_an_odd_start_does_not_hide_a_slowdown() -> None:
    """A base start that was slow as well refutes nothing: it is set aside at the next look."""
    assert decide([-0.35], [-0.35, 1.0]).wants == "confirm"
    decision = decide([-0.35], [-0.35, 1.0, -0.35, -0.35])
    assert decision.verdict.outcome is Outcome.REGRESSION


def test_odd_starts_do_not_outvote_the_others() -> None:
    """Two odd base starts of three do not turn a slowdown into an improvement."""
    decision = decide([-0.02, 1.0, 1.0], [])
    assert decision.wants == "screen"
    assert decision.verdict.outcome is not Outcome.IMPROVED


def test_what_is_odd_twice_is_not_set_aside() -> None:
    """A build that starts slowly every now and then does not pass for its good starts."""
    verdict = decide([0.0, -0.6, 0.0, -0.6, 0.0, 0.0], [0.0] * 4, last=True).verdict
    assert verdict.outcome is Outcome.INCONCLUSIVE


def test_two_blocks_set_nothing_aside() -> None:
    """Of two blocks nobody can tell which one is odd, so a confirmation of two uses both."""
    assert decide([-0.35], [-0.35, 0.5]).verdict.outcome is not Outcome.REGRESSION


def test_improved_wins_over_pass() -> None:
    """A speed-up beyond the tolerance is measured on until it is shown, not passed at once."""
    two = decide([0.07, 0.07], [])
    assert (two.verdict.outcome, two.wants) == (Outcome.PASS, "screen")
    assert finish(two).verdict.outcome is Outcome.PASS
    assert decide([0.1] * 6, []).verdict.outcome is Outcome.IMPROVED


def test_a_speed_up_that_is_not_shown_passes() -> None:
    """Without a proof of IMPROVED the verdict is the PASS that was shown."""
    decision = decide([0.06, 0.06, 0.06, 0.05, 0.06, 0.07, 0.05], [])
    assert (decision.verdict.outcome, decision.wants) == (Outcome.PASS, "screen")
    decision = decide([0.06, 0.06, 0.06, 0.05, 0.06, 0.07, 0.05, 0.06], [])
    assert (decision.verdict.outcome, decision.wants) == (Outcome.PASS, None)
    assert "shown to be within" in decision.verdict.reason


def naive_flags(rng: Rng, worsening: float, sd: float) -> bool:
    """One start of each build, ten requests as ten independent values, t test at 1 %."""
    launches = rng.normal(0, sd / math.sqrt(2), 2)
    base = launches[0] + rng.normal(0, 0.01, 10)
    new = launches[1] + rng.normal(0, 0.01, 10) + worsening
    se = math.sqrt((base.var(ddof=1) + new.var(ddof=1)) / 10)
    t = (new.mean() - base.mean() - MARGIN) / se
    return student_t_sf(float(t), 18) < 0.01


def test_false_regressions_stay_below_the_bound() -> None:
    """At the worst case, a slowdown of just the tolerance, and far above it for naive tests."""
    rng = np.random.default_rng(20260227)
    runs, sd = 150, 0.025
    false = sum(
        play(lambda: noisy(rng, MARGIN, sd))[0].outcome is Outcome.REGRESSION for _ in range(runs)
    )
    naive = sum(naive_flags(rng, MARGIN, sd) for _ in range(runs))
    bound = DEFAULT_PLAN.false_regression_bound
    # Three more than expected at the bound would be a chance of one in a thousand.
    assert false <= bound * runs + 3
    assert naive / runs > 0.1


def test_equal_builds_mostly_pass() -> None:
    """Of equal builds none is a regression and few are unclear."""
    rng = np.random.default_rng(11434)
    outcomes = [play(lambda: noisy(rng, 0.0, 0.025))[0].outcome for _ in range(300)]
    assert Outcome.REGRESSION not in outcomes
    assert Outcome.IMPROVED not in outcomes
    assert outcomes.count(Outcome.PASS) > 0.9 * len(outcomes)


def test_slow_builds_do_not_pass() -> None:
    """A build slower by the tolerance passes no more often than stated."""
    rng = np.random.default_rng(8149)
    runs = 120
    passed = sum(
        play(lambda: noisy(rng, MARGIN, 0.025))[0].outcome is Outcome.PASS for _ in range(runs)
    )
    assert passed <= DEFAULT_PLAN.pass_alpha * runs


@pytest.mark.parametrize(
    ("metric", "worsening"), [(DECODE, -math.log(0.65)), (TTFT, math.log(1.35))]
)
def test_power_at_35_percent(metric: Metric, worsening: float) -> None:
    """All are regressions, at least 95 % of them after one screening block and one confirmation."""
    rng = np.random.default_rng(35)
    played = [play(lambda: noisy(rng, worsening, 0.025, metric=metric), metric) for _ in range(300)]
    assert all(verdict.outcome is Outcome.REGRESSION for verdict, _, _ in played)
    fast = sum((screen, confirm) == (1, 2) for _, screen, confirm in played)
    assert fast >= 0.95 * len(played)
