"""What a calibration says of the blocks that it has."""

from __future__ import annotations

from pytest_llmperf.cli.calibrate import Measured, report
from pytest_llmperf.judge.priors import Priors
from pytest_llmperf.judge.side_by_side import Block


def kept(level: float, ratio: float, count: int = 12) -> list[Measured]:
    """Return blocks whose starts scatter by a tenth, the same on both sides of a block."""
    found = []
    for number in range(count):
        speed = 100.0 + 10 * (number % 2)
        block = Block((speed,) * 3, (speed * ratio,) * 3, paired=True, order="bnb")
        found.append(Measured("cpu", level, "short", "decode_tps", block, 1.0))
    return found


def test_a_gate_without_statistics_is_told_once_a_tolerance() -> None:
    """Not with each way of replaying, which it has nothing to do with; nor of slower builds."""
    lines = report([*kept(0.0, 1.0), *kept(0.1, 0.9)], (0.03, 0.05), Priors(), 5)
    naive = [line for line in lines if "compares medians" in line]
    assert len(naive) == 2
    assert "tolerance 3 %, would fail" in naive[0]
    assert "tolerance 5 %, would fail" in naive[1]


def test_without_equal_builds_nothing_is_told_of_such_a_gate() -> None:
    """There is nothing to be wrong about."""
    assert not [line for line in report(kept(0.1, 0.9), (0.03,), Priors(), 5) if "medians" in line]
