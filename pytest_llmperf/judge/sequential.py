"""The rule that side by side and stored comparisons share: screen, then confirm on fresh units.

A unit is what was started afresh: a block of both builds, or a launch of the build under test.
The rule looks at the units after each one that comes. It is a pure function of them: it is walked
through from the first unit, so the same units always lead to the same end.

1. **Screen.** Every look asks: is the slowdown beyond the tolerance, within it, or is the build
   better by more than it? After ``max_screen`` units without an answer it ends open.
2. **Confirm.** A suspicion is looked at again on units that had no part in raising it, from
   ``first_confirm`` of them on, up to ``max_confirm``. They alone can make it a REGRESSION. The
   pool of all units can make it a PASS. There is one confirmation in a verdict.

**What a look may spend.** Each kind of claim has a probability of error for the whole walk, and
each look at which it can be made gets a part of it, so that the parts add up to it (Bonferroni:
valid however the looks depend on each other). The parts follow a power of the number of the look:

- screening rises (``LATER``): the first looks need little to see a gross slowdown, and a small one
  takes many units to see at all;
- confirmation is equal at all looks;
- PASS falls (``EARLIER``): equal builds, which most are, should end after two or three units.

A share ``ODD_SHARE`` of each part pays for setting aside what is far off the others
(``statistics.set_aside``); the claim gets the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from pytest_llmperf.judge._common import (
    BEYOND,
    ROUNDING,
    STALE,
    Draft,
    finding,
    interval_of,
    percent,
    plural,
    relative,
    sign,
    within_slack_text,
)
from pytest_llmperf.judge.statistics import Estimate, student_t_ppf
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

Phase = Literal["screen", "confirm"]
Claim = Literal["slower", "improved", "within", "slack", "open"]

LATER = 0.5
EARLIER = -1.5
ODD_SHARE = 0.05

IMPROVED_UNTIL = 8
"""Units up to which a build that was shown to be within the tolerance is measured on, where it
looks better by more than that: IMPROVED says more than PASS, but is not worth the whole budget."""

_SHARED_ALPHA_LIMIT = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """How many units are measured and how errors are spent.

    Attributes:
        first_screen: Units behind the first look that may raise a suspicion.
        first_pass: Fewest units behind a PASS or IMPROVED.
        max_screen: Most screening units.
        first_confirm: Fewest fresh units behind a REGRESSION.
        max_confirm: Most confirmation units.
        screen_alpha: Probability that a build within tolerance is ever suspected.
        confirm_alpha: Probability that the confirmation of such a suspicion is wrong.
        pass_alpha: Probability that a build slower by the tolerance passes.
        shared_base: Screening and confirmation are compared with the same baseline launches, so
            that both may be wrong together.

    Raises:
        ValueError: A number out of range.
    """

    first_screen: int
    first_pass: int
    max_screen: int
    first_confirm: int
    max_confirm: int
    screen_alpha: float
    confirm_alpha: float
    pass_alpha: float
    shared_base: bool

    def __post_init__(self) -> None:
        for first, most in (
            ("first_screen", "max_screen"),
            ("first_pass", "max_screen"),
            ("first_confirm", "max_confirm"),
        ):
            if not 1 <= getattr(self, first) <= getattr(self, most):
                raise ValueError(f"plan: {first} must lie between 1 and {most}")
        for name in ("screen_alpha", "confirm_alpha", "pass_alpha"):
            if not 0 < getattr(self, name) < _SHARED_ALPHA_LIMIT:
                raise ValueError(f"plan: {name} must lie between 0 and 0.5")

    @property
    def most_units(self) -> int:
        """Most units that a verdict can take."""
        return self.max_screen + self.max_confirm

    def screen_part(self, units: int) -> float:
        """Probability spent on suspicion at the look at so many screening units."""
        looks = self.max_screen - self.first_screen + 1
        return parts(self.screen_alpha, looks, LATER)[units - self.first_screen]

    def confirm_part(self, units: int) -> float:
        """Probability spent on REGRESSION at the look at so many confirmation units."""
        looks = self.max_confirm - self.first_confirm + 1
        return parts(self.confirm_alpha, looks, 0.0)[units - self.first_confirm]

    def pass_part(self, units: int) -> float:
        """Probability spent on PASS at the look at a pool of so many units."""
        looks = self.most_units - self.first_pass + 1
        return parts(self.pass_alpha, looks, EARLIER)[units - self.first_pass]

    @property
    def false_regression_bound(self) -> float:
        """Upper bound of P(REGRESSION) for a build within tolerance.

        Fresh units of both builds are wrong independently of what led to them, so the
        probabilities multiply. With a shared baseline P(suspected and confirmed) is only at most
        the smaller of the two.
        """
        if self.shared_base:
            return min(self.screen_alpha, self.confirm_alpha)
        return self.screen_alpha * self.confirm_alpha


@functools.lru_cache(maxsize=128)
def parts(alpha: float, looks: int, power: float) -> tuple[float, ...]:
    """``alpha`` in as many parts as there are looks, proportional to a power of their number."""
    weights = [number**power for number in range(1, looks + 1)]
    return tuple(alpha * weight / sum(weights) for weight in weights)


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict so far and the unit that would make it clearer.

    Attributes:
        verdict: Final if ``wants`` is None, else what it is if no more is measured:
            INCONCLUSIVE, or PASS where only IMPROVED is still open.
        wants: The kind of unit to measure next.
    """

    verdict: Verdict
    wants: Phase | None


@dataclass(frozen=True, slots=True)
class Alphas:
    """What one look may spend: None rules a claim out.

    Attributes:
        slower: On the claim that the slowdown is beyond the tolerance.
        within: On the claims that it is within it, or better beyond it.
        odd: On setting aside what is far off the others.
    """

    slower: float | None
    within: float | None
    odd: float

    @classmethod
    def of(cls, slower: float | None, within: float | None) -> Alphas:
        """Split the parts of a look into what its claims and its setting aside may spend."""
        odd = ODD_SHARE * min(part for part in (slower, within) if part is not None)
        return cls(
            None if slower is None else slower - odd,
            None if within is None else within - odd,
            odd,
        )


@dataclass(frozen=True, slots=True)
class Look:
    """One look at units, all values oriented so that positive is worse.

    Attributes:
        phase: ``screen`` for the pool of all units so far, ``confirm`` for the fresh ones alone.
        units: How many.
        set_aside: Which of them, by number, are too far off the others to be looked at; by arm.
        base: Level of the baseline, in the metric's unit.
        worse: The log effect.
        claim: What it shows.
        alphas: What it could spend.
        margin: The log effect that the tolerance allows.
    """

    phase: Phase
    units: int
    set_aside: Mapping[str, tuple[int, ...]]
    base: float
    worse: Estimate
    claim: Claim
    alphas: Alphas
    margin: float

    @property
    def aside(self) -> int:
        """How many were set aside."""
        return sum(map(len, self.set_aside.values()))

    @property
    def level_alpha(self) -> float:
        """The probability behind the interval that a verdict states by this look."""
        spent = self.alphas.within if self.alphas.within is not None else self.alphas.slower
        return spent or 0.0

    @property
    def needed_alpha(self) -> float:
        """The probability behind the claim that the effect, if it is as it looks, would prove."""
        slower = self.alphas.slower
        beyond = self.worse.effect > self.margin
        return slower if beyond and slower is not None else self.level_alpha

    def to_json(self) -> dict[str, object]:
        """JSON values for a verdict's evidence."""
        df = self.worse.df
        alphas = {"slower": self.alphas.slower, "within": self.alphas.within}
        return {
            "phase": self.phase,
            "units": self.units,
            "set_aside": {arm: list(which) for arm, which in self.set_aside.items()},
            "effect": self.worse.effect,
            "se": self.worse.se,
            "df": df if math.isfinite(df) else None,
            "statistic": self.worse.statistic(self.margin),
            "alpha": alphas,
            "threshold": {
                name: None if alpha is None else student_t_ppf(1 - alpha, df)
                for name, alpha in alphas.items()
            },
            "claim": self.claim,
        }


def claim_of(metric: Metric, base: float, worse: Estimate, margin: float, alphas: Alphas) -> Claim:
    """What an effect shows with what may be spent on showing it.

    Args:
        metric: What was measured; a difference within its slack never counts.
        base: Level of the baseline, in the metric's unit.
        worse: The log effect, positive where worse.
        margin: The log effect that the tolerance allows.
        alphas: What may be spent.
    """
    difference = base * relative(sign(metric) * worse.effect)
    within_slack = metric.slack > 0 and abs(difference) <= metric.slack
    if alphas.slower is not None and not within_slack:  # noqa: SIM102 - one claim, one block
        if worse.bounds(alphas.slower)[0] > margin:
            return "slower"
    if alphas.within is not None:
        if within_slack:
            return "slack"
        high = worse.bounds(alphas.within)[1]
        if high < -margin:
            return "improved"
        if high < margin:
            return "within"
    return "open"


U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Walk:
    """Where the rule stands after all the units that it could use.

    Attributes:
        looks: All looks, in their order.
        wants: The kind of unit to measure next.
        screened: Screening units behind the last look.
        confirmed: Confirmation units behind it.
        within: The last look that showed the build to be within tolerance.
    """

    looks: tuple[Look, ...]
    wants: Phase | None
    screened: int
    confirmed: int = 0
    within: Look | None = None

    @property
    def telling(self) -> Look:
        """The look that the verdict states: the last, unless only an earlier one made a claim."""
        last = self.looks[-1]
        return self.within if last.claim == "open" and self.within is not None else last


def walk(
    plan: Plan,
    margin: float,
    screen: Sequence[U],
    confirm: Sequence[U],
    look: Callable[[Phase, Sequence[U], Alphas], Look],
) -> Walk:
    """Walk through the units until the rule ends or has used them up.

    Args:
        plan: Numbers of units and error probabilities.
        margin: The log effect that the tolerance allows.
        screen: Screening units, in the order in which they were measured.
        confirm: Confirmation units, likewise.
        look: Judges units; the phase says whether they are the pool or the confirmation alone.

    Returns:
        The looks and what is wanted next. Units beyond the end are not looked at.
    """
    looks: list[Look] = []
    within: Look | None = None
    given = min(len(screen), plan.max_screen)
    for count in range(min(plan.first_screen, plan.first_pass), given + 1):
        alphas = Alphas.of(
            plan.screen_part(count) if count >= plan.first_screen else None,
            plan.pass_part(count) if count >= plan.first_pass else None,
        )
        seen = look("screen", screen[:count], alphas)
        looks.append(seen)
        if seen.claim == "slower":
            return _confirm(plan, looks, screen[:count], confirm, look)
        if seen.claim == "within" and seen.worse.effect < -margin - ROUNDING:
            # PASS is shown, but the build looks better by more than the tolerance, and the next
            # units may show that. What was shown stays shown.
            within = seen
        elif seen.claim != "open":
            return Walk(tuple(looks), None, count)
        if within is not None and count >= IMPROVED_UNTIL:
            return Walk(tuple(looks), None, count, within=within)
    wants: Phase | None = "screen" if given < plan.max_screen else None
    return Walk(tuple(looks), wants, given, within=within)


def _confirm(
    plan: Plan,
    looks: list[Look],
    screened: Sequence[U],
    confirm: Sequence[U],
    look: Callable[[Phase, Sequence[U], Alphas], Look],
) -> Walk:
    given = min(len(confirm), plan.max_confirm)
    for count in range(1, given + 1):
        fresh = confirm[:count]
        if count >= plan.first_confirm:
            looks.append(look("confirm", fresh, Alphas.of(plan.confirm_part(count), None)))
            if looks[-1].claim == "slower":
                return Walk(tuple(looks), None, len(screened), count)
        pool = [*screened, *fresh]
        if len(pool) >= plan.first_pass:
            looks.append(look("screen", pool, Alphas.of(None, plan.pass_part(len(pool)))))
            if looks[-1].claim != "open":
                return Walk(tuple(looks), None, len(screened), count)
    wants: Phase | None = "confirm" if given < plan.max_confirm else None
    return Walk(tuple(looks), wants, len(screened), given)


def verdict_of(
    walk: Walk,
    bare: Draft,
    evidence: Mapping[str, object],
    unit: str,
    lacking: Callable[[Look], tuple[object, str]],
) -> Verdict:
    """The verdict of a walk with at least one look.

    Args:
        walk: The walk.
        bare: Metric, tolerance and samples.
        evidence: What is to be recorded beside the looks.
        unit: ``block`` or ``launch``.
        lacking: How many units would make an open look clear, as JSON and in words.
    """
    metric, look = bare.metric, walk.telling
    # A confirmed slowdown is stated from the confirmation alone: the screening units were
    # selected for looking slow.
    alpha = look.level_alpha
    log_change = sign(metric) * look.worse.effect
    change = relative(log_change)
    draft = replace(
        bare,
        base=look.base,
        new=look.base * (1 + change),
        change=change,
        interval=interval_of(look.worse, sign(metric), alpha),
    )
    more: dict[str, object] = {
        **evidence,
        "looks": [one.to_json() for one in walk.looks],
        "telling_look": walk.looks.index(look),
        "level": 1 - 2 * alpha,
    }
    found = finding(metric.name, change, draft.interval, 1 - 2 * alpha)
    if look.aside:
        found += f" without {plural(look.aside, unit)} far off the others"
    allowed = percent(draft.tolerance)
    fresh = f"fresh {unit}{'es' if unit.endswith('ch') else 's'}"
    if look.claim == "slower" and walk.wants is None:
        outcome = Outcome.REGRESSION
        reason = f"{found}, confirmed on {fresh}, {BEYOND.format(tolerance=allowed)}"
    elif walk.wants == "confirm":
        outcome = Outcome.INCONCLUSIVE
        reason = f"{found}, a slowdown that waits for its confirmation on {fresh}"
    elif look.claim == "improved":
        outcome = Outcome.IMPROVED
        reason = f"{found}, {STALE.format(tolerance=allowed)}"
    elif look.claim == "within":
        outcome = Outcome.PASS
        reason = f"{found}, shown to be within the tolerance of {allowed}"
    elif look.claim == "slack":
        outcome = Outcome.PASS
        reason = within_slack_text(metric, draft.base or 0.0, draft.new or 0.0)
    else:
        outcome = Outcome.INCONCLUSIVE
        more["missing"], advice = lacking(look)
        suspected = f", suspected but not confirmed on {fresh}" if walk.confirmed else ""
        reason = (
            f"{found} after {plural(look.units, unit)}, neither within nor beyond the tolerance "
            f"of {allowed}{suspected}: {advice}"
        )
    return draft.verdict(outcome, reason, more)


def finish(decision: Decision) -> Decision:
    """The decision when no further unit will be measured; a final one is returned as it is."""
    if decision.wants is None:
        return decision
    verdict = decision.verdict
    if verdict.outcome is Outcome.PASS:
        return Decision(verdict, None)
    if verdict.change is None:
        reason = f"{verdict.metric}: the budget was spent before the first look"
    else:
        reason = f"{verdict.reason}; the budget was spent"
    return Decision(replace(verdict, reason=f"{reason}: raise --llmperf-budget"), None)
