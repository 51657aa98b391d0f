"""A server process that does not outlive us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from pytest_llmperf.errors import ServerError

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 20.0


def describe_exit(status: int) -> str:
    """Return an exit status in words: ``exit code 1``, ``killed by SIGKILL (exit 137)``."""
    if status >= 0:
        return f"exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    memory = ": out of memory, or somebody's kill" if -status == signal.SIGKILL else ""
    return f"killed by {name} (exit {128 - status}{memory})"


class ServerProcess:
    """One command under a supervisor, in a session of its own, with its output in a file.

    The supervisor holds the other end of a pipe; when this process ends in any way, the kernel
    closes the pipe and the supervisor ends the server with all its descendants.

    Attributes:
        pid: Process id of the server (not of the supervisor).
        log: File with its standard output and standard error.

    Raises:
        ServerError: If the command cannot be started at all.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        self._exit: int | None = None
        self._said: SimpleQueue[dict[str, object]] = SimpleQueue()
        self._supervisor = subprocess.Popen(  # noqa: S603 - our own program, the user's build
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(log), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(env),
            # Ctrl-C is for pytest, which then stops its servers in order.
            process_group=0,
        )
        self._listener = Thread(target=self._listen, daemon=True, name="llmperf-supervisor")
        self._listener.start()
        first = self._next(_START_TIMEOUT)
        if first is None or "pid" not in first:
            self.stop()
            silent = "did not answer" if first is None else "ended"
            why = (first or {}).get("error", f"its supervisor {silent}")
            raise ServerError(f"cannot start the server: {why}", log=log, kind="start")
        self.pid = int(str(first["pid"]))

    def _listen(self) -> None:
        stdout = self._supervisor.stdout
        if stdout is None:  # pragma: no cover - it was opened as a pipe
            return
        for line in stdout:
            # A supervisor that is killed may leave half a line.
            with suppress(ValueError):
                self._said.put(json.loads(line))
        self._said.put({})

    def _next(self, timeout: float) -> dict[str, object] | None:
        try:
            return self._said.get(timeout=timeout)
        except Empty:
            return None

    def poll(self) -> int | None:
        """Return the server's exit status (negative for a signal), or None while it runs."""
        while self._exit is None:
            try:
                message = self._said.get_nowait()
            except Empty:
                break
            if "exit" in message:
                self._exit = int(str(message["exit"]))
        if self._exit is None and self._supervisor.poll() is not None:
            # The supervisor is gone without a word: somebody killed it, and so the server.
            self._listener.join(1.0)
            if self._said.empty():
                self._exit = -signal.SIGKILL
            else:
                return self.poll()
        return self._exit

    def stop(self) -> int | None:
        """Stop the server and its descendants; return its exit status. Safe to call again."""
        if self._supervisor.stdin is not None and not self._supervisor.stdin.closed:
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            # PDEATHSIG takes the server along.
            self._supervisor.kill()
            self._supervisor.wait()
        self._listener.join(1.0)
        if self._supervisor.stdout is not None:
            self._supervisor.stdout.close()
        return self.poll()
