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
One-sided 1 % each; two claims at most are made of one set of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from pytest_llmperf.metrics import Metric

__all__ = [
    "ALPHA",
    "BY_CHUNK",
    "FEWEST_CHUNKS",
    "QUALITY",
    "compare_chunks",
    "compare_quality",
    "compare_tails",
    "pooled",
]

ALPHA = 0.01
FEWEST_CHUNKS = 4
"""Fewest chunks that say anything of how chunks differ."""

RESAMPLES = 2000
"""Passes drawn for a percentile: twenty of them lie beyond each bound."""

SEED = 1
"""Of the draws, which are the same for every verdict on as many chunks."""

_MOST_CHUNKS = 4096
# Chunks that agree to the last bit still leave the rounding of a log of 16-bit values.
_LEAST_SD = 1e-7
# Entries of an array of resamples by listed tokens: 8 MiB.
_BATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class _Seen:
    """What two passes show, oriented so that positive is worse; a perplexity as its logarithm.

    Attributes:
        worse: By how much the build under test is worse.
        bounds: One-sided lower and upper bound of that.
        value: Lower and upper bound of the build's own value.
    """

    worse: Estimate
    bounds: tuple[float, float]
    value: tuple[float, float]


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
    seen = _Seen(worse, worse.bounds(ALPHA), _mean(sign(metric) * after).bounds(ALPHA))
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
    drawn_base, drawn_new = _resampled(Tail(base, tokens), Tail(new, tokens), n)
    low, high = _bootstrapped(drawn_new - drawn_base, after - before, n)
    se = max((high - low) / 2 / student_t_ppf(1 - ALPHA, n - 1), _LEAST_SD / math.sqrt(n))
    worse = Estimate(after - before, se, float(n - 1))
    seen = _Seen(worse, (low, high), _bootstrapped(drawn_new, after, n))
    evidence: dict[str, object] = {
        "base_chunks": [[float(v) for v in chunk] for chunk in base],
        "new_chunks": [[float(v) for v in chunk] for chunk in new],
        "tokens": tokens,
        "resamples": RESAMPLES,
        "seed": SEED,
        "bounds": [low, high],
    }
    return _judged(metric, (base, new), tokens, seen, tolerance, budget, evidence)


def _unusable(metric: Metric, base: Chunks, new: Chunks, tokens: int) -> str:
    """Why two passes cannot be judged, as a sentence; "" if they can."""
    wrong = ""
    if len(base) != len(new):
        wrong = (
            f"{plural(len(base), 'chunk')} of the baseline, {len(new)} of the build under test: "
            "pass the same corpus with the same number of chunks"
        )
    elif len(base) < FEWEST_CHUNKS:
        wrong = f"{plural(len(base), 'chunk')} tell nothing, pass {FEWEST_CHUNKS} at least"
    else:
        for who, chunks in (("the baseline", base), ("the build under test", new)):
            if found := complaint(metric, chunks, tokens):
                wrong = f"{who} has {found}"
                break
    return wrong and f"{metric.name} cannot be judged: {wrong}"


def _mean(values: Array) -> Estimate:
    n = len(values)
    sd = max(float(values.std(ddof=1)), _LEAST_SD)
    return Estimate(float(values.mean()), sd / math.sqrt(n), float(n - 1))


# --- The bootstrap ------------------------------------------------------------------------------


def _resampled(base: Tail, new: Tail, chunks: int) -> Array:
    """Percentiles of both sides in each drawn pass, shape ``(2, RESAMPLES)``."""
    rows = max(1, _BATCH // max(chunks, len(base), len(new)))
    parts = [
        np.stack([base.percentiles(counts), new.percentiles(counts)])
        for counts in _draws(chunks, rows)
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


def _bootstrapped(drawn: Array, found: float, chunks: int) -> tuple[float, float]:
    """One-sided bounds from a bootstrap: quantiles, stretched for few chunks.

    Stretched about the median, so that a bound never comes nearer; what was found lies between.
    """
    low, middle, high = (float(v) for v in np.quantile(drawn, [ALPHA, 0.5, 1 - ALPHA]))
    stretch = (
        math.sqrt(chunks / (chunks - 1))
        * student_t_ppf(1 - ALPHA, chunks - 1)
        / student_t_ppf(1 - ALPHA, math.inf)
    )
    return (
        min(found, middle - stretch * (middle - low)),
        max(found, middle + stretch * (high - middle)),
    )


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
        "level": 1 - 2 * ALPHA,
        "margin": margin,
        "budget": budget,
        "effect": seen.worse.effect,
        "se": seen.worse.se,
        "df": seen.worse.df,
        "statistic": seen.worse.statistic(margin),
        "threshold": student_t_ppf(1 - ALPHA, seen.worse.df),
    }
    outcome, reason = _outcome(draft, seen, margin, chunks, evidence)
    if budget is not None:
        outcome, reason = _within_budget(metric, seen, budget, (outcome, reason))
    return draft.verdict(outcome, reason, evidence)


def _change(
    metric: Metric, base: float, new: float, seen: _Seen
) -> tuple[float | None, tuple[float, float] | None]:
    """The relative change and its interval, None where no share can be told."""
    low, high = sorted(sign(metric) * end for end in seen.bounds)
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
    low, high = seen.bounds
    # A share of nearly nothing is not what was allowed where the slack is more.
    by_slack = metric.name != "ppl" and margin > draft.tolerance * abs(draft.base or 0.0)
    allowed = f"{metric.slack:g} {metric.unit}" if by_slack else percent(draft.tolerance)
    if low > margin:
        return Outcome.REGRESSION, f"{found}, {BEYOND.format(tolerance=allowed)}"
    if high < -margin:
        return Outcome.IMPROVED, f"{found}, {STALE.format(tolerance=allowed)}"
    if high < margin:
        return Outcome.PASS, f"{found}, shown to be within the tolerance of {allowed}"
    lack = more_units(seen.worse, margin, ALPHA, chunks, _MOST_CHUNKS)
    evidence["missing"] = lack
    advice = f"even {_MOST_CHUNKS} chunks would hardly tell"
    if lack is not None:
        advice = f"about {plural(lack, 'more chunk')} needed"
    reason = (
        f"{found} after {plural(chunks, 'chunk')}, neither within nor beyond the tolerance of "
        f"{allowed}: {advice}"
    )
    return Outcome.INCONCLUSIVE, reason


def _within_budget(
    metric: Metric, seen: _Seen, budget: float, judged: tuple[Outcome, str]
) -> tuple[Outcome, str]:
    """The outcome once the value itself is held against its budget: the worse of the two."""
    outcome, reason = judged
    limit = sign(metric) * (math.log(budget) if metric.name == "ppl" else budget)
    low, high = seen.value
    told = f"the budget of {budget:g} {metric.unit}"
    if low > limit:
        return (
            Outcome.REGRESSION,
            f"{metric.name} is beyond {told}, whatever the baseline; {reason}",
        )
    if high > limit and outcome in {Outcome.PASS, Outcome.IMPROVED}:
        return (
            Outcome.INCONCLUSIVE,
            f"{reason}, but not shown to be within {told}: more chunks needed",
        )
    return outcome, reason
