"""What every way of comparing needs: direction, margin, point values and wording."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pytest_llmperf.judge.statistics import (
    Estimate,
    Prior,
    set_aside,
    smallest,
    student_t_ppf,
)
from pytest_llmperf.judge.verdict import Mode, Outcome, Verdict
from pytest_llmperf.metrics import Metric

ROUNDING = 1e-9
"""A log effect this close to a limit lies on it: a mirrored metric must be judged alike."""

POWER = 0.8
"""The chance of a clear verdict that the number of missing units is worked out for."""

Launches = Sequence[Sequence[float]]

# exp of this is finite, and no measured ratio comes near it.
_LARGEST_LOG = 700.0


def sign(metric: Metric) -> int:
    """The factor that makes a log ratio new/base positive when the new value is worse."""
    return 1 if metric.better == "lower" else -1


def margin_of(tolerance: float) -> float:
    """The log effect that a relative tolerance allows: ln(1 + tolerance).

    Raises:
        ValueError: A tolerance that is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"a tolerance is a share like 0.05, not negative: got {tolerance}")
    return math.log1p(tolerance)


def bounded_exp(log_value: float) -> float:
    """``exp``, but finite for every input."""
    return math.exp(max(-_LARGEST_LOG, min(_LARGEST_LOG, log_value)))


def relative(log_ratio: float) -> float:
    """``exp(log_ratio) - 1``, but finite for every input."""
    return math.expm1(max(-_LARGEST_LOG, min(_LARGEST_LOG, log_ratio)))


def interval_of(worse: Estimate, direction: int, alpha: float) -> tuple[float, float]:
    """Two-sided interval of the change, at level ``1 - 2 alpha``.

    Args:
        worse: Estimate of the log effect, positive where the new value is worse.
        direction: ``sign`` of the metric.
        alpha: Probability of a miss at each end.
    """
    low, high = sorted(relative(direction * end) for end in worse.bounds(alpha))
    return low, high


def odd_ones(worsenings: Sequence[float], prior: Prior | None, alpha: float) -> tuple[int, ...]:
    """Which blocks or launches a look does without: those that ``set_aside`` names.

    None of them where two or more are odd for the worse. With one start in forty odd, two of six
    blocks are so in one verdict of a hundred, while a build that starts slowly every now and then
    shows just this, and must not pass.

    Args:
        worsenings: Log values, positive where worse.
        prior: What is known of their spread.
        alpha: Probability that any of a set of equal kind is set aside.
    """
    odd = set_aside(worsenings, prior, alpha)
    centre = median(worsenings)
    return odd if sum(worsenings[i] > centre for i in odd) <= 1 else ()


def would_tell(worse: Estimate, margin: float, alpha: float, *, more: int, shrink: float) -> bool:
    """Whether an effect this far from the margin would be clear with ``POWER``.

    Args:
        worse: The effect as far as it is known, positive where worse.
        margin: The effect that the tolerance allows.
        alpha: Probability of error of the claim.
        more: Units, and so degrees of freedom, that come on top.
        shrink: Factor of the standard error with these.
    """
    df = worse.df + more
    reach = student_t_ppf(1 - alpha, df) + student_t_ppf(POWER, df)
    return abs(worse.effect - margin) >= reach * worse.se * shrink


def more_units(worse: Estimate, margin: float, alpha: float, units: int, most: int) -> int | None:
    """How many units are missing for a clear verdict; None where ``most`` would hardly do.

    Args:
        worse: Mean effect of units of equal weight.
        margin: The effect that the tolerance allows.
        alpha: Probability of error of the claim.
        units: How many units are behind the mean.
        most: Most units that are asked for, those at hand included. One more than these at
            least: they have just shown that they do not suffice.
    """

    def enough(size: int) -> bool:
        return would_tell(worse, margin, alpha, more=size - units, shrink=math.sqrt(units / size))

    size = smallest(enough, units + 1, max(most, units + 1))
    return None if size is None else size - units


def prior_json(prior: Prior | None) -> dict[str, object] | None:
    """The prior for a verdict's evidence."""
    return None if prior is None else prior.to_json()


@dataclass(frozen=True, slots=True)
class Draft:
    """The fields of a verdict that a comparison knows before its outcome."""

    metric: Metric
    mode: Mode
    tolerance: float
    base_launches: Launches
    new_launches: Launches
    base: float | None = None
    new: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    slack: float | None = None

    def verdict(self, outcome: Outcome, reason: str, evidence: Mapping[str, object]) -> Verdict:
        """The verdict with this outcome."""
        return Verdict(
            outcome=outcome,
            metric=self.metric.name,
            mode=self.mode,
            base=self.base,
            new=self.new,
            change=self.change,
            interval=self.interval,
            tolerance=self.tolerance,
            slack=self.metric.slack if self.slack is None else self.slack,
            launches_base=len(self.base_launches),
            launches_new=len(self.new_launches),
            samples_base=sum(map(len, self.base_launches)),
            samples_new=sum(map(len, self.new_launches)),
            reason=reason,
            evidence=evidence,
        )


def without_logs(draft: Draft) -> Verdict | None:
    """The verdict on samples that have no logarithm, None where all have one.

    A value of 0 is real for some metrics (GPU memory of a run on the CPU): two point values no
    further apart than the slack pass. Everything else is an error: a gate that cannot measure
    never passes.
    """
    sides = (("the baseline", draft.base_launches), ("the build under test", draft.new_launches))
    for who, launches in sides:
        for number, launch in enumerate(launches, start=1):
            if len(launch) == 0:
                return _error(draft, f"launch {number} of {who} has no samples")
            for sample in launch:
                if not 0 <= sample < math.inf:
                    return _error(draft, f"launch {number} of {who} has a sample of {sample}")
    if all(sample > 0 for _, launches in sides for launch in launches for sample in launch):
        return None
    base, new = (median(map(median, launches)) for _, launches in sides)
    draft = Draft(
        draft.metric,
        draft.mode,
        draft.tolerance,
        draft.base_launches,
        draft.new_launches,
        base=base,
        new=new,
        change=change_of(base, new),
    )
    if abs(new - base) > draft.metric.slack:
        return _error(draft, "samples of 0 cannot be compared by ratio")
    reason = f"{draft.metric.name} is {describe(draft.change)}, with samples of 0 on both sides"
    if new != base:
        told = slack_text(draft.metric)
        reason = f"{draft.metric.name} differs by no more than the slack of {told}"
    return draft.verdict(Outcome.PASS, reason, _launches_json(draft))


def _error(draft: Draft, what: str) -> Verdict:
    reason = f"{draft.metric.name} cannot be judged: {what}; measure it again"
    return draft.verdict(Outcome.ERROR, reason, _launches_json(draft))


def _launches_json(draft: Draft) -> dict[str, object]:
    return {
        "mode": draft.mode,
        "unusable": {
            "base": [[number_json(v) for v in launch] for launch in draft.base_launches],
            "new": [[number_json(v) for v in launch] for launch in draft.new_launches],
        },
    }


def number_json(value: float) -> float | str:
    """A sample for evidence: as text where it is not finite, which no JSON number is."""
    return value if math.isfinite(value) else str(value)


def change_of(base: float, new: float) -> float | None:
    """``new / base - 1``; None where the base is 0 and the new value is not."""
    if new == base:
        return 0.0
    if base == 0:
        return None
    change = new / base - 1
    return change if math.isfinite(change) else None


def percent(share: float) -> str:
    """A share for people: ``5 %``, ``0.5 %``."""
    return f"{100 * share:.3g} %"


def describe(change: float | None) -> str:
    """A change for people: ``8.1 % lower``."""
    if change is None:
        return "no longer 0"
    if abs(change) < 0.0005:  # noqa: PLR2004 - would be printed as 0.0 %
        return "unchanged"
    return f"{100 * abs(change):.1f} % {'lower' if change < 0 else 'higher'}"


def finding(
    name: str, change: float | None, interval: tuple[float, float] | None, level: float
) -> str:
    """What was measured, for the start of a reason."""
    text = f"{name} is {describe(change)}"
    if interval is not None:
        low, high = interval
        text += f" ({100 * level:.3g} % interval {100 * low:+.1f} % to {100 * high:+.1f} %)"
    return text


def within_slack_text(metric: Metric, base: float, new: float) -> str:
    """The reason where the point values differ by no more than the slack."""
    return (
        f"{metric.name} differs by {abs(new - base):.4g} {metric.unit}, "
        f"no more than the slack of {slack_text(metric)}"
    )


def slack_text(metric: Metric, slack: float | None = None) -> str:
    """A slack for people: ``8 MiB``; of a percentage in points, as 4 % of it would be less.

    Args:
        metric: What was measured.
        slack: Absolute difference in the metric's unit; None for the metric's own.
    """
    value = metric.slack if slack is None else slack
    if metric.unit != "%":
        return f"{value:g} {metric.unit}"
    return f"{value:g} {'point' if value == 1 else 'points'}"


def plural(count: int, noun: str) -> str:
    """``1 launch``, ``2 launches``, ``3 blocks``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}{'es' if noun.endswith('ch') else 's'}"


BEYOND = (
    "beyond the tolerance of {tolerance}: try the builds between the two to find the commit, or "
    "record the new value with --update-baselines if it is meant"
)
STALE = (
    "better by more than {tolerance}: the baseline is stale, record a new one with "
    "--update-baselines"
)
