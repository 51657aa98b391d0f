"""What the verdicts of a machine are worth: real blocks of known slowdowns, replayed.

Pure functions of blocks. Each comparison uses blocks that no other comparison of the same replay
uses, so that the rates are those of independent runs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pytest_llmperf.judge._common import odd_ones, sign
from pytest_llmperf.judge.priors import calibrated
from pytest_llmperf.judge.sequential import Plan
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior, block_effect, log_means
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
    blocks: Iterable[Block | None],
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
        blocks: Real ones, all of the same true effect; None for one that stayed disturbed, which
            ends its comparison as INCOMPARABLE.
        tolerance: Relative change for the worse that is allowed.
        prior: As for :func:`~pytest_llmperf.judge.side_by_side.decide_side_by_side`.
        plan: Likewise.
    """
    outcomes: Counter[Outcome] = Counter()
    used = 0
    for outcome, taken in _comparisons(metric, blocks, tolerance, prior, plan):
        outcomes[outcome] += 1
        used += taken
    return Replay(sum(outcomes.values()), dict(outcomes), used)


def _comparisons(
    metric: Metric,
    blocks: Iterable[Block | None],
    tolerance: float,
    prior: Prior | None,
    plan: Plan,
) -> Iterator[tuple[Outcome, int]]:
    """Outcome and number of blocks of each comparison that the blocks give."""
    screen: list[Block] = []
    confirm: list[Block] = []
    wants: str | None = "screen"
    for block in blocks:
        outcome: Outcome | None = Outcome.INCOMPARABLE
        if block is not None:
            (confirm if wants == "confirm" else screen).append(block)
            decision = decide_side_by_side(
                metric, screen, confirm, tolerance=tolerance, prior=prior, plan=plan
            )
            wants = decision.wants
            outcome = decision.verdict.outcome if wants is None else None
        if outcome is not None:
            yield outcome, len(screen) + len(confirm) + (block is None)
            screen, confirm, wants = [], [], "screen"


def resample(
    metric: Metric,
    blocks: Sequence[Block | None],
    *,
    runs: int,
    seed: int,
    tolerance: float,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_PLAN,
) -> Replay:
    """Run comparisons each of which draws its blocks anew, none of them twice.

    More comparisons than the blocks would give in a row, but not independent ones: how far the
    rates can be off is set by the number of blocks, not of runs.

    Args:
        metric: What was measured.
        blocks: As for ``replay``.
        runs: Comparisons.
        seed: Seed of the draws.
        tolerance: As for ``replay``.
        prior: Likewise.
        plan: Likewise.

    Raises:
        ValueError: Fewer blocks than one comparison may want.
    """
    if len(blocks) < plan.most_units:
        raise ValueError(f"resampling needs {plan.most_units} blocks at least, got {len(blocks)}")
    rng = random.Random(seed)  # noqa: S311 - a draw, not a key
    outcomes: Counter[Outcome] = Counter()
    used = 0
    for _ in range(runs):
        drawn = rng.sample(blocks, plan.most_units)
        outcome, taken = next(_comparisons(metric, drawn, tolerance, prior, plan))
        outcomes[outcome] += 1
        used += taken
    return Replay(runs, dict(outcomes), used)


@dataclass(frozen=True, slots=True)
class Spread:
    """How blocks and launches of equal builds scatter, for one config and workload.

    Attributes:
        block: Variance of the blocks' log effects.
        launch: Variance of the launches' log values, drift of the machine included.
        df: Degrees of freedom of either.
    """

    block: float
    launch: float
    df: float


def spread(metric: Metric, blocks: Sequence[Block], *, alpha: float = 1e-3) -> Spread:
    """Return the scatter of equal builds, without what is far off the others.

    Args:
        metric: What was measured.
        blocks: Of a build against itself, three at least.
        alpha: Probability of setting aside what is like the others.

    Raises:
        ValueError: If there are fewer than three blocks.
    """
    if len(blocks) < 3:  # noqa: PLR2004 - one may be set aside
        raise ValueError("a spread needs three blocks at least")
    effects = [sign(metric) * block_effect(b.base, b.new, paired=b.paired) for b in blocks]
    odd = odd_ones(effects, None, alpha)
    kept = [block for i, block in enumerate(blocks) if i not in odd]
    sides = [log_means([side(block) for block in kept]) for side in (_base, _new)]
    return Spread(
        block=float(np.var([e for i, e in enumerate(effects) if i not in odd], ddof=1)),
        launch=float(np.mean([np.var(values, ddof=1) for values in sides])),
        df=float(len(kept) - 1),
    )


def _base(block: Block) -> tuple[float, ...]:
    return block.base


def _new(block: Block) -> tuple[float, ...]:
    return block.new


def naive_alarms(metric: Metric, blocks: Sequence[Block], tolerance: float) -> float:
    """Return how often a gate without statistics would fail a build against itself.

    That gate starts each build once and fails if the median of the new one's requests is worse
    than the median of the other's by more than the tolerance. Every start is compared with every
    start of another block, in both roles: the two of one block were asked in turn, which is what
    a gate with statistics does.

    Args:
        metric: What was measured.
        blocks: Of a build against itself, two at least: each has a start on either side.
        tolerance: Relative change for the worse that is allowed.

    Returns:
        Share of the comparisons that fail.

    Raises:
        ValueError: Fewer than two blocks.
    """
    if len(blocks) < 2:  # noqa: PLR2004 - starts of one block are not independent
        raise ValueError("a naive gate needs two blocks at least")
    starts = np.array([np.median(side) for block in blocks for side in (block.base, block.new)])
    # For the worse, as a share of the first: what the naive gate computes.
    change = sign(metric) * (starts[np.newaxis, :] / starts[:, np.newaxis] - 1)
    of_block = np.repeat(np.arange(len(blocks)), 2)
    apart = of_block[np.newaxis, :] != of_block[:, np.newaxis]
    return float(np.mean(change[apart] > tolerance))


def priors_of(spreads: Sequence[Spread]) -> tuple[Prior, Prior]:
    """The priors of a block's and of a launch's value, from every config and workload measured."""
    dfs = [one.df for one in spreads]
    return (
        calibrated([one.block for one in spreads], dfs),
        calibrated([one.launch for one in spreads], dfs),
    )


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
