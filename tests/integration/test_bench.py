"""The real llama-bench as a source of samples, beside the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.project import SUITE, Project

MORE = """
[workloads.depth]
turns = [{ depth = 64, prompt = 16, generate = 8 }]

[workloads.bench]
tool = "llama-bench"
turns = [{ depth = 64, prompt = 16, generate = 8 }]

[workloads.bench_0]
tool = "llama-bench"
turns = [{ prompt = 16, generate = 8 }]
"""
MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one", "two"], workloads=["depth", "bench", "bench_0"])
def test_depth(speed):
    speed.gate("decode_tps", "prefill_tps")

@pytest.mark.llmperf(configs=["one"], workloads=["bench"])
def test_wrong_metric(speed):
    speed.gate("ttft_ms")
"""


@pytest.fixture
def bench_project(project: Project) -> Project:
    """A project whose suite has the same depth by both programs."""
    project.write("suites/llmperf.toml", SUITE + MORE)
    project.write("test_suite.py", MODULE)
    return project


def tools(project: Project) -> list[str]:
    """Return the names of the logs that llama-bench left."""
    return sorted(path.name for path in project.path.glob(".llmperf/latest/bench-*.log"))


@pytest.mark.tools
def test_llama_bench_is_recorded_beside_the_server(
    bench_project: Project, real_server: Path
) -> None:
    """Both depths come from one process a launch, and the run ends with both programs' speeds."""
    build = f"--llmperf-build={real_server}"
    done = bench_project.run("-k", "test_depth and one", build, "--update-baselines")
    assert done.code == 0, done.text
    assert len(done.verdicts()) == 6
    assert set(done.verdicts().values()) == {"RECORDED"}
    # Two launches, unless the machine was not quiet enough for one of them.
    assert len(tools(bench_project)) >= 2
    for result in done.results:
        if "bench" in result["case"]:
            assert "--n-depth 0,64" in result["new"]["command"]
            assert {len(one) for one in result["measured"]["decode_tps"]} == {2}
    table = [line.split() for line in done.text.splitlines() if line.startswith("one  ")]
    assert [line[:3] for line in table] == [
        ["one", "decode_tps", "64"],
        ["one", "prefill_tps", "64"],
    ]


@pytest.mark.tools
def test_llama_bench_side_by_side(bench_project: Project, real_server: Path) -> None:
    """Blocks of one build after the other, of a config with a quantized KV cache."""
    done = bench_project.run(
        *("-k", "test_depth and two-bench_0", f"--llmperf-build={real_server}"),
        *(f"--baseline={real_server}", "--llmperf-budget=0"),
    )
    (result,) = done.results
    assert "--cache-type-k q8_0" in result["new"]["command"]
    for verdict in result["verdicts"]:
        assert verdict["outcome"] != "ERROR", verdict["reason"]
        assert {block["paired"] for block in verdict["evidence"]["blocks"]} == {False}
        assert {block["order"] for block in verdict["evidence"]["blocks"]} <= {"b", "n"}


@pytest.mark.tools
def test_what_llama_bench_does_not_tell(bench_project: Project, real_server: Path) -> None:
    """A gate on it fails, and says what could be gated."""
    done = bench_project.run(
        "-k", "test_wrong_metric", f"--llmperf-build={real_server}", "--update-baselines"
    )
    assert done.code == 1
    assert "llama-bench tells prefill_tps and decode_tps" in done.text


def test_a_wheel_has_no_llama_bench(bench_project: Project) -> None:
    """The test fails and says where one is to be had; the server's workloads are not held up."""
    done = bench_project.run("-k", "test_depth and one and not bench_0", "--update-baselines")
    assert done.code == 1
    assert done.verdicts() == {
        "one/depth decode_tps": "RECORDED",
        "one/depth prefill_tps": "RECORDED",
        "one/bench decode_tps": "ERROR",
        "one/bench prefill_tps": "ERROR",
    }
    assert "has no llama-bench beside its server: give a folder with llama.cpp's" in done.text
