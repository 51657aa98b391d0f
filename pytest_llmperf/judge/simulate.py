"""How often the decision rules err and how much they measure, by simulation.

Noise is made in the units in which it was measured: the log value of a launch, with requests
around it. Launches come in the order of time, so that they may be correlated and drift; the two
launches of a block come in coin-flipped order. The verdicts are those of ``decide_side_by_side``
and ``decide_stored`` themselves, asked after every block or launch, as a run asks them.

``python -m pytest_llmperf.judge.simulate`` prints the table of ``docs/measurements.md``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from pytest_llmperf.judge.sequential import Plan
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Array, Prior
from pytest_llmperf.judge.stored import DEFAULT_STORED, decide_stored
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import METRICS, Metric

Generator = np.random.Generator

GROSS = 0.35
"""The slowdown that must always be found."""

_ODD_SPEED = 0.4
# Where the simulated metric stands does not matter: both arms are judged by their ratio.
_LEVEL = 100.0


@dataclass(frozen=True, slots=True)
class Noise:
    """What makes equal launches differ; all figures are in log units unless said otherwise.

    Attributes:
        name: As printed.
        between: Standard deviation of a launch. A block's effect has sqrt(2) times that.
        within: Standard deviation of a request inside its launch.
        ar1: Correlation of a launch with the one before it, 0 to below 1.
        drift: Added from one launch to the next.
        odd: Share of launches, of either build, that run at 40 % of their speed.
        df: Degrees of freedom of a launch's Student t, above 2; infinite for the normal.

    Raises:
        ValueError: A figure out of range.
    """

    name: str
    between: float = 0.017
    within: float = 0.02
    ar1: float = 0.0
    drift: float = 0.0
    odd: float = 0.0
    df: float = math.inf

    def __post_init__(self) -> None:
        if self.between < 0 or self.within < 0:
            raise ValueError(f"noise {self.name}: standard deviations are not negative")
        if not 0 <= self.ar1 < 1 or not 0 <= self.odd <= 1:
            raise ValueError(f"noise {self.name}: ar1 and odd lie between 0 and 1")
        if not self.df > 2:  # noqa: PLR2004 - below it there is no variance to scale to
            raise ValueError(f"noise {self.name}: df must lie above 2")


NOISES = (
    Noise("independent"),
    Noise("AR(1) 0.6", ar1=0.6),
    Noise("drift", drift=0.0075),
    Noise("odd starts", odd=1 / 40),
    Noise("heavy tails", df=3.0),
    Noise("all of these", ar1=0.6, drift=0.0075, odd=1 / 40, df=3.0),
)
"""What is simulated: 1.7 % between launches is the measured 2.4 % between blocks; the drift is
15 % over twenty launches, and one start in forty is the share that was seen at 40 % speed."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    Attributes:
        noise: Name of the noise.
        tolerance: The tolerance judged by.
        effect: True relative change for the worse.
        runs: Verdicts simulated.
        counts: How many had each outcome.
        spent: Mean number of blocks, or of launches of the build under test where the
            comparison is with recorded ones.
    """

    noise: str
    tolerance: float
    effect: float
    runs: int
    counts: Counter[Outcome]
    spent: float

    def rate(self, outcome: Outcome) -> float:
        """Share of the runs with this outcome."""
        return self.counts[outcome] / self.runs


def effects_of(tolerance: float) -> tuple[float, ...]:
    """The effects to simulate: none, at the tolerance, 1.5 and 2 times it, and a gross one."""
    return (0.0, tolerance, 1.5 * tolerance, 2 * tolerance, GROSS)


def launches(noise: Noise, rng: Generator, runs: int, count: int) -> Array:
    """Log values of launches in the order of time, without any effect.

    Returns:
        Array of shape ``(runs, count)``.
    """
    if math.isinf(noise.df):
        innovations = rng.standard_normal((runs, count))
    else:
        innovations = rng.standard_t(noise.df, (runs, count)) / math.sqrt(noise.df / (noise.df - 2))
    values = np.empty((runs, count))
    values[:, 0] = innovations[:, 0]
    # Scaled so that every launch has the same variance, the first one included.
    fresh = math.sqrt(1 - noise.ar1**2)
    for i in range(1, count):
        values[:, i] = noise.ar1 * values[:, i - 1] + fresh * innovations[:, i]
    values = noise.between * values + noise.drift * np.arange(count)
    odd = rng.random((runs, count)) < noise.odd
    return np.asarray(values - odd * math.log(_ODD_SPEED))


def blocks(  # noqa: PLR0917 - noise, effect, chance and the three sizes
    noise: Noise, worsening: float, rng: Generator, runs: int, count: int, pairs: int = 4
) -> Array:
    """Log values of requests of blocks, where more is worse.

    Args:
        noise: What makes equal launches differ.
        worsening: True log effect.
        rng: Source of all chance.
        runs: Number of independent runs.
        count: Blocks of each run.
        pairs: Pairs of requests in each block.

    Returns:
        Array of shape ``(runs, count, 2, pairs)``; of the two, the first is the baseline.
    """
    starts = launches(noise, rng, runs, 2 * count).reshape(runs, count, 2)
    flipped = rng.random((runs, count, 1)) < 0.5  # noqa: PLR2004 - a coin
    arms = np.where(flipped, starts[:, :, ::-1], starts) + np.array([0.0, worsening])
    requests = noise.within * rng.standard_normal((runs, count, 2, pairs))
    return np.asarray(arms[..., None] + requests)


def samples(log_values: Array, metric: Metric) -> tuple[float, ...]:
    """Log values, where more is worse, as samples of a metric."""
    direction = 1 if metric.better == "lower" else -1
    return tuple((_LEVEL * np.exp(direction * log_values)).tolist())


def to_block(log_values: Array, metric: Metric) -> Block:
    """One block of ``blocks``, shape ``(2, pairs)``, as the judge takes it."""
    base, new = (samples(arm, metric) for arm in log_values)
    return Block(base, new, paired=True, order="")


def play_side_by_side(
    made: Sequence[Block],
    metric: Metric,
    *,
    tolerance: float,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_PLAN,
) -> tuple[Outcome, int]:
    """Take blocks in the order of time until the verdict is final.

    Returns:
        The outcome and the number of blocks that it took.

    Raises:
        IndexError: Fewer blocks than the rule may want.
    """
    screen: list[Block] = []
    confirm: list[Block] = []
    while True:
        decision = decide_side_by_side(
            metric, screen, confirm, tolerance=tolerance, prior=prior, plan=plan
        )
        taken = len(screen) + len(confirm)
        if decision.wants is None:
            return decision.verdict.outcome, taken
        (screen if decision.wants == "screen" else confirm).append(made[taken])


def side_by_side(
    noise: Noise,
    tolerance: float,
    effect: float,
    *,
    runs: int,
    seed: int,
    metric: Metric = METRICS["decode_tps"],
    prior: Prior | None = None,
    plan: Plan = DEFAULT_PLAN,
) -> Cell:
    """Simulate one cell; the same seed gives the same cell.

    Args:
        noise: What makes equal launches differ.
        tolerance: The tolerance judged by.
        effect: True relative change for the worse: at ``tolerance`` the log effect is the
            margin itself, ln(1 + tolerance).
        runs: Number of verdicts.
        seed: Seed of all chance.
        metric: Which metric the figures stand for.
        prior: As ``decide_side_by_side`` takes it.
        plan: Likewise.
    """
    rng = np.random.default_rng(seed)
    made = blocks(noise, math.log1p(effect), rng, runs, plan.most_units)
    played = (
        play_side_by_side(
            [to_block(block, metric) for block in run],
            metric,
            tolerance=tolerance,
            prior=prior,
            plan=plan,
        )
        for run in made
    )
    return cell(noise, tolerance, effect, played)


def stored(
    noise: Noise,
    tolerance: float,
    effect: float,
    *,
    runs: int,
    seed: int,
    metric: Metric = METRICS["decode_tps"],
    recorded: int = 3,
    prior: Prior | None = None,
    plan: Plan = DEFAULT_STORED,
    requests: int = 5,
) -> Cell:
    """Simulate one cell of comparing with recorded launches, by ``decide_stored`` itself.

    The recorded launches come right before the new ones, so a drift hits one arm.

    Args:
        noise: What makes equal launches differ.
        tolerance: The tolerance judged by.
        effect: True relative change for the worse.
        runs: Number of verdicts.
        seed: Seed of all chance.
        metric: Which metric the figures stand for.
        recorded: Recorded launches.
        prior: As ``decide_stored`` takes it; where None, the true spread worth ten degrees of
            freedom, as the other cases of a file would tell.
        plan: As ``decide_stored`` takes it.
        requests: Samples of each launch.
    """
    prior = Prior(noise.between, 10.0) if prior is None else prior
    rng = np.random.default_rng(seed)
    most = recorded + plan.most_units
    starts = launches(noise, rng, runs, most)
    starts[:, recorded:] += math.log1p(effect)
    made = starts[..., None] + noise.within * rng.standard_normal((runs, most, requests))

    def play(run: Sequence[tuple[float, ...]]) -> tuple[Outcome, int]:
        base, new = run[:recorded], run[recorded:]
        screen: list[Sequence[float]] = []
        confirm: list[Sequence[float]] = []
        while True:
            decision = decide_stored(
                metric, base, screen, confirm, tolerance=tolerance, prior=prior, plan=plan
            )
            taken = len(screen) + len(confirm)
            if decision.wants is None:
                return decision.verdict.outcome, taken
            (screen if decision.wants == "screen" else confirm).append(new[taken])

    played = (play([samples(launch, metric) for launch in run]) for run in made)
    return cell(noise, tolerance, effect, played)


def cell(
    noise: Noise, tolerance: float, effect: float, played: Iterable[tuple[Outcome, int]]
) -> Cell:
    """Count what was played."""
    counts: Counter[Outcome] = Counter()
    spent = 0
    for outcome, taken in played:
        counts[outcome] += 1
        spent += taken
    runs = counts.total()
    return Cell(noise.name, tolerance, effect, runs, counts, spent / runs)


Simulation = Callable[..., Cell]


@dataclass(frozen=True, slots=True)
class _Task:
    """One cell to simulate; it travels to another process."""

    simulation: Simulation
    noise: Noise
    tolerance: float
    effect: float
    runs: int
    seed: int

    def run(self) -> Cell:
        return self.simulation(
            self.noise, self.tolerance, self.effect, runs=self.runs, seed=self.seed
        )


def simulate(
    simulation: Simulation,
    *,
    tolerances: Sequence[float],
    runs: int,
    seed: int,
    noises: Sequence[Noise] = NOISES,
    jobs: int = 1,
) -> list[Cell]:
    """Every noise, tolerance and effect; each cell has a seed of its own.

    Args:
        simulation: ``side_by_side`` or ``stored``.
        tolerances: Those to judge by.
        runs: Verdicts a cell.
        seed: Seed of all chance.
        noises: What makes equal launches differ.
        jobs: Processes to share the cells out to.
    """
    tasks = [
        _Task(simulation, noise, tolerance, effect, runs, seed + 1000 * i + 100 * j + k)
        for i, noise in enumerate(noises)
        for j, tolerance in enumerate(tolerances)
        for k, effect in enumerate(effects_of(tolerance))
    ]
    if jobs == 1:
        return [task.run() for task in tasks]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_Task.run, tasks))


def table(cells: Sequence[Cell]) -> str:
    """The cells as a table in Markdown, rates in percent."""
    lines = [
        "| noise | tolerance | slowdown | REGRESSION | PASS | IMPROVED | INCONCLUSIVE | spent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = (Outcome.REGRESSION, Outcome.PASS, Outcome.IMPROVED, Outcome.INCONCLUSIVE)
    for one in cells:
        rates = " | ".join(f"{100 * one.rate(outcome):.2f}" for outcome in shown)
        lines.append(
            f"| {one.noise} | {100 * one.tolerance:g} % | {100 * one.effect:g} % | {rates} "
            f"| {one.spent:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; ``--help`` tells the options."""
    parser = argparse.ArgumentParser(prog="python -m pytest_llmperf.judge.simulate")
    parser.add_argument("--runs", type=int, default=2000, help="verdicts a row (default 2000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all chance (default 1)")
    parser.add_argument(
        "--tolerance", type=float, nargs="+", default=[0.03, 0.05], help="default 0.03 0.05"
    )
    parser.add_argument("--stored", action="store_true", help="compare with recorded launches")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    simulation = stored if options.stored else side_by_side
    cells = simulate(
        simulation,
        tolerances=options.tolerance,
        runs=options.runs,
        seed=options.seed,
        jobs=options.jobs,
    )
    sys.stdout.write(table(cells) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
