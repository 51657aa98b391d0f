"""``llmperf calibrate``: what this machine's verdicts are worth.

Measures a build against itself, and against itself slowed down by known amounts, in the same
blocks a gate uses, and prints noise, false alarms, power and the blocks a verdict takes. Blocks are
appended to a file as they are measured, so that an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from pytest_llmperf.campaign.servers import ServerCampaign
from pytest_llmperf.cli.subject import subject
from pytest_llmperf.errors import PlanError
from pytest_llmperf.files import cache_folder
from pytest_llmperf.gate import to_block
from pytest_llmperf.gpu.cards import all_gpus, gpus
from pytest_llmperf.judge.calibration import (
    naive_alarms,
    noise,
    priors_of,
    replay,
    resample,
    smallest_detectable,
    spread,
)
from pytest_llmperf.judge.priors import Priors, path_of, save
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.machine import machine
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.report.wording import columns, percent
from pytest_llmperf.serve.launch import ServePlan
from pytest_llmperf.settings import DEFAULT_PAIRS, DEFAULT_SUITE, default_foreign_load

DEFAULT_METRICS = ("decode_tps", "prefill_tps", "ttft_ms", "itl_ms")
_POWER = 0.9
_FEWEST_BLOCKS = 10
"""Fewest blocks of a case that say anything of its noise."""
_SHOWN = (
    Outcome.REGRESSION,
    Outcome.PASS,
    Outcome.IMPROVED,
    Outcome.INCONCLUSIVE,
    Outcome.INCOMPARABLE,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric of one workload in one block.

    Attributes:
        config: Name.
        level: Share of the time in which the second server was stopped.
        workload: Name.
        metric: Name.
        block: The samples of both sides.
        seconds: What the whole block took.
        disturbed: What disturbed it in every try, ``""`` if nothing did.
    """

    config: str
    level: float
    workload: str
    metric: str
    block: Block
    seconds: float
    disturbed: str = ""

    def dumps(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(
            {
                "config": self.config,
                "level": self.level,
                "workload": self.workload,
                "metric": self.metric,
                "base": list(self.block.base),
                "new": list(self.block.new),
                "paired": self.block.paired,
                "order": self.block.order,
                "seconds": round(self.seconds, 3),
                "disturbed": self.disturbed,
            }
        )

    @classmethod
    def loads(cls, line: str) -> Measured:
        """Return what :meth:`dumps` wrote.

        Raises:
            ValueError: If the line is none.
        """
        try:
            data = json.loads(line)
            block = Block(tuple(data["base"]), tuple(data["new"]), data["paired"], data["order"])
            return cls(
                data["config"],
                data["level"],
                data["workload"],
                data["metric"],
                block,
                data["seconds"],
                data["disturbed"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a calibration block: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``llmperf calibrate``."""
    parser.add_argument("--suite", type=Path, default=Path(DEFAULT_SUITE), help="the suite file")
    parser.add_argument("--build", help="the build to calibrate with (default: as for pytest)")
    parser.add_argument("--config", default="cpu", help="a config of the suite file")
    parser.add_argument("--workload", action="append", help="a workload; repeatable (short)")
    parser.add_argument("--models", type=Path, action="append", default=[], help="GGUF folder")
    parser.add_argument("--blocks", type=int, default=40, help="blocks a slowdown (40)")
    parser.add_argument(
        "--slowdowns",
        type=_shares,
        default=(0.0, 0.05, 0.10, 0.35),
        help="shares of the time in which the second server is stopped (0,0.05,0.10,0.35)",
    )
    parser.add_argument("--tolerance", type=_shares, default=(0.03, 0.05), help="(0.03,0.05)")
    parser.add_argument("--pairs", type=int, default=DEFAULT_PAIRS, help="pairs a block (3)")
    parser.add_argument(
        "--blocks-file",
        type=Path,
        default=Path(".llmperf/calibration.jsonl"),
        help="where blocks are kept (.llmperf/calibration.jsonl)",
    )
    parser.add_argument(
        "--runs", type=int, default=200, help="comparisons drawn from the blocks (200)"
    )
    parser.add_argument(
        "--uncalibrated",
        action="store_true",
        help="judge as a machine that was never calibrated would",
    )
    parser.add_argument(
        "--foreign-load",
        type=_cores,
        default=default_foreign_load(),
        metavar="CORES",
        help="cores that other programs may keep busy, or `off` "
        f"(a tenth of all, half a core at least: {default_foreign_load():g})",
    )
    parser.add_argument(
        "--replay-only", action="store_true", help="measure nothing, judge the blocks that are kept"
    )


def _shares(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError("fractions from 0 to below 1, separated by commas")
    return values


def _cores(text: str) -> float:
    if text == "off":
        return math.inf
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError("cores, 0 at least, or `off`")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing, print the tables and keep the priors.

    Raises:
        UserError: If suite, build, config or model cannot be had.
    """
    kept = load_blocks(arguments.blocks_file)
    cache = cache_folder()
    key = str(machine(os.environ.get("LLMPERF_MACHINE") or None)["key"])
    if not arguments.replay_only:
        kept = measure(arguments, kept, cache)
    # The blocks of a replay may come from another machine: their noise is not this one's.
    found = priors(kept)
    judged = Priors() if arguments.uncalibrated else found
    lines = report(kept, arguments.tolerance, judged, arguments.runs)
    if not arguments.replay_only and found.blocks:
        path = path_of(cache, key)
        save(path, found, machine=key, at=time.strftime("%Y-%m-%d"))
        lines += ["", f"priors kept for later runs on {key}: {path}"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def priors(kept: Sequence[Measured]) -> Priors:
    """Return the priors that blocks of a build against itself give, by metric."""
    groups: dict[str, dict[tuple[str, str], list[Block]]] = {}
    for one in kept:
        if one.level == 0 and not one.disturbed:
            of_metric = groups.setdefault(one.metric, {})
            of_metric.setdefault((one.config, one.workload), []).append(one.block)
    blocks, launches = {}, {}
    for name, cases in groups.items():
        enough = [case for case in cases.values() if len(case) >= _FEWEST_BLOCKS]
        if enough:
            blocks[name], launches[name] = priors_of([spread(METRICS[name], b) for b in enough])
    return Priors(blocks, launches)


def load_blocks(path: Path) -> list[Measured]:
    """Return the blocks of a file, none if there is no file.

    Raises:
        PlanError: If a line is no block.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            found.append(Measured.loads(line))
        except ValueError as error:
            raise PlanError(str(error), path, number) from error
    return found


def measure(arguments: argparse.Namespace, kept: list[Measured], cache: Path) -> list[Measured]:
    """Measure blocks, slowdowns taking turns, until each has as many as were asked for."""
    chosen = subject(
        arguments.suite,
        arguments.build,
        arguments.config,
        arguments.workload or ["short"],
        arguments.models,
        progress=_say,
    )
    config, cases = chosen.config, chosen.cases
    folder = arguments.blocks_file.parent / f"calibrate-{os.getpid()}"
    arguments.blocks_file.parent.mkdir(parents=True, exist_ok=True)
    leases = Leases(cache / "locks", gpus(), all_gpus(), _say)
    campaigns = {
        level: ServerCampaign(
            config=config,
            workloads=chosen.workloads,
            new=replace(chosen.build, stopped_share=level),
            base=chosen.build,
            files=chosen.files,
            serve=ServePlan(folder=folder),
            pairs=arguments.pairs,
            leases=leases,
            rng=random.Random(f"{time.time_ns()}:{level}"),  # noqa: S311 - a coin, not a key
            foreign_load=arguments.foreign_load,
        )
        for level in arguments.slowdowns
    }
    names = {workload.name for workload in chosen.workloads}
    done = {
        level: sum(
            m.level == level and m.config == config.name and m.workload in names for m in kept
        )
        // (len(cases) * len(DEFAULT_METRICS))
        for level in campaigns
    }
    with arguments.blocks_file.open("a", encoding="utf-8") as stream:
        while pending := [level for level in campaigns if done[level] < arguments.blocks]:
            for level in pending:
                began = time.monotonic()
                pair = campaigns[level].block(campaigns[level].measured[0])
                seconds = time.monotonic() - began
                for one in cases:
                    if one.workload is None:
                        continue
                    if error := campaigns[level].failures.get(one.workload.name):
                        raise error
                    for name in DEFAULT_METRICS:
                        block = to_block(pair, one, METRICS[name])
                        measured = Measured(
                            config.name,
                            level,
                            one.workload.name,
                            name,
                            block,
                            seconds,
                            pair.disturbed,
                        )
                        kept.append(measured)
                        stream.write(measured.dumps() + "\n")
                stream.flush()
                done[level] += 1
                progress = f"block {done[level]} of {arguments.blocks}, {seconds:.1f} s"
                _say(f"slowdown {level:g}: {progress}")
    return kept


Group = tuple[str, str, float]
"""Case, metric and share of the time in which the second server was stopped."""


def report(
    kept: Sequence[Measured], tolerances: Sequence[float], found: Priors, runs: int
) -> list[str]:
    """Return the tables: noise and priors, then outcomes by slowdown and tolerance.

    Args:
        kept: What was measured.
        tolerances: Those to judge by.
        found: The priors that it gives, with which a later run would judge.
        runs: Comparisons to draw from the blocks of each slowdown.
    """
    groups: dict[Group, list[Measured]] = {}
    for one in kept:
        groups.setdefault((f"{one.config}/{one.workload}", one.metric, one.level), []).append(one)
    lines = [f"machine {machine()['key']}", ""]
    rows = [("case", "metric", "stopped", "blocks", "true change", "sd", "robust sd", "range")]
    for (case, metric, level), group in sorted(groups.items()):
        steady = [one.block for one in group if not one.disturbed]
        if len(steady) > 1:
            told = noise(steady)
            rows.append(
                (
                    case,
                    metric,
                    f"{100 * level:g} %",
                    f"{len(steady)}" + (f" of {len(group)}" if len(steady) < len(group) else ""),
                    percent(math.expm1(told.effect)),
                    f"{100 * told.sd:.2f} %",
                    f"{100 * told.robust_sd:.2f} %",
                    f"{100 * told.spread[0]:+.1f} … {100 * told.spread[1]:+.1f} %",
                )
            )
    lines += columns(rows)
    if found.blocks:
        lines += ["", "noise floor: sd of a block's log effect, and of a launch's log value"]
        lines += columns(
            [
                ("metric", "block", "d0", "launch", "d0"),
                *(
                    (
                        name,
                        f"{100 * prior.s0:.2f} %",
                        f"{prior.d0:.1f}",
                        f"{100 * found.launches[name].s0:.2f} %",
                        f"{found.launches[name].d0:.1f}",
                    )
                    for name, prior in sorted(found.blocks.items())
                ),
            ]
        )
    for tolerance in tolerances:
        if naive := _naive(groups, tolerance):
            lines += ["", *naive]
        for drawn in (False, True):
            how = f"{runs} comparisons drawn" if drawn else "each block used once"
            lines += ["", f"tolerance {100 * tolerance:g} %, {how}"]
            _say(lines[-1])
            lines += _outcomes(groups, tolerance, found, runs if drawn else 0)
    return lines


def _naive(groups: dict[Group, list[Measured]], tolerance: float) -> list[str]:
    """Return how often a gate without statistics would be wrong, of each case of equal builds."""
    lines = []
    for (case, name, level), group in sorted(groups.items()):
        equal = [one.block for one in group if not one.disturbed and not level]
        if len(equal) > 1:
            alarms = naive_alarms(METRICS[name], equal, tolerance)
            lines.append(
                f"{case} {name}: a gate that starts each build once and compares medians, "
                f"tolerance {100 * tolerance:g} %, would fail equal builds {100 * alarms:.1f} % of "
                "the time"
            )
    return lines


def _outcomes(
    groups: dict[Group, list[Measured]], tolerance: float, found: Priors, runs: int
) -> list[str]:
    rows = [
        (
            "case",
            "metric",
            "true change",
            "comparisons",
            *(o.value for o in _SHOWN),
            "blocks",
            "s",
        )
    ]
    power: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (case, name, level), group in sorted(groups.items()):
        blocks = [None if one.disturbed else one.block for one in group]
        steady = [block for block in blocks if block is not None]
        if len(steady) < 2 or (runs and len(blocks) < DEFAULT_PLAN.most_units):  # noqa: PLR2004 - no noise without two
            continue
        effect = math.expm1(noise(steady).effect)
        metric, prior = METRICS[name], found.block(name)
        played = (
            resample(
                metric, blocks, runs=runs, seed=int(1e4 * level), tolerance=tolerance, prior=prior
            )
            if runs
            else replay(metric, blocks, tolerance=tolerance, prior=prior)
        )
        # The median: some blocks waited for another run that measured.
        each = median(one.seconds for one in group)
        worse = -effect if metric.better == "higher" else effect
        power.setdefault((case, name), []).append((worse, played.rate(Outcome.REGRESSION)))
        rows.append(
            (
                case,
                name,
                percent(effect),
                str(played.comparisons),
                *(f"{100 * played.rate(outcome):.1f} %" for outcome in _SHOWN),
                f"{played.blocks_each:.1f}",
                f"{played.blocks_each * each:.0f}",
            )
        )
    lines = columns(rows)
    for (case, name), pairs in sorted(power.items()):
        smallest = smallest_detectable(pairs, _POWER)
        told = "none of those measured" if smallest is None else f"{100 * smallest:.1f} %"
        lines.append(
            f"{case} {name}: smallest slowdown flagged {100 * _POWER:g} % of the time: {told}"
        )
    return lines


def _say(text: str) -> None:
    sys.stderr.write(f"llmperf: {text}\n")
