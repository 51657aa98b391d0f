"""The rule that blocks and launches share: what is spent, and when it ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.sequential import ODD_SHARE, Alphas, Plan, parts

ALPHAS = st.floats(1e-4, 0.4)


def plan_of(  # noqa: PLR0917 - drawn one by one
    first: int,
    more: int,
    confirm: int,
    screen_alpha: float,
    confirm_alpha: float,
    pass_alpha: float,
) -> Plan:
    """A plan with these numbers."""
    return Plan(
        first_screen=first,
        first_pass=first,
        max_screen=first + more,
        first_confirm=1,
        max_confirm=confirm,
        screen_alpha=screen_alpha,
        confirm_alpha=confirm_alpha,
        pass_alpha=pass_alpha,
        shared_base=False,
    )


PLANS = st.builds(
    plan_of, st.integers(1, 4), st.integers(0, 20), st.integers(1, 20), ALPHAS, ALPHAS, ALPHAS
)


@given(ALPHAS, st.integers(1, 60), st.floats(-2, 2))
def test_parts_add_up(alpha: float, looks: int, power: float) -> None:
    """However they are shared out, the parts are positive and make up the whole."""
    shared = parts(alpha, looks, power)
    assert len(shared) == looks
    assert min(shared) > 0
    assert sum(shared) == pytest.approx(alpha)


@given(PLANS)
def test_no_more_is_spent_than_stated(plan: Plan) -> None:
    """Over all looks at which a claim can be made, its parts add up to its probability."""
    screening = range(plan.first_screen, plan.max_screen + 1)
    assert sum(map(plan.screen_part, screening)) == pytest.approx(plan.screen_alpha)
    confirming = range(plan.first_confirm, plan.max_confirm + 1)
    assert sum(map(plan.confirm_part, confirming)) == pytest.approx(plan.confirm_alpha)
    pools = range(plan.first_pass, plan.most_units + 1)
    assert sum(map(plan.pass_part, pools)) == pytest.approx(plan.pass_alpha)
    assert plan.false_regression_bound == plan.screen_alpha * plan.confirm_alpha


@given(ALPHAS, ALPHAS)
def test_setting_aside_is_paid_for(slower: float, within: float) -> None:
    """What a look spends on its claim and on setting aside is no more than its part."""
    both = Alphas.of(slower, within)
    assert both.slower is not None
    assert both.within is not None
    assert both.slower + both.odd <= slower * (1 + 1e-12)
    assert both.within + both.odd <= within * (1 + 1e-12)
    assert both.odd == pytest.approx(ODD_SHARE * min(slower, within))
    assert Alphas.of(slower, None).within is None


@pytest.mark.parametrize("name", ["first_screen", "first_pass", "first_confirm"])
def test_numbers_are_checked(name: str) -> None:
    """A plan that could not end is refused."""
    numbers = {
        "first_screen": 1,
        "first_pass": 1,
        "max_screen": 3,
        "first_confirm": 1,
        "max_confirm": 3,
    }
    with pytest.raises(ValueError, match=f"{name} must lie between 1 and"):
        Plan(
            **(numbers | {name: 4}),
            screen_alpha=0.1,
            confirm_alpha=0.1,
            pass_alpha=0.1,
            shared_base=False,
        )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_alphas_are_checked(alpha: float) -> None:
    """A probability that bounds nothing is refused."""
    with pytest.raises(ValueError, match="confirm_alpha must lie"):
        plan_of(1, 1, 1, 0.1, alpha, 0.1)
