"""Stored: launches measured now against recorded ones, looked at more than once.

The caller measures the launch that ``decide_stored`` wants and asks again, as side by side::

    decision = decide_stored(metric, base, screen, confirm, tolerance=0.05, prior=prior)
    while decision.wants is not None:
        launch = ...  # the build under test, started afresh
        (screen if decision.wants == "screen" else confirm).append(launch)
        decision = decide_stored(metric, base, screen, confirm, tolerance=0.05, prior=prior)

**Error bounds.** Let the true effect be a slowdown no larger than the tolerance, and the log
values of launches independent and normal with one variance, recorded and new.

- *Screening* raises a suspicion with probability ``screen_alpha`` at most.
- *Confirmation* compares fresh launches with **the same recorded ones**. Where the recorded
  mean happens to lie too high, both looks are wrong together, so their probabilities must not be
  multiplied. What holds: given the recorded launches, the fresh ones do not depend on
  when screening stopped, so P(a confirmation was asked for and is wrong) is at most
  P(a look at so many fresh launches is wrong) = ``confirm_alpha``. So
  P(false REGRESSION) <= min(``screen_alpha``, ``confirm_alpha``): 0.005 for ``stored_plan``.
- *PASS* of a build that is slower by the tolerance or more: ``pass_alpha`` at most.

None of this covers a machine that was faster on the day of the record. A gate therefore lets blocks
decide what the first look suspects or leaves open, where it can start the baseline's build.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from pytest_llmperf.judge._common import (
    Draft,
    Launches,
    bounded_exp,
    margin_of,
    odd_ones,
    plural,
    prior_json,
    sign,
    without_logs,
    would_tell,
)
from pytest_llmperf.judge.decide import failed, missing
from pytest_llmperf.judge.sequential import (
    Alphas,
    Decision,
    Look,
    Phase,
    Plan,
    claim_of,
    finish,
    verdict_of,
    walk,
)
from pytest_llmperf.judge.statistics import (
    Array,
    Prior,
    difference_estimate,
    log_means,
    smallest,
)
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

FEWEST_RECORDED = 3
"""Fewest recorded launches that say anything about their own variance."""

MOST_LAUNCHES = 64
"""Most launches that an INCONCLUSIVE verdict asks for; nobody waits for more."""


def stored_plan(launches: int = 3) -> Plan:
    """The plan of a comparison with recorded launches.

    Args:
        launches: Fresh starts before the first look, and before the first look of a confirmation;
            up to twice as many of each are measured.

    Raises:
        ValueError: Fewer than one.
    """
    return Plan(
        first_screen=launches,
        first_pass=launches,
        max_screen=2 * launches,
        first_confirm=launches,
        max_confirm=2 * launches,
        screen_alpha=0.02,
        confirm_alpha=0.005,
        pass_alpha=0.05,
        shared_base=True,
    )


DEFAULT_STORED = stored_plan()


def decide_stored(
    metric: Metric,
    base: Launches,
    new_screen: Launches,
    new_confirm: Launches,
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_STORED,
    last: bool = False,
) -> Decision:
    """Judge the new launches so far and say which launch is wanted next.

    A pure function: the rule is walked through from the first launch, and launches beyond a
    final verdict are not looked at. With y the median log of a launch, s the sign that makes worse
    positive and m = ln(1 + tolerance), the statistic of a look at K recorded and L new launches is
    T = (s (mean y_new - mean y_base) - m) / (s̃ √(1/K + 1/L)). The variance s̃² is pooled over
    both arms, K - 1 + L - 1 degrees of freedom, and moderated by the prior (Smyth 2004).

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
    if len(base) < FEWEST_RECORDED and (prior is None or prior.d0 == 0):
        evidence = _evidence(bare, margin, prior, plan, len(new_screen))
        return Decision(_too_few(bare, evidence), None)
    walked = walk(
        plan,
        margin,
        log_means(new_screen).tolist(),
        log_means(new_confirm).tolist(),
        _Judge(metric, margin, prior, log_means(base)).look,
    )
    used = [*new_screen[: walked.screened], *new_confirm[: walked.confirmed]]
    bare = replace(bare, new_launches=used)
    evidence = _evidence(bare, margin, prior, plan, walked.screened)
    if walked.looks:
        verdict = verdict_of(walked, bare, evidence, "launch", partial(_lacking, len(base)))
    else:
        reason = (
            f"{metric.name}: {plural(len(used), 'launch')} of the build under test measured, the "
            f"first look needs {plan.first_screen}"
        )
        verdict = bare.verdict(Outcome.INCONCLUSIVE, reason, evidence)
    decision = Decision(verdict, walked.wants)
    return finish(decision) if last else decision


@dataclass(frozen=True, slots=True)
class _Judge:
    """What stays the same from look to look."""

    metric: Metric
    margin: float
    prior: Prior | None
    base: Array

    def look(self, phase: Phase, launches: Sequence[float], alphas: Alphas) -> Look:
        metric, margin, prior, base = self.metric, self.margin, self.prior, self.base
        direction = sign(metric)
        new = np.asarray(launches)
        # Two recorded launches that are odd for the better may be the baseline's own speed, and a
        # build that lost it must not pass: what is worse in the one arm is better in the other.
        odd_base = odd_ones((-direction * base).tolist(), prior, alphas.odd / 2)
        odd_new = odd_ones((direction * new).tolist(), prior, alphas.odd / 2)
        kept_base, kept_new = _without(base, odd_base), _without(new, odd_new)
        estimate = difference_estimate(kept_base, kept_new, prior)
        worse = replace(estimate, effect=direction * estimate.effect)
        level = bounded_exp(float(kept_base.mean()))
        return Look(
            phase,
            len(new),
            {"base": odd_base, "new": odd_new},
            level,
            worse,
            claim_of(metric, level, worse, margin, alphas),
            alphas,
            margin,
        )


def _without(values: Array, indices: Sequence[int]) -> Array:
    kept: Array = values[[i for i in range(len(values)) if i not in indices]]
    return kept


def _lacking(recorded: int, look: Look) -> tuple[dict[str, int] | None, str]:
    """How many launches are missing for a clear verdict, None for too many; and in words.

    More launches of the build under test if they can do it, more of both where the few recorded
    ones are the bottleneck, None if ``MOST_LAUNCHES`` of each are too few.
    """
    kept = recorded - len(look.set_aside["base"]), look.units - len(look.set_aside["new"])
    lack = _missing(look, kept)
    if lack is None:
        return None, f"even {MOST_LAUNCHES} launches of each build would hardly tell"
    parts = []
    if lack["base"]:
        parts.append(f"{lack['base']} more of the baseline (--update-baselines on its build)")
    if lack["new"]:
        parts.append(f"{lack['new']} more of the build under test")
    return lack, f"about {' and '.join(parts)} are missing, counted in launches"


def _missing(look: Look, counts: tuple[int, int]) -> dict[str, int] | None:
    """Launches missing until an effect this far from the margin is clear with ``POWER``."""
    k, n = counts

    def enough(k_then: int, n_then: int) -> bool:
        shrink = math.sqrt((1 / k_then + 1 / n_then) / (1 / k + 1 / n))
        more = k_then - k + n_then - n
        return would_tell(look.worse, look.margin, look.needed_alpha, more=more, shrink=shrink)

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


def _too_few(bare: Draft, evidence: dict[str, object]) -> Verdict:
    recorded = len(bare.base_launches)
    lack = FEWEST_RECORDED - recorded
    reason = (
        f"{plural(recorded, 'launch')} of the baseline cannot tell a change in "
        f"{bare.metric.name} from noise: record {lack} more with --update-baselines on the "
        "baseline's build"
    )
    return bare.verdict(
        Outcome.INCONCLUSIVE, reason, {**evidence, "missing": {"base": lack, "new": 0}}
    )


def _evidence(
    bare: Draft, margin: float, prior: Prior | None, plan: Plan, screened: int
) -> dict[str, object]:
    return {
        "mode": "stored",
        "margin": margin,
        "prior": prior_json(prior),
        "plan": asdict(plan),
        "false_regression_bound": plan.false_regression_bound,
        "base_samples": [list(launch) for launch in bare.base_launches],
        "screen_samples": [list(launch) for launch in bare.new_launches[:screened]],
        "confirm_samples": [list(launch) for launch in bare.new_launches[screened:]],
    }
