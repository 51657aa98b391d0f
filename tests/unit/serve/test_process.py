"""Server processes: how they end, and that they never outlive what started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support.fakes import Journal, eventually, fake_command, goes, running

from pytest_llmperf.errors import ServerError
from pytest_llmperf.serve.process import ServerProcess, describe_exit

START = """
import json, os, sys, time
from pathlib import Path
from pytest_llmperf.serve.process import ServerProcess
process = ServerProcess(sys.argv[2:], Path(sys.argv[1]), os.environ)
print(json.dumps(process.pid), flush=True)
time.sleep(600)
"""

Start = Callable[..., ServerProcess]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """What the fake servers of this test note."""
    return Journal(tmp_path / "journal")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts commands, and stops them at the end of the test."""
    started: list[ServerProcess] = []

    def one(*command: str) -> ServerProcess:
        started.append(ServerProcess(command, tmp_path / "log", os.environ))
        return started[-1]

    yield one
    for process in started:
        process.stop()


def ended(process: ServerProcess) -> int | None:
    """Wait for a process to end by itself; return its exit status."""
    eventually(lambda: process.poll() is not None)
    return process.poll()


def child_of(journal: Journal) -> int:
    """Wait for a fake server to have its child; return that one's process id."""
    eventually(lambda: bool(journal.entries("start")))
    return int(journal.entries("start")[0]["child"])


def supervisor_of(pid: int) -> psutil.Process:
    """Return the supervisor of a server."""
    supervisor = psutil.Process(pid).parent()
    assert supervisor is not None
    assert any("supervisor.py" in part for part in supervisor.cmdline())
    return supervisor


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-signal.SIGSEGV, "killed by SIGSEGV (exit 139)"),
        (-signal.SIGTERM, "killed by SIGTERM (exit 143)"),
        (-signal.SIGKILL, "killed by SIGKILL (exit 137: out of memory, or somebody's kill)"),
        (137, "exit code 137 (SIGKILL, told by a shell: out of memory, or somebody's kill)"),
        (-99, "killed by signal 99 (exit 227)"),
    ],
)
def test_an_exit_status_is_told_in_words(status: int, text: str) -> None:
    """A code is a code, a signal has its name and the number that a shell shows."""
    assert describe_exit(status) == text


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_the_exit_status_is_the_servers_own(start: Start, code: str, status: int) -> None:
    """What the supervisor reports is how the server ended, and it stays so after stop()."""
    process = start(sys.executable, "-I", "-S", "-c", code)
    assert ended(process) == status
    assert process.stop() == status
    assert process.poll() == status


def test_output_of_both_kinds_goes_to_the_log(start: Start) -> None:
    """Standard output and standard error end up in one file."""
    code = "import sys; print('to stdout'); print('to stderr', file=sys.stderr)"
    process = start(sys.executable, "-I", "-S", "-c", code)
    ended(process)
    assert sorted(process.log.read_text("utf-8").splitlines()) == ["to stderr", "to stdout"]


def test_a_command_that_is_not_there_is_named(start: Start) -> None:
    """A program that cannot be started is an error of kind `start` with its name and why."""
    with pytest.raises(ServerError, match="no-such-server: No such file") as caught:
        start("no-such-server")
    assert caught.value.kind == "start"


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error names the log, not the command, which is in order."""
    log = tmp_path / "missing" / "log"
    with pytest.raises(ServerError, match="missing/log: No such file"):
        ServerProcess([sys.executable, "-c", ""], log, os.environ)


def test_a_supervisor_that_cannot_work_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that ends without a word is an error now, not after the start timeout."""
    broken = tmp_path / "supervisor.py"
    broken.write_text("", "utf-8")
    monkeypatch.setattr("pytest_llmperf.serve.process._SUPERVISOR", broken)
    monkeypatch.setattr("pytest_llmperf.serve.process._START_TIMEOUT", 3600.0)
    with pytest.raises(ServerError, match="cannot start the server: its supervisor ended") as error:
        ServerProcess([sys.executable, "-c", ""], tmp_path / "log", os.environ)
    assert error.value.kind == "start"


def test_a_running_server_has_no_exit_status(start: Start, journal: Journal) -> None:
    """poll() gives None while the server runs; the pid is the server's own."""
    process = start(*fake_command(journal, faults="never-listens,child"))
    child_of(journal)
    assert process.poll() is None
    assert journal.entries("start")[0]["pid"] == process.pid


def test_stop_twice_is_stop_once(start: Start, journal: Journal) -> None:
    """A second stop() does nothing and gives the same exit status."""
    process = start(*fake_command(journal, faults="never-listens,child"))
    child_of(journal)
    assert process.stop() == 0
    assert process.stop() == 0
    assert not running(process.pid)


def test_a_child_in_another_session_dies_too(start: Start, journal: Journal) -> None:
    """stop() ends descendants that left the process group and ignore SIGTERM."""
    process = start(*fake_command(journal, faults="never-listens,child"))
    child = child_of(journal)
    assert os.getsid(child) == child
    process.stop()
    assert goes(child)


def test_a_child_of_a_server_that_crashed_dies_too(start: Start, journal: Journal) -> None:
    """Descendants in other sessions do not outlive a server that ended by itself."""
    process = start(*fake_command(journal, faults="start-exit,child"))
    assert ended(process) == 3
    assert goes(child_of(journal))


def test_a_server_deaf_to_sigterm_is_killed(start: Start, journal: Journal) -> None:
    """A server that ignores SIGTERM gets SIGKILL after its grace."""
    process = start(*fake_command(journal, faults="never-listens,deaf,child"))
    child = child_of(journal)
    assert process.stop() == -signal.SIGKILL
    assert not running(process.pid)
    assert goes(child)


def test_a_server_dies_with_its_supervisor(start: Start, journal: Journal) -> None:
    """SIGKILL of the supervisor ends the server, deaf or not, and is told as SIGKILL."""
    process = start(*fake_command(journal, faults="never-listens,deaf,child"))
    child = child_of(journal)
    try:
        supervisor_of(process.pid).kill()
        assert goes(process.pid)
        assert ended(process) == -signal.SIGKILL
        assert process.stop() == -signal.SIGKILL
    finally:
        os.kill(child, signal.SIGKILL)


def test_sigterm_to_the_supervisor_stops_in_order(start: Start, journal: Journal) -> None:
    """A supervisor that is asked to end stops the server and its descendants first."""
    process = start(*fake_command(journal, faults="never-listens,child"))
    child = child_of(journal)
    supervisor_of(process.pid).terminate()
    assert ended(process) == 0
    assert goes(child)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_nothing_outlives_a_killed_parent(tmp_path: Path, journal: Journal, how: int) -> None:
    """When the process that started it is killed, server, child and supervisor go."""
    command = fake_command(journal, faults="never-listens,child")
    script = tmp_path / "start.py"
    script.write_text("import resource; resource.setrlimit(4, (0, 0))\n" + START, "utf-8")
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "log"), *command], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        server = int(json.loads(parent.stdout.readline()))
        child = child_of(journal)
        supervisor = supervisor_of(server).pid
        assert running(server)
        assert running(child)
        parent.send_signal(how)
    assert parent.returncode == -how
    assert goes(server)
    assert goes(child)
    assert goes(supervisor)


def test_many_may_ask_at_once_how_it_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """As parallel requests do; all hear the same, even if one of them is slow to take it in."""
    process = start("sh", "-c", "exit 3")
    process._supervisor.wait()
    process._listener.join()
    hear = process._hear

    def slowly(message: Mapping[str, object]) -> None:
        time.sleep(0.2)
        hear(message)

    monkeypatch.setattr(process, "_hear", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: process.poll(), range(4))) == {3}
