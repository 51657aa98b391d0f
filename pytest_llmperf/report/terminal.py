"""The closing table of verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from pytest_llmperf.judge.store import Change
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plain import plain
from pytest_llmperf.report.result import Result
from pytest_llmperf.report.wording import (
    HEADER,
    bandwidth_told,
    columns,
    figure,
    partial_told,
    rows,
    run_bound,
    settled_told,
    since_oldest,
)

_COLOUR = {
    Outcome.PASS: {"green": True},
    Outcome.RECORDED: {"green": True},
    Outcome.IMPROVED: {"green": True, "bold": True},
    Outcome.INCONCLUSIVE: {"yellow": True, "bold": True},
    Outcome.REGRESSION: {"red": True, "bold": True},
    Outcome.OOM: {"red": True, "bold": True},
}
_FAILED = {"red": True}


class WrittenFile(Protocol):
    """A baseline file that was written, and what changed in it."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def changes(self) -> Sequence[Change]:
        """One a metric and case."""


def summarize(
    reporter: pytest.TerminalReporter,
    results: Sequence[Result],
    *,
    written: Sequence[WrittenFile],
    stale: Mapping[Path, Sequence[str]],
    strict: bool,
    report: Path | None,
    error: str | None,
) -> None:
    """Write the table, and what a person should know beside it.

    Args:
        reporter: pytest's terminal.
        results: Of all tests, from all processes.
        written: What ``--update-baselines`` did.
        stale: Entries of those files that no case makes any more.
        strict: Whether INCONCLUSIVE fails.
        report: Where the report was written.
        error: What went wrong after the tests, if anything did.
    """
    reporter.section("llmperf")
    lines = [(result, *line) for result in results for line in rows(result)]
    header, *table = columns([HEADER, *(cells for _, cells, _ in lines)])
    reporter.write_line(header, bold=True)
    for text, (result, _, verdict) in zip(table, lines, strict=True):
        # Behind the columns, not in one: few lines have it.
        told = bandwidth_told(result, verdict)
        line = f"{text}  {told}" if told else text
        reporter.write_line(line, **_COLOUR.get(verdict.outcome, _FAILED))
    _sides(reporter, results)
    _closing(reporter, results, strict=strict)
    for one in written:
        for change in one.changes:
            if change.failed:
                told = f"{one.path}: {change.case} {change.failed}: recorded"
                reporter.write_line(told, yellow=True)
                continue
            metric = METRICS[change.metric]
            what = "chunks" if metric.scope == "quality" else "launches"
            how = "replaced, its conditions changed" if change.replaced else "recorded"
            reporter.write_line(
                f"{one.path}: {change.case} {change.metric} {how}: "
                f"{figure(change.old, metric.unit)} -> {figure(change.new, metric.unit)} "
                f"({change.launches_before} -> {change.launches_after} {what})"
            )
    for path, entries in stale.items():
        reporter.write_line(
            f"{path}: stale, made by no case of the suite file: {', '.join(entries)}", yellow=True
        )
    if report is not None:
        reporter.write_line(f"report: {report}")
    if error is not None:
        reporter.write_line(f"ERROR: {error}", red=True)


def _sides(reporter: pytest.TerminalReporter, results: Sequence[Result]) -> None:
    reporter.write_line("")
    for text in dict.fromkeys(f"build under test: {result.new.about}" for result in results):
        reporter.write_line(text)
    bases = [result.base for result in results if result.base is not None]
    for text in dict.fromkeys(f"baseline: {base.about}" for base in bases):
        reporter.write_line(text)
    for machine in dict.fromkeys(result.machine for result in results):
        reporter.write_line(f"machine: {machine}")


def _closing(reporter: pytest.TerminalReporter, results: Sequence[Result], *, strict: bool) -> None:
    outcomes = [verdict.outcome for result in results for verdict in result.verdicts]
    counts = ", ".join(
        f"{outcomes.count(outcome)} {outcome.value}" for outcome in Outcome if outcome in outcomes
    )
    reporter.write_line(f"verdicts: {counts}")
    if (bound := run_bound(results)) is not None:
        reporter.write_line(
            f"chance of a false REGRESSION in this run: {100 * bound:.2g} % at most, the sum over "
            "its verdicts, each judged by itself"
        )
    for text, warning in settled_told(results):
        reporter.write_line(plain(text), yellow=warning)
    for text, drifted in since_oldest(results):
        reporter.write_line(text, yellow=drifted)
    for result in results:
        if partial := partial_told(result):
            reporter.write_line(f"{result.case}: {partial}", yellow=True)
        for verdict in result.verdicts:
            if "uneven" in verdict.evidence:
                told = plain(f"warning: {result.case}: {verdict.reason}")
                reporter.write_line(told, yellow=True)
            if verdict.outcome is Outcome.INCONCLUSIVE and not strict:
                told = f"warning: {result.case} {verdict.metric} is INCONCLUSIVE: {verdict.reason}"
                reporter.write_line(plain(told), yellow=True)
