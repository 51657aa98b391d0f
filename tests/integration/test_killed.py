"""A run that is killed leaves no server behind, and nothing half-written."""

from __future__ import annotations

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
