"""Verdicts without statistics: exact values and published figures."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import strategies as st

from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    failed,
    incomparable,
    missing,
    recorded,
)
from pytest_llmperf.judge.verdict import Outcome
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


def test_a_record_of_uneven_launches_says_so() -> None:
    """Launches that differ by more than a quarter make a baseline that tells little."""
    uneven = recorded(DECODE, [[100.0], [101.0, 99.0], [60.0]])
    assert uneven.outcome is Outcome.RECORDED
    assert "differ by a factor of 1.67" in uneven.reason
    assert uneven.evidence["uneven"] == pytest.approx(100 / 60)
    assert "uneven" not in recorded(DECODE, [[100.0], [90.0]]).evidence
    assert "uneven" not in recorded(VRAM, [[100.0], [900.0]]).evidence, "a size is what it is"
    assert "uneven" not in recorded(DECODE, []).evidence
