"""The lines below the closing table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from pytest_llmperf.judge.store import Change
from pytest_llmperf.report.result import Result
from pytest_llmperf.report.terminal import summarize


class Reporter:
    """The part of pytest's terminal that is written to."""

    def __init__(self) -> None:
        """Start with nothing written."""
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        """Keep a heading."""
        self.lines.append(title)

    def write_line(self, line: str, **_markup: bool) -> None:
        """Keep a line."""
        self.lines.append(line)


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written."""

    path: Path
    changes: tuple[Change, ...]


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("decode_tps", "decode_tps recorded: - -> 70 tok/s (0 -> 40 launches)"),
        ("model_mib", "model_mib recorded: - -> 70 MiB (0 -> 40 launches)"),
        ("kld_mean", "kld_mean recorded: - -> 70 nat (0 -> 40 chunks)"),
        ("kld_p999", "kld_p999 recorded: - -> 70 nat (0 -> 40 chunks)"),
    ],
)
def test_what_was_recorded_is_counted_in_its_unit(result: Result, metric: str, told: str) -> None:
    """A pass over a corpus has chunks, everything else launches."""
    reporter = Reporter()
    change = Change("c7/short", metric, None, 70.0, 0, 40, replaced=False)
    summarize(
        cast("pytest.TerminalReporter", reporter),
        [result],
        written=[Written(Path("b.json"), (change,))],
        stale={},
        strict=False,
        report=None,
        error=None,
    )
    assert f"b.json: c7/short {told}" in reporter.lines


def test_a_decode_speed_carries_its_share_of_the_bandwidth(
    result: Result, roofline: dict[str, Any]
) -> None:
    """Behind the columns, which stay as they are; other metrics have none."""
    reporter = Reporter()
    other = replace(result.verdicts[0], metric="prefill_tps")
    summarize(
        cast("pytest.TerminalReporter", reporter),
        [replace(result, roofline=roofline, verdicts=(*result.verdicts, other)), result],
        written=[],
        stale={},
        strict=False,
        report=None,
        error=None,
    )
    header, decode, prefill, untold = reporter.lines[1:5]
    assert decode == f"{untold}  30 % of the bandwidth (34 % before)"
    assert prefill.endswith("REGRESSION")
    assert "bandwidth" not in header


def test_a_recorded_failure_and_a_crash_are_told(result: Result) -> None:
    """What cannot be measured has no metric and no figures; what worked of it is named."""
    reporter = Reporter()
    change = Change("c2/short", "", None, None, 0, 0, replaced=False, failed="runs out of memory")
    partial = {"build": "b9", "how": "crashed", "answered": 1, "asked": 7, "samples": {}}
    summarize(
        cast("pytest.TerminalReporter", reporter),
        [replace(result, partial=partial)],
        written=[Written(Path("b.json"), (change,))],
        stale={},
        strict=False,
        report=None,
        error=None,
    )
    assert "b.json: c2/short runs out of memory: recorded" in reporter.lines
    assert any(line.startswith("c7/short: b9 crashed after 1 of 7") for line in reporter.lines)
