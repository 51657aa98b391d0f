"""Verdicts from recorded launches, exact values and published figures."""

import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_llmperf.judge import decide
from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    compare_stored,
    failed,
    incomparable,
    missing,
    recorded,
)
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS

DECODE = METRICS["decode_tps"]
TTFT = METRICS["ttft_ms"]
VRAM = METRICS["vram_mib"]
CTX = METRICS["n_ctx"]
COMPUTE = METRICS["compute_mib"]
LAYERS = METRICS["offloaded_layers"]

# Eight launches with an sd of about 1.1 %, as good as measurements get.
STEADY = [[v, v * 1.002, v * 0.998] for v in (100, 101, 99, 100.5, 98.5, 101.5, 99.5, 100)]

LAUNCH = st.lists(st.floats(10, 1000), min_size=1, max_size=4)
LAUNCHES = st.lists(LAUNCH, min_size=1, max_size=5)


def scaled(launches: Sequence[Sequence[float]], factor: float) -> list[list[float]]:
    """The launches with every sample multiplied."""
    return [[factor * v for v in launch] for launch in launches]


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
    verdict = compare_stored(DECODE, STEADY, scaled(STEADY[:4], factor), tolerance=0.05)
    assert verdict.outcome is outcome
    assert verdict.mode == "stored"
    assert verdict.change == pytest.approx(factor - 1, abs=0.01)


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.35, Outcome.REGRESSION), (1.0, Outcome.PASS), (0.7, Outcome.IMPROVED)],
)
def test_lower_is_better(factor: float, outcome: Outcome) -> None:
    """For latency the directions are the other way round."""
    verdict = compare_stored(TTFT, STEADY, scaled(STEADY[:4], factor), tolerance=0.05)
    assert verdict.outcome is outcome


@given(LAUNCHES, LAUNCHES, st.floats(0, 0.5))
def test_change_is_the_ratio_of_the_points(
    base: list[list[float]], new: list[list[float]], tolerance: float
) -> None:
    """``change`` is new / base - 1 and lies inside its interval."""
    verdict = compare_stored(DECODE, base, new, tolerance=tolerance, prior=Prior(0.03, 4))
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
    """Swapped, the log effect is negated: a regression one way is an improvement the other."""
    metric = TTFT if lower else DECODE
    prior = Prior(0.03, 4)
    one = compare_stored(metric, base, new, tolerance=tolerance, prior=prior)
    other = compare_stored(metric, new, base, tolerance=tolerance, prior=prior)
    effect, swapped = one.evidence["effect"], other.evidence["effect"]
    assert isinstance(effect, float)
    assert isinstance(swapped, float)
    assert effect == pytest.approx(-swapped, abs=1e-12)
    regressed = one.outcome is Outcome.REGRESSION
    assert regressed == (other.outcome is Outcome.IMPROVED)


@given(LAUNCHES, LAUNCHES, st.floats(0.01, 100))
def test_scaling_both_arms_keeps_the_verdict(
    base: list[list[float]], new: list[list[float]], factor: float
) -> None:
    """The unit of measurement does not matter."""
    prior = Prior(0.03, 4)
    one = compare_stored(DECODE, base, new, tolerance=0.05, prior=prior)
    p_regression, p_within = one.evidence["p_regression"], one.evidence["p_within"]
    assert isinstance(p_regression, float)
    assert isinstance(p_within, float)
    # At the very edge rounding may tip it.
    assume(min(abs(p_regression - 0.01), abs(p_within - 0.01)) > 1e-6)
    other = compare_stored(
        DECODE, scaled(base, factor), scaled(new, factor), tolerance=0.05, prior=prior
    )
    assert other.outcome is one.outcome
    assert other.change == pytest.approx(one.change, abs=1e-9)


@given(LAUNCHES, LAUNCHES)
def test_verdicts_can_be_written(base: list[list[float]], new: list[list[float]]) -> None:
    """Every verdict survives JSON, evidence included."""
    verdict = compare_stored(DECODE, base, new, tolerance=0.05)
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_evidence_recomputes_the_statistic() -> None:
    """The launches in the evidence give the statistic and the p values again."""
    verdict = compare_stored(
        DECODE, STEADY, scaled(STEADY[:2], 0.93), tolerance=0.05, prior=Prior(0.02, 4)
    )
    evidence = json.loads(json.dumps(verdict.evidence))
    base = [math.log(v) for v in evidence["base_launches"]]
    new = [math.log(v) for v in evidence["new_launches"]]
    means = [sum(logs) / len(logs) for logs in (base, new)]
    squares = sum((y - means[0]) ** 2 for y in base) + sum((y - means[1]) ** 2 for y in new)
    s2 = (4 * 0.02**2 + squares) / (4 + 8)
    se = math.sqrt(s2 * (1 / 8 + 1 / 2))
    statistic = (means[0] - means[1] - math.log(1.05)) / se
    assert evidence["statistic"] == pytest.approx(statistic)
    assert evidence["df"] == 12
    assert (verdict.launches_base, verdict.launches_new) == (8, 2)
    assert (verdict.samples_base, verdict.samples_new) == (24, 6)


@pytest.mark.parametrize("launches", [1, 2])
def test_too_few_recorded_launches(launches: int) -> None:
    """Fewer than three recorded launches and no prior decide nothing, however large the gap."""
    verdict = compare_stored(DECODE, STEADY[:launches], scaled(STEADY, 0.5), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert f"record {3 - launches} more" in verdict.reason
    assert verdict.evidence["missing"] == {"base": 3 - launches, "new": 0}
    assert verdict.interval is None


def test_a_prior_stands_in_for_launches() -> None:
    """With the variance known from other configs even one launch each shows a gross slowdown."""
    verdict = compare_stored(
        DECODE, STEADY[:1], scaled(STEADY[:1], 0.65), tolerance=0.05, prior=Prior(0.02, 20)
    )
    assert verdict.outcome is Outcome.REGRESSION


def test_an_odd_request_decides_nothing() -> None:
    """One stalled request in each new launch is no regression."""
    new = [[*launch, launch[0] / 3] for launch in STEADY[:4]]
    assert compare_stored(DECODE, STEADY, new, tolerance=0.05).outcome is Outcome.PASS


def test_missing_launches_of_the_build_under_test() -> None:
    """Where more new launches can decide it, their number is given."""
    verdict = compare_stored(DECODE, STEADY, scaled(STEADY[:1], 0.93), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    lack = verdict.evidence["missing"]
    assert isinstance(lack, dict)
    assert lack["base"] == 0
    assert lack["new"] > 0
    assert f"{lack['new']} more of the build under test" in verdict.reason


def test_the_missing_launches_suffice() -> None:
    """With as many more launches as asked for, all alike, the verdict is clear."""
    new = scaled(STEADY[:2], 0.93)
    lack = compare_stored(DECODE, STEADY, new, tolerance=0.05).evidence["missing"]
    assert isinstance(lack, dict)
    more = new * (1 + lack["new"])
    verdict = compare_stored(DECODE, STEADY, more, tolerance=0.05)
    assert verdict.outcome is Outcome.REGRESSION


def test_missing_launches_of_the_baseline() -> None:
    """Where the few recorded launches are the bottleneck, more of them are asked for."""
    base = [[90.0], [100.0], [110.0]]
    verdict = compare_stored(DECODE, base, scaled(base, 0.8), tolerance=0.05)
    lack = verdict.evidence["missing"]
    assert isinstance(lack, dict)
    assert lack["base"] > 0
    assert f"{lack['base']} more of the baseline" in verdict.reason


def test_a_change_right_at_the_margin_is_hopeless() -> None:
    """A change that equals the tolerance is not promised to be settled."""
    base = [[90.0], [100.0], [110.0]]
    verdict = compare_stored(DECODE, base, scaled(base, 1 / 1.05), tolerance=0.05)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.evidence["missing"] is None
    assert "even 64 launches" in verdict.reason


def test_slack_passes_a_small_difference() -> None:
    """A difference below the slack passes even where the ratio is beyond the tolerance."""
    base = [[1000.0], [1000.0], [1000.0]]
    for new in (1060.0, 940.0):
        verdict = compare_stored(VRAM, base, [[new]], tolerance=0.02)
        assert verdict.outcome is Outcome.PASS
        assert "slack of 64 MiB" in verdict.reason
    assert compare_stored(VRAM, base, [[1070.0]], tolerance=0.02).outcome is Outcome.REGRESSION


def test_equal_launches_are_no_proof_of_no_noise() -> None:
    """Launches without any spread still give a finite statistic and an interval of some width."""
    base = [[1000.0]] * 3
    verdict = compare_stored(VRAM, base, base, tolerance=0.02)
    assert verdict.outcome is Outcome.PASS
    assert verdict.interval is not None
    assert verdict.interval[0] < 0 < verdict.interval[1]


@pytest.mark.parametrize(
    ("launch", "what"),
    [([], "has no samples"), ([math.nan], "has a sample of nan"), ([-1.0], "has a sample of -1.0")],
)
def test_unusable_samples_are_errors(launch: list[float], what: str) -> None:
    """A launch that cannot be judged is an error that says which, on either side."""
    verdict = compare_stored(DECODE, [*STEADY, launch], STEADY, tolerance=0.05)
    assert verdict.outcome is Outcome.ERROR
    assert f"launch 9 of the baseline {what}" in verdict.reason
    verdict = compare_stored(DECODE, STEADY, [launch], tolerance=0.05)
    assert verdict.outcome is Outcome.ERROR
    assert f"launch 1 of the build under test {what}" in verdict.reason


def test_zero_passes_against_zero_only() -> None:
    """No GPU memory on both sides is no change; some against none cannot be a ratio."""
    none = [[0.0]] * 3
    assert compare_stored(VRAM, none, none, tolerance=0.02).outcome is Outcome.PASS
    within = compare_stored(VRAM, none, [[60.0]], tolerance=0.02)
    assert (within.outcome, within.change) == (Outcome.PASS, None)
    verdict = compare_stored(VRAM, none, [[900.0]], tolerance=0.02)
    assert verdict.outcome is Outcome.ERROR
    assert "samples of 0" in verdict.reason


def test_no_launches_at_all() -> None:
    """An empty baseline is missing, an empty measurement an error: neither passes."""
    assert compare_stored(DECODE, [], STEADY, tolerance=0.05).outcome is Outcome.MISSING
    assert compare_stored(DECODE, STEADY, [], tolerance=0.05).outcome is Outcome.ERROR


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_tolerance_is_checked(tolerance: float) -> None:
    """A tolerance that means nothing is refused."""
    with pytest.raises(ValueError, match="a tolerance is a share"):
        compare_stored(DECODE, STEADY, STEADY, tolerance=tolerance)


@pytest.mark.parametrize("alpha", [0, 0.5, 1, math.nan])
def test_alpha_is_checked(alpha: float) -> None:
    """An error probability that makes no bound is refused."""
    with pytest.raises(ValueError, match="alpha must lie between"):
        compare_stored(DECODE, STEADY, STEADY, tolerance=0.05, alpha=alpha)


@pytest.mark.parametrize(
    ("new", "outcome"),
    [(4096, Outcome.PASS), (4095, Outcome.REGRESSION), (4097, Outcome.IMPROVED)],
)
def test_exact_without_slack(new: float, outcome: Outcome) -> None:
    """Without slack a single token less of context is a regression."""
    verdict = compare_exact(CTX, 4096, new, tolerance=0, slack=0)
    assert (verdict.outcome, verdict.mode) == (outcome, "exact")


@pytest.mark.parametrize(
    ("new", "outcome"),
    [
        (104.0, Outcome.PASS),
        (104.1, Outcome.REGRESSION),
        (96.0, Outcome.PASS),
        (95.9, Outcome.IMPROVED),
    ],
)
def test_exact_with_slack(new: float, outcome: Outcome) -> None:
    """A difference of just the slack does not count, one beyond it does."""
    assert compare_exact(COMPUTE, 100.0, new, tolerance=0, slack=4).outcome is outcome


def test_exact_needs_to_exceed_slack_and_tolerance() -> None:
    """Where both are given, both must be exceeded."""
    assert compare_exact(COMPUTE, 1000, 1040, tolerance=0.05, slack=4).outcome is Outcome.PASS
    assert compare_exact(COMPUTE, 10, 13, tolerance=0.05, slack=4).outcome is Outcome.PASS
    verdict = compare_exact(COMPUTE, 1000, 1060, tolerance=0.05, slack=4)
    assert verdict.outcome is Outcome.REGRESSION


def test_exact_forgives_the_rounding_of_the_file() -> None:
    """A value equal but for six significant digits is equal; a whole number must be it."""
    assert compare_exact(CTX, 0.833333, 5 / 6, tolerance=0, slack=0).outcome is Outcome.PASS
    verdict = compare_exact(CTX, 1048576, 1048575, tolerance=0, slack=0)
    assert verdict.outcome is Outcome.REGRESSION


def test_exact_from_zero() -> None:
    """Layers that appear on a GPU are an improvement without a ratio."""
    verdict = compare_exact(LAYERS, 0, 33, tolerance=0, slack=0)
    assert (verdict.outcome, verdict.change) == (Outcome.IMPROVED, None)
    assert compare_exact(LAYERS, 0, 0, tolerance=0, slack=0).change == 0


def test_exact_is_checked() -> None:
    """No number cannot pass, and a negative slack is refused."""
    assert compare_exact(CTX, math.nan, 1, tolerance=0, slack=0).outcome is Outcome.ERROR
    with pytest.raises(ValueError, match="slack must be"):
        compare_exact(CTX, 1, 1, tolerance=0, slack=-1)


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [
        (0.9, Outcome.REGRESSION),
        (0.97, Outcome.PASS),
        (1.03, Outcome.PASS),
        (1.2, Outcome.IMPROVED),
    ],
)
def test_published_is_a_plain_tolerance(factor: float, outcome: Outcome) -> None:
    """Against a published figure only the tolerance counts, and the reason says so."""
    verdict = compare_published(DECODE, 100.0, scaled(STEADY[:3], factor), tolerance=0.05)
    assert (verdict.outcome, verdict.mode) == (outcome, "published")
    assert "published figure with no samples behind it" in verdict.reason
    assert verdict.interval is None
    assert (verdict.launches_base, verdict.samples_base) == (0, 0)


def test_published_takes_the_median_of_launches() -> None:
    """One launch in three at 40 % of the speed does not make a regression."""
    new = [[100.0], [40.0], [101.0]]
    assert compare_published(DECODE, 100.0, new, tolerance=0.05).outcome is Outcome.PASS


def test_published_slack_and_zero() -> None:
    """The slack holds for published figures too, and 0 is no figure to compare with."""
    assert compare_published(VRAM, 1000, [[1060]], tolerance=0.02).outcome is Outcome.PASS
    verdict = compare_published(DECODE, 0, [[10.0]], tolerance=0.05)
    assert (verdict.outcome, verdict.launches_base) == (Outcome.ERROR, 0)
    assert compare_published(DECODE, 10, [], tolerance=0.05).outcome is Outcome.ERROR


def test_verdicts_without_comparison() -> None:
    """Each has its outcome, no numbers, mode none, and the reason that it was given."""
    made = [
        (incomparable(DECODE, ["driver 1 != 2", "gpu busy"]), Outcome.INCOMPARABLE),
        (missing(DECODE, "record it"), Outcome.MISSING),
        (failed(DECODE, "server died"), Outcome.ERROR),
    ]
    for verdict, outcome in made:
        assert (verdict.outcome, verdict.mode, verdict.change) == (outcome, "none", None)
        assert verdict.outcome.fails(strict=False)
    assert "driver 1 != 2; gpu busy" in made[0][0].reason
    assert made[1][0].reason == "record it"
    done = recorded(DECODE, [[1.0, 2.0, 3.0], [4.0]])
    assert (done.outcome, done.new, done.launches_new) == (Outcome.RECORDED, 3.0, 2)


def test_the_public_names_exist() -> None:
    """Everything ``decide`` lists can be imported from it."""
    assert [name for name in decide.__all__ if not hasattr(decide, name)] == []
