"""A config that the real llama.cpp has no memory for: a verdict of its own, which can be recorded.

The limit is one of the address space, which the project's conftest.py sets for pytest and so for
its servers: what a machine has and who else uses it do not matter.
"""

from __future__ import annotations

import json
import sys

import pytest
from support.project import SUITE, Project

from pytest_llmperf.build import embedded_server

LIMIT_MIB = 6000

CONFTEST = f"""
import resource

resource.setrlimit(resource.RLIMIT_AS, ({LIMIT_MIB} * 2**20, resource.RLIM_INFINITY))
"""

# The tiny model's KV cache takes 2 KiB a token.
TOO_MUCH = "ctx-size = 5000192, fit = 'off'"
KV_MIB = 5000192 * 2 // 1024

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one"])
def test_buffers(memory):
    memory.gate("kv_mib", "n_ctx")

@pytest.mark.llmperf(configs=["one"], workloads=["w"])
def test_decode(speed):
    speed.gate("decode_tps", "ttft_ms")
"""

ROOM = 150016
WHAT = f"CPU KV buffer of {ROOM * 2 / 1024:.0f} MiB"

# The real server, in a shell that limits it and not the run.
PROGRAM = f"""#!/bin/sh
ulimit -v $(cat {{limit}})
exec {sys.executable} -I {embedded_server.__file__} "$@"
"""

CASES = ("one/launch kv_mib", "one/launch n_ctx", "one/w decode_tps", "one/w ttft_ms")


@pytest.fixture
def limited(project: Project) -> Project:
    """A project whose servers may have so much memory, and whose config wants more."""
    project.write("conftest.py", CONFTEST)
    project.write("test_suite.py", MODULE)
    project.write("suites/llmperf.toml", wants(TOO_MUCH))
    return project


def wants(options: str) -> str:
    """Return the suite file, its config with these options in place of its context."""
    assert SUITE.count("ctx-size = 512") == 1
    return SUITE.replace("ctx-size = 512", options)


def test_no_memory_is_a_verdict_of_its_own(limited: Project) -> None:
    """OOM names buffer, size, limit and what to do, and that both builds are alike."""
    alone = limited.run("--baseline=embedded")
    assert alone.code == 1
    assert alone.verdicts() == dict.fromkeys(CASES, "OOM")
    for told in (
        f"out of memory: CPU KV buffer of {KV_MIB} MiB could not be allocated",
        f"the limit of the address space is {LIMIT_MIB} MiB (ulimit -v)",
        "lower ctx-size",
        "both builds fail",
        "one/w: decode_tps, ttft_ms OOM",
    ):
        assert told in alone.text


def test_no_memory_can_be_recorded_and_compared(project: Project) -> None:
    """Under the same conditions OOM and figures change places, and neither goes unnoticed."""
    limit = project.path / "limit"
    limit.write_text("500000", "utf-8")
    program = project.write("build/llama-server", PROGRAM.format(limit=limit))
    program.chmod(0o755)
    project.write("test_suite.py", MODULE)
    project.write("suites/llmperf.toml", wants(f"ctx-size = {ROOM}, fit = 'off'"))
    only = (f"--llmperf-build={program}", "-k", "buffers", "-o", "llmperf_launches=1")

    recorded = project.run(*only, "--update-baselines")
    assert recorded.verdicts() == dict.fromkeys(CASES[:2], "RECORDED"), recorded.text
    [file] = project.baseline_files()
    data = json.loads(file.read_text("utf-8"))
    assert data["failures"] == {"one/launch": {"kind": "oom", "what": WHAT}}
    assert data["results"] == {}
    again = project.run(*only)
    assert again.code == 0, again.text
    assert again.verdicts() == dict.fromkeys(CASES[:2], "PASS")

    limit.write_text("unlimited", "utf-8")
    works = project.run(*only)
    assert works.code == 0, works.text
    assert works.verdicts() == dict.fromkeys(CASES[:2], "IMPROVED")

    assert project.run(*only, "--update-baselines").code == 0
    limit.write_text("500000", "utf-8")
    lost = project.run(*only)
    assert lost.code == 1
    assert lost.verdicts() == dict.fromkeys(CASES[:2], "OOM")
