"""Writes ``results.json`` and a self-contained ``index.html``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2

from pytest_llmperf.errors import UserError
from pytest_llmperf.judge.store import write_atomic
from pytest_llmperf.plain import plain
from pytest_llmperf.report.gpus import gpu_lines
from pytest_llmperf.report.result import Result
from pytest_llmperf.report.wording import (
    HEADER,
    bandwidth_told,
    partial_told,
    roofline_told,
    rows,
    run_bound,
)

SCHEMA = 1
"""Version of ``results.json``."""


def write_report(folder: Path, results: Sequence[Result]) -> Path:
    """Write both files and return the page's path.

    ``results.json`` is ``{"schema": 1, "false_regression_bound": P, "results": [...]}``: the bound
    of the whole run, and each result with its verdicts, their evidence and the samples of every
    launch of the build under test.

    Args:
        folder: Made if it is not there.
        results: Of all tests, from all processes.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        data = {
            "schema": SCHEMA,
            "false_regression_bound": run_bound(results),
            "results": [json.loads(result.dumps()) for result in results],
        }
        write_atomic(folder / "results.json", json.dumps(data, indent=2, sort_keys=True) + "\n")
        page = folder / "index.html"
        write_atomic(page, _render(results))
    except OSError as error:
        raise UserError(f"--llmperf-report={folder}: cannot write: {error.strerror}") from error
    return page


def _render(results: Sequence[Result]) -> str:
    source = resources.files("pytest_llmperf").joinpath("data/report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    lines = [
        {
            "cells": cells,
            "outcome": verdict.outcome.value,
            "bandwidth": bandwidth_told(result, verdict),
            "roofline": roofline_told(result),
            "reason": "\n".join(filter(None, (verdict.reason, partial_told(result)))),
            "nodeid": result.nodeid,
            "command": result.new.command,
            "base_command": result.base.command if result.base else "",
            "logs": [*result.new.logs, *(result.base.logs if result.base else ())],
            "evidence": json.dumps(verdict.evidence, indent=1, sort_keys=True),
        }
        for result in results
        for cells, verdict in rows(result)
    ]
    counts: dict[str, int] = {}
    for verdict in (verdict for result in results for verdict in result.verdicts):
        counts[verdict.outcome.value] = counts.get(verdict.outcome.value, 0) + 1
    page = environment.from_string(source).render(
        header=HEADER,
        measured=HEADER.index("measured"),
        lines=lines,
        counts=counts,
        builds=list(dict.fromkeys(result.new.about for result in results)),
        baselines=list(dict.fromkeys(r.base.about for r in results if r.base is not None)),
        machines=list(dict.fromkeys(result.machine for result in results)),
        gpus=list(dict.fromkeys((r.case, told) for r in results if (told := _gpus(r)))),
    )
    return plain(page)


def _gpus(result: Result) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the builds of a result that GPUs were looked at for, with a line for each GPU."""
    sides = [side for side in (result.new, result.base) if side is not None]
    return tuple((side.label, tuple(lines)) for side in sides if (lines := gpu_lines(side)))
