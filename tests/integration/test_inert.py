"""Installed and unused, the plugin costs nothing; asked, it documents itself."""

from __future__ import annotations

import pytest

HEAVY = ("numpy", "httpx", "pynvml", "psutil", "jinja2", "filelock")


def test_unused_it_loads_nothing_heavy(pytester: pytest.Pytester) -> None:
    """A run without our fixtures imports none of the libraries we need."""
    pytester.makepyfile(
        f"""
        import sys

        def test_nothing_heavy():
            assert [name for name in {HEAVY!r} if name in sys.modules] == []
        """
    )
    # Other plugins of a developer's environment load some of these themselves.
    done = pytester.runpytest_subprocess(
        "-p", "no:hypothesispytest", "-p", "no:anyio", "-p", "no:xdist", "-p", "no:benchmark"
    )
    done.assert_outcomes(passed=1)


def test_unused_it_reads_no_suite_file(pytester: pytest.Pytester) -> None:
    """Without our fixtures even a broken suite file is none of our business."""
    pytester.mkdir("suites").joinpath("llmperf.toml").write_text("[broken", "utf-8")
    pytester.makepyfile("def test_pass(): pass")
    pytester.runpytest_subprocess("--baseline=nonsense").assert_outcomes(passed=1)


def test_help_documents_every_option(pytester: pytest.Pytester) -> None:
    """``--help`` lists all options and ini values."""
    text = pytester.runpytest_subprocess("--help").stdout.str()
    for option in (
        "--baseline=NAME",
        "--update-baselines",
        "--llmperf-build=SPEC",
        "--llmperf-suite=FILE",
        "--llmperf-models=DIR",
        "--llmperf-strict",
        "--llmperf-report=DIR",
        "--llmperf-budget=SECONDS",
        "llmperf_tolerances",
        "llmperf_machine",
    ):
        assert option in text


def test_markers_are_documented(pytester: pytest.Pytester) -> None:
    """``--markers`` explains all of ours."""
    text = pytester.runpytest_subprocess("--markers").stdout.str()
    for marker in ("mark.gpu:", "mark.long_running:", "mark.quality:", "mark.llmperf(configs"):
        assert marker in text


def test_fixtures_are_documented(pytester: pytest.Pytester) -> None:
    """``--fixtures`` shows each public fixture with its docstring."""
    pytester.makepyfile("def test_pass(): pass")
    text = pytester.runpytest_subprocess("--fixtures").stdout.str()
    for fixture in ("speed", "memory", "llama_server", "build", "llmperf_case"):
        assert f"{fixture} -- " in text
    assert "no docstring available" not in text.partition("pytest_llmperf.fixtures")[2]
