"""From measured values to a verdict without statistics. Pure functions.

``compare_exact``       deterministic values
``compare_published``   launches measured now against a figure from a report

and one for each verdict without a comparison: ``incomparable``, ``missing``, ``failed``,
``out_of_memory`` and ``recorded``. What cannot be measured is compared by ``still_fails`` and
``works_now``. Comparisons with statistics are in ``side_by_side``, ``stored`` and ``quality``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from statistics import median

from pytest_llmperf.judge._common import (
    BEYOND,
    STALE,
    Draft,
    Launches,
    bounded_exp,
    change_of,
    describe,
    margin_of,
    number_json,
    percent,
    plural,
    relative,
    sign,
    slack_text,
    without_logs,
)
from pytest_llmperf.judge._schema import Failure
from pytest_llmperf.judge.chunks import Chunks, pooled
from pytest_llmperf.judge.statistics import log_means
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

UNEVEN = 1.25
"""Factor between recorded launches of equal builds above which a record is of little use: half of
it on either side of the mean is twice the tolerance of most metrics."""

# Baselines keep six significant digits; half a unit of the last one.
_ROUNDING = 5e-6


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
        outcome, end = Outcome.PASS, f"within the slack of {slack_text(metric)}"
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


def disturbed(metric: Metric, what: str) -> Verdict:
    """The verdict where the machine was not fit to measure on, however often it was tried.

    Args:
        metric: What was to be measured.
        what: What disturbed it, in words.
    """
    reason = (
        f"{metric.name} cannot be compared: {what}, in every one of several tries: measure on a "
        "quiet machine whose GPUs are cool and nobody else's, or raise `llmperf_foreign_load` in "
        "the ini file to allow busy cores"
    )
    return _nothing(metric, Outcome.INCOMPARABLE, reason, {"disturbed": what})


def missing(metric: Metric, reason: str) -> Verdict:
    """The verdict where there is no baseline; ``reason`` gives the command that mends it."""
    return _nothing(metric, Outcome.MISSING, reason, {})


def failed(metric: Metric, reason: str) -> Verdict:
    """The verdict where the metric could not be measured."""
    return _nothing(metric, Outcome.ERROR, reason, {})


def out_of_memory(metric: Metric, reason: str) -> Verdict:
    """The verdict where a server had too little memory to be measured."""
    return _nothing(metric, Outcome.OOM, reason, {})


def recorded_failure(metric: Metric, failure: Failure) -> Verdict:
    """The verdict where it was written to a baseline that a case cannot be measured."""
    reason = f"{metric.name} is not to be had, it {failure.words}: recorded, nothing compared"
    return _nothing(metric, Outcome.RECORDED, reason, {"failed": asdict(failure)})


def still_fails(metric: Metric, was: Failure, now: Failure, label: str) -> Verdict:
    """The verdict where a case cannot be measured, and could not be with the baseline either.

    Args:
        metric: What was to be measured.
        was: How it failed with the baseline.
        now: How it fails now, of the same kind.
        label: The baseline's.
    """
    same = was.what == now.what
    then = "" if same else f"; with {label} it was {was.what}"
    reason = f"it {now.words}, as recorded of {label}{then}"
    ends: dict[str, object] = {"was": asdict(was), "failed": asdict(now)}
    return _nothing(metric, Outcome.PASS, reason, ends)


def works_now(metric: Metric, was: Failure, new: Launches, label: str) -> Verdict:
    """The verdict where a case can be measured that could not be with the baseline.

    Args:
        metric: What was measured.
        was: How it failed with the baseline.
        new: Samples of each launch of the build under test, one at least.
        label: The baseline's.
    """
    value = median([median(launch) for launch in new])
    draft = Draft(metric, "none", metric.tolerance, [], new, new=value)
    reason = (
        f"{metric.name} is {value:.4g} {metric.unit}, and with {label} the case {was.words}: the "
        "baseline is stale, record a new one with --update-baselines"
    )
    return draft.verdict(Outcome.IMPROVED, reason, {"mode": "none", "was": asdict(was)})


def recorded(metric: Metric, new: Launches) -> Verdict:
    """The verdict where launches were written to a baseline instead of compared.

    Args:
        metric: What was measured.
        new: Samples of each recorded launch, in the metric's unit.
    """
    middles = [median(launch) for launch in new] if all(new) else []
    value = median(middles) if middles else None
    draft = Draft(metric, "none", metric.tolerance, [], new, new=value)
    reason = f"{metric.name} recorded from {plural(len(new), 'launch')}, nothing compared"
    evidence: dict[str, object] = {"mode": "none"}
    if metric.kind == "timing" and middles and min(middles) > 0:
        ratio = max(middles) / min(middles)
        if ratio > UNEVEN:
            evidence["uneven"] = ratio
            reason += (
                f"; its launches differ by a factor of {ratio:.2f}, so the machine was not steady: "
                "record again, or later comparisons will be INCONCLUSIVE"
            )
    return draft.verdict(Outcome.RECORDED, reason, evidence)


def recorded_chunks(metric: Metric, chunks: Chunks, *, tokens: int) -> Verdict:
    """The verdict where a pass over a corpus was written to a baseline instead of compared.

    Args:
        metric: A quality metric.
        chunks: What was recorded, one list a chunk.
        tokens: Scored tokens of a chunk.
    """
    draft = Draft(metric, "none", metric.tolerance, [], chunks, new=pooled(metric, chunks, tokens))
    reason = f"{metric.name} recorded from {plural(len(chunks), 'chunk')}, nothing compared"
    return draft.verdict(Outcome.RECORDED, reason, {"mode": "none"})


def _nothing(metric: Metric, outcome: Outcome, reason: str, evidence: dict[str, object]) -> Verdict:
    draft = Draft(metric, "none", metric.tolerance, [], [])
    return draft.verdict(outcome, reason, {"mode": "none"} | evidence)
