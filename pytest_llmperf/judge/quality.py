"""Quality by chunk: two passes over the same tokens, compared chunk by chunk.

Tokens of one text depend on each other, so the chunk is the unit: each gives one difference
between the build under test and the baseline, on identical tokens, and their mean is judged with
Student's t. What makes chunks hard or easy is the same on both sides and cancels.

Which difference, by metric:

``ppl``        of the mean negative log-likelihoods; the margin is ln(1 + tolerance)
``kld_mean``   of the mean divergences from the reference, in nat; the margin is the tolerance as a
               share of the baseline's mean, and the metric's slack at least: a baseline that
               is its own reference diverges by nothing, and a share of nothing allows nothing
``same_top``   of the shares of tokens with the same likeliest successor, in percent; likewise

A budget bounds the value itself, whatever the baseline: the upper bound of the mean must not exceed
it. One-sided 1 % each; two claims at most are made of one set of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pytest_llmperf.judge._common import (
    BEYOND,
    STALE,
    Draft,
    bounded_exp,
    finding,
    margin_of,
    percent,
    plural,
    relative,
    sign,
)
from pytest_llmperf.judge.decide import failed
from pytest_llmperf.judge.statistics import Estimate, smallest, student_t_ppf
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

ALPHA = 0.01
FEWEST_CHUNKS = 4
"""Fewest chunks that say anything of how chunks differ."""

BY_CHUNK = ("ppl", "kld_mean", "same_top")
"""Metrics that are means over chunks; a maximum or a percentile of tokens is none."""

_MOST_CHUNKS = 4096
_POWER = 0.8
# Chunks that agree to the last bit still leave the rounding of a log of 16-bit values.
_LEAST_SD = 1e-7


def compare_chunks(
    metric: Metric,
    base: Sequence[float],
    new: Sequence[float],
    *,
    tolerance: float,
    budget: float | None = None,
) -> Verdict:
    """Judge the chunks of two passes over the same tokens.

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
    if wrong := _unusable(metric, base, new):
        return failed(metric, f"{metric.name} cannot be judged: {wrong}")
    in_logs = metric.name == "ppl"
    before, after = (_logs(values) if in_logs else np.asarray(values) for values in (base, new))
    direction = sign(metric)
    level = float(before.mean())
    margin = margin_of(tolerance) if in_logs else max(tolerance * abs(level), metric.slack)
    worse = _mean(direction * (after - before))
    draft = _draft(metric, before, after, tolerance, worse, in_logs=in_logs)
    evidence: dict[str, object] = {
        "mode": "chunks",
        "base_chunks": [float(v) for v in base],
        "new_chunks": [float(v) for v in new],
        "alpha": ALPHA,
        "level": 1 - 2 * ALPHA,
        "margin": margin,
        "budget": budget,
        "effect": worse.effect,
        "se": worse.se,
        "df": worse.df,
        "statistic": worse.statistic(margin),
        "threshold": student_t_ppf(1 - ALPHA, worse.df),
    }
    outcome, reason = _outcome(draft, worse, margin, len(base), evidence)
    if budget is not None:
        outcome, reason = _within_budget(metric, after, budget, (outcome, reason))
    return draft.verdict(outcome, reason, evidence)


def _unusable(metric: Metric, base: Sequence[float], new: Sequence[float]) -> str:
    if len(base) != len(new):
        return (
            f"{plural(len(base), 'chunk')} of the baseline, {len(new)} of the build under test: "
            "pass the same corpus with the same number of chunks"
        )
    if len(base) < FEWEST_CHUNKS:
        return f"{plural(len(base), 'chunk')} tell nothing, pass {FEWEST_CHUNKS} at least"
    least = 1.0 if metric.name == "ppl" else 0.0
    for who, values in (("the baseline", base), ("the build under test", new)):
        for number, value in enumerate(values, start=1):
            # Rounding to 16 bits makes a divergence of nothing fall below 0 by a hair.
            if not math.isfinite(value) or value < least - 1e-4:
                return f"chunk {number} of {who} has a value of {value}"
    return ""


def _logs(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.log(np.maximum(np.asarray(values, dtype=np.float64), 1.0))


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Estimate:
    n = len(values)
    sd = max(float(values.std(ddof=1)), _LEAST_SD)
    return Estimate(float(values.mean()), sd / math.sqrt(n), float(n - 1))


def _draft(
    metric: Metric,
    before: np.ndarray[tuple[int], np.dtype[np.float64]],
    after: np.ndarray[tuple[int], np.dtype[np.float64]],
    tolerance: float,
    worse: Estimate,
    *,
    in_logs: bool,
) -> Draft:
    level, now = float(before.mean()), float(after.mean())
    ends = sorted(sign(metric) * end for end in worse.bounds(ALPHA))
    if in_logs:
        base, new = bounded_exp(level), bounded_exp(now)
        change: float | None = relative(now - level)
        interval: tuple[float, float] | None = (relative(ends[0]), relative(ends[1]))
    else:
        base, new = level, now
        # Of a baseline that does not diverge at all no share can be told.
        shares = [end / level for end in ends] if level > 0 else None
        change = (now - level) / level if level > 0 else None
        interval = (shares[0], shares[1]) if shares else None
        if change is not None and not math.isfinite(change):
            change = interval = None
    chunks = [before.tolist()], [after.tolist()]
    return Draft(metric, "chunks", tolerance, *chunks, base, new, change, interval)


def _outcome(
    draft: Draft, worse: Estimate, margin: float, chunks: int, evidence: dict[str, object]
) -> tuple[Outcome, str]:
    metric = draft.metric
    found = finding(metric.name, draft.change, draft.interval, 1 - 2 * ALPHA)
    if draft.change is None or metric.name != "ppl":
        found = f"{metric.name} is {draft.new:.4g} {metric.unit}, {draft.base:.4g} in the baseline"
    low, high = worse.bounds(ALPHA)
    allowed = percent(draft.tolerance)
    if low > margin:
        return Outcome.REGRESSION, f"{found}, {BEYOND.format(tolerance=allowed)}"
    if high < -margin:
        return Outcome.IMPROVED, f"{found}, {STALE.format(tolerance=allowed)}"
    if high < margin:
        return Outcome.PASS, f"{found}, shown to be within the tolerance of {allowed}"
    lack = _lacking(worse, margin, chunks)
    evidence["missing"] = lack
    advice = f"even {_MOST_CHUNKS} chunks would hardly tell"
    if lack is not None:
        advice = f"about {plural(lack, 'more chunk')} needed"
    reason = (
        f"{found} after {plural(chunks, 'chunk')}, neither within nor beyond the tolerance of "
        f"{allowed}: {advice}"
    )
    return Outcome.INCONCLUSIVE, reason


def _lacking(worse: Estimate, margin: float, chunks: int) -> int | None:
    distance = abs(worse.effect - margin)

    def enough(size: int) -> bool:
        reach = student_t_ppf(1 - ALPHA, size - 1) + student_t_ppf(_POWER, size - 1)
        return distance >= reach * worse.se * math.sqrt(chunks / size)

    size = smallest(enough, chunks + 1, max(_MOST_CHUNKS, chunks + 1))
    return None if size is None else size - chunks


def _within_budget(
    metric: Metric,
    after: np.ndarray[tuple[int], np.dtype[np.float64]],
    budget: float,
    judged: tuple[Outcome, str],
) -> tuple[Outcome, str]:
    """The outcome once the value itself is held against its budget: the worse of the two."""
    outcome, reason = judged
    direction = sign(metric)
    limit = math.log(budget) if metric.name == "ppl" else budget
    value = _mean(direction * after)
    low, high = value.bounds(ALPHA)
    told = f"the budget of {budget:g} {metric.unit}"
    if low > direction * limit:
        return (
            Outcome.REGRESSION,
            f"{metric.name} is beyond {told}, whatever the baseline; {reason}",
        )
    if high > direction * limit and outcome in {Outcome.PASS, Outcome.IMPROVED}:
        return (
            Outcome.INCONCLUSIVE,
            f"{reason}, but not shown to be within {told}: more chunks needed",
        )
    return outcome, reason
