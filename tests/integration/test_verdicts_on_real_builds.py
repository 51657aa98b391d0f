"""The main job on real llama.cpp: equal builds pass, a slower one fails, errors are errors."""

from __future__ import annotations

import pytest
from support.project import Project

pytestmark = pytest.mark.alone

SUITE = """
[models.small]
synth = { layers = 8, embedding = 512, heads = 8, kv-heads = 4, feed-forward = 1536 }

[builds.one-thread]
source = "embedded"
options = { threads = 1, threads-batch = 1 }

[configs.cpu]
model = "small"
options = { threads = 2, ctx-size = 1024 }

[configs.odd]
extends = "cpu"
options = { no-such-option = 3 }

[configs.typed]
extends = "cpu"
options = { cache-type-k = "q99_0" }

[workloads.short]
turns = [{ prompt = 64, generate = 48 }]
"""


@pytest.fixture
def gate(project: Project) -> Project:
    """A project with a model large enough that threads matter."""
    project.write("suites/llmperf.toml", SUITE)
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["cpu"], workloads=["short"])
        def test_decode(speed):
            speed.gate("decode_tps")

        @pytest.mark.llmperf(configs=["odd"], workloads=["short"])
        def test_odd(speed):
            speed.gate("decode_tps")

        @pytest.mark.llmperf(configs=["typed"], workloads=["short"])
        def test_typed(speed):
            speed.gate("decode_tps")

        @pytest.mark.llmperf(configs=["cpu"], workloads=["short"], tolerances={"e2e_ms": 0.9})
        def test_wide(speed):
            speed.gate("e2e_ms")
        """,
    )
    return project


def test_same_build_gives_no_regression(gate: Project) -> None:
    """A build against itself is not a REGRESSION."""
    done = gate.run("--baseline=embedded", "-k", "decode")
    [outcome] = done.verdicts().values()
    assert outcome in {"PASS", "INCONCLUSIVE", "IMPROVED"}, done.text
    assert done.code == 0


def test_half_the_threads_are_a_regression(gate: Project) -> None:
    """The same build with one thread instead of two fails, and the text says how and why."""
    done = gate.run("--llmperf-build=one-thread", "--baseline=embedded", "-k", "decode")
    assert done.verdicts() == {"cpu/short decode_tps": "REGRESSION"}, done.text
    assert done.code == 1
    for needed in ("tok/s", "allowed -5 %", "launches", "--threads 1", ".log", "machine"):
        assert needed in done.text


def test_unknown_option_is_an_error_that_names_it(gate: Project) -> None:
    """What the build does not know is said before anything is measured."""
    done = gate.run("--baseline=embedded", "-k", "odd")
    assert done.code == 1
    assert done.verdicts() == {"odd/short decode_tps": "ERROR"}
    assert "config odd: build b11549 has no option --no-such-option" in done.text


def test_value_the_server_refuses_shows_its_log(gate: Project) -> None:
    """A server that ends at once is reported with its exit code and what it said."""
    done = gate.run("--baseline=embedded", "-k", "typed")
    assert done.verdicts() == {"typed/short decode_tps": "ERROR"}
    assert "ended before it was ready: exit code 1" in done.text
    assert "q99_0" in done.text
    assert ".log" in done.text


def test_tolerance_of_the_marker_wins(gate: Project) -> None:
    """A tolerance in the test is the one that counts."""
    done = gate.run("--baseline=embedded", "-k", "wide", "--llmperf-budget=0")
    assert done.results[0]["verdicts"][0]["tolerance"] == pytest.approx(0.9)


def test_one_launch_serves_all_tests_of_a_config(gate: Project) -> None:
    """Two tests of a config share its launches."""
    done = gate.run("--update-baselines", "-k", "decode or wide")
    logs = {log for result in done.results for log in result["new"]["logs"]}
    assert len(done.results) == 2
    assert len(logs) == 2, "llmperf_launches = 2, however many tests"
