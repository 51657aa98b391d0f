"""Side by side: blocks in which both builds were started afresh, judged by the sequential rule.

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

**Error bounds.** Let the true effect be a slowdown no larger than the tolerance, and block
effects independent and normal, with the variance that the prior says.

- *Screening* raises a suspicion with probability ``screen_alpha`` at most.
- *Confirmation* is judged on its own fresh blocks, so whatever led to it, it is wrong with
  probability ``confirm_alpha`` at most. So P(false REGRESSION) <= screen_alpha * confirm_alpha,
  which is 0.001 for ``DEFAULT_PLAN``, for each metric and whatever the dependence between metrics.
- *PASS* of a build that is slower by the tolerance or more: ``pass_alpha`` at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pytest_llmperf.judge._common import (
    Draft,
    bounded_exp,
    margin_of,
    more_units,
    odd_ones,
    plural,
    sign,
    without_logs,
)
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
    MOST_FLIPPED,
    Prior,
    block_effect,
    log_means,
    mean_estimate,
    sign_flip_p,
)
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import Metric

DEFAULT_BLOCK_PRIOR = Prior(s0=0.025, d0=4.0)
"""Spread of a block's log effect where none was calibrated.

Measured on a shared 2-core machine: 60 blocks, both equal builds launched afresh, four
coin-flipped pairs each: sd 2.4 %. Four degrees of freedom let the blocks at hand overrule it.
"""

UNPAIRED_BLOCK_PRIOR = Prior(s0=0.042, d0=4.0)
"""The same for timings of which one build's all came after the other's.

Measured on such a machine: 25 runs of llama-bench with five repetitions. Of two equal ones, taken
at random, one was more than 3 % slower in 25 % of the pairs and more than 5 % in 11 %, as it is
where their log ratio has an sd of 4.1 to 4.4 %.
"""

_MOST_BLOCKS = 64


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


DEFAULT_PLAN = Plan(
    first_screen=1,
    first_pass=2,
    max_screen=20,
    first_confirm=2,
    max_confirm=16,
    screen_alpha=0.04,
    confirm_alpha=0.025,
    pass_alpha=0.05,
    shared_base=False,
)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is judged of a block.

    Attributes:
        effect: Its log effect, positive where the new build is worse.
        base: Log value of its baseline launch.
    """

    effect: float
    base: float


def decide_side_by_side(
    metric: Metric,
    screen: Sequence[Block],
    confirm: Sequence[Block],
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_PLAN,
    last: bool = False,
) -> Decision:
    """Judge the blocks so far and say which block is wanted next.

    A pure function: the rule is walked through from the first block, so the same blocks always
    give the same decision. Blocks beyond a final verdict are not looked at.

    REGRESSION: screening and a confirmation on its own both show a slowdown beyond the
    tolerance. PASS and IMPROVED: the pool of all blocks shows it. INCONCLUSIVE: neither after
    the most blocks that the plan allows.

    Args:
        metric: What was measured.
        screen: Screening blocks, in the order in which they were measured.
        confirm: Confirmation blocks, likewise.
        tolerance: Relative change for the worse that is allowed.
        prior: What is known of the sd of a block's log effect; if None, ``DEFAULT_BLOCK_PRIOR``,
            or ``UNPAIRED_BLOCK_PRIOR`` for timings that are not paired.
        plan: Numbers of blocks and error probabilities.
        last: No further block will come: the decision is final.

    Raises:
        ValueError: A tolerance that is negative or not finite, or a prior without degrees of
            freedom, which a look at one block needs.
    """
    if prior is None:
        apart = metric.kind == "timing" and any(not b.paired for b in (*screen, *confirm))
        prior = UNPAIRED_BLOCK_PRIOR if apart else DEFAULT_BLOCK_PRIOR
    if prior.d0 == 0:
        raise ValueError("prior: a look at one block needs d0 above 0")
    margin = margin_of(tolerance)
    blocks = [*screen, *confirm]
    bare = Draft(
        metric, "side-by-side", tolerance, [b.base for b in blocks], [b.new for b in blocks]
    )
    if blocks and (verdict := without_logs(bare)) is not None:
        return Decision(verdict, None)
    seen = [_seen(metric, block) for block in blocks]
    first_confirm = len(screen)
    walked = walk(
        plan,
        margin,
        seen[:first_confirm],
        seen[first_confirm:],
        _Judge(metric, margin, prior).look,
    )
    used = [*range(walked.screened), *range(first_confirm, first_confirm + walked.confirmed)]
    bare = replace(
        bare,
        base_launches=[blocks[i].base for i in used],
        new_launches=[blocks[i].new for i in used],
    )
    evidence: dict[str, object] = {
        "mode": "side-by-side",
        "margin": margin,
        "prior": prior.to_json(),
        "plan": asdict(plan),
        "false_regression_bound": plan.false_regression_bound,
        "blocks": [
            _block_json("screen" if i < first_confirm else "confirm", blocks[i], seen[i])
            for i in used
        ],
    }
    if not walked.looks:
        reason = f"{metric.name}: no block was measured yet"
        verdict = bare.verdict(Outcome.INCONCLUSIVE, reason, evidence)
    else:
        told = walked.telling
        taken = used[walked.screened :] if told.phase == "confirm" else used
        effects = [seen[i].effect for i in taken[: told.units]]
        if len(effects) <= MOST_FLIPPED:
            evidence["sign_flip_p"] = sign_flip_p(effects)
        verdict = verdict_of(walked, bare, evidence, "block", _lacking)
    decision = Decision(verdict, walked.wants)
    return finish(decision) if last else decision


def _seen(metric: Metric, block: Block) -> _Seen:
    effect = sign(metric) * block_effect(block.base, block.new, paired=block.paired)
    return _Seen(effect, float(log_means([block.base])[0]))


@dataclass(frozen=True, slots=True)
class _Judge:
    """What stays the same from look to look."""

    metric: Metric
    margin: float
    prior: Prior

    def look(self, phase: Phase, blocks: Sequence[_Seen], alphas: Alphas) -> Look:
        odd = odd_ones([seen.effect for seen in blocks], self.prior, alphas.odd)
        kept = [seen for i, seen in enumerate(blocks) if i not in odd]
        worse = mean_estimate([seen.effect for seen in kept], self.prior)
        base = bounded_exp(math.fsum(seen.base for seen in kept) / len(kept))
        return Look(
            phase,
            len(blocks),
            {"blocks": odd},
            base,
            worse,
            claim_of(self.metric, base, worse, self.margin, alphas),
            alphas,
            self.margin,
        )


def _lacking(look: Look) -> tuple[int | None, str]:
    """How many blocks are missing for a clear verdict, None for too many; and in words."""
    units = look.units - look.aside
    lack = more_units(look.worse, look.margin, look.needed_alpha, units, _MOST_BLOCKS)
    if lack is None:
        return None, f"even {_MOST_BLOCKS} blocks would hardly tell"
    return lack, f"about {plural(lack, 'more block')} needed"


def _block_json(phase: Phase, block: Block, seen: _Seen) -> dict[str, object]:
    return {
        "phase": phase,
        "base": list(block.base),
        "new": list(block.new),
        "paired": block.paired,
        "order": block.order,
        "effect": seen.effect,
    }
