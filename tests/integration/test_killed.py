"""A run that is killed leaves no server behind, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from support.project import Project, command_lines

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one"], workloads=["long"])
def test_decode(speed):
    speed.gate("decode_tps")
"""

FIRST = """
import pytest

@pytest.mark.llmperf(configs=["two"])
def test_first(memory):
    memory.gate("kv_mib")
"""


def _until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def _servers(project: Project) -> list[str]:
    return [line for line in command_lines() if str(project.path) in line and "--port" in line]


def _start(project: Project, *arguments: str) -> subprocess.Popen[bytes]:
    project.lengthen()
    project.write("test_suite.py", MODULE)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=project.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_sigkill_leaves_no_server(project: Project) -> None:
    """SIGKILL of pytest in mid-measurement takes all servers along."""
    run = _start(project, "--baseline=embedded")
    try:
        # Each server shows twice: its supervisor's command line holds its own.
        assert _until(lambda: len(_servers(project)) >= 4), "both servers should be up"
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    assert _until(lambda: not _servers(project)), _servers(project)


def test_interrupt_leaves_no_server(project: Project) -> None:
    """Ctrl-C stops the servers in order."""
    run = _start(project, "--update-baselines")
    try:
        assert _until(lambda: len(_servers(project)) >= 2), "the server should be up"
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 2
    finally:
        run.kill()
        run.wait()
    assert not _servers(project)


def test_killed_record_keeps_the_file_whole(project: Project) -> None:
    """What an earlier run recorded survives a later run that is killed."""
    assert project.run("--update-baselines").code == 0
    [path] = project.baseline_files()
    before = path.read_bytes()
    run = _start(project, "--update-baselines")
    try:
        assert _until(lambda: len(_servers(project)) >= 2), "the server should be up"
        os.kill(run.pid, signal.SIGKILL)
    finally:
        run.kill()
        run.wait()
    assert path.read_bytes() == before
    assert _until(lambda: not _servers(project)), _servers(project)


def test_being_asked_to_end_keeps_what_was_judged(project: Project) -> None:
    """SIGTERM, as of CI whose time is up: servers stop in order, and the report is written."""
    project.lengthen()
    tests = MODULE.replace("def test_decode", "def test_second")
    project.write("test_suite.py", FIRST + tests)
    arguments = ("-q", "--update-baselines", "--llmperf-report=report")
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], cwd=project.path, stdout=subprocess.PIPE
    ) as run:
        try:
            assert _until(lambda: bool(project.baseline_files())), "the first test should be done"
            assert _until(lambda: bool(_servers(project))), "the second one's server should be up"
            run.send_signal(signal.SIGTERM)
            output, _ = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 2
    assert not _servers(project)
    results = json.loads((project.path / "report" / "results.json").read_text("utf-8"))["results"]
    assert [one["case"] for one in results] == ["two/launch"]
    assert b"two/launch" in output, "the table is shown as well"
