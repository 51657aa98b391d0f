"""Side by side: screen block by block, confirm a suspicion on fresh blocks.

In a block both builds are started afresh and asked the same prompts in coin-flipped order, so
a block gives one log effect in which the drift of the host cancels. The caller measures the
block that ``decide_side_by_side`` wants and asks again::

    decision = decide_side_by_side(metric, screen, confirm, tolerance=0.05)
    while decision.wants is not None:
        block = ...  # both builds, started afresh
        (screen if decision.wants == "screen" else confirm).append(block)
        decision = decide_side_by_side(metric, screen, confirm, tolerance=0.05)

Several metrics may share blocks: each keeps its own two lists, and a block that one metric
screens may confirm for another.

**Odd starts.** About one start in forty runs at 40 % of its speed. Where a block is so far from
the others of a look that equal blocks would hardly ever be (``statistics.set_aside``), the look
does without it and says so. Fewer than a third of the blocks can be set aside, none of a
confirmation of two, and never two that are odd for the worse: what comes twice may be the build.

Simulated with one odd start in forty, 1,000 runs a row, tolerance 5 %, without and with it
(all of the table: ``docs/measurements.md``)::

    slowdown   REGRESSION      PASS            INCONCLUSIVE
    0 %         0.0 ->  0.0 %  81.4 -> 90.8 %  18.5 ->  9.1 %
    10 %       43.2 -> 55.2 %   0.1 ->  0.0 %  56.7 -> 44.7 %
    35 %       92.2 -> 99.2 %   0.0 ->  0.0 %   7.8 ->  0.7 %

**IMPROVED** says more than PASS. Where a look shows the build to be within tolerance while its
mean lies beyond the tolerance for the better, screening goes on; what was shown stays shown.

**Error bounds.** Let the true effect be a slowdown no larger than the tolerance, and block
effects independent and normal, with the variance that the prior says.

- *Screening.* Confirmation is first asked for at one of ``max_blocks`` looks, each with
  probability ``screen_alpha / max_blocks`` at most (Bonferroni), so with ``screen_alpha`` at
  most in all. Each such part holds ``odd_alpha``, the probability that the look sets aside
  what it should not, and the claim gets the rest.
- *Confirmation* is judged on its own fresh blocks, so whatever led to it, it is wrong with
  probability ``confirm_alpha`` at most. The second confirmation, if any, comes after the
  first. So P(false REGRESSION) <= max_confirmations * screen_alpha * confirm_alpha, which is
  0.001 for ``DEFAULT_PLAN``, for each metric and whatever the dependence between metrics.
- *PASS* of a build that is slower by the tolerance or more: the pool is looked at after each
  of its possible sizes, from ``min_blocks`` to ``max_blocks`` and all confirmation blocks, each
  time with a part of ``pass_alpha``, so with ``pass_alpha`` at most in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from pytest_llmperf.judge._common import (
    BEYOND,
    ROUNDING,
    STALE,
    Draft,
    bounded_exp,
    finding,
    interval_of,
    margin_of,
    odd_ones,
    percent,
    plural,
    relative,
    sign,
    within_slack_text,
    without_logs,
)
from pytest_llmperf.judge.statistics import (
    MOST_FLIPPED,
    Estimate,
    Prior,
    block_effect,
    log_means,
    mean_estimate,
    sign_flip_p,
    smallest,
    student_t_ppf,
)
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric

Phase = Literal["screen", "confirm"]
Claim = Literal["slower", "improved", "within", "slack", "open"]

DEFAULT_BLOCK_PRIOR = Prior(s0=0.025, d0=4.0)
"""Spread of a block's log effect where none was calibrated.

Measured on a shared 2-core machine: 60 blocks, both equal builds launched afresh, four
coin-flipped pairs each: sd 2.4 %. Four degrees of freedom let the blocks at hand overrule it.
"""

_MOST_BLOCKS = 64
_POWER = 0.8


@dataclass(frozen=True, slots=True)
class Block:
    """Samples of one block: one fresh start of each build.

    Attributes:
        base: Samples of the baseline build, in the metric's unit.
        new: Samples of the build under test.
        paired: Sample i of both answered the same prompt, one right after the other.
        order: The order in which the builds were asked, for the record.

    Raises:
        ValueError: A side without samples, or pairs that do not match.
    """

    base: tuple[float, ...]
    new: tuple[float, ...]
    paired: bool
    order: str

    def __post_init__(self) -> None:
        if not self.base or not self.new:
            raise ValueError("a block needs samples of both builds")
        if self.paired and len(self.base) != len(self.new):
            raise ValueError(
                f"a paired block needs as many samples of each build: {len(self.base)} of the "
                f"baseline, {len(self.new)} of the build under test"
            )


@dataclass(frozen=True, slots=True)
class SequentialPlan:
    """How many blocks are measured and how errors are spent; see the module's bounds.

    Attributes:
        min_blocks: Fewest blocks behind a PASS or IMPROVED. A suspicion needs only one.
        max_blocks: Most screening blocks.
        confirm_blocks: Fresh blocks of one confirmation.
        max_confirmations: Most confirmations.
        screen_alpha: Probability that a build within tolerance is ever confirmed.
        confirm_alpha: Probability that one confirmation is wrong.
        pass_alpha: Probability that a build slower by the tolerance passes.
        odd_alpha: Probability that a look sets aside blocks that are like the others. It is
            taken off what the look may spend on its claims.

    Raises:
        ValueError: A number out of range.
    """

    min_blocks: int = 2
    max_blocks: int = 6
    confirm_blocks: int = 2
    max_confirmations: int = 2
    screen_alpha: float = 0.02
    confirm_alpha: float = 0.025
    pass_alpha: float = 0.05
    odd_alpha: float = 2e-4

    def __post_init__(self) -> None:
        if not 1 <= self.min_blocks <= self.max_blocks:
            raise ValueError("plan: min_blocks must lie between 1 and max_blocks")
        if self.confirm_blocks < 1 or self.max_confirmations < 1:
            raise ValueError("plan: one confirmation of one block is the least")
        for name in ("screen_alpha", "confirm_alpha", "pass_alpha"):
            if not 0 < getattr(self, name) < 0.5:  # noqa: PLR2004 - a bound needs less
                raise ValueError(f"plan: {name} must lie between 0 and 0.5")
        smallest_pass = min(self.pass_look_alpha(n) for n in (1, self.max_blocks + 1))
        if not self.odd_alpha > 0 or min(self.screen_look_alpha, smallest_pass) <= 0:
            raise ValueError(
                "plan: odd_alpha must be positive, and smaller than what each look may spend"
            )

    @property
    def screen_look_alpha(self) -> float:
        """Probability spent at one look that may ask for confirmation."""
        return self.screen_alpha / self.max_blocks - self.odd_alpha

    def pass_look_alpha(self, blocks: int) -> float:
        """Probability spent at a look at a pool of this size that may pass.

        Nine tenths of ``pass_alpha`` go in equal parts to the pools that screening alone can
        reach, one tenth to the larger ones, which only a refuted suspicion leads to.
        """
        if blocks <= self.max_blocks:
            share = 0.9 / (self.max_blocks - self.min_blocks + 1)
        else:
            share = 0.1 / (self.max_confirmations * self.confirm_blocks)
        return share * self.pass_alpha - self.odd_alpha

    @property
    def false_regression_bound(self) -> float:
        """Upper bound of P(REGRESSION) for a build within tolerance."""
        return self.max_confirmations * self.screen_alpha * self.confirm_alpha


DEFAULT_PLAN = SequentialPlan()


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict so far and the block that would make it clearer.

    Attributes:
        verdict: Final if ``wants`` is None, else what it is if no more is measured:
            INCONCLUSIVE, or PASS where only IMPROVED is still open.
        wants: The kind of block to measure next.
    """

    verdict: Verdict
    wants: Phase | None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A block and what is judged of it.

    Attributes:
        block: The block.
        effect: Its log effect, positive where the new build is worse.
        base: Log value of its baseline launch.
    """

    block: Block
    effect: float
    base: float


@dataclass(frozen=True, slots=True)
class _Look:
    """One look at blocks, all values oriented so that positive is worse."""

    phase: Phase
    blocks: tuple[_Seen, ...]
    set_aside: tuple[int, ...]
    base: float
    worse: Estimate
    claim: Claim
    slower_alpha: float | None
    within_alpha: float | None
    margin: float

    def to_json(self) -> dict[str, object]:
        df = self.worse.df
        thresholds = {
            name: None if alpha is None else student_t_ppf(1 - alpha, df)
            for name, alpha in (("slower", self.slower_alpha), ("within", self.within_alpha))
        }
        return {
            "phase": self.phase,
            "blocks": len(self.blocks),
            "set_aside": list(self.set_aside),
            "effect": self.worse.effect,
            "se": self.worse.se,
            "df": df if math.isfinite(df) else None,
            "statistic": self.worse.statistic(self.margin),
            "alpha": {"slower": self.slower_alpha, "within": self.within_alpha},
            "threshold": thresholds,
            "claim": self.claim,
        }


@dataclass(frozen=True, slots=True)
class _Judge:
    """What stays the same from look to look."""

    metric: Metric
    margin: float
    prior: Prior
    plan: SequentialPlan

    def look(
        self,
        phase: Phase,
        blocks: Sequence[_Seen],
        slower_alpha: float | None,
        within_alpha: float | None,
    ) -> _Look:
        """Look at these blocks; an alpha of None rules its claims out."""
        direction = sign(self.metric)
        odd = odd_ones([seen.effect for seen in blocks], self.prior, self.plan.odd_alpha)
        kept = [seen for i, seen in enumerate(blocks) if i not in odd]
        worse = mean_estimate([seen.effect for seen in kept], self.prior)
        base = bounded_exp(math.fsum(seen.base for seen in kept) / len(kept))
        difference = base * relative(direction * worse.effect)
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
        slower = (
            slower_alpha is not None
            and not within_slack
            and worse.bounds(slower_alpha)[0] > self.margin
        )
        return _Look(
            phase,
            tuple(blocks),
            odd,
            base,
            worse,
            "slower" if slower else claim,
            slower_alpha,
            within_alpha,
            self.margin,
        )


@dataclass(frozen=True, slots=True)
class _Walk:
    """Where the rule stands after all the blocks it could use.

    Attributes:
        looks: All looks, in their order.
        wants: The kind of block to measure next.
        within: The last look that showed the build to be within tolerance.
    """

    looks: tuple[_Look, ...]
    wants: Phase | None
    within: _Look | None = None

    @property
    def telling(self) -> _Look:
        """The look that the verdict states: the last, unless only an earlier one made a claim."""
        last = self.looks[-1]
        return self.within if last.claim == "open" and self.within is not None else last


def decide_side_by_side(
    metric: Metric,
    screen: Sequence[Block],
    confirm: Sequence[Block],
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: SequentialPlan = DEFAULT_PLAN,
    last: bool = False,
) -> Decision:
    """Judge the blocks so far and say which block is wanted next.

    A pure function: the rule is walked through from the first block, so the same blocks always
    give the same decision. Blocks beyond a final verdict are not looked at.

    REGRESSION: screening and a confirmation on its own both show a slowdown beyond the
    tolerance. PASS and IMPROVED: the pool of all blocks shows it. INCONCLUSIVE: neither after
    ``plan.max_blocks`` screening blocks. A confirmation that does not confirm joins the pool.

    Args:
        metric: What was measured.
        screen: Screening blocks, in the order in which they were measured.
        confirm: Confirmation blocks, likewise.
        tolerance: Relative change for the worse that is allowed.
        prior: What is known of the sd of a block's log effect; ``DEFAULT_BLOCK_PRIOR`` if None.
        plan: Numbers of blocks and error probabilities.
        last: No further block will come: the decision is final.

    Raises:
        ValueError: A tolerance that is negative or not finite, or a prior without degrees of
            freedom, which a look at one block needs.
    """
    prior = DEFAULT_BLOCK_PRIOR if prior is None else prior
    if prior.d0 == 0:
        raise ValueError("prior: a look at one block needs d0 above 0")
    judge = _Judge(metric, margin_of(tolerance), prior, plan)
    blocks = [*screen, *confirm]
    bare = Draft(
        metric, "side-by-side", tolerance, [b.base for b in blocks], [b.new for b in blocks]
    )
    if blocks and (verdict := without_logs(bare)) is not None:
        return Decision(verdict, None)
    walk = _walk(judge, screen, confirm)
    decision = Decision(_verdict(judge, walk, tolerance), walk.wants)
    return finish(decision) if last else decision


def finish(decision: Decision) -> Decision:
    """The decision when no further block will be measured; a final one is returned as it is."""
    if decision.wants is None:
        return decision
    verdict = decision.verdict
    if verdict.outcome is Outcome.PASS:
        return Decision(verdict, None)
    if verdict.change is None:
        reason = f"{verdict.metric}: the budget was spent before the first block was measured"
    elif decision.wants == "confirm":
        reason = (
            f"{_found(verdict)}, and the budget was spent before this slowdown could be "
            "confirmed: raise --llmperf-budget"
        )
    else:
        reason = (
            f"{_found(verdict)}, and the budget was spent before it was shown to be within or "
            f"beyond the tolerance of {percent(verdict.tolerance)}: raise --llmperf-budget"
        )
    return Decision(replace(verdict, reason=reason), None)


def _seen(metric: Metric, block: Block) -> _Seen:
    effect = sign(metric) * block_effect(block.base, block.new, paired=block.paired)
    return _Seen(block, effect, float(log_means([block.base])[0]))


def _walk(judge: _Judge, screen: Sequence[Block], confirm: Sequence[Block]) -> _Walk:
    plan = judge.plan
    looks: list[_Look] = []
    pool: list[_Seen] = []
    rounds = 0
    within: _Look | None = None
    for block in screen[: plan.max_blocks]:
        pool.append(_seen(judge.metric, block))
        while True:
            look = judge.look(
                "screen",
                pool,
                plan.screen_look_alpha if rounds < plan.max_confirmations else None,
                plan.pass_look_alpha(len(pool)) if len(pool) >= plan.min_blocks else None,
            )
            looks.append(look)
            if look.claim == "open":
                break
            if look.claim == "within" and look.worse.effect < -judge.margin - ROUNDING:
                # PASS is shown, but the build looks better by more than the tolerance: IMPROVED
                # says more, and the blocks that are left may show it.
                within = look
                break
            if look.claim != "slower":
                return _Walk(tuple(looks), None)
            start = rounds * plan.confirm_blocks
            fresh = [
                _seen(judge.metric, block) for block in confirm[start : start + plan.confirm_blocks]
            ]
            if len(fresh) < plan.confirm_blocks:
                return _Walk(tuple(looks), "confirm", within)
            looks.append(judge.look("confirm", fresh, plan.confirm_alpha, None))
            if looks[-1].claim == "slower":
                return _Walk(tuple(looks), None)
            pool += fresh
            rounds += 1
    return _Walk(tuple(looks), "screen" if len(screen) < plan.max_blocks else None, within)


def _verdict(judge: _Judge, walk: _Walk, tolerance: float) -> Verdict:
    metric, plan = judge.metric, judge.plan
    used = _used(walk)
    draft = Draft(
        metric,
        "side-by-side",
        tolerance,
        [seen.block.base for _, seen in used],
        [seen.block.new for _, seen in used],
    )
    evidence: dict[str, object] = {
        "mode": "side-by-side",
        "margin": judge.margin,
        "prior": judge.prior.to_json(),
        "plan": asdict(plan),
        "false_regression_bound": plan.false_regression_bound,
        "blocks": [_block_json(phase, seen) for phase, seen in used],
        "looks": [look.to_json() for look in walk.looks],
    }
    if not walk.looks:
        reason = f"{metric.name}: no block was measured yet"
        return draft.verdict(Outcome.INCONCLUSIVE, reason, evidence)
    # A confirmed slowdown is stated from the confirmation alone: the screening blocks were
    # selected for looking slow.
    look = walk.telling
    alpha = plan.pass_look_alpha(len(look.blocks))
    if look.phase == "confirm":
        alpha = plan.confirm_alpha
    change = relative(sign(metric) * look.worse.effect)
    draft = replace(
        draft,
        base=look.base,
        new=look.base * (1 + change),
        change=change,
        interval=interval_of(look.worse, sign(metric), alpha),
    )
    effects = [seen.effect for seen in look.blocks]
    evidence |= {
        "telling_look": walk.looks.index(look),
        "level": 1 - 2 * alpha,
        "sign_flip_p": sign_flip_p(effects) if len(effects) <= MOST_FLIPPED else None,
    }
    return _worded(judge, walk, draft, evidence)


def _worded(judge: _Judge, walk: _Walk, draft: Draft, evidence: dict[str, object]) -> Verdict:
    look = walk.telling
    level = evidence["level"]
    found = finding(
        judge.metric.name,
        draft.change,
        draft.interval,
        level if isinstance(level, float) else 0.0,
    )
    allowed = percent(draft.tolerance)
    if look.set_aside:
        aside = plural(len(look.set_aside), "block")
        found += f" without {aside} of {len(look.blocks)} far off the others"
    if walk.wants == "confirm":
        outcome = Outcome.INCONCLUSIVE
        reason = f"{found}, a slowdown that waits for its confirmation on fresh blocks"
    elif look.claim == "slower":
        outcome = Outcome.REGRESSION
        reason = f"{found}, confirmed on fresh blocks, {BEYOND.format(tolerance=allowed)}"
    elif look.claim == "improved":
        outcome = Outcome.IMPROVED
        reason = f"{found}, {STALE.format(tolerance=allowed)}"
    elif look.claim == "within":
        outcome = Outcome.PASS
        reason = f"{found}, shown to be within the tolerance of {allowed}"
    elif look.claim == "slack":
        outcome = Outcome.PASS
        reason = within_slack_text(judge.metric, draft.base or 0.0, draft.new or 0.0)
    else:
        outcome = Outcome.INCONCLUSIVE
        lack = _lacking(judge, look)
        evidence["missing_blocks"] = lack
        advice = (
            f"even {_MOST_BLOCKS} blocks would hardly tell"
            if lack is None
            else f"about {plural(lack, 'more block')} needed"
        )
        reason = (
            f"{found} after {plural(len(look.blocks), 'block')}, neither within nor beyond the "
            f"tolerance of {allowed}: {advice}"
        )
    return draft.verdict(outcome, reason, evidence)


def _lacking(judge: _Judge, look: _Look) -> int | None:
    """Blocks missing until an effect this far from the margin is clear with ``_POWER``."""
    n = len(look.blocks) - len(look.set_aside)
    variance = look.worse.se**2 * n
    distance = abs(look.worse.effect - judge.margin)
    alpha = judge.plan.pass_look_alpha(n)

    def enough(size: int) -> bool:
        df = look.worse.df + size - n
        reach = student_t_ppf(1 - alpha, df) + student_t_ppf(_POWER, df)
        return distance >= reach * math.sqrt(variance / size)

    size = smallest(enough, n + 1, max(_MOST_BLOCKS, n + 1))
    return None if size is None else size - n


def _used(walk: _Walk) -> list[tuple[Phase, _Seen]]:
    """Every block that was looked at, in the order of the looks."""
    used: list[tuple[Phase, _Seen]] = []
    for look in walk.looks:
        if look.phase == "confirm":
            used += [("confirm", seen) for seen in look.blocks]
        elif len(look.blocks) > len(used):
            used += [("screen", seen) for seen in look.blocks[len(used) :]]
    return used


def _block_json(phase: Phase, seen: _Seen) -> dict[str, object]:
    block = seen.block
    return {
        "phase": phase,
        "base": list(block.base),
        "new": list(block.new),
        "paired": block.paired,
        "order": block.order,
        "effect": seen.effect,
    }


def _found(verdict: Verdict) -> str:
    level = verdict.evidence.get("level")
    return finding(
        verdict.metric,
        verdict.change,
        verdict.interval,
        level if isinstance(level, float) else 0.0,
    )
