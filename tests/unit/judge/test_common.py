"""What every way of comparing shares: how many units an open verdict asks for."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge._common import more_units, would_tell
from pytest_llmperf.judge.statistics import Estimate


@given(
    effect=st.floats(-0.2, 0.2),
    se=st.floats(1e-4, 0.1),
    units=st.integers(2, 60),
    alpha=st.sampled_from([0.001, 0.01, 0.05]),
)
def test_the_fewest_units_that_would_tell(
    effect: float, se: float, units: int, alpha: float
) -> None:
    """One unit less would not, and None means that the most would not either."""
    worse = Estimate(effect, se, units - 1.0)
    lack = more_units(worse, 0.05, alpha, units, 64)

    def tells(more: int) -> bool:
        return would_tell(worse, 0.05, alpha, more=more, shrink=math.sqrt(units / (units + more)))

    if lack is None:
        assert not tells(max(64 - units, 1))
    else:
        assert 1 <= lack <= max(64 - units, 1)
        assert tells(lack)
        assert lack == 1 or not tells(lack - 1)


@given(st.floats(0.0, 0.2), st.floats(0.01, 10.0))
def test_what_is_at_the_margin_never_tells(margin: float, se: float) -> None:
    """No number of units shows which side of the margin an effect on it lies."""
    worse = Estimate(margin, se, 5.0)
    assert more_units(worse, margin, 0.01, 6, 64) is None
