"""The simulation in reduced form: error rates stay bounded, launches stay the unit."""

import math

import numpy as np
import pytest

from pytest_llmperf.judge import simulate
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block
from pytest_llmperf.judge.simulate import NOISES, Cell, Noise
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import METRICS

DECODE = METRICS["decode_tps"]
TOLERANCE = 0.05
BOUND = DEFAULT_PLAN.false_regression_bound


def most(bound: float, runs: int) -> float:
    """What a rate at its bound exceeds about once in a thousand times."""
    return bound * runs + 3.1 * math.sqrt(bound * runs) + 1


def cell(noise: Noise, effect: float, runs: int) -> Cell:
    """One cell at the tolerance of most metrics, the same at every call."""
    return simulate.side_by_side(noise, TOLERANCE, effect, runs=runs, seed=20261121)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
def test_false_regressions_are_within_the_bound(noise: Noise) -> None:
    """At the worst case, a slowdown of just the tolerance, whatever the noise."""
    runs = 100
    assert cell(noise, TOLERANCE, runs).counts[Outcome.REGRESSION] <= most(BOUND, runs)


def test_launches_are_the_unit() -> None:
    """A judge that took each request for a block would be wrong far more often than stated."""
    noise = Noise("steady requests", between=0.05, within=0.005)
    runs = 30
    assert cell(noise, TOLERANCE, runs).counts[Outcome.REGRESSION] <= most(BOUND, runs)

    rng = np.random.default_rng(1)
    requests = DEFAULT_PLAN.most_units
    made = simulate.blocks(noise, math.log1p(TOLERANCE), rng, runs, 1, pairs=requests)
    naive = 0
    for (block,) in made:
        pairs = [simulate.to_block(block[:, i : i + 1], DECODE) for i in range(requests)]
        outcome, _ = simulate.play_side_by_side(pairs, DECODE, tolerance=TOLERANCE)
        naive += outcome is Outcome.REGRESSION
    assert naive > 2 * most(BOUND, runs)


def test_more_requests_do_not_make_a_verdict_surer() -> None:
    """With steady requests, four or forty of them tell the same of the next start."""
    noise = Noise("steady requests", within=0.0)
    outcomes = []
    for pairs in (4, 40):
        rng = np.random.default_rng(5)
        made = simulate.blocks(noise, 0.0, rng, 8, DEFAULT_PLAN.most_units, pairs)
        outcomes.append(
            [
                simulate.play_side_by_side(
                    [simulate.to_block(block, DECODE) for block in run], DECODE, tolerance=TOLERANCE
                )
                for run in made
            ]
        )
    assert outcomes[0] == outcomes[1]


def test_power() -> None:
    """Gross slowdowns are all found, in three blocks; equal builds pass."""
    gross = cell(NOISES[0], simulate.GROSS, 30)
    assert gross.rate(Outcome.REGRESSION) == 1
    assert gross.spent < 3.2
    assert cell(NOISES[0], 0.0, 60).rate(Outcome.PASS) > 0.85


def test_the_noise_is_what_it_says() -> None:
    """Standard deviation, correlation, drift and odd starts can be read off the launches."""
    rng = np.random.default_rng(3)
    plain = simulate.launches(Noise("", between=0.1), rng, 20_000, 2)
    assert plain.std() == pytest.approx(0.1, rel=0.03)
    tails = simulate.launches(Noise("", between=0.1, df=5.0), rng, 20_000, 2)
    assert tails.std() == pytest.approx(0.1, rel=0.1)
    following = simulate.launches(Noise("", between=0.1, ar1=0.6), rng, 20_000, 3)
    assert np.corrcoef(following[:, 1], following[:, 2])[0, 1] == pytest.approx(0.6, abs=0.03)
    assert following[:, 2].std() == pytest.approx(0.1, rel=0.03)
    drifting = simulate.launches(Noise("", between=0.0, drift=0.01), rng, 2, 5)
    assert drifting[:, -1] == pytest.approx([0.04, 0.04])
    odd = simulate.launches(Noise("", between=0.0, odd=0.25), rng, 20_000, 1)
    assert np.mean(odd > 0.9) == pytest.approx(0.25, abs=0.02)


def test_drift_cancels_over_the_coin_flips() -> None:
    """A drift moves blocks both ways, and their mean not at all."""
    noise = Noise("", between=0.0, within=0.0, drift=0.02)
    made = simulate.blocks(noise, 0.1, np.random.default_rng(2), 4000, 1)
    effects = (made[:, :, 1] - made[:, :, 0]).mean(axis=-1).ravel()
    assert sorted(set(effects.round(9))) == [0.08, 0.12]
    assert effects.mean() == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("name", ["decode_tps", "ttft_ms"])
def test_more_is_worse_in_either_direction(name: str) -> None:
    """A worsening lowers speed and raises latency."""
    metric = METRICS[name]
    block: Block = simulate.to_block(np.array([[0.0], [0.1]]), metric)
    assert (block.new[0] > block.base[0]) == (metric.better == "lower")


def test_the_same_seed_gives_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The table has a row for every noise and effect and is reproduced exactly."""
    arguments = ["--runs", "1", "--tolerance", "0.05", "--seed", "7"]
    assert simulate.main(arguments) == 0
    first = capsys.readouterr().out
    assert simulate.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) == 2 + len(NOISES) * len(simulate.effects_of(TOLERANCE))


def test_impossible_noise_is_refused() -> None:
    """A noise without a variance, or with impossible shares, is an error that names it."""
    for bad in ({"between": -1.0}, {"ar1": 1.0}, {"odd": 1.5}, {"df": 2.0}):
        with pytest.raises(ValueError, match="noise this one"):
            Noise("this one", **bad)
