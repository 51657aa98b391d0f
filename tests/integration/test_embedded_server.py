"""The real server of the installed wheel, hosted in its own process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pytest_llmperf.build import embedded_server
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.model import SynthSpec

pytest.importorskip("xllamacpp")

KEY = "a-key-for-this-test-0123456789"
PATIENCE_S = 60.0
REQUEST = {
    "prompt": [300, 301, 302, 303] * 4,
    "n_predict": 4,
    "ignore_eos": True,
    "temperature": 0,
    "seed": 1,
    "cache_prompt": False,
}


@dataclass(frozen=True)
class Program:
    """A running program and the file its log goes to."""

    process: subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def url(self) -> str:
        """Wait until the server is ready and return its address."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if found := re.search(r"main: server is listening on (https?://\S+)", self.text()):
                return found[1]
            assert self.process.poll() is None, self.text()
            time.sleep(0.01)
        pytest.fail(f"not ready: {self.text()}")

    def end(self, number: signal.Signals) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


Start = Callable[..., Program]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model."""
    return make_model(SynthSpec(), tmp_path_factory.mktemp("models"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the program with options; whatever still runs at the end is killed."""
    started: list[Program] = []

    def run(*options: str) -> Program:
        log = tmp_path / f"server-{len(started)}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", embedded_server.__file__, *options],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={"PATH": os.environ["PATH"], "LLAMA_ARG_N_PARALLEL": "3"},
            )
        started.append(Program(process, log))
        return started[-1]

    yield run
    for program in started:
        program.process.kill()
        program.process.wait(PATIENCE_S)


@pytest.fixture
def options(model: Path, tmp_path: Path) -> list[str]:
    """Return the options of a small server with a key."""
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n", encoding="utf-8")
    return ["-m", str(model), "-c", "512", "--port", "0", "--offline", "--api-key-file", str(file)]


def test_it_serves_with_the_key_and_not_without(start: Start, options: list[str]) -> None:
    """Health is open, everything else asks for the key, and the key stays out of the log."""
    program = start(*options, "-np", "1", "-lv", "4")
    url = program.url()
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/props").status_code == 401
    assert httpx.post(f"{url}/completion", json=REQUEST).status_code == 401
    assert httpx.get(f"{url}/props", headers=headers).json()["total_slots"] == 1
    answer = httpx.post(f"{url}/completion", json=REQUEST, headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 200
    assert answer.json()["tokens_predicted"] == 4
    assert KEY not in program.text()
    assert program.end(signal.SIGTERM) == 0


def test_the_log_tells_the_memory(start: Start, options: list[str]) -> None:
    """At the verbosity of traces the log has the size of each buffer."""
    program = start(*options, "-np", "1", "-lv", "4")
    program.url()
    kinds = set(re.findall(r"(model|KV|compute) buffer size =\s*[\d.]+ MiB", program.text()))
    assert kinds == {"model", "KV", "compute"}


def test_slots_are_as_in_llama_server(start: Start, options: list[str]) -> None:
    """Left alone the server has four slots, whatever the environment says."""
    headers = {"Authorization": f"Bearer {KEY}"}
    props = httpx.get(f"{start(*options).url()}/props", headers=headers).json()
    assert props["total_slots"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_while_an_answer_is_under_way(
    start: Start, options: list[str], number: signal.Signals
) -> None:
    """An open stream does not hold the program up, and the exit status is 0."""
    program = start(*options, "-np", "1", "--ctx-size", "8192")
    request = {**REQUEST, "n_predict": 8000, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream(
        "POST", f"{program.url()}/completion", json=request, headers=headers, timeout=PATIENCE_S
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: ")
        assert program.end(number) == 0


def test_an_unknown_option_is_named(start: Start, options: list[str]) -> None:
    """A wrong option ends the program with status 1 before anything is loaded."""
    program = start(*options, "--no-such-option")
    assert program.process.wait(PATIENCE_S) == 1
    assert program.text().startswith("error: invalid argument: --no-such-option\n")


def test_a_model_that_does_not_load_is_explained(start: Start, tmp_path: Path) -> None:
    """The library's own words stand in the log, and the exit status is 1."""
    program = start("-m", str(tmp_path / "none.gguf"), "--port", "0")
    assert program.process.wait(PATIENCE_S) == 1
    assert "failed to load model" in program.text()
    assert program.text().splitlines()[-1].startswith("main: error: the server did not start")


def test_a_signal_ends_it_while_the_model_is_loading(start: Start, tmp_path: Path) -> None:
    """While it loads, health answers 503 and a signal is not put off until it has loaded."""
    # Opening a pipe that nobody writes to waits for ever, as a very large model would.
    pipe = tmp_path / "slow.gguf"
    os.mkfifo(pipe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = start("-m", str(pipe), "--port", str(port))
    assert _first_health(port) == 503
    assert program.end(signal.SIGTERM) == -signal.SIGTERM


# A wheel that handles the signal itself, as older ones do, just as one arrives. Its
# handler is any function of the C library that does nothing much.
_SWALLOWS = """
import ctypes, os, signal
from types import SimpleNamespace

def threads():
    return SimpleNamespace(n_threads=-1)

class CommonParams(SimpleNamespace):
    def __init__(self):
        super().__init__(model=SimpleNamespace(path=""), cpuparams=threads(),
                         cpuparams_batch=threads(), port=0, n_parallel=1)

class Server:
    listening_address = "http://127.0.0.1:1"

    def __init__(self, params):
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.signal.restype = ctypes.c_void_p
        library.signal(signal.SIGTERM, ctypes.cast(library.abs, ctypes.c_void_p))
        os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_signal_that_the_library_takes_is_not_lost(start: Start, tmp_path: Path) -> None:
    """A signal between the library's handler and ours ends the program too."""
    (tmp_path / "xllamacpp").mkdir()
    (tmp_path / "xllamacpp" / "__init__.py").write_text(_SWALLOWS, encoding="utf-8")
    program = start("--llmperf-wheel", str(tmp_path), "-m", "model.gguf")
    assert program.process.wait(PATIENCE_S) == 0
    assert program.text().endswith("main: told to stop, exiting\n")


def _first_health(port: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code
        except httpx.TransportError:
            time.sleep(0.01)
    pytest.fail("the server never listened")


def _output(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", embedded_server.__file__, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_it_tells_its_version() -> None:
    """The version is on the error stream, in the shape of llama-server."""
    done = _output("--version")
    assert done.returncode == 0
    assert re.match(r"version: \d+ \(\w+\)\nwheel: xllamacpp \S+\n$", done.stderr)


def test_it_lists_devices() -> None:
    """Each line under the headline is a device with its memory, or says that there is none."""
    done = _output("--list-devices")
    assert done.returncode == 0
    head, *lines = done.stdout.splitlines()
    assert head == "Available devices:"
    shape = r"  (\S+: .+ \(\d+ MiB, \d+ MiB free\)|\(none\))"
    assert lines != []
    assert [line for line in lines if not re.fullmatch(shape, line)] == []


def test_the_wheel_may_lie_in_a_folder(tmp_path: Path) -> None:
    """``--llmperf-wheel`` puts a folder before the installed packages."""
    package = tmp_path / "xllamacpp"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.2.12'\nBUILD_INFO = {'build_number': 8156, 'commit': '3769fe6eb'}\n",
        encoding="utf-8",
    )
    done = _output("--llmperf-wheel", str(tmp_path), "--version")
    assert done.stderr == "version: 8156 (3769fe6eb)\nwheel: xllamacpp 0.2.12\n"
