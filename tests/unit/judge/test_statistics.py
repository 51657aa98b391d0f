"""Distributions against tables and closed forms, estimators against their properties."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge import statistics
from pytest_llmperf.judge.statistics import (
    MIN_SD,
    Estimate,
    Prior,
    block_effect,
    difference_estimate,
    digamma,
    fit_prior,
    log_means,
    mean_estimate,
    moderate,
    set_aside,
    sign_flip_p,
    smallest,
    student_t_pdf,
    student_t_ppf,
    student_t_sf,
    trigamma,
    trigamma_inverse,
)

T_VALUES = st.floats(-60, 60)
DFS = st.floats(0.3, 1e7) | st.just(math.inf)
SAMPLES = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9)
EFFECTS = st.lists(st.floats(-1, 1), min_size=1, max_size=9)


def _closed_form(t: float, df: int) -> float:
    """The upper tail for the degrees of freedom that have an elementary one."""
    u = t / math.sqrt(df)
    if df == 1:
        return 0.5 - math.atan(t) / math.pi
    if df == 2:
        return 0.5 - t / (2 * math.sqrt(2 + t * t))
    if df == 3:
        return 0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi
    return 0.5 - 3 / 8 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (12 * (1 + t * t / 4)))


@given(st.floats(-40, 40), st.sampled_from([1, 2, 3, 4]))
def test_sf_has_the_closed_forms(t: float, df: int) -> None:
    """For 1 to 4 degrees of freedom the tail is an elementary function."""
    assert student_t_sf(t, df) == pytest.approx(_closed_form(t, df), abs=1e-13)


@pytest.mark.parametrize(
    ("q", "df", "t"),
    [
        (0.95, 1, 6.313751514675043),
        (0.975, 2, 4.302652729911275),
        (0.99, 4, 3.746947387979197),
        (0.975, 10, 2.228138851964939),
        (0.995, 30, 2.749995653567231),
        (0.975, 100, 1.983971518523552),
        (0.99, math.inf, 2.326347874040841),
    ],
)
def test_ppf_has_the_table_values(q: float, df: float, t: float) -> None:
    """Quantiles agree with published tables to 1e-10."""
    assert student_t_ppf(q, df) == pytest.approx(t, rel=1e-10)
    assert student_t_ppf(1 - q, df) == pytest.approx(-t, rel=1e-10)


@pytest.mark.parametrize("df", [0.5, 5.0, 7.5, 40.0, 900.0, 9999.0, 10001.0, 2e5])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 6.0])
def test_sf_is_the_integral_of_the_density(t: float, df: float) -> None:
    """Half less the area from 0 to t, by Gauss-Legendre quadrature, is the tail."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    points = (nodes + 1) * t / 2
    # Γ(df/2 + 1/2) / Γ(df/2) by its series: the difference of two lgamma loses digits.
    a = df / 2
    if df > 100:
        log_ratio = math.log(a) / 2 - 1 / (8 * a) + 1 / (192 * a**3)
    else:
        log_ratio = math.lgamma(a + 0.5) - math.lgamma(a)
    density = np.exp(log_ratio - (df + 1) / 2 * np.log1p(points**2 / df))
    area = float(weights @ density) * t / 2 / math.sqrt(df * math.pi)
    assert student_t_sf(t, df) == pytest.approx(0.5 - area, abs=1e-11)


@pytest.mark.parametrize("t", [0.01, 0.7, 2.0, 5.0, 12.0])
def test_both_ways_to_the_tail_meet(t: float) -> None:
    """The beta fraction and the normalising transformation agree where one hands over."""
    df = 10_000.0
    fraction = student_t_sf(t, df)
    transformed = 0.5 * math.erfc(statistics._normalise(t, df) / math.sqrt(2))
    assert transformed == pytest.approx(fraction, rel=1e-10)


@given(T_VALUES, DFS)
def test_sf_is_symmetric_and_a_probability(t: float, df: float) -> None:
    """The tails above t and below t sum to one, and neither leaves 0..1."""
    upper = student_t_sf(t, df)
    assert 0 <= upper <= 1
    assert upper + student_t_sf(-t, df) == pytest.approx(1, abs=1e-15)


@given(st.floats(-30, 30), st.floats(1e-3, 5), DFS)
def test_sf_falls(t: float, step: float, df: float) -> None:
    """A larger statistic never has a larger p value."""
    assert student_t_sf(t + step, df) <= student_t_sf(t, df)


@given(st.floats(1e-6, 1 - 1e-6), DFS)
def test_ppf_inverts_sf(q: float, df: float) -> None:
    """The tail beyond the q quantile is 1 - q."""
    assert student_t_sf(student_t_ppf(q, df), df) == pytest.approx(1 - q, rel=1e-9, abs=1e-12)


def test_infinite_df_is_the_normal_distribution() -> None:
    """With infinite degrees of freedom t is normal, with very many nearly so."""
    normal = NormalDist()
    assert student_t_sf(1.7, math.inf) == pytest.approx(1 - normal.cdf(1.7), rel=1e-13)
    assert student_t_sf(1.7, 1e12) == pytest.approx(1 - normal.cdf(1.7), rel=1e-10)
    assert student_t_pdf(0.3, math.inf) == pytest.approx(normal.pdf(0.3), rel=1e-14)


def test_extremes_of_t() -> None:
    """Infinite and enormous statistics have the tails they must have."""
    assert student_t_sf(math.inf, 3) == 0
    assert student_t_sf(-math.inf, 3) == 1
    assert student_t_sf(1e300, 3) == 0
    assert student_t_sf(0, 3) == pytest.approx(0.5, abs=1e-15)
    assert student_t_ppf(0.5, 3) == 0


@pytest.mark.parametrize("df", [0, -1, math.nan])
def test_df_must_be_positive(df: float) -> None:
    """Degrees of freedom that mean nothing are refused."""
    with pytest.raises(ValueError, match="degrees of freedom"):
        student_t_sf(1, df)


def test_arguments_out_of_range() -> None:
    """What is no number or no probability is refused."""
    with pytest.raises(ValueError, match="not a number"):
        student_t_sf(math.nan, 3)
    for q in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            student_t_ppf(q, 3)
    for x in (0, -1, math.inf):
        with pytest.raises(ValueError, match="positive values"):
            trigamma_inverse(x)
    with pytest.raises(ValueError, match="positive numbers"):
        digamma(0)


def test_polygamma_at_known_points() -> None:
    """Both functions at 1 and 1/2, and the third derivative at 1, have known values."""
    gamma, zeta_3 = 0.5772156649015328606, 1.2020569031595942854
    assert digamma(1) == pytest.approx(-gamma, rel=1e-14)
    assert digamma(0.5) == pytest.approx(-gamma - 2 * math.log(2), rel=1e-14)
    assert trigamma(1) == pytest.approx(math.pi**2 / 6, rel=1e-14)
    assert trigamma(0.5) == pytest.approx(math.pi**2 / 2, rel=1e-14)
    assert statistics._tetragamma(1) == pytest.approx(-2 * zeta_3, rel=1e-13)


@given(st.floats(1e-4, 1e6))
def test_polygamma_recurrence(x: float) -> None:
    """ψ(x + 1) = ψ(x) + 1/x and ψ'(x + 1) = ψ'(x) - 1/x²."""
    assert digamma(x + 1) == pytest.approx(digamma(x) + 1 / x, rel=1e-11, abs=1e-11)
    assert trigamma(x) == pytest.approx(trigamma(x + 1) + 1 / x**2, rel=1e-11)


@given(st.floats(1e-6, 1e8))
def test_trigamma_inverse(x: float) -> None:
    """Trigamma of its inverse is where one started."""
    assert trigamma(trigamma_inverse(x)) == pytest.approx(x, rel=1e-10)


def test_fit_prior_recovers_what_made_the_variances() -> None:
    """From many variances with 5 degrees of freedom s0 and d0 come back."""
    rng = np.random.default_rng(7)
    true = Prior(0.02, 6.0)
    sigma2 = true.s0**2 * true.d0 / rng.chisquare(true.d0, 20_000)
    variances = sigma2 * rng.chisquare(5, 20_000) / 5
    fitted = fit_prior(variances.tolist(), [5.0] * 20_000)
    assert fitted.s0 == pytest.approx(true.s0, rel=0.02)
    assert fitted.d0 == pytest.approx(true.d0, rel=0.08)


def test_fit_prior_of_equal_variances() -> None:
    """Variances that differ less than chance makes them have an infinitely strong prior."""
    assert math.isinf(fit_prior([4e-4, 4e-4, 4e-4], [5, 5, 5]).d0)


def test_fit_prior_of_one_variance() -> None:
    """One variance says nothing about how much variances differ."""
    assert fit_prior([4e-4, 9.0], [5, 0]).d0 == 0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 30)), min_size=2, max_size=8),
    st.floats(0.5, 2),
)
def test_fit_prior_scales(pairs: list[tuple[float, int]], factor: float) -> None:
    """With all deviations scaled, s0 scales with them and d0 stays."""
    variances = [max(v, (2 * MIN_SD) ** 2) for v, _ in pairs]
    dfs = [d for _, d in pairs]
    plain = fit_prior(variances, dfs)
    scaled = fit_prior([v * factor**2 for v in variances], dfs)
    assert scaled.s0 == pytest.approx(plain.s0 * factor, rel=1e-6)
    # Where the excess variance is a rounding error d0 is huge, and infinite as well.
    assert scaled.d0 == pytest.approx(plain.d0, rel=1e-6) or min(scaled.d0, plain.d0) > 1e6


def test_fit_prior_refuses_nonsense() -> None:
    """No variances, negative ones and infinite ones make no prior."""
    for variances, dfs in (([], []), ([1.0], [0]), ([-1.0], [2]), ([math.inf], [2])):
        with pytest.raises(ValueError, match="varianc"):
            fit_prior(variances, dfs)
    with pytest.raises(ValueError, match="shorter"):
        fit_prior([1.0, 2.0], [1])


def test_prior_is_checked() -> None:
    """A prior with no spread, or less than no weight, is refused."""
    for s0, d0 in ((0, 1), (-1, 1), (math.inf, 1), (0.1, -1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="prior: "):
            Prior(s0, d0)
    assert Prior(0.1, math.inf).to_json() == {"s0": 0.1, "d0": None}


@given(st.floats(1e-5, 1), st.integers(1, 50), st.floats(0.01, 1), st.floats(0, 1e6))
def test_moderated_variance_lies_between(s2: float, df: int, s0: float, d0: float) -> None:
    """Moderation draws the variance towards the prior and adds the degrees of freedom."""
    moderated, total = moderate(s2, df, Prior(s0, d0))
    assert total == d0 + df
    low, high = sorted((s2, s0**2))
    assert low * (1 - 1e-12) <= moderated <= high * (1 + 1e-12)


def test_moderation_at_its_ends() -> None:
    """An infinite prior wins, no prior changes nothing, no data leaves the prior."""
    assert moderate(4.0, 3, Prior(0.5, math.inf)) == (0.25, math.inf)
    assert moderate(4.0, 3, None) == (4.0, 3)
    assert moderate(0.0, 0, Prior(0.5, 4)) == (0.25, 4)
    assert moderate(0.0, 3, None) == (MIN_SD**2, 3)
    with pytest.raises(ValueError, match="no degrees of freedom"):
        moderate(0.0, 0, None)
    with pytest.raises(ValueError, match="not negative"):
        moderate(-1.0, 2, None)


def test_log_means_shrug_off_one_spike() -> None:
    """One stalled request does not move the value of its launch."""
    assert log_means([[100, 100, 10, 100, 100]]).tolist() == [math.log(100)]


def test_log_means_need_logarithms() -> None:
    """A launch without samples, and a sample that is not a positive number, are refused."""
    for launch in ([], [0.0], [-1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="sample"):
            log_means([[1.0], launch])


@given(SAMPLES, SAMPLES)
def test_swapping_the_arms_negates_the_effect(base: list[float], new: list[float]) -> None:
    """The effect of new over base is minus that of base over new, paired or not."""
    size = min(len(base), len(new))
    assert block_effect(new, base, paired=False) == -block_effect(base, new, paired=False)
    paired = block_effect(base[:size], new[:size], paired=True)
    assert block_effect(new[:size], base[:size], paired=True) == pytest.approx(-paired, abs=1e-15)


@given(SAMPLES, SAMPLES, st.floats(1e-3, 1e3))
def test_scaling_both_arms_changes_nothing(
    base: list[float], new: list[float], factor: float
) -> None:
    """The effect is a ratio: the unit does not matter."""
    size = min(len(base), len(new))
    for paired in (True, False):
        one = block_effect(base[:size], new[:size], paired=paired)
        other = block_effect(
            [factor * v for v in base[:size]], [factor * v for v in new[:size]], paired=paired
        )
        assert other == pytest.approx(one, abs=1e-9)


def test_pairs_cancel_what_prompts_differ_in() -> None:
    """Paired samples give the common ratio exactly, however much the prompts differ."""
    base, new = [1.0, 50.0, 900.0], [1.1, 55.0, 990.0]
    assert block_effect(base, new, paired=True) == pytest.approx(math.log(1.1), abs=1e-12)
    with pytest.raises(ValueError, match="paired samples must match"):
        block_effect([1.0], [1.0, 2.0], paired=True)


@given(EFFECTS, st.floats(-0.5, 0.5))
def test_sign_flip_p_is_attainable(effects: list[float], margin: float) -> None:
    """The p value is a multiple of 2^-n, at least that, and at most 1."""
    p = sign_flip_p(effects, margin)
    cases = 2 ** len(effects)
    assert 1 / cases <= p <= 1
    assert p * cases == round(p * cases)


def test_sign_flip_p_reaches_its_minimum() -> None:
    """Effects that are all above the margin have the smallest p value there is."""
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4]) == 1 / 16
    assert sign_flip_p([-0.1, -0.2]) == 1
    for effects in ([], [0.1] * 13):
        with pytest.raises(ValueError, match="can be flipped"):
            sign_flip_p(effects)


@given(st.floats(-1, 1), st.floats(1e-3, 1), DFS, st.floats(0.001, 0.4), st.floats(-1, 1))
def test_bounds_and_p_values_agree(
    effect: float, se: float, df: float, alpha: float, margin: float
) -> None:
    """The lower bound is above the margin just when the p value is below alpha."""
    estimate = Estimate(effect, se, df)
    low, high = estimate.bounds(alpha)
    p = estimate.p_above(margin)
    assert low <= effect <= high
    assert p + estimate.p_below(margin) == pytest.approx(1)
    if abs(p - alpha) > 1e-9:
        assert (low > margin) == (p < alpha)


def test_mean_estimate_is_the_plain_one_without_prior() -> None:
    """Mean, standard error and degrees of freedom as in any textbook."""
    estimate = mean_estimate([0.1, 0.2, 0.3], None)
    assert estimate.effect == pytest.approx(0.2)
    assert estimate.se == pytest.approx(0.1 / math.sqrt(3))
    assert estimate.df == 2


def test_one_block_stands_on_the_prior() -> None:
    """A single effect has the prior's spread, and cannot be judged without a prior."""
    assert mean_estimate([0.3], Prior(0.025, 4)) == Estimate(0.3, 0.025, 4)
    with pytest.raises(ValueError, match="no degrees of freedom"):
        mean_estimate([0.3], None)


def test_difference_estimate_pools_both_arms() -> None:
    """The variance comes from both arms: K - 1 + L - 1 degrees of freedom."""
    estimate = difference_estimate(np.array([0.0, 0.2]), np.array([1.0, 1.2, 1.4]), None)
    assert estimate.df == 3
    assert estimate.effect == pytest.approx(1.1)
    assert estimate.se == pytest.approx(math.sqrt((0.02 + 0.08) / 3 * (1 / 2 + 1 / 3)))
    with pytest.raises(ValueError, match="at least one launch"):
        difference_estimate(np.array([]), np.array([1.0]), None)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 60))
def test_smallest_finds_the_first(start: int, threshold: int, more: int) -> None:
    """Galloping and halving end at the first size that is enough, or at None."""
    limit = start + more
    expected = max(start, threshold)
    found = smallest(lambda n: n >= threshold, start, limit)
    assert found == (expected if expected <= limit else None)


@given(st.lists(st.floats(-1, 1), max_size=10), st.floats(-3, 3))
def test_set_aside_is_a_minority(values: list[float], shift: float) -> None:
    """Fewer than a third, mirrored values alike, and a common shift changes nothing that counts."""
    odd = set_aside(values, Prior(0.025, 4), 2e-4)
    assert 3 * len(odd) < max(len(values), 1)
    assert set_aside([-v for v in values], Prior(0.025, 4), 2e-4) == odd
    assert len(set_aside([v + shift for v in values], Prior(1e9, 4), 2e-4)) == 0


def test_set_aside_finds_odd_ones() -> None:
    """One or two far ones are found, which do not hide each other; ordinary spread stays."""
    prior = Prior(0.025, 4)
    assert set_aside([0.0, 0.9], prior, 2e-4) == ()
    assert set_aside([0.0, 0.9, 0.9], prior, 2e-4) == ()
    assert set_aside([0.0, 0.9, 0.02, 0.0], prior, 2e-4) == (1,)
    assert set_aside([0.9, 0.01, 0.0, 0.92, -0.02, 0.0, 0.01], prior, 2e-4) == (0, 3)
    assert set_aside([0.06, 0.01, 0.0, -0.05, -0.02], prior, 2e-4) == ()
    assert set_aside([0.0, 0.9, 0.02, 0.0], None, 2e-4) == ()


def test_set_aside_is_rarely_wrong() -> None:
    """Of values whose spread the prior describes hardly any are set aside."""
    rng = np.random.default_rng(4)
    runs, alpha, d0 = 2000, 0.02, 4.0
    sds = 0.025 * np.sqrt(d0 / rng.chisquare(d0, runs))
    wrong = sum(
        bool(set_aside(rng.normal(0, sd, 6).tolist(), Prior(0.025, d0), alpha)) for sd in sds
    )
    assert wrong <= alpha * runs
