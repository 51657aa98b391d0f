"""Builds of the fake server, what it noted, and waiting for processes to go."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmperf.build.build import Build
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.launch import ServePlan, Server, start

PROGRAM = Path(__file__).parents[1] / "fake_server.py"
BENCH_PROGRAM = PROGRAM.with_name("fake_bench.py")
CONFIG = Config("one", "tiny", {"threads": 1, "ctx-size": 1024})
PATIENCE = 30.0
"""Seconds until what has to happen counts as not happening."""


@dataclass(frozen=True)
class Journal:
    """What fake servers noted, in the order in which it happened."""

    path: Path

    def entries(self, event: str) -> list[dict[str, Any]]:
        """Return the entries of one kind: ``start`` or ``completion``."""
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        # What follows the last line end is still being written.
        lines = text.rpartition("\n")[0].splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def starts(self) -> list[str]:
        """Return the number of the build of each start."""
        return [str(entry["build"]) for entry in self.entries("start")]

    def asked(self, prompt: int) -> list[str]:
        """Return the number of the build of each completion of this many prompt tokens."""
        return [str(e["build"]) for e in self.entries("completion") if e["prompt"] == prompt]


def fake_command(
    journal: Journal, *, number: int = 9000, faults: str = "", token_ms: float = 1.0
) -> tuple[str, ...]:
    """Return the command of a fake server."""
    own = ("--fake-number", str(number), "--fake-token-ms", str(token_ms))
    rest = ("--fake-faults", faults, "--fake-journal", str(journal.path))
    return (sys.executable, "-I", "-S", str(PROGRAM), *own, *rest)


def fake_build(
    journal: Journal,
    *,
    number: int = 9000,
    faults: str = "",
    token_ms: float = 1.0,
    options: Mapping[str, OptionValue] | None = None,
    env: Mapping[str, str] | None = None,
) -> Build:
    """Return a build whose server is the fake one."""
    return Build(
        label=f"b{number}",
        number=number,
        commit="0a1b2c3",
        source="fake",
        sha256=f"{number:064x}",
        command=fake_command(journal, number=number, faults=faults, token_ms=token_ms),
        options=options or {},
        env=env or {},
    )


@contextmanager
def fake_server(folder: Path, faults: str = "", *, hang: float = PATIENCE) -> Iterator[Server]:
    """Start a fake server with these faults in this folder; stop it at the end."""
    build = fake_build(Journal(folder / "journal"), faults=faults)
    plan = ServePlan(folder / "run", timeout=PATIENCE, hang=hang)
    with start(build, CONFIG, ModelFiles(folder / "model.gguf"), plan) as server:
        yield server


def write_program(path: Path, command: tuple[str, ...]) -> Path:
    """Write an executable script that runs ``command`` with its own arguments appended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', "utf-8")
    path.chmod(0o755)
    return path


def running(pid: int) -> bool:
    """Return whether a process runs; one that is dead but not collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def eventually(condition: Callable[[], bool]) -> bool:
    """Return whether a condition comes true within :data:`PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def goes(pid: int) -> bool:
    """Return whether a process goes within :data:`PATIENCE`."""
    return eventually(lambda: not running(pid))


def add_bench(folder: Path, faults: str = "", *, number: int = 9000) -> Path:
    """Put a fake llama-bench into a build's folder; return the journal of its starts."""
    journal = folder / "bench-journal"
    own = ("--fake-faults", faults, "--fake-journal", str(journal), "--fake-number", str(number))
    command = (sys.executable, "-I", "-S", str(BENCH_PROGRAM), *own, "--")
    write_program(folder / "llama-bench", command)
    return journal
