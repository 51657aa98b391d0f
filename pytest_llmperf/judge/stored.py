"""Stored: launches measured now against recorded ones, looked at more than once.

The caller measures the launch that ``decide_stored`` wants and asks again, as side by side::

    decision = decide_stored(metric, base, screen, confirm, tolerance=0.05, prior=prior)
    while decision.wants is not None:
        launch = ...  # the build under test, started afresh
        (screen if decision.wants == "screen" else confirm).append(launch)
        decision = decide_stored(metric, base, screen, confirm, tolerance=0.05, prior=prior)

**Error bounds.** Let the true effect be a slowdown no larger than the tolerance, and the log
values of launches independent and normal with one variance, recorded and new.

- *Screening* asks for a confirmation at one of ``screen_looks`` looks, each with an equal part
  of ``screen_alpha``, so with ``screen_alpha`` at most in all (Bonferroni).
- *Confirmation* compares fresh launches with **the same recorded ones**. Where the recorded
  mean happens to lie too high, both looks are wrong together, so their probabilities must not be
  multiplied. What holds: given the recorded launches, the fresh ones do not depend on
  when screening stopped, so P(a confirmation was asked for and is wrong) is at most
  P(a look at so many fresh launches is wrong) = ``confirm_alpha``. With one confirmation
  P(false REGRESSION) <= min(``screen_alpha``, ``confirm_alpha``): 0.005 for ``DEFAULT_STORED``.
- *PASS* of a build that is slower by the tolerance or more: the new launches in the order of
  time are looked at after each of their possible numbers, each time with a part of
  ``pass_alpha``, so with ``pass_alpha`` at most in all.

None of this covers a machine that was faster on the day of the record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from pytest_llmperf.judge._common import (
    BEYOND,
    ROUNDING,
    STALE,
    Draft,
    Launches,
    bounded_exp,
    finding,
    interval_of,
    margin_of,
    odd_ones,
    percent,
    plural,
    prior_json,
    relative,
    sign,
    within_slack_text,
    without_logs,
)
from pytest_llmperf.judge.decide import FEWEST_RECORDED, failed, lacking_launches, missing
from pytest_llmperf.judge.sequential import Claim, Decision, Phase
from pytest_llmperf.judge.statistics import (
    Array,
    Estimate,
    Prior,
    difference_estimate,
    log_means,
    student_t_ppf,
)
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """How many launches are measured and how errors are spent; see the module's bounds.

    Attributes:
        min_launches: New launches before the first look.
        max_launches: Most screening launches.
        confirm_launches: Fresh launches of the one confirmation.
        screen_alpha: Probability that a build within tolerance is ever confirmed.
        confirm_alpha: Probability that a confirmation is wrong.
        pass_alpha: Probability that a build slower by the tolerance passes.
        odd_alpha: Probability that a look sets aside launches of one build that are like its
            others. It is taken, for both builds, off what the look may spend on its claims.

    Raises:
        ValueError: A number out of range.
    """

    min_launches: int = 3
    max_launches: int = 6
    confirm_launches: int = 3
    screen_alpha: float = 0.02
    confirm_alpha: float = 0.005
    pass_alpha: float = 0.05
    odd_alpha: float = 1e-4

    def __post_init__(self) -> None:
        if not 1 <= self.min_launches <= self.max_launches:
            raise ValueError("plan: min_launches must lie between 1 and max_launches")
        if self.confirm_launches < 1:
            raise ValueError("plan: one launch is the least that confirms")
        for name in ("screen_alpha", "confirm_alpha", "pass_alpha"):
            if not 0 < getattr(self, name) < 0.5:  # noqa: PLR2004 - a bound needs less
                raise ValueError(f"plan: {name} must lie between 0 and 0.5")
        spendable = (
            self.screen_look_alpha,
            self.confirm_look_alpha,
            self.pass_look_alpha(self.min_launches),
            self.pass_look_alpha(self.max_launches + 1),
        )
        if not self.odd_alpha > 0 or min(spendable) <= 0:
            raise ValueError(
                "plan: odd_alpha must be positive, and smaller than half of what each look may "
                "spend"
            )

    @property
    def screen_looks(self) -> int:
        """Looks that may ask for the confirmation."""
        return self.max_launches - self.min_launches + 1

    @property
    def screen_look_alpha(self) -> float:
        """Probability spent at one look that may ask for confirmation."""
        return self.screen_alpha / self.screen_looks - 2 * self.odd_alpha

    @property
    def confirm_look_alpha(self) -> float:
        """Probability spent at the confirmation."""
        return self.confirm_alpha - 2 * self.odd_alpha

    def pass_look_alpha(self, launches: int) -> float:
        """Probability spent at a look at so many new launches that may pass.

        Nine tenths of ``pass_alpha`` go in equal parts to the numbers that screening alone can
        reach, one tenth to the larger ones, which only a refuted suspicion leads to.
        """
        if launches <= self.max_launches:
            share = 0.9 / self.screen_looks
        else:
            share = 0.1 / self.confirm_launches
        return share * self.pass_alpha - 2 * self.odd_alpha

    @property
    def false_regression_bound(self) -> float:
        """Upper bound of P(REGRESSION) for a build within tolerance; not a product, see above."""
        return min(self.screen_alpha, self.confirm_alpha)


DEFAULT_STORED = StoredPlan()


@dataclass(frozen=True, slots=True)
class _Look:
    """One look, all values oriented so that positive is worse."""

    phase: Phase
    launches: int
    set_aside_base: tuple[int, ...]
    set_aside_new: tuple[int, ...]
    base: float
    worse: Estimate
    kept: tuple[int, int]
    claim: Claim
    slower_alpha: float | None
    within_alpha: float | None
    margin: float

    def to_json(self) -> dict[str, object]:
        df = self.worse.df
        alphas = {"slower": self.slower_alpha, "within": self.within_alpha}
        return {
            "phase": self.phase,
            "launches": self.launches,
            "set_aside_base": list(self.set_aside_base),
            "set_aside_new": list(self.set_aside_new),
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


@dataclass(frozen=True, slots=True)
class _Judge:
    """What stays the same from look to look."""

    metric: Metric
    base: Array
    margin: float
    prior: Prior | None
    plan: StoredPlan

    def look(
        self,
        phase: Phase,
        new: Array,
        slower_alpha: float | None,
        within_alpha: float | None,
    ) -> _Look:
        """Look at these new launches; an alpha of None rules its claims out."""
        direction = sign(self.metric)
        # Two recorded launches that are odd for the better may be the baseline's own speed, and a
        # build that lost it must not pass: what is worse in the one arm is better in the other.
        odd_base = odd_ones((-direction * self.base).tolist(), self.prior, self.plan.odd_alpha)
        odd_new = odd_ones((direction * new).tolist(), self.prior, self.plan.odd_alpha)
        kept_base, kept_new = _without(self.base, odd_base), _without(new, odd_new)
        estimate = difference_estimate(kept_base, kept_new, self.prior)
        worse = replace(estimate, effect=direction * estimate.effect)
        base = bounded_exp(float(kept_base.mean()))
        difference = base * relative(estimate.effect)
        within_slack = self.metric.slack > 0 and abs(difference) <= self.metric.slack
        claim: Claim = "open"
        if within_alpha is not None:
            high = worse.bounds(within_alpha)[1]
            if within_slack:
                claim = "slack"
            elif high < -self.margin:
                claim = "improved"
            elif high < self.margin:
                claim = "within"
        if (
            slower_alpha is not None
            and not within_slack
            and worse.bounds(slower_alpha)[0] > self.margin
        ):
            claim = "slower"
        return _Look(
            phase,
            len(new),
            odd_base,
            odd_new,
            base,
            worse,
            (len(kept_base), len(kept_new)),
            claim,
            slower_alpha,
            within_alpha,
            self.margin,
        )


@dataclass(frozen=True, slots=True)
class _Walk:
    """Where the rule stands; ``within`` is the last look that showed PASS."""

    looks: tuple[_Look, ...]
    wants: Phase | None
    within: _Look | None = None

    @property
    def telling(self) -> _Look:
        """The look that the verdict states: the last, unless only an earlier one made a claim."""
        last = self.looks[-1]
        return self.within if last.claim == "open" and self.within is not None else last


def decide_stored(
    metric: Metric,
    base: Launches,
    new_screen: Launches,
    new_confirm: Launches,
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: StoredPlan = DEFAULT_STORED,
    last: bool = False,
) -> Decision:
    """Judge the new launches so far and say which launch is wanted next.

    A pure function: the rule is walked through from the first launch, and launches beyond a
    final verdict are not looked at. The statistic is that of ``compare_stored``. A confirmation
    that does not confirm joins the screening launches, and nothing is confirmed twice.

    Args:
        metric: What was measured.
        base: Samples of each recorded launch, in the metric's unit.
        new_screen: Samples of each screening launch of the build under test, in the order of
            time.
        new_confirm: Those of the confirmation, likewise.
        tolerance: Relative change for the worse that is allowed.
        prior: What is known of the sd of one launch's log value; without it at least
            ``FEWEST_RECORDED`` recorded launches are needed.
        plan: Numbers of launches and error probabilities.
        last: No further launch will come: the decision is final.

    Returns:
        The verdict so far and the kind of launch to measure next, None where it is final.

    Raises:
        ValueError: A tolerance that is negative or not finite.
    """
    margin = margin_of(tolerance)
    if not base:
        reason = "the baseline has no launches: record it with --update-baselines"
        return Decision(missing(metric, reason), None)
    given = [*new_screen, *new_confirm]
    bare = Draft(metric, "stored", tolerance, base, given)
    if given and (verdict := without_logs(bare)) is not None:
        return Decision(verdict, None)
    if not given:
        # The sides are checked together, so there is nothing to say before the first launch.
        reason = "no launch of the build under test was measured"
        return Decision(failed(metric, reason), None if last else "screen")
    judge = _Judge(metric, log_means(base), margin, prior, plan)
    if len(base) < FEWEST_RECORDED and (prior is None or prior.d0 == 0):
        return Decision(_too_few(judge, bare), None)
    walk = _walk(judge, log_means(new_screen), log_means(new_confirm))
    decision = Decision(_verdict(judge, walk, bare, len(new_screen)), walk.wants)
    return _finish(decision) if last else decision


def _without(values: Array, indices: Sequence[int]) -> Array:
    kept: Array = values[[i for i in range(len(values)) if i not in indices]]
    return kept


def _walk(judge: _Judge, screen: Array, confirm: Array) -> _Walk:
    plan = judge.plan
    looks: list[_Look] = []
    within: _Look | None = None
    refuted = 0
    for count in range(plan.min_launches, min(len(screen), plan.max_launches) + 1):
        while True:
            # Before the refutation no confirmation launch is looked at.
            pool = screen[:count]
            if refuted:
                pool = np.concatenate([pool, confirm[: plan.confirm_launches]])
            look = judge.look(
                "screen",
                pool,
                None if refuted else plan.screen_look_alpha,
                plan.pass_look_alpha(len(pool)),
            )
            looks.append(look)
            if look.claim == "open":
                break
            if look.claim == "within" and look.worse.effect < -judge.margin - ROUNDING:
                # IMPROVED says more than PASS, and the launches that are left may show it.
                within = look
                break
            if look.claim != "slower":
                return _Walk(tuple(looks), None)
            fresh = confirm[: plan.confirm_launches]
            if len(fresh) < plan.confirm_launches:
                return _Walk(tuple(looks), "confirm", within)
            looks.append(judge.look("confirm", fresh, plan.confirm_look_alpha, None))
            if looks[-1].claim == "slower":
                return _Walk(tuple(looks), None)
            refuted = 1
    return _Walk(tuple(looks), "screen" if len(screen) < plan.max_launches else None, within)


def _too_few(judge: _Judge, bare: Draft) -> Verdict:
    lack = FEWEST_RECORDED - len(judge.base)
    reason = (
        f"{plural(len(judge.base), 'launch')} of the baseline cannot tell a change in "
        f"{judge.metric.name} from noise: record {lack} more with --update-baselines on the "
        "baseline's build"
    )
    evidence = _evidence(judge, bare, len(bare.new_launches)) | {
        "missing": {"base": lack, "new": 0},
    }
    return bare.verdict(Outcome.INCONCLUSIVE, reason, evidence)


def _evidence(judge: _Judge, bare: Draft, screened: int) -> dict[str, object]:
    return {
        "mode": "stored",
        "margin": judge.margin,
        "prior": prior_json(judge.prior),
        "plan": asdict(judge.plan),
        "false_regression_bound": judge.plan.false_regression_bound,
        "base_samples": [list(launch) for launch in bare.base_launches],
        "screen_samples": [list(launch) for launch in bare.new_launches[:screened]],
        "confirm_samples": [list(launch) for launch in bare.new_launches[screened:]],
    }


def _verdict(judge: _Judge, walk: _Walk, bare: Draft, screened: int) -> Verdict:
    metric, plan = judge.metric, judge.plan
    evidence = _evidence(judge, bare, screened)
    evidence["looks"] = [look.to_json() for look in walk.looks]
    if not walk.looks:
        reason = (
            f"{metric.name}: {plural(len(bare.new_launches), 'launch')} of the build under test "
            f"measured, the first look needs {plan.min_launches}"
        )
        return bare.verdict(Outcome.INCONCLUSIVE, reason, evidence)
    look = walk.telling
    alpha = plan.confirm_look_alpha
    if look.phase == "screen":
        alpha = plan.pass_look_alpha(look.launches)
    log_change = sign(metric) * look.worse.effect
    draft = replace(
        bare,
        base=look.base,
        new=look.base * (1 + relative(log_change)),
        change=relative(log_change),
        interval=interval_of(look.worse, sign(metric), alpha),
    )
    evidence |= {"level": 1 - 2 * alpha, "telling_look": walk.looks.index(look)}
    return _worded(judge, walk, draft, evidence, alpha)


def _worded(
    judge: _Judge, walk: _Walk, draft: Draft, evidence: dict[str, object], alpha: float
) -> Verdict:
    look, metric = walk.telling, judge.metric
    found = finding(metric.name, draft.change, draft.interval, 1 - 2 * alpha)
    aside = len(look.set_aside_base) + len(look.set_aside_new)
    if aside:
        found += f" without {plural(aside, 'launch')} far off the others"
    allowed = percent(draft.tolerance)
    if walk.wants == "confirm":
        outcome = Outcome.INCONCLUSIVE
        reason = f"{found}, a slowdown that waits for its confirmation on fresh launches"
    elif look.claim == "slower":
        outcome = Outcome.REGRESSION
        reason = f"{found}, confirmed on fresh launches, {BEYOND.format(tolerance=allowed)}"
    elif look.claim == "improved":
        outcome, reason = Outcome.IMPROVED, f"{found}, {STALE.format(tolerance=allowed)}"
    elif look.claim == "within":
        outcome = Outcome.PASS
        reason = f"{found}, shown to be within the tolerance of {allowed}"
    elif look.claim == "slack":
        outcome = Outcome.PASS
        reason = within_slack_text(metric, draft.base or 0.0, draft.new or 0.0)
    else:
        outcome = Outcome.INCONCLUSIVE
        distance = abs(look.worse.effect - judge.margin)
        evidence["missing"], advice = lacking_launches(distance, look.worse, look.kept, alpha)
        refuted = any(one.phase == "confirm" for one in walk.looks)
        before = ", a suspicion that fresh launches did not confirm" if refuted else ""
        reason = f"{found}, neither within nor beyond the tolerance of {allowed}{before}: {advice}"
    return draft.verdict(outcome, reason, evidence)


def _finish(decision: Decision) -> Decision:
    if decision.wants is None or decision.verdict.outcome is Outcome.PASS:
        return Decision(decision.verdict, None)
    verdict = decision.verdict
    reason = f"{verdict.reason}; the budget was spent: raise --llmperf-budget"
    return Decision(replace(verdict, reason=reason), None)
