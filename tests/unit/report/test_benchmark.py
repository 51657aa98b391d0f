"""Samples replayed into pytest-benchmark, seen through a run of pytest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_llmperf.report.result import Result

pytest.importorskip("pytest_benchmark")

TABLE = "*benchmark 's/token c7/short': 1 tests*"
"""How pytest-benchmark heads the table of a replayed result."""

RunWith = Callable[..., "tuple[pytest.RunResult, list[dict[str, Any]]]"]


@pytest.fixture
def run_with(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> RunWith:
    """Return a function that runs a test which replays a result.

    It takes the result, options of pytest, the body of the test with ``replay(request, result)``
    and its fixtures, and returns the outcome and the benchmarks of its JSON file. Options go
    without a JSON file: pytest-benchmark warns where it has nothing to write.
    """
    # It takes a worker of pytest-xdist for no place to measure; this one only replays.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(
        result: Result,
        *options: str,
        body: str = "replay(request, result)",
        fixtures: str = "request",
    ) -> tuple[pytest.RunResult, list[dict[str, Any]]]:
        pytester.makepyfile(
            f"""
            from pytest_llmperf.report.benchmark import replay
            from pytest_llmperf.report.result import Result

            result = Result.loads({result.dumps()!r})

            def test_it({fixtures}):
                {body}
            """
        )
        file = pytester.path / "benchmarks.json"
        outcome = pytester.runpytest(*(options or [f"--benchmark-json={file}"]))
        return outcome, read(file)

    return run


def read(file: Path) -> list[dict[str, Any]]:
    """Return the benchmarks of a JSON file; a missing one has none."""
    if not file.exists():
        return []
    found: list[dict[str, Any]] = json.loads(file.read_text("utf-8"))["benchmarks"]
    return found


def test_rounds_are_seconds_a_token_of_all_launches(run_with: RunWith, result: Result) -> None:
    """So that the least is the best and OPS are tokens per second."""
    outcome, (benchmark,) = run_with(result)
    outcome.assert_outcomes(passed=1)
    outcome.stdout.fnmatch_lines([TABLE])
    stats = benchmark["stats"]
    assert stats["data"] == pytest.approx([1 / 50, 1 / 40, 1 / 62.5])
    assert (stats["rounds"], stats["iterations"]) == (3, 1)
    assert stats["min"] == pytest.approx(1 / 62.5)
    assert stats["ops"] == pytest.approx(3 / (1 / 50 + 1 / 40 + 1 / 62.5))


def test_case_builds_machine_and_verdicts_go_along(run_with: RunWith, result: Result) -> None:
    """As extra information; the case is the group."""
    _, (benchmark,) = run_with(result)
    assert benchmark["group"] == "s/token c7/short"
    assert benchmark["extra_info"] == {
        "case": "c7/short",
        "build": "b8156",
        "baseline": "b8149",
        "machine": "rtx-5080-16gb",
        "verdicts": {"decode_tps": "REGRESSION"},
    }


def test_the_roofline_goes_along(
    run_with: RunWith, result: Result, roofline: dict[str, Any]
) -> None:
    """Where there is one."""
    _, (benchmark,) = run_with(replace(result, roofline=roofline))
    assert benchmark["extra_info"]["roofline"] == roofline


def test_a_result_without_baseline_is_replayed(run_with: RunWith, result: Result) -> None:
    """A first recording is worth a benchmark, too."""
    _, (benchmark,) = run_with(replace(result, base=None))
    assert benchmark["extra_info"]["baseline"] is None


@pytest.mark.parametrize("measured", [{}, {"ttft_ms": [[12.0]]}, {"decode_tps": [[]]}])
def test_without_decode_samples_there_is_no_benchmark(
    run_with: RunWith, result: Result, measured: dict[str, list[list[float]]]
) -> None:
    """A gate of memory has no rounds."""
    outcome, _ = run_with(replace(result, measured=measured), "--benchmark-columns=min")
    outcome.assert_outcomes(passed=1)
    outcome.stdout.no_fnmatch_line(TABLE)


def test_of_two_results_of_one_test_the_first_is_replayed(
    run_with: RunWith, result: Result
) -> None:
    """pytest-benchmark takes one benchmark a test."""
    outcome, benchmarks = run_with(result, body="replay(request, result); replay(request, result)")
    outcome.assert_outcomes(passed=1)
    assert len(benchmarks) == 1


def test_a_test_with_a_benchmark_of_its_own_keeps_it(run_with: RunWith, result: Result) -> None:
    """What the author measures is not replaced."""
    outcome, (benchmark,) = run_with(
        result,
        body="replay(request, result); benchmark.pedantic(int, rounds=2)",
        fixtures="request, benchmark",
    )
    outcome.assert_outcomes(passed=1)
    assert benchmark["stats"]["rounds"] == 2
    assert benchmark["extra_info"] == {}


@pytest.mark.parametrize("option", ["--benchmark-skip", "--benchmark-disable"])
def test_without_benchmarks_the_test_still_runs(
    run_with: RunWith, result: Result, option: str
) -> None:
    """Whoever wants no benchmarks wants verdicts all the same."""
    outcome, _ = run_with(result, option)
    outcome.assert_outcomes(passed=1)
    outcome.stdout.no_fnmatch_line(TABLE)
