"""The suite of this repository, as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on the repository's own suite."""
    command = [sys.executable, "-m", "pytest", "suites", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_node_ids_read_as_promised() -> None:
    """Config and workload stand between the brackets."""
    done = run("--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "suites/test_speed.py::test_decode[c7-short]" in done.stdout
    assert "suites/test_memory.py::test_vram[fit-nobatch]" in done.stdout


def test_memory_is_gated_between_two_real_builds(
    shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``test_memory[cpu]`` compares b11549 with b8156 and passes."""
    monkeypatch.setenv("LLMPERF_CACHE", str(shared_cache))
    done = run(
        "-k",
        "test_memory and cpu and not q8 and not synth",
        "--baseline=b8156",
        "--llmperf-build=embedded",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu/launch" in done.stdout
