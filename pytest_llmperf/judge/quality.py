"""Quality by chunk: two passes over the same tokens, compared chunk by chunk.

Tokens of one text depend on each other, so the chunk is the unit. What makes chunks hard or easy is
the same on both sides and cancels, because the chunks of both are the same tokens.

Which difference, by metric:

``ppl``        of the mean negative log-likelihoods; the margin is ln(1 + tolerance)
``kld_mean``   of the mean divergences from the reference, in nat; the margin is the tolerance as a
               share of the baseline's value, and the metric's slack at least: a baseline that
               is its own reference diverges by nothing, and a share of nothing allows nothing
``same_top``   of the shares of tokens with the same likeliest successor, in percent; likewise
``kld_p999``   of the percentiles of the divergences of all tokens, in nat; likewise

A mean is judged with Student's t on one difference a chunk. A percentile is none of one chunk: its
bounds are those of a bootstrap by chunk (Efron and Tibshirani 1993, "An Introduction to the
Bootstrap", chapter 13). Chunks are drawn with replacement, the same for both sides, and each side's
percentile of the drawn pass is taken from the largest divergences of its chunks. The quantiles of
the bootstrap are too near for few chunks, as its variance is that of n, not n - 1, and as it takes
its own spread for the true one: their distance from its median is multiplied by
sqrt(n / (n - 1)) t(n - 1) / z, which for normal values gives Student's interval (Hesterberg 2015,
"What Teachers Should Know About the Bootstrap", The American Statistician 69, 371-386, has the
same correction as an expanded percentile interval). The draws are the same every time, so a verdict
can be computed again.

A budget bounds the value itself, whatever the baseline: the value's upper bound must not exceed it.

Every claim is one-sided. PASS, and being within a budget, may be wrong with probability ``ALPHA``.
REGRESSION, IMPROVED and being beyond a budget take ``REGRESSION_ALPHA``: a pass is made once, so a
REGRESSION is not confirmed on fresh data as one of speed is, and one look has to be as sure as both
of those together. With a budget there are two ways to a REGRESSION, and its bound is twice that.

Of two thousand passes drawn, two lie beyond a quantile of 0.1 %: too few to place it. So the bounds
at ``REGRESSION_ALPHA`` are those at ``ALPHA``, beyond which twenty lie, stretched further about the
median, by the ratio of Student's quantiles, t(n - 1) at 99.9 % and at 99 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.judge._common import (
    BEYOND,
    STALE,
    Draft,
    finding,
    margin_of,
    more_units,
    percent,
    plural,
    relative,
    sign,
    slack_text,
)
from pytest_llmperf.judge.chunks import (
    BY_CHUNK,
    QUALITY,
    Chunks,
    Tail,
    check_quality,
    complaint,
    logs,
    pooled,
)
from pytest_llmperf.judge.decide import failed
from pytest_llmperf.judge.statistics import Array, Estimate, student_t_ppf
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import FEWEST_CHUNKS, Metric

__all__ = [
    "ALPHA",
    "BY_CHUNK",
    "FEWEST_CHUNKS",
    "QUALITY",
    "REGRESSION_ALPHA",
    "compare_chunks",
    "compare_quality",
    "compare_tails",
    "pooled",
    "within_budget",
]

ALPHA = 0.01
"""Chance at most that a PASS is wrong, and each end of the interval shown."""

REGRESSION_ALPHA = 0.001
"""Chance at most that a REGRESSION is wrong, and likewise IMPROVED."""

RESAMPLES = 2000
"""Passes drawn for a percentile: twenty of them lie beyond each bound."""

SEED = 1
"""Of the draws, which are the same for every verdict on as many chunks."""

_MOST_CHUNKS = 4096
# Chunks that agree to the last bit still leave the rounding of a log of 16-bit values.
_LEAST_SD = 1e-7
# Entries of an array of resamples by listed tokens: 8 MiB.
_BATCH = 1 << 20
# The others fail already, or nothing was to be judged.
_COMPARED = frozenset({Outcome.PASS, Outcome.IMPROVED, Outcome.INCONCLUSIVE, Outcome.REGRESSION})


@dataclass(frozen=True, slots=True)
class _Bounds:
    """One-sided lower and upper bounds of one quantity.

    Attributes:
        usual: Each missed with probability ``ALPHA``.
        sure: Each missed with probability ``REGRESSION_ALPHA``.
    """

    usual: tuple[float, float]
    sure: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What two passes show, oriented so that positive is worse; a perplexity as its logarithm.

    Attributes:
        worse: By how much the build under test is worse.
        bounds: Bounds of that.
        value: Bounds of the build's own value.
    """

    worse: Estimate
    bounds: _Bounds
    value: _Bounds


def compare_quality(
    metric: Metric,
    base: Chunks,
    new: Chunks,
    *,
    tokens: int,
    tolerance: float,
    budget: float | None = None,
) -> Verdict:
    """Judge two passes over the same tokens, whatever the metric.

    Args:
        metric: One of ``QUALITY``.
        base: The values of each chunk on the baseline, in the metric's unit, as
            :mod:`pytest_llmperf.judge.chunks` has them.
        new: The same of the build under test, in the same order.
        tokens: Scored tokens of one chunk; of no matter to means.
        tolerance: Relative change for the worse that is allowed.
        budget: Value that must not be exceeded, whatever the baseline; None for none.

    Returns:
        The verdict; ERROR where the chunks do not match or a value cannot be used.

    Raises:
        ValueError: A metric that is not judged by chunk, or a tolerance out of range.
    """
    check_quality(metric)
    if metric.name not in BY_CHUNK:
        return compare_tails(metric, base, new, tokens=tokens, tolerance=tolerance, budget=budget)
    margin_of(tolerance)
    if wrong := _unusable(metric, base, new, tokens):
        return failed(metric, wrong)
    means = ([chunk[0] for chunk in side] for side in (base, new))
    return compare_chunks(metric, *means, tolerance=tolerance, budget=budget)


def compare_chunks(
    metric: Metric,
    base: Sequence[float],
    new: Sequence[float],
    *,
    tolerance: float,
    budget: float | None = None,
) -> Verdict:
    """Judge the means of chunks of two passes over the same tokens.

    Args:
        metric: One of ``BY_CHUNK``.
        base: Value of each chunk on the baseline, in the metric's unit.
        new: The same of the build under test, in the same order.
        tolerance: Relative change for the worse that is allowed.
        budget: Value that the mean must not be worse than, whatever the baseline; None for none.

    Returns:
        The verdict; ERROR where the chunks do not match or a value cannot be used.

    Raises:
        ValueError: A metric that is no mean over chunks, or a tolerance out of range.
    """
    if metric.name not in BY_CHUNK:
        raise ValueError(f"{metric.name} is not a mean over chunks")
    margin_of(tolerance)
    lists = [[value] for value in base], [[value] for value in new]
    if wrong := _unusable(metric, *lists, 1):
        return failed(metric, wrong)
    in_logs = metric.name == "ppl"
    before, after = (logs(values) if in_logs else np.asarray(values) for values in (base, new))
    worse = _mean(sign(metric) * (after - before))
    seen = _Seen(worse, _around(worse), _around(_mean(sign(metric) * after)))
    evidence: dict[str, object] = {
        "base_chunks": [float(v) for v in base],
        "new_chunks": [float(v) for v in new],
    }
    return _judged(metric, lists, 1, seen, tolerance, budget, evidence)


def compare_tails(
    metric: Metric,
    base: Chunks,
    new: Chunks,
    *,
    tokens: int,
    tolerance: float,
    budget: float | None = None,
) -> Verdict:
    """Judge the 99.9 % percentiles of the tokens of two passes over the same tokens.

    Args:
        metric: ``kld_p999``.
        base: The largest divergences of each chunk on the baseline, nats, as
            :func:`pytest_llmperf.quality.divergence.tails_by_chunk` gives them.
        new: The same of the build under test, for the chunks in the same order.
        tokens: Scored tokens of one chunk.
        tolerance: Relative change for the worse that is allowed.
        budget: Value that the percentile must not exceed, whatever the baseline; None for none.

    Returns:
        The verdict; ERROR where the chunks do not match or a value cannot be used.

    Raises:
        ValueError: A metric that is no percentile of tokens, or a tolerance out of range.
    """
    check_quality(metric)
    if metric.name in BY_CHUNK:
        raise ValueError(f"{metric.name} is a mean over chunks, not a percentile of tokens")
    margin_of(tolerance)
    if wrong := _unusable(metric, base, new, tokens):
        return failed(metric, wrong)
    n = len(base)
    # A divergence is worse where it is larger, so nothing has to be turned about here.
    before, after = (pooled(metric, side, tokens) for side in (base, new))
    drawn_base, drawn_new = _resampled(n, Tail(base, tokens), Tail(new, tokens))
    bounds = _bootstrapped(drawn_new - drawn_base, after - before, n)
    low, high = bounds.usual
    se = max((high - low) / 2 / student_t_ppf(1 - ALPHA, n - 1), _LEAST_SD / math.sqrt(n))
    worse = Estimate(after - before, se, float(n - 1))
    seen = _Seen(worse, bounds, _bootstrapped(drawn_new, after, n))
    evidence: dict[str, object] = {
        "base_chunks": [[float(v) for v in chunk] for chunk in base],
        "new_chunks": [[float(v) for v in chunk] for chunk in new],
        "tokens": tokens,
        "resamples": RESAMPLES,
        "seed": SEED,
        "bounds": [low, high],
        "regression_bounds": list(bounds.sure),
    }
    return _judged(metric, (base, new), tokens, seen, tolerance, budget, evidence)


def within_budget(
    verdict: Verdict, metric: Metric, chunks: Chunks, *, tokens: int, budget: float | None
) -> Verdict:
    """Hold a verdict that was reached without chunks of a baseline against a budget.

    Args:
        verdict: What a published figure, or the lack of one, led to.
        metric: One of ``QUALITY``.
        chunks: The values of each chunk of the build under test, in the metric's unit, as
            :mod:`pytest_llmperf.judge.chunks` has them.
        tokens: Scored tokens of one chunk; of no matter to means.
        budget: Value that must not be exceeded, whatever the baseline; None for none.

    Returns:
        The worse of the two outcomes: REGRESSION where the value is beyond the budget,
        INCONCLUSIVE where it is not shown to be within, else that of ``verdict``. ERROR where the
        chunks cannot be used. Without a budget, and where ``verdict`` is ERROR, MISSING,
        INCOMPARABLE or RECORDED, it is returned as it is.

    Raises:
        ValueError: A metric that is not judged by chunk.
    """
    check_quality(metric)
    if budget is None or verdict.outcome not in _COMPARED:
        return verdict
    if wrong := _few(len(chunks)) or complaint(metric, chunks, tokens):
        return failed(metric, f"{metric.name} cannot be held against its budget: {wrong}")
    judged = verdict.outcome, verdict.reason
    outcome, reason = _budgeted(metric, _value(metric, chunks, tokens), budget, judged)
    # What a published figure says has no error rate of its own.
    evidence = {
        **verdict.evidence,
        "alpha": ALPHA,
        "regression_alpha": REGRESSION_ALPHA,
        "false_regression_bound": REGRESSION_ALPHA,
        "budget": budget,
        "new_chunks": [[float(v) for v in chunk] for chunk in chunks],
        "tokens": tokens,
    }
    new = pooled(metric, chunks, tokens) if verdict.new is None else verdict.new
    return replace(verdict, outcome=outcome, reason=reason, new=new, evidence=evidence)


def _value(metric: Metric, chunks: Chunks, tokens: int) -> _Bounds:
    """Bounds of the value of a pass, oriented so that positive is worse."""
    if metric.name not in BY_CHUNK:
        found = pooled(metric, chunks, tokens)
        (drawn,) = _resampled(len(chunks), Tail(chunks, tokens))
        return _bootstrapped(drawn, found, len(chunks))
    means = [chunk[0] for chunk in chunks]
    return _around(_mean(sign(metric) * (logs(means) if metric.name == "ppl" else np.array(means))))


def _few(chunks: int) -> str:
    """That there are too few chunks; "" if there are enough."""
    if chunks >= FEWEST_CHUNKS:
        return ""
    return f"{plural(chunks, 'chunk')} tell nothing, pass {FEWEST_CHUNKS} at least"


def _unusable(metric: Metric, base: Chunks, new: Chunks, tokens: int) -> str:
    """Why two passes cannot be judged, as a sentence; "" if they can."""
    if len(base) != len(new):
        wrong = (
            f"{plural(len(base), 'chunk')} of the baseline, {len(new)} of the build under test: "
            "pass the same corpus with the same number of chunks"
        )
    elif not (wrong := _few(len(base))):
        for who, chunks in (("the baseline", base), ("the build under test", new)):
            if found := complaint(metric, chunks, tokens):
                wrong = f"{who} has {found}"
                break
    return wrong and f"{metric.name} cannot be judged: {wrong}"


def _mean(values: Array) -> Estimate:
    n = len(values)
    sd = max(float(values.std(ddof=1)), _LEAST_SD)
    return Estimate(float(values.mean()), sd / math.sqrt(n), float(n - 1))


def _around(mean: Estimate) -> _Bounds:
    return _Bounds(mean.bounds(ALPHA), mean.bounds(REGRESSION_ALPHA))


# --- The bootstrap ------------------------------------------------------------------------------


def _resampled(chunks: int, *tails: Tail) -> Array:
    """Percentiles of each side in each drawn pass, shape ``(len(tails), RESAMPLES)``."""
    rows = max(1, _BATCH // max(chunks, *map(len, tails)))
    parts = [
        np.stack([tail.percentiles(counts) for tail in tails]) for counts in _draws(chunks, rows)
    ]
    return np.concatenate(parts, axis=1)


def _draws(chunks: int, rows: int) -> Iterator[NDArray[np.int64]]:
    """How often each chunk is in each drawn pass, in batches of shape ``(rows, chunks)``."""
    # numpy promises the same bits of this in every version, but not of the draws made from them.
    bits = np.random.PCG64(SEED)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        raw = np.asarray(bits.random_raw((size, chunks)) >> np.uint64(32), np.int64)
        # The upper 32 bits as a fraction of 2^32: no chunk is likelier by more than 2^-20.
        drawn = (raw * chunks >> 32) + np.arange(size)[:, None] * chunks
        yield np.bincount(drawn.ravel(), minlength=size * chunks).reshape(size, chunks)


def _bootstrapped(drawn: Array, found: float, chunks: int) -> _Bounds:
    """One-sided bounds from a bootstrap: quantiles, stretched for few chunks.

    Stretched about the median, so that a bound never comes nearer; what was found lies between.
    The sure bounds are stretched further, not read off: see the top of this module.
    """
    low, middle, high = (float(v) for v in np.quantile(drawn, [ALPHA, 0.5, 1 - ALPHA]))

    def bounds(alpha: float) -> tuple[float, float]:
        stretch = (
            math.sqrt(chunks / (chunks - 1))
            * student_t_ppf(1 - alpha, chunks - 1)
            / student_t_ppf(1 - ALPHA, math.inf)
        )
        return (
            min(found, middle - stretch * (middle - low)),
            max(found, middle + stretch * (high - middle)),
        )

    return _Bounds(bounds(ALPHA), bounds(REGRESSION_ALPHA))


# --- From bounds to a verdict -------------------------------------------------------------------


def _judged(  # noqa: PLR0917 - what two ways of comparing have in common
    metric: Metric,
    sides: tuple[Chunks, Chunks],
    tokens: int,
    seen: _Seen,
    tolerance: float,
    budget: float | None,
    evidence: dict[str, object],
) -> Verdict:
    base, new = (pooled(metric, side, tokens) for side in sides)
    if metric.name == "ppl":
        margin = margin_of(tolerance)
    else:
        margin = max(tolerance * abs(base), metric.slack)
    chunks = len(sides[0])
    change, interval = _change(metric, base, new, seen)
    # The chunks are the samples of a verdict, of one launch a side.
    launches = [[chunk[0] for chunk in sides[0]]], [[chunk[0] for chunk in sides[1]]]
    draft = Draft(metric, "chunks", tolerance, *launches, base, new, change, interval)
    evidence |= {
        "mode": "chunks",
        "alpha": ALPHA,
        "regression_alpha": REGRESSION_ALPHA,
        "false_regression_bound": REGRESSION_ALPHA * (1 if budget is None else 2),
        "level": 1 - 2 * ALPHA,
        "margin": margin,
        "budget": budget,
        "effect": seen.worse.effect,
        "se": seen.worse.se,
        "df": seen.worse.df,
        "statistic": seen.worse.statistic(margin),
        # How far above 0 the statistic is for a REGRESSION, and how far below 0 for a PASS.
        "threshold": {
            "regression": student_t_ppf(1 - REGRESSION_ALPHA, seen.worse.df),
            "pass": student_t_ppf(1 - ALPHA, seen.worse.df),
        },
    }
    outcome, reason = _outcome(draft, seen, margin, chunks, evidence)
    if budget is not None:
        outcome, reason = _budgeted(metric, seen.value, budget, (outcome, reason))
    return draft.verdict(outcome, reason, evidence)


def _change(
    metric: Metric, base: float, new: float, seen: _Seen
) -> tuple[float | None, tuple[float, float] | None]:
    """The relative change and its interval, None where no share can be told."""
    low, high = sorted(sign(metric) * end for end in seen.bounds.usual)
    if metric.name == "ppl":
        change = relative(sign(metric) * seen.worse.effect)
        return change, (relative(low), relative(high))
    # Of a baseline that does not diverge at all no share can be told.
    if base <= 0:
        return None, None
    shares = (new - base) / base, low / base, high / base
    return (shares[0], shares[1:]) if all(map(math.isfinite, shares)) else (None, None)


def _outcome(
    draft: Draft, seen: _Seen, margin: float, chunks: int, evidence: dict[str, object]
) -> tuple[Outcome, str]:
    metric = draft.metric
    found = finding(metric.name, draft.change, draft.interval, 1 - 2 * ALPHA)
    if draft.change is None or metric.name != "ppl":
        found = f"{metric.name} is {draft.new:.4g} {metric.unit}, {draft.base:.4g} in the baseline"
    # A share of nearly nothing is not what was allowed where the slack is more.
    by_slack = metric.name != "ppl" and margin > draft.tolerance * abs(draft.base or 0.0)
    allowed = slack_text(metric) if by_slack else percent(draft.tolerance)
    if seen.bounds.sure[0] > margin:
        return Outcome.REGRESSION, f"{found}, {BEYOND.format(tolerance=allowed)}"
    if seen.bounds.sure[1] < -margin:
        return Outcome.IMPROVED, f"{found}, {STALE.format(tolerance=allowed)}"
    if seen.bounds.usual[1] < margin:
        return Outcome.PASS, f"{found}, shown to be within the tolerance of {allowed}"
    # More chunks would show the one or the other: each takes its own sureness.
    alpha = REGRESSION_ALPHA if seen.worse.effect > margin else ALPHA
    lack = more_units(seen.worse, margin, alpha, chunks, _MOST_CHUNKS)
    evidence["missing"] = lack
    advice = f"even {_MOST_CHUNKS} chunks would hardly tell"
    if lack is not None:
        advice = f"about {plural(lack, 'more chunk')} needed"
    unclear = f"neither within nor beyond the tolerance of {allowed}"
    if seen.bounds.usual[0] > margin:
        # The interval shown lies beyond the tolerance, which would not go with "neither".
        unclear = (
            f"beyond the tolerance of {allowed} by all appearances, but not as surely as a "
            f"REGRESSION has to be, {percent(1 - REGRESSION_ALPHA)}"
        )
    return Outcome.INCONCLUSIVE, f"{found} after {plural(chunks, 'chunk')}, {unclear}: {advice}"


def _budgeted(
    metric: Metric, value: _Bounds, budget: float, judged: tuple[Outcome, str]
) -> tuple[Outcome, str]:
    """The outcome once the value itself is held against its budget: the worse of the two."""
    outcome, reason = judged
    limit = sign(metric) * (math.log(budget) if metric.name == "ppl" else budget)
    told = f"the budget of {budget:g} {metric.unit}"
    if value.sure[0] > limit:
        return (
            Outcome.REGRESSION,
            f"{metric.name} is beyond {told}, whatever the baseline; {reason}",
        )
    if outcome not in {Outcome.PASS, Outcome.IMPROVED}:
        return outcome, reason
    if value.usual[1] > limit:
        return (
            Outcome.INCONCLUSIVE,
            f"{reason}, but not shown to be within {told}: more chunks needed",
        )
    return outcome, f"{reason}; shown to be within {told}"
