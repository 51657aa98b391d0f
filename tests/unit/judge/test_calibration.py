"""Replaying real blocks as comparisons."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.calibration import (
    naive_alarms,
    noise,
    priors_of,
    replay,
    resample,
    smallest_detectable,
    spread,
)
from pytest_llmperf.judge.side_by_side import Block
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import METRICS

SPEED = METRICS["decode_tps"]


def blocks(ratio: float, count: int, sd: float = 0.005, seed: int = 1) -> list[Block]:
    """Return blocks whose new side runs at ``ratio`` of the base."""
    rng = np.random.default_rng(seed)
    return [
        Block(
            base=(100.0,) * 4,
            new=(100.0 * ratio * math.exp(rng.normal(0, sd)),) * 4,
            paired=True,
            order="bnbn",
        )
        for _ in range(count)
    ]


def test_noise_needs_two_blocks() -> None:
    """One block has no spread."""
    with pytest.raises(ValueError, match="two blocks"):
        noise(blocks(1.0, 1))


def test_noise_tells_the_effect_and_its_scatter() -> None:
    """The median is the slowdown; the robust sd is not moved by one wild block."""
    usual = blocks(0.9, 40, sd=0.01)
    found = noise([*usual, *blocks(0.4, 1)])
    assert found.effect == pytest.approx(math.log(0.9), abs=0.01)
    assert found.robust_sd < 0.02 < found.sd
    assert found.blocks == 41


def test_equal_builds_pass_and_slow_ones_are_flagged() -> None:
    """Each comparison uses blocks of its own, and no more than there are."""
    equal = replay(SPEED, blocks(1.0, 40), tolerance=0.05)
    slow = replay(SPEED, blocks(0.65, 40), tolerance=0.05)
    assert equal.rate(Outcome.REGRESSION) == 0
    assert slow.rate(Outcome.REGRESSION) == 1
    assert equal.blocks <= 40
    assert slow.comparisons == 40 // 3, "one look and its confirmation"


def test_what_does_not_suffice_is_not_counted() -> None:
    """A comparison that runs out of blocks has no outcome."""
    found = replay(SPEED, blocks(1.0, 1), tolerance=0.05)
    assert (found.comparisons, found.blocks_each, found.rate(Outcome.PASS)) == (0, 0.0, 0.0)


def test_smallest_detectable_holds_for_all_larger_ones() -> None:
    """A lucky small slowdown does not count while a larger one is missed."""
    assert smallest_detectable([(0.05, 0.95), (0.1, 0.5), (0.2, 1.0)], 0.9) == 0.2
    assert smallest_detectable([(0.05, 0.1)], 0.9) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8))
def test_smallest_detectable_is_one_that_was_measured(power: list[tuple[float, float]]) -> None:
    """It never invents a slowdown."""
    found = smallest_detectable(power, 0.9)
    assert found is None or (found, 1) <= (1, 1)
    assert found is None or found in [slowdown for slowdown, share in power if share >= 0.9]


def test_a_disturbed_block_ends_its_comparison() -> None:
    """As in a gate: INCOMPARABLE, and the next comparison begins after it."""
    made = blocks(1.0, 6)
    found = replay(SPEED, [made[0], None, *made[1:5]], tolerance=0.05)
    assert found.outcomes[Outcome.INCOMPARABLE] == 1
    assert found.outcomes[Outcome.PASS] >= 1


def test_resampling_draws_as_many_as_asked_for() -> None:
    """The rates are those of the replay, the runs as many as wanted, the same for one seed."""
    made = blocks(0.65, 40)
    found = resample(SPEED, made, runs=25, seed=3, tolerance=0.05)
    assert (found.comparisons, found.rate(Outcome.REGRESSION)) == (25, 1.0)
    assert found == resample(SPEED, made, runs=25, seed=3, tolerance=0.05)
    with pytest.raises(ValueError, match="resampling needs 36 blocks at least, got 7"):
        resample(SPEED, made[:7], runs=1, seed=3, tolerance=0.05)


def test_spread_of_equal_builds() -> None:
    """The variance of effects and launches, one wild block left out."""
    made = [*blocks(1.0, 200, sd=0.02), *blocks(0.4, 1)]
    found = spread(SPEED, made)
    assert found.block == pytest.approx(0.02**2, rel=0.3)
    assert found.launch == pytest.approx(0.02**2 / 2, rel=0.3)
    assert found.df == 199
    with pytest.raises(ValueError, match="three blocks"):
        spread(SPEED, made[:2])
    block, launch = priors_of([found, found])
    assert block.s0 == pytest.approx(0.02, rel=0.2)
    assert launch.s0 < block.s0


def pair(base: tuple[float, ...], new: tuple[float, ...]) -> Block:
    """Return a block of such samples."""
    return Block(base, new, paired=True, order="b" * len(base))


def test_a_naive_gate_counts_starts_that_are_worse_than_others() -> None:
    """One is 10 % slower: it fails against the two of the other block, in 2 of 8 pairs."""
    made = [pair((100.0, 100.0), (100.0, 101.0)), pair((90.0,), (100.0,))]
    assert naive_alarms(SPEED, made, 0.05) == 2 / 8
    assert naive_alarms(SPEED, made, 0.2) == 0
    # What is better when lower is worse the other way round: the others fail against that one.
    assert naive_alarms(METRICS["ttft_ms"], made, 0.05) == 2 / 8
    with pytest.raises(ValueError, match="two blocks at least"):
        naive_alarms(SPEED, made[:1], 0.05)


@given(
    st.lists(st.tuples(st.floats(1, 1e3), st.floats(1, 1e3)), min_size=2, max_size=8),
    st.floats(0, 0.5),
    st.floats(0.01, 100),
)
def test_a_naive_gate_looks_at_ratios_alone(
    starts: list[tuple[float, float]], tolerance: float, scale: float
) -> None:
    """Other units change nothing, and a larger tolerance never alarms more often."""
    made = [pair((one,), (other,)) for one, other in starts]
    scaled = [pair((one * scale,), (other * scale,)) for one, other in starts]
    share = naive_alarms(SPEED, made, tolerance)
    assert 0 <= share <= 0.5
    assert naive_alarms(SPEED, scaled, tolerance) == pytest.approx(share, abs=0.05)
    assert naive_alarms(SPEED, made, tolerance + 0.1) <= share
