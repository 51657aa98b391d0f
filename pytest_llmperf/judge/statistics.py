"""Distributions, moderated variances and effects on log values.

Everything here is a pure function. The distributions are written out because SciPy would be
a large dependency for three functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MIN_SD = 0.001
"""Smallest standard deviation of a log value that is believed.

Three equal values are no proof that there is no noise: clocks tick and sizes are rounded.
"""

MOST_FLIPPED = 12
"""Most effects whose signs are flipped one by one: 2^12 cases take well under a millisecond."""

_NORMAL = NormalDist()
_EPSILON = 1e-16
_TINY = 1e-300
_LARGE_DF = 1e4
# B_2, B_4, ..., B_14: coefficients of the asymptotic series of the polygamma functions.
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_SERIES_FROM = 20.0


# --- Student's t ------------------------------------------------------------------------------


def student_t_sf(t: float, df: float) -> float:
    """P(T > t) for Student's t.

    Args:
        t: Any number, infinite ones included.
        df: Degrees of freedom, > 0; ``math.inf`` is the normal distribution.

    Returns:
        The upper tail, to at least 1e-10 relative.

    Raises:
        ValueError: ``df`` is not positive or ``t`` is not a number.

    The regularised incomplete beta function I_x(df/2, 1/2) at x = df/(df + t²), halved:
    Abramowitz and Stegun 26.7.1. Above 10 000 degrees of freedom the normalising
    transformation of Hill (1970), CACM algorithm 395, whose error there is below 1e-15.
    """
    _check_df(df)
    if math.isnan(t):
        raise ValueError("t is not a number")
    if t < 0:
        return 1.0 - student_t_sf(-t, df)
    if math.isinf(t):
        return 0.0
    if df > _LARGE_DF:
        return 0.5 * math.erfc(_normalise(t, df) / math.sqrt(2))
    ratio = t * (t / df)
    if math.isinf(ratio):
        return 0.0
    # x and 1 - x apart, so that neither is lost where the other is close to 1.
    return 0.5 * _beta_regularised(df / 2, 0.5, 1 / (1 + ratio), ratio / (1 + ratio))


def student_t_pdf(t: float, df: float) -> float:
    """Density of Student's t at ``t``; ``df`` > 0, ``math.inf`` is the normal distribution."""
    _check_df(df)
    if math.isinf(df):
        return _NORMAL.pdf(t)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return math.exp(log_c - (df + 1) / 2 * math.log1p(t * t / df))


@functools.lru_cache(maxsize=4096)
def student_t_ppf(q: float, df: float) -> float:
    """The quantile t with P(T <= t) = q of Student's t.

    Args:
        q: Probability, 0 < q < 1.
        df: Degrees of freedom, > 0; ``math.inf`` is the normal distribution.

    Raises:
        ValueError: ``q`` or ``df`` is out of range.
    """
    _check_df(df)
    if not 0 < q < 1:
        raise ValueError(f"a probability must lie between 0 and 1, got {q}")
    if math.isinf(df):
        return _NORMAL.inv_cdf(q)
    if q == 0.5:  # noqa: PLR2004 - the median
        return 0.0
    return -_upper_quantile(q, df) if q < 0.5 else _upper_quantile(1 - q, df)  # noqa: PLR2004


def _upper_quantile(p: float, df: float) -> float:
    """The t > 0 with P(T > t) = p < 1/2, by Newton's method in log t, kept inside a bracket.

    In the tail log sf is nearly a straight line in log t, whatever ``df``.
    """
    target = math.log(p)
    low, high = 0.0, math.inf
    z = -_NORMAL.inv_cdf(p)
    # Two terms of the Cornish-Fisher expansion: near enough unless df is small.
    t = z + (z**3 + z) / (4 * df)
    for _ in range(200):
        tail = student_t_sf(t, df)
        if tail > p:
            low = t
        else:
            high = t
        step = (math.log(tail) - target) * tail / (t * student_t_pdf(t, df))
        following = t * math.exp(max(-3.0, min(3.0, step)))
        if not low <= following <= high:
            following = (low + high) / 2
        # Newton's method squares the error: after a step this small nothing is left of it.
        if abs(following - t) <= 1e-9 * t:
            return following
        t = following
    return t


def _normalise(t: float, df: float) -> float:
    a = df - 0.5
    z = math.sqrt(a * math.log1p(t * t / df)) if math.isfinite(df) else t
    return z + (z**3 + 3 * z) / (48 * a * a)


def _beta_regularised(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) with y = 1 - x given apart; DLMF 8.17.22."""
    if x <= 0:
        return 0.0
    if y <= 0:
        return 1.0
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    # log1p(-y) is exact where x is close to 1, log(x) where it is not.
    log_x = math.log1p(-y) if y < 0.5 else math.log(x)  # noqa: PLR2004 - the nearer end
    log_y = math.log1p(-x) if x < 0.5 else math.log(y)  # noqa: PLR2004 - the nearer end
    front = math.exp(a * log_x + b * log_y - log_beta)
    # The continued fraction converges fast on one side of the mean; the other is its mirror.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, y) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    c = 1.0
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + numerator * d)
            c = _away_from_zero(1 + numerator / c)
            value *= c * d
        if abs(c * d - 1) <= 2 * _EPSILON:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _check_df(df: float) -> None:
    if not df > 0:
        raise ValueError(f"degrees of freedom must be positive, got {df}")


# --- Polygamma functions ----------------------------------------------------------------------


def digamma(x: float) -> float:
    """The derivative of log Γ at x > 0 (DLMF 5.11.2 after 5.5.2)."""
    shifted, total = _shift(x, lambda y: -1 / y)
    total += math.log(shifted) - 1 / (2 * shifted)
    for k, b in enumerate(_BERNOULLI, start=1):
        total -= b / (2 * k * shifted ** (2 * k))
    return total


def trigamma(x: float) -> float:
    """The second derivative of log Γ at x > 0 (DLMF 5.15.8 after 5.15.5)."""
    shifted, total = _shift(x, lambda y: 1 / y**2)
    total += 1 / shifted + 1 / (2 * shifted**2)
    for k, b in enumerate(_BERNOULLI, start=1):
        total += b / shifted ** (2 * k + 1)
    return total


def _tetragamma(x: float) -> float:
    """The third derivative of log Γ at x > 0."""
    shifted, total = _shift(x, lambda y: -2 / y**3)
    total -= 1 / shifted**2 + 1 / shifted**3
    for k, b in enumerate(_BERNOULLI, start=1):
        total -= (2 * k + 1) * b / shifted ** (2 * k + 2)
    return total


def _shift(x: float, term: Callable[[float], float]) -> tuple[float, float]:
    """``x`` moved up to where the series holds, and the sum of the recurrence's terms."""
    if not x > 0:
        raise ValueError(f"polygamma functions are evaluated at positive numbers only, got {x}")
    total = 0.0
    while x < _SERIES_FROM:
        total += term(x)
        x += 1
    return x, total


def trigamma_inverse(x: float) -> float:
    """The y > 0 with trigamma(y) = x > 0.

    Newton's method on 1/trigamma, which is convex and nearly linear: Smyth (2004), appendix.

    Raises:
        ValueError: ``x`` is not positive and finite.
    """
    if not 0 < x < math.inf:
        raise ValueError(f"trigamma takes positive values only, got {x}")
    y = 0.5 + 1 / x
    for _ in range(200):
        value = trigamma(y)
        step = value * (1 - value / x) / _tetragamma(y)
        y += step
        if abs(step) <= 1e-15 * y:
            break
    return y


# --- Moderated variance -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known about a variance before the data in hand.

    Attributes:
        s0: Standard deviation of one log value (a launch, or a block's effect), > 0.
        d0: Degrees of freedom it is worth, >= 0; ``math.inf`` where all variances are equal.

    Raises:
        ValueError: A value out of range.
    """

    s0: float
    d0: float

    def __post_init__(self) -> None:
        if not 0 < self.s0 < math.inf:
            raise ValueError(f"prior: s0 must be positive and finite, got {self.s0}")
        if not self.d0 >= 0:
            raise ValueError(f"prior: d0 must not be negative, got {self.d0}")

    def to_json(self) -> dict[str, object]:
        """JSON values; an infinite ``d0`` is null, for which JSON has no number."""
        return {"s0": self.s0, "d0": self.d0 if math.isfinite(self.d0) else None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prior:
        """The prior that ``to_json`` wrote.

        Raises:
            KeyError: A missing value.
            ValueError: A value out of range.
        """
        return cls(float(data["s0"]), math.inf if data["d0"] is None else float(data["d0"]))


def moderate(s2: float, df: float, prior: Prior | None) -> tuple[float, float]:
    """A variance drawn towards a prior: (d0 s0² + df s²) / (d0 + df) and d0 + df.

    Smyth (2004), "Linear models and empirical Bayes methods". The result is never below
    ``MIN_SD`` squared.

    Args:
        s2: Variance of log values; not looked at when ``df`` is 0.
        df: Its degrees of freedom, >= 0.
        prior: None for the plain variance.

    Raises:
        ValueError: No degrees of freedom at all, or a negative number.
    """
    if df < 0 or (df > 0 and not s2 >= 0):
        raise ValueError(f"a variance and its degrees of freedom are not negative: {s2}, {df}")
    d0 = 0.0 if prior is None else prior.d0
    total = d0 + df
    if total == 0:
        raise ValueError("no degrees of freedom: give two launches or more, or a prior")
    if prior is None:
        moderated = s2
    elif math.isinf(d0):
        moderated = prior.s0**2
    else:
        moderated = (d0 * prior.s0**2 + (df * s2 if df > 0 else 0.0)) / total
    return max(moderated, MIN_SD**2), total


def fit_prior(variances: Sequence[float], dfs: Sequence[float]) -> Prior:
    """The prior under which these variances look like draws: Smyth (2004), section 6.2.

    Method of moments on log variances. With one variance nothing is known about how much
    they differ, so ``d0`` is 0; with variances that differ no more than chance makes them,
    ``d0`` is infinite.

    Args:
        variances: Variances of log values, one a config, of one metric on one machine.
        dfs: Degrees of freedom of each; those with 0 are left out.

    Raises:
        ValueError: Lengths differ, a negative or non-finite value, or nothing is left.
    """
    pairs = [(v, d) for v, d in zip(variances, dfs, strict=True) if d != 0]
    if not pairs:
        raise ValueError("a prior needs at least one variance with degrees of freedom")
    if not all(0 <= v < math.inf and 0 < d < math.inf for v, d in pairs):
        raise ValueError("variances and degrees of freedom must be finite and not negative")
    logs = [math.log(max(v, MIN_SD**2)) - digamma(d / 2) + math.log(d / 2) for v, d in pairs]
    n = len(logs)
    centre = math.fsum(logs) / n
    if n == 1:
        return Prior(math.exp(centre / 2), 0.0)
    spread = math.fsum((e - centre) ** 2 for e in logs) / (n - 1)
    excess = spread - math.fsum(trigamma(d / 2) for _, d in pairs) / n
    if excess <= 0:
        return Prior(math.exp(centre / 2), math.inf)
    half = trigamma_inverse(excess)
    return Prior(math.exp((centre + digamma(half) - math.log(half)) / 2), 2 * half)


# --- Effects ----------------------------------------------------------------------------------


def log_means(launches: Sequence[Sequence[float]]) -> Array:
    """One log value a launch: the median of the logs of its samples.

    The median, not the mean: one stalled request in a launch of five moves the mean by a fifth
    of the stall and the median hardly at all. Measured on a shared host, the sd of paired log
    ratios is 0.7-1.3 % robust and 4-5 % with the spikes.

    Args:
        launches: Positive samples of each launch, in the metric's unit.

    Returns:
        Array of shape ``(len(launches),)``.

    Raises:
        ValueError: A launch without samples, or a sample that has no logarithm.
    """
    return np.array([_median_log(launch) for launch in launches], dtype=np.float64)


def block_effect(base: Sequence[float], new: Sequence[float], *, paired: bool) -> float:
    """The log ratio new/base of one block.

    Args:
        base: Positive samples of the baseline build.
        new: Positive samples of the build under test.
        paired: Sample i of both answered the same prompt, one right after the other: the
            median of the paired log ratios. Otherwise the difference of the median logs.

    Raises:
        ValueError: No samples, a sample without a logarithm, or pairs that do not match.
    """
    if not paired:
        return _median_log(new) - _median_log(base)
    if len(base) != len(new):
        raise ValueError(f"paired samples must match: {len(base)} of base, {len(new)} of new")
    # The logs before the difference: the ratio of two extreme values may overflow.
    return float(np.median(_logs(new) - _logs(base)))


def sign_flip_p(effects: Sequence[float], margin: float = 0.0) -> float:
    """One-sided p value that the effects exceed ``margin``, by flipping their signs.

    Needs no variance and no normal distribution, only symmetry about the margin, which the
    coin-flipped order gives under ``margin`` 0. Never below ``2 ** -len(effects)``.

    Args:
        effects: Log effects, 1 to ``MOST_FLIPPED`` of them.
        margin: The log effect to exceed.

    Raises:
        ValueError: Too few or too many effects.
    """
    n = len(effects)
    if not 1 <= n <= MOST_FLIPPED:
        raise ValueError(f"signs of 1 to {MOST_FLIPPED} effects can be flipped, got {n}")
    excess = np.asarray(effects, dtype=np.float64) - margin
    sums = _signs(n) @ excess
    # Sums that differ only by rounding are ties, and ties count.
    slop = 1e-12 * float(np.abs(excess).sum())
    return float(np.mean(sums >= float(excess.sum()) - slop))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A log effect known up to noise.

    Attributes:
        effect: The log effect.
        se: Its standard error, > 0.
        df: Degrees of freedom of ``se``.
    """

    effect: float
    se: float
    df: float

    def statistic(self, margin: float) -> float:
        """The t statistic of the excess of the effect over ``margin``."""
        return (self.effect - margin) / self.se

    def p_above(self, margin: float) -> float:
        """One-sided p value of "the effect is at most ``margin``"; small: it is above."""
        return student_t_sf(self.statistic(margin), self.df)

    def p_below(self, margin: float) -> float:
        """One-sided p value of "the effect is at least ``margin``"; small: it is below."""
        return student_t_sf(-self.statistic(margin), self.df)

    def bounds(self, alpha: float) -> tuple[float, float]:
        """One-sided lower and upper bound, each missed with probability ``alpha``."""
        reach = student_t_ppf(1 - alpha, self.df) * self.se
        return self.effect - reach, self.effect + reach


def mean_estimate(effects: Sequence[float], prior: Prior | None) -> Estimate:
    """Mean of block effects with its moderated standard error.

    Raises:
        ValueError: Fewer than two effects and no prior.
    """
    values = np.asarray(effects, dtype=np.float64)
    n = len(values)
    s2, df = moderate(float(values.var(ddof=1)) if n > 1 else 0.0, n - 1, prior)
    return Estimate(float(values.mean()), math.sqrt(s2 / n), df)


def set_aside(values: Sequence[float], prior: Prior | None, alpha: float) -> tuple[int, ...]:
    """Which values are too far from the others to be of their kind.

    One start in forty runs at 40 % of its speed: an effect thirty standard deviations away,
    that moves a mean and its error out of all use. Such values are told by their distance from
    the others, with k of n values, fewer than a third, tested together so that they do not hide
    each other (after Rosner 1983, "Percentage points for a generalized ESD many-outlier
    procedure").

    For a value x and a set S of others, (x - mean of S) / (s̃ √(1 + 1/|S|)) with the moderated
    s̃ of S follows Student's t with d0 + |S| - 1 degrees of freedom. What may be tested are
    C(n, k) k such pairs for each k, and each gets an equal part of ``alpha``, so for normal
    values with the variance that the prior says, any is set aside with probability ``alpha`` at
    most. Of three values two odd ones would outvote the third, so none is set aside.

    Args:
        values: Log values.
        prior: What is known of their spread; None if nothing is.
        alpha: Probability that any of a set of equal kind is set aside, between 0 and 1.

    Returns:
        Indices, ascending; fewer than a third of all.
    """
    n = len(values)
    most = (n - 1) // 3
    if most <= 0:
        return ()
    centre = median(values)
    # The farthest first; equal distances in their own order, so that the answer is one.
    order = sorted(range(n), key=lambda i: -abs(values[i] - centre))
    for k in range(most, 0, -1):
        core = [values[i] for i in order[k:]]
        size = len(core)
        mean = math.fsum(core) / size
        s2 = math.fsum((v - mean) ** 2 for v in core) / (size - 1)
        moderated, df = moderate(s2, size - 1, prior)
        level = alpha / (most * math.comb(n, k) * k)
        # By the lower tail: 1 - level / 2 would lose the digits of a level this small.
        reach = -student_t_ppf(level / 2, df) * math.sqrt(moderated * (1 + 1 / size))
        if all(abs(values[i] - mean) > reach for i in order[:k]):
            return tuple(sorted(order[:k]))
    return ()


def difference_estimate(base: Array, new: Array, prior: Prior | None) -> Estimate:
    """Mean of ``new`` minus mean of ``base`` with its moderated standard error.

    The variance is pooled over both, so both builds are taken to be equally noisy.

    Raises:
        ValueError: An empty arm, or one value each and no prior.
    """
    k, n = len(base), len(new)
    if not k or not n:
        raise ValueError("both arms need at least one launch")
    df = k - 1 + n - 1
    squares = float(((base - base.mean()) ** 2).sum() + ((new - new.mean()) ** 2).sum())
    s2, total = moderate(squares / df if df else 0.0, df, prior)
    return Estimate(float(new.mean() - base.mean()), math.sqrt(s2 * (1 / k + 1 / n)), total)


def smallest(enough: Callable[[int], bool], start: int, limit: int) -> int | None:
    """Smallest n in start..limit with ``enough(n)``, which once true stays true; None if none."""
    low, high = start - 1, start
    while not enough(high):
        if high >= limit:
            return None
        low, high = high, min(limit, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _logs(samples: Sequence[float]) -> Array:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a launch without samples")
    if not bool(np.all(np.isfinite(values) & (values > 0))):
        raise ValueError("a sample that is not a positive number has no logarithm")
    result: Array = np.log(values)
    return result


def _median_log(samples: Sequence[float]) -> float:
    return float(np.median(_logs(samples)))


@functools.lru_cache(maxsize=MOST_FLIPPED)
def _signs(n: int) -> NDArray[Any]:
    """All rows of n signs, shape ``(2 ** n, n)``."""
    bits = (np.arange(2**n)[:, None] >> np.arange(n)[None, :]) & 1
    return 1.0 - 2.0 * bits
