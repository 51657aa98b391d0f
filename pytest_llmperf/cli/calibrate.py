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

import platformdirs

from pytest_llmperf.build.resolve import default_spec, resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.campaign import Campaign
from pytest_llmperf.errors import PlanError
from pytest_llmperf.gate import to_block
from pytest_llmperf.judge.calibration import noise, replay, smallest_detectable
from pytest_llmperf.judge.side_by_side import Block
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.measure.machine import machine
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.models.locate import locate
from pytest_llmperf.plan.suite import load_suite
from pytest_llmperf.report.wording import columns, percent
from pytest_llmperf.serve.launch import ServePlan
from pytest_llmperf.settings import DEFAULT_PAIRS, DEFAULT_SUITE

DEFAULT_METRICS = ("decode_tps", "prefill_tps", "ttft_ms", "itl_ms")
_POWER = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric of one workload in one block.

    Attributes:
        level: Share of the time in which the second server was stopped.
        workload: Name.
        metric: Name.
        block: The samples of both sides.
        seconds: What the whole block took.
    """

    level: float
    workload: str
    metric: str
    block: Block
    seconds: float

    def dumps(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(
            {
                "level": self.level,
                "workload": self.workload,
                "metric": self.metric,
                "base": list(self.block.base),
                "new": list(self.block.new),
                "paired": self.block.paired,
                "order": self.block.order,
                "seconds": round(self.seconds, 3),
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
            return cls(data["level"], data["workload"], data["metric"], block, data["seconds"])
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
    parser.add_argument("--pairs", type=int, default=DEFAULT_PAIRS, help="pairs a block (4)")
    parser.add_argument(
        "--blocks-file",
        type=Path,
        default=Path(".llmperf/calibration.jsonl"),
        help="where blocks are kept (.llmperf/calibration.jsonl)",
    )
    parser.add_argument(
        "--replay-only", action="store_true", help="measure nothing, judge the blocks that are kept"
    )


def _shares(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError("fractions from 0 to below 1, separated by commas")
    return values


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing and print the table.

    Raises:
        UserError: If suite, build, config or model cannot be had.
    """
    kept = load_blocks(arguments.blocks_file)
    if not arguments.replay_only:
        kept = measure(arguments, kept)
    sys.stdout.write("\n".join(report(kept, arguments.tolerance)) + "\n")
    return 0


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


def measure(arguments: argparse.Namespace, kept: list[Measured]) -> list[Measured]:
    """Measure blocks, slowdowns taking turns, until each has as many as were asked for."""
    cache = Path(os.environ.get("LLMPERF_CACHE") or platformdirs.user_cache_path("pytest-llmperf"))
    suite = load_suite(arguments.suite)
    [case, *_] = cases = suite.cases([arguments.config], arguments.workload or ["short"])
    config = case.config
    spec = parse_spec(arguments.build or default_spec(os.environ), suite.builds, Path.cwd())
    build = resolve(spec, cache, _say)
    model = locate(suite.models[config.model], arguments.models, cache)
    folder = arguments.blocks_file.parent / f"calibrate-{os.getpid()}"
    arguments.blocks_file.parent.mkdir(parents=True, exist_ok=True)
    campaigns = {
        level: Campaign(
            config=config,
            workloads=[one.workload for one in cases if one.workload is not None],
            new=replace(build, stopped_share=level),
            base=build,
            model=model,
            serve=ServePlan(folder=folder),
            pairs=arguments.pairs,
            lock=cache / "locks" / "measuring.lock",
            rng=random.Random(f"{time.time_ns()}:{level}"),  # noqa: S311 - a coin, not a key
        )
        for level in arguments.slowdowns
    }
    names = {one.workload.name for one in cases if one.workload is not None}
    done = {
        level: sum(m.level == level and m.workload in names for m in kept)
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
                        measured = Measured(level, one.workload.name, name, block, seconds)
                        kept.append(measured)
                        stream.write(measured.dumps() + "\n")
                stream.flush()
                done[level] += 1
                progress = f"block {done[level]} of {arguments.blocks}, {seconds:.1f} s"
                _say(f"slowdown {level:g}: {progress}")
    return kept


def report(kept: Sequence[Measured], tolerances: Sequence[float]) -> list[str]:
    """Return the tables: noise, then outcomes a slowdown and tolerance."""
    groups: dict[tuple[str, str, float], list[Measured]] = {}
    for one in kept:
        groups.setdefault((one.workload, one.metric, one.level), []).append(one)
    lines = [f"machine {machine()['key']}", ""]
    rows = [("workload", "metric", "stopped", "blocks", "true change", "sd", "robust sd", "range")]
    for (workload, metric, level), group in sorted(groups.items()):
        if len(group) > 1:
            found = noise([one.block for one in group])
            rows.append(
                (
                    workload,
                    metric,
                    f"{100 * level:g} %",
                    str(found.blocks),
                    percent(math.expm1(found.effect)),
                    f"{100 * found.sd:.2f} %",
                    f"{100 * found.robust_sd:.2f} %",
                    f"{100 * found.spread[0]:+.1f} … {100 * found.spread[1]:+.1f} %",
                )
            )
    lines += columns(rows)
    for tolerance in tolerances:
        lines += ["", f"tolerance {100 * tolerance:g} %", *_outcomes(groups, tolerance)]
    return lines


def _outcomes(groups: dict[tuple[str, str, float], list[Measured]], tolerance: float) -> list[str]:
    shown = (Outcome.REGRESSION, Outcome.PASS, Outcome.IMPROVED, Outcome.INCONCLUSIVE)
    rows = [
        (
            "workload",
            "metric",
            "true change",
            "comparisons",
            *(o.value for o in shown),
            "blocks",
            "s",
        )
    ]
    power: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (workload, metric, _level), group in sorted(groups.items()):
        if len(group) < 2:  # noqa: PLR2004 - no noise without two
            continue
        blocks = [one.block for one in group]
        effect = math.expm1(noise(blocks).effect)
        found = replay(METRICS[metric], blocks, tolerance=tolerance)
        each = sum(one.seconds for one in group) / len(group)
        worse = -effect if METRICS[metric].better == "higher" else effect
        power.setdefault((workload, metric), []).append((worse, found.rate(Outcome.REGRESSION)))
        rows.append(
            (
                workload,
                metric,
                percent(effect),
                str(found.comparisons),
                *(f"{100 * found.rate(outcome):.1f} %" for outcome in shown),
                f"{found.blocks_each:.1f}",
                f"{found.blocks_each * each:.0f}",
            )
        )
    lines = columns(rows)
    for (workload, metric), pairs in sorted(power.items()):
        smallest = smallest_detectable(pairs, _POWER)
        told = "none of those measured" if smallest is None else f"{100 * smallest:.1f} %"
        lines.append(
            f"{workload} {metric}: smallest slowdown flagged {100 * _POWER:g} % of the time: {told}"
        )
    return lines


def _say(text: str) -> None:
    sys.stderr.write(f"llmperf: {text}\n")
