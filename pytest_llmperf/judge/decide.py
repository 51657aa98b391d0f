"""From measured values to a verdict. Pure functions, none of which takes 10 ms.

One function for each way of comparing:

``compare_stored``      launches measured now against launches recorded earlier
``decide_side_by_side`` blocks in which both builds were started afresh (``sequential``)
``compare_exact``       deterministic values, without statistics
``compare_published``   launches measured now against a figure from a report

and one for each verdict without a comparison: ``incomparable``, ``missing``, ``failed`` and
``recorded``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from pytest_llmperf.judge._common import (
    BEYOND,
    STALE,
    Draft,
    Launches,
    bounded_exp,
    change_of,
    describe,
    finding,
    interval_of,
    margin_of,
    number_json,
    percent,
    plural,
    prior_json,
    relative,
    sign,
    within_slack_text,
    without_logs,
)
from pytest_llmperf.judge.sequential import (
    DEFAULT_BLOCK_PRIOR,
    DEFAULT_PLAN,
    Block,
    Decision,
    SequentialPlan,
    decide_side_by_side,
    finish,
)
from pytest_llmperf.judge.statistics import (
    Estimate,
    Prior,
    difference_estimate,
    log_means,
    smallest,
    student_t_ppf,
)
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

__all__ = [
    "DEFAULT_BLOCK_PRIOR",
    "DEFAULT_PLAN",
    "FEWEST_RECORDED",
    "Block",
    "Decision",
    "SequentialPlan",
    "compare_exact",
    "compare_published",
    "compare_stored",
    "decide_side_by_side",
    "failed",
    "finish",
    "incomparable",
    "missing",
    "recorded",
]

FEWEST_RECORDED = 3
"""Fewest recorded launches that say anything about their own variance."""

MOST_LAUNCHES = 64
"""Most launches that an INCONCLUSIVE verdict asks for; nobody waits for more."""

POWER = 0.8
"""The chance of a clear verdict that the number of missing launches is worked out for."""

# Baselines keep six significant digits; half a unit of the last one.
_ROUNDING = 5e-6


def compare_stored(
    metric: Metric,
    base: Launches,
    new: Launches,
    *,
    tolerance: float,
    prior: Prior | None = None,
    alpha: float = 0.01,
) -> Verdict:
    """Judge launches measured now against recorded ones.

    With y the median log of a launch, s the sign that makes worse positive and
    m = ln(1 + tolerance), the statistic is T = (s (mean y_new - mean y_base) - m) / se with
    se = s̃ √(1/K + 1/L). The variance s̃² is pooled over both arms, K - 1 + L - 1 degrees of
    freedom, and moderated by the prior (Smyth 2004).

    REGRESSION: the one-sided lower bound of the worsening lies above m. PASS: its upper bound
    lies below m. IMPROVED: its upper bound lies below -m. Each is wrong with probability
    ``alpha`` at most. Point values closer than ``metric.slack`` pass.

    Args:
        metric: What was measured.
        base: Samples of each recorded launch, in the metric's unit.
        new: Samples of each launch of the build under test.
        tolerance: Relative change for the worse that is allowed: 0.05 is 5 %.
        prior: What is known of the sd of one launch's log value; without it at least
            ``FEWEST_RECORDED`` recorded launches are needed.
        alpha: Probability of an error of each kind, between 0 and 0.5.

    Returns:
        The verdict; ERROR where a sample cannot be used, MISSING without any recorded launch.

    Raises:
        ValueError: A tolerance or alpha out of range.
    """
    margin = margin_of(tolerance)
    if not 0 < alpha < 0.5:  # noqa: PLR2004 - above it a bound would be no bound
        raise ValueError(f"alpha must lie between 0 and 0.5, got {alpha}")
    draft = Draft(metric, "stored", tolerance, base, new)
    if not base:
        return missing(metric, "the baseline has no launches: record it with --update-baselines")
    if not new:
        return failed(metric, "no launch of the build under test was measured")
    if (verdict := without_logs(draft)) is not None:
        return verdict

    base_logs, new_logs = log_means(base), log_means(new)
    log_base = float(base_logs.mean())
    log_change = float(new_logs.mean()) - log_base
    evidence: dict[str, object] = {
        "mode": "stored",
        "base_launches": [bounded_exp(y) for y in base_logs],
        "new_launches": [bounded_exp(y) for y in new_logs],
        "alpha": alpha,
        "level": 1 - 2 * alpha,
        "margin": margin,
        "prior": prior_json(prior),
    }
    draft = replace(
        draft,
        base=bounded_exp(log_base),
        new=bounded_exp(log_base + log_change),
        change=relative(log_change),
    )
    if len(base) < FEWEST_RECORDED and (prior is None or prior.d0 == 0):
        lack = FEWEST_RECORDED - len(base)
        evidence["missing"] = {"base": lack, "new": 0}
        reason = (
            f"{finding(metric.name, draft.change, None, 0)}, but {plural(len(base), 'launch')} "
            f"of the baseline cannot tell a change from noise: record {lack} more with "
            "--update-baselines on the baseline's build"
        )
        return draft.verdict(Outcome.INCONCLUSIVE, reason, evidence)

    direction = sign(metric)
    estimate = difference_estimate(base_logs, new_logs, prior)
    worse = replace(estimate, effect=direction * estimate.effect)
    draft = replace(draft, interval=interval_of(worse, direction, alpha))
    evidence |= {
        "effect": worse.effect,
        "se": worse.se,
        "df": worse.df if math.isfinite(worse.df) else None,
        "statistic": worse.statistic(margin),
        "threshold": student_t_ppf(1 - alpha, worse.df),
        "p_regression": worse.p_above(margin),
        "p_within": worse.p_below(margin),
    }
    return _judge_stored(draft, worse, margin, alpha, evidence)


def _judge_stored(
    draft: Draft, worse: Estimate, margin: float, alpha: float, evidence: dict[str, object]
) -> Verdict:
    metric, base, new = draft.metric, draft.base, draft.new
    if base is None or new is None:  # pragma: no cover - the caller has filled them in
        raise ValueError("a draft without point values cannot be judged")
    low, high = worse.bounds(alpha)
    found = finding(metric.name, draft.change, draft.interval, 1 - 2 * alpha)
    allowed = percent(draft.tolerance)
    if metric.slack > 0 and abs(new - base) <= metric.slack:
        return draft.verdict(Outcome.PASS, within_slack_text(metric, base, new), evidence)
    if low > margin:
        reason = f"{found}, {BEYOND.format(tolerance=allowed)}"
        return draft.verdict(Outcome.REGRESSION, reason, evidence)
    if high < -margin:
        reason = f"{found}, {STALE.format(tolerance=allowed)}"
        return draft.verdict(Outcome.IMPROVED, reason, evidence)
    if high < margin:
        reason = f"{found}, shown to be within the tolerance of {allowed}"
        return draft.verdict(Outcome.PASS, reason, evidence)
    counts = len(draft.base_launches), len(draft.new_launches)
    distance = abs(worse.effect - margin)
    evidence["missing"], advice = lacking_launches(distance, worse, counts, alpha)
    reason = f"{found}, neither within nor beyond the tolerance of {allowed}: {advice}"
    return draft.verdict(Outcome.INCONCLUSIVE, reason, evidence)


def lacking_launches(
    distance: float, worse: Estimate, counts: tuple[int, int], alpha: float
) -> tuple[dict[str, int] | None, str]:
    """How many launches are missing for a clear verdict, and the same in words.

    Args:
        distance: Distance of the effect from the margin, in log units.
        worse: The effect with its standard error.
        counts: Launches of the baseline and of the build under test behind it.
        alpha: Probability of an error that the verdict allows.

    Returns:
        The missing launches of ``base`` and ``new``, None where ``MOST_LAUNCHES`` of each are
        too few; and the advice.
    """
    lack = _lacking(distance, worse, counts, alpha)
    if lack is None:
        return None, f"even {MOST_LAUNCHES} launches of each build would hardly tell"
    parts = []
    if lack["base"]:
        parts.append(f"{lack['base']} more of the baseline (--update-baselines on its build)")
    if lack["new"]:
        parts.append(f"{lack['new']} more of the build under test")
    return lack, f"about {' and '.join(parts)} are missing, counted in launches"


def _lacking(
    distance: float, worse: Estimate, counts: tuple[int, int], alpha: float
) -> dict[str, int] | None:
    """Launches missing until an effect this far from the margin is clear with ``POWER``.

    More launches of the build under test if they can do it, more of both where the few
    recorded ones are the bottleneck, None if ``MOST_LAUNCHES`` of each are too few.
    """
    k, n = counts
    s2 = worse.se**2 / (1 / k + 1 / n)

    def enough(k_then: int, n_then: int) -> bool:
        df = worse.df + (k_then - k) + (n_then - n)
        reach = student_t_ppf(1 - alpha, df) + student_t_ppf(POWER, df)
        return distance >= reach * math.sqrt(s2 * (1 / k_then + 1 / n_then))

    # One more at least: this verdict has shown that what there is does not suffice.
    more_new = smallest(lambda size: enough(k, size), n + 1, max(MOST_LAUNCHES, n + 1))
    if more_new is not None:
        return {"base": 0, "new": more_new - n}
    start = min(k, n) + 1
    both = smallest(
        lambda size: enough(max(k, size), max(n, size)), start, max(MOST_LAUNCHES, start)
    )
    if both is None:
        return None
    return {"base": max(k, both) - k, "new": max(n, both) - n}


def compare_exact(
    metric: Metric, base: float, new: float, *, tolerance: float, slack: float
) -> Verdict:
    """Judge a deterministic value: no statistics.

    A worsening counts once it exceeds both ``slack`` and ``tolerance`` times the base; an
    improvement likewise. Values that are not whole numbers may also differ by the rounding of
    the baseline file, six significant digits.

    Args:
        metric: What was measured.
        base: Value of the baseline, in the metric's unit.
        new: Value of the build under test.
        tolerance: Relative change that is allowed; 0 for none.
        slack: Absolute change that is allowed, in the metric's unit.

    Raises:
        ValueError: A tolerance or slack that is negative or not finite.
    """
    margin_of(tolerance)
    if not 0 <= slack < math.inf:
        raise ValueError(f"slack must be finite and not negative, got {slack}")
    draft = Draft(metric, "exact", tolerance, [[base]], [[new]], slack=slack)
    if not (math.isfinite(base) and math.isfinite(new)):
        reason = f"{metric.name} cannot be judged: {base} against {new}; measure it again"
        ends = {"base": number_json(base), "new": number_json(new)}
        return draft.verdict(Outcome.ERROR, reason, {"mode": "exact", "slack": slack} | ends)
    draft = replace(draft, base=base, new=new, change=change_of(base, new))
    allowed = max(slack, tolerance * abs(base))
    whole = float(base).is_integer() and float(new).is_integer()
    rounding = 1e-12 if whole else _ROUNDING
    threshold = allowed + rounding * max(abs(base), abs(new))
    worse = sign(metric) * (new - base)
    evidence: dict[str, object] = {
        "mode": "exact",
        "base": base,
        "new": new,
        "slack": slack,
        "statistic": worse,
        "threshold": threshold,
    }
    values = f"{metric.name} is {new:.8g} {metric.unit}, {base:.8g} in the baseline"
    if worse > threshold:
        reason = (
            f"{values}, worse by more than the {allowed:.4g} {metric.unit} allowed: try the "
            "builds between the two, or record it with --update-baselines if it is meant"
        )
        return draft.verdict(Outcome.REGRESSION, reason, evidence)
    if -worse > threshold:
        reason = f"{values}: the baseline is stale, record a new one with --update-baselines"
        return draft.verdict(Outcome.IMPROVED, reason, evidence)
    return draft.verdict(Outcome.PASS, f"{values}: no difference that counts", evidence)


def compare_published(metric: Metric, value: float, new: Launches, *, tolerance: float) -> Verdict:
    """Judge launches against a figure from a report, by tolerance only.

    The published figure has no samples behind it, so no error rate can be stated; the verdict
    says so. The new value is the median over launches of the geometric centre of each.

    Args:
        metric: What was measured.
        value: The published figure, in the metric's unit.
        new: Samples of each launch of the build under test.
        tolerance: Relative change for the worse that is allowed.

    Raises:
        ValueError: A tolerance that is negative or not finite.
    """
    margin = margin_of(tolerance)
    draft = Draft(metric, "published", tolerance, [], new)
    if not new:
        return failed(metric, "no launch of the build under test was measured")
    # The figure stands in as a launch of one sample where samples are checked, not counted.
    checked = without_logs(replace(draft, base_launches=[[value]]))
    if checked is not None:
        return replace(checked, launches_base=0, samples_base=0)
    log_base, log_new = math.log(value), float(median(log_means(new).tolist()))
    worse = sign(metric) * (log_new - log_base)
    draft = replace(
        draft, base=value, new=bounded_exp(log_new), change=relative(log_new - log_base)
    )
    evidence: dict[str, object] = {
        "mode": "published",
        "value": value,
        "new_launches": [bounded_exp(y) for y in log_means(new)],
        "statistic": worse,
        "threshold": margin,
    }
    found = (
        f"{metric.name} is {describe(draft.change)} than a published figure with no samples "
        f"behind it ({plural(len(new), 'launch')}, compared by tolerance only)"
    ).replace("unchanged than", "unchanged from")
    allowed = percent(tolerance)
    if metric.slack > 0 and abs(bounded_exp(log_new) - value) <= metric.slack:
        outcome, end = Outcome.PASS, f"within the slack of {metric.slack:g} {metric.unit}"
    elif worse > margin:
        outcome, end = Outcome.REGRESSION, BEYOND.format(tolerance=allowed)
    elif worse < -margin:
        outcome, end = Outcome.IMPROVED, STALE.format(tolerance=allowed)
    else:
        outcome, end = Outcome.PASS, f"within the tolerance of {allowed}"
    return draft.verdict(outcome, f"{found}, {end}", evidence)


def incomparable(metric: Metric, differences: Sequence[str]) -> Verdict:
    """The verdict where baseline and measurement were made under different conditions.

    Args:
        metric: What was measured.
        differences: What differs and how to mend it, each in a few words.
    """
    listed = "; ".join(differences) or "the conditions differ"
    reason = (
        f"{metric.name} cannot be compared with the baseline, the conditions differ: {listed}: "
        "restore them, or record anew with `pytest --update-baselines`"
    )
    return _nothing(metric, Outcome.INCOMPARABLE, reason, {"differences": list(differences)})


def missing(metric: Metric, reason: str) -> Verdict:
    """The verdict where there is no baseline; ``reason`` gives the command that mends it."""
    return _nothing(metric, Outcome.MISSING, reason, {})


def failed(metric: Metric, reason: str) -> Verdict:
    """The verdict where the metric could not be measured."""
    return _nothing(metric, Outcome.ERROR, reason, {})


def recorded(metric: Metric, new: Launches) -> Verdict:
    """The verdict where launches were written to a baseline instead of compared.

    Args:
        metric: What was measured.
        new: Samples of each recorded launch, in the metric's unit.
    """
    value = median(median(launch) for launch in new) if new and all(new) else None
    draft = Draft(metric, "none", metric.tolerance, [], new, new=value)
    reason = f"{metric.name} recorded from {plural(len(new), 'launch')}, nothing compared"
    return draft.verdict(Outcome.RECORDED, reason, {"mode": "none"})


def _nothing(metric: Metric, outcome: Outcome, reason: str, evidence: dict[str, object]) -> Verdict:
    draft = Draft(metric, "none", metric.tolerance, [], [])
    return draft.verdict(outcome, reason, {"mode": "none"} | evidence)
