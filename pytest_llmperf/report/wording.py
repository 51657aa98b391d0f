"""Figures and verdicts in words: the failure text and the lines of the closing table."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import median

from pytest_llmperf.judge._common import slack_text
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plain import plain
from pytest_llmperf.report.gpus import gpu_lines, hundredths
from pytest_llmperf.report.result import Result

_MOST_NAMES = 3

HEADER = ("case", "metric", "baseline", "measured", "change", "interval", "tolerance", "verdict")


def figure(value: float | None, unit: str = "") -> str:
    """Return a figure with four significant digits and its unit, or a dash."""
    if value is None:
        return "-"
    shown = f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"  # noqa: PLR2004 - four digits
    return f"{shown} {unit}".rstrip()


def percent(value: float) -> str:
    """Return a signed percentage with one decimal."""
    # Adding 0 takes the sign off a change that is rounded to nothing.
    return f"{round(100 * value, 1) + 0.0:+.1f} %"


def interval(verdict: Verdict) -> str:
    """Return the confidence interval of the change, or a dash."""
    if verdict.interval is None:
        return "-"
    low, high = verdict.interval
    return f"{percent(low)} … {percent(high)}"


def run_bound(results: Sequence[Result]) -> float | None:
    """Return the bound of the chance that any verdict of a run is a false REGRESSION.

    Each verdict is judged by itself and has a bound of its own, so the run's is their sum at most,
    however they depend on each other and whatever else was selected.

    Returns:
        None where no verdict rests on statistics.
    """
    bounds = [
        bound
        for result in results
        for verdict in result.verdicts
        if isinstance(bound := verdict.evidence.get("false_regression_bound"), float)
    ]
    return min(sum(bounds), 1.0) if bounds else None


def since_oldest(results: Sequence[Result]) -> list[tuple[str, bool]]:
    """Return lines on the change since the oldest baseline, and whether it is beyond tolerance."""
    lines = []
    for result in results:
        for verdict in result.verdicts:
            told = verdict.evidence.get("oldest")
            if not isinstance(told, Mapping):
                continue
            change = float(told["change"])
            worse = -change if METRICS[verdict.metric].better == "higher" else change
            newest = "-" if verdict.change is None else percent(verdict.change)
            text = (
                f"since {told['label']}, the oldest baseline: {result.case} {verdict.metric} "
                f"{percent(change)} (against the one compared with {newest})"
            )
            lines.append((text, worse > verdict.tolerance))
    return lines


def settled_told(results: Sequence[Result]) -> list[tuple[str, bool]]:
    """Return lines on verdicts that blocks of today settled, and whether one is a warning.

    Their figures are today's, whatever the record says.
    """
    found = [
        (f"{result.case} {verdict.metric}", verdict)
        for result in results
        for verdict in result.verdicts
        if verdict.settled
    ]
    if not found:
        return []
    lines = [
        (
            "judged by blocks of both builds, since by the record they were open or suspected: "
            + ", ".join(name for name, _ in found),
            False,
        )
    ]
    for name, verdict in found:
        if verdict.evidence.get("suspected") and not verdict.outcome.fails(strict=True):
            lines.append((f"warning: {name}: {verdict.reason}", True))
    return lines


def folded(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, list[str]]]:
    """Return verdicts with the metrics that each stands for, in their order.

    One cause, such as a server that does not start, fails every metric of a case alike: those have
    one line together.
    """
    lines: dict[tuple[object, ...], tuple[Verdict, list[str]]] = {}
    for index, verdict in enumerate(verdicts):
        same = verdict.outcome in {Outcome.ERROR, Outcome.OOM}
        key = (verdict.outcome, verdict.reason, verdict.base) if same else (index,)
        lines.setdefault(key, (verdict, []))[1].append(verdict.metric)
    return list(lines.values())


def rows(result: Result) -> list[tuple[tuple[str, ...], Verdict]]:
    """Return the lines of the closing table for a result, each with its verdict."""
    lines = []
    for verdict, names in folded(result.verdicts):
        case, _, *rest = row(result, verdict)
        shown = names if len(names) <= _MOST_NAMES else [names[0], f"{len(names) - 1} more"]
        lines.append(((case, ", ".join(shown), *rest), verdict))
    return lines


def partial_told(result: Result) -> str:
    """Return what was answered before a workload failed, in words; ``""`` if nothing failed."""
    told = result.partial
    if not told:
        return ""
    text = f"{told['build']} {told['how']} after {told['answered']} of {told['asked']} requests"
    samples = told["samples"]
    names = [one.metric for one in result.verdicts if samples.get(one.metric)] or list(samples)
    means = [
        f"{name} {figure(median(samples[name]), METRICS[name].unit)}"
        for name in names
        if samples[name] and name in METRICS
    ]
    if not means:
        return f"{text}, before a sample was complete"
    return f"{text}; those that worked, not judged: {', '.join(means)}"


def bandwidth_told(result: Result, verdict: Verdict) -> str:
    """Return what share of the memory's bandwidth a decode speed uses, ``""`` where untold."""
    new, base = (result.roofline.get(side) for side in ("new", "base"))
    if verdict.metric != "decode_tps" or verdict.new is None or new is None:
        return ""
    before = "" if base is None else f" ({hundredths(base)} before)"
    return f"{hundredths(new)} of the bandwidth{before}"


def roofline_told(result: Result) -> str:
    """Return what the shares of the bandwidth rest on, ``""`` where there are none."""
    told = result.roofline
    if not told:
        return ""
    notes = "".join(f"; {note}" for note in told.get("notes") or ())
    return (
        f"a token reads {figure(told.get('gb_per_token'), 'GB')}, the memory "
        f"{figure(told.get('bandwidth_gbs'), 'GB/s')} ({told.get('source')}){notes}"
    )


def row(result: Result, verdict: Verdict) -> tuple[str, ...]:
    """Return a line of the closing table, in the order of :data:`HEADER`."""
    unit = METRICS[verdict.metric].unit
    return (
        result.case,
        verdict.metric,
        figure(verdict.base, unit),
        figure(verdict.new, unit),
        "-" if verdict.change is None else percent(verdict.change),
        interval(verdict),
        allowed(verdict),
        verdict.outcome.value,
    )


def allowed(verdict: Verdict) -> str:
    """Return what change for the worse is allowed."""
    metric = METRICS[verdict.metric]
    sign = "-" if metric.better == "higher" else "+"
    parts = []
    if verdict.tolerance or (metric.kind != "exact" and not verdict.slack):
        parts.append(f"{sign}{100 * verdict.tolerance:g} %")
    if verdict.slack:
        parts.append(slack_text(metric, verdict.slack))
    change = " or ".join(parts) or "none"
    budget = verdict.evidence.get("budget")
    if not isinstance(budget, int | float):
        return change
    most = "least" if metric.better == "higher" else "most"
    return f"{change}, at {most} {budget:g}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned lines, figures to the right, words to the left."""
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    left = {0, 1, len(widths) - 1}
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in rows
    ]


def failure(result: Result, *, strict: bool) -> str:
    """Return what a person needs to act on a failed gate.

    Metric, both values, ratio with its interval, tolerance, launches and samples behind it,
    exact server command, both builds, machine, log, and what to do next.
    """
    failing = [v for v in result.verdicts if v.outcome.fails(strict=strict)]
    causes = folded(failing)
    told = [f"{', '.join(names)} {verdict.outcome.value}" for verdict, names in causes]
    lines = [f"{result.case}: {', '.join(told)}"]
    for verdict, names in causes:
        lines += ["", *_explain(result, verdict, names)]
    if partial := partial_told(result):
        lines += ["", f"  {partial}"]
    lines += ["", f"  build under test  {result.new.about}"]
    if result.new.command:
        lines.append(f"    command         {result.new.command}")
    lines += [f"    log             {log}" for log in result.new.logs[-1:]]
    lines += [f"    {text}" for text in gpu_lines(result.new)]
    if result.base is not None:
        lines.append(f"  baseline          {result.base.about}")
        if result.base.command:
            lines.append(f"    command         {result.base.command}")
        lines += [f"    log             {log}" for log in result.base.logs[-1:]]
        lines += [f"    {text}" for text in gpu_lines(result.base)]
    lines.append(f"  machine           {result.machine}")
    if any(v.outcome is Outcome.REGRESSION for v in failing):
        lines += ["", _next_step(result)]
    return plain("\n".join(lines))


def _explain(result: Result, verdict: Verdict, names: Sequence[str]) -> list[str]:
    metric = METRICS[verdict.metric]
    lines = [f"  {', '.join(names)}: {verdict.outcome.value}: {verdict.reason}"]
    if verdict.base is not None and verdict.new is not None:
        change = "" if verdict.change is None else f", {percent(verdict.change)}"
        ends = "" if verdict.interval is None else f" ({interval(verdict)})"
        lines.append(
            f"    {figure(verdict.base, metric.unit)} -> {figure(verdict.new, metric.unit)}"
            f"{change}{ends}; allowed {allowed(verdict)}; {metric.better} is better"
        )
        lines.append(f"    {_behind(verdict)}")
    if told := bandwidth_told(result, verdict):
        lines.append(f"    {told}; {roofline_told(result)}")
    return lines


def _behind(verdict: Verdict) -> str:
    """Return what a verdict rests on."""
    if verdict.mode == "chunks":
        return f"one pass of each build, by chunk; {_chunks(verdict)} chunks"
    return (
        f"{verdict.mode}; launches {verdict.launches_base} + {verdict.launches_new}, "
        f"samples {verdict.samples_base} + {verdict.samples_new}"
    )


def _chunks(verdict: Verdict) -> int:
    chunks = verdict.evidence.get("new_chunks")
    return len(chunks) if isinstance(chunks, list) else 0


def _next_step(result: Result) -> str:
    return (
        "  Next: repeat it alone with\n"
        f"    pytest {shlex.quote(result.nodeid)} {result.options}\n"
        "  if the change is known and accepted, raise the tolerance in the suite file, or record "
        "this build with\n"
        "    pytest --update-baselines."
    )
