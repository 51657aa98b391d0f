"""What the verdicts of a machine are worth: real blocks of known slowdowns, replayed.

Pure functions of blocks. Each comparison uses blocks that no other comparison of the same replay
uses, so that the rates are those of independent runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pytest_llmperf.judge.sequential import Plan
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior, block_effect
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import Metric


@dataclass(frozen=True, slots=True)
class Noise:
    """How the log effects of blocks scatter.

    Attributes:
        blocks: How many there are.
        effect: Their median: the true log effect, if the machine is fair.
        sd: Standard deviation.
        robust_sd: 1.4826 times the median absolute deviation: the sd without its outliers.
        spread: Smallest and largest.
    """

    blocks: int
    effect: float
    sd: float
    robust_sd: float
    spread: tuple[float, float]


def noise(blocks: Sequence[Block]) -> Noise:
    """Return how block effects scatter.

    Raises:
        ValueError: If there are fewer than two blocks.
    """
    if len(blocks) < 2:  # noqa: PLR2004 - a spread needs two
        raise ValueError("noise needs two blocks at least")
    effects = np.array([block_effect(b.base, b.new, paired=b.paired) for b in blocks])
    middle = float(np.median(effects))
    return Noise(
        blocks=len(blocks),
        effect=middle,
        sd=float(effects.std(ddof=1)),
        # 1.4826 makes the median absolute deviation an estimate of a normal sd.
        robust_sd=1.4826 * float(np.median(np.abs(effects - middle))),
        spread=(float(effects.min()), float(effects.max())),
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcomes of comparisons made from real blocks.

    Attributes:
        comparisons: How many could be made.
        outcomes: Verdict to how often.
        blocks: Blocks they used together.
    """

    comparisons: int
    outcomes: dict[Outcome, int]
    blocks: int

    def rate(self, outcome: Outcome) -> float:
        """Return the share of an outcome, 0 where nothing was compared."""
        return self.outcomes.get(outcome, 0) / self.comparisons if self.comparisons else 0.0

    @property
    def blocks_each(self) -> float:
        """Mean blocks of a comparison."""
        return self.blocks / self.comparisons if self.comparisons else 0.0


def replay(
    metric: Metric,
    blocks: Iterable[Block],
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_PLAN,
) -> Replay:
    """Run one comparison after another on blocks in the order in which they were measured.

    A comparison takes as many blocks as its rule wants, and the next one begins with the block
    after them. What is left at the end and does not suffice for a verdict is not counted.

    Args:
        metric: What was measured.
        blocks: Real ones, all of the same true effect.
        tolerance: Relative change for the worse that is allowed.
        prior: As for :func:`~pytest_llmperf.judge.side_by_side.decide_side_by_side`.
        plan: Likewise.
    """
    outcomes: Counter[Outcome] = Counter()
    used = 0
    screen: list[Block] = []
    confirm: list[Block] = []
    for block in blocks:
        wants = decide_side_by_side(
            metric, screen, confirm, tolerance=tolerance, prior=prior, plan=plan
        ).wants
        (confirm if wants == "confirm" else screen).append(block)
        decision = decide_side_by_side(
            metric, screen, confirm, tolerance=tolerance, prior=prior, plan=plan
        )
        if decision.wants is None:
            outcomes[decision.verdict.outcome] += 1
            used += len(screen) + len(confirm)
            screen, confirm = [], []
    return Replay(sum(outcomes.values()), dict(outcomes), used)


def smallest_detectable(power: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Return the smallest slowdown flagged often enough, or None if none was.

    Args:
        power: Pairs of (true slowdown as a fraction, share flagged).
        wanted: The share that is often enough, and must hold for every larger slowdown too.
    """
    found = None
    for slowdown, share in sorted(power, reverse=True):
        if share < wanted:
            break
        found = slowdown
    return found
