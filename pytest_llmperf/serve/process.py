"""A server process that does not outlive us."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from weakref import WeakSet

from pytest_llmperf.errors import ServerError
from pytest_llmperf.serve.failure import Kills, before, kills, who_killed

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
# A shell's exit code for a signal is this plus its number.
_SHELL = 128
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 20.0
# The grace, and two commands that may each take half a minute.
_CLEAN_TIMEOUT = 70.0


def describe_exit(status: int, killer: str = "out of memory, or somebody's kill") -> str:
    """Return an exit status in words: ``exit code 1``, ``killed by SIGKILL (exit 137)``.

    Args:
        status: Negative for a signal.
        killer: Who sent SIGKILL, if it was that.
    """
    if status == _SHELL + signal.SIGKILL:
        return f"exit code {status} (SIGKILL, told by a shell: {killer})"
    if status >= 0:
        return f"exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    who = f": {killer}" if -status == signal.SIGKILL else ""
    return f"killed by {name} (exit {_SHELL - status}{who})"


_processes: WeakSet[ServerProcess] = WeakSet()


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What is to be done for a server whose process is only the client of what runs it.

    Attributes:
        look: Command that tells how the server ended.
        clean: Command that ends what still runs, and removes it.
        words: Puts an end into words, from the client's exit status and the exit code and output
            of ``look``.
    """

    look: tuple[str, ...]
    clean: tuple[str, ...]
    words: Callable[[int, int, str], str]


def server_pids() -> set[int]:
    """Return the process ids of the servers that this process runs, those in containers too."""
    return {one.server_pid for one in _processes if one.server_pid is not None and not one.stopped}


class ServerProcess:
    """One command under a supervisor, in a session of its own, with its output in a file.

    The supervisor holds the other end of a pipe; when this process ends in any way, the kernel
    closes the pipe and the supervisor ends the server with all its descendants.

    Args:
        command: Program and arguments.
        log: File for its output.
        env: Its environment, and that of the aftermath.
        aftermath: What is done once the command ended, whatever ended it.

    Attributes:
        pid: Process id of the command (not of the supervisor).
        server_pid: Process id of the server: that of the command, unless the command is only a
            client; None where it cannot be seen from here.
        stopped: Whether :meth:`stop` was called.
        log: File with its standard output and standard error.
        before: What was true of memory before it started.

    Raises:
        ServerError: If the command cannot be started at all.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        aftermath: Aftermath | None = None,
    ) -> None:
        self.log = log
        self.stopped = False
        self._env = dict(env)
        self._aftermath = aftermath
        self._looked: tuple[int, str] | None = None
        self._clean = aftermath is None
        self._exit: int | None = None
        # Of requests at once each asks by itself how the server died.
        self._polling = Lock()
        self._ending = False
        self._kills_after: Kills | None = None
        self.before = before()
        self._said: SimpleQueue[dict[str, object]] = SimpleQueue()
        own = [str(log)]
        if aftermath is not None:
            own.append(json.dumps({"look": aftermath.look, "clean": aftermath.clean}))
        self._supervisor = subprocess.Popen(  # noqa: S603 - our own program, the user's build
            [sys.executable, "-I", "-S", str(_SUPERVISOR), *own, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._env,
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
        self.server_pid: int | None = self.pid
        _processes.add(self)

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
        with self._polling:
            return self._poll()

    def _poll(self) -> int | None:
        while self._exit is None:
            try:
                message = self._said.get_nowait()
            except Empty:
                break
            self._hear(message)
        if self._exit is None and self._supervisor.poll() is not None:
            # The supervisor is gone without a word: somebody killed it, and so the server.
            self._listener.join(1.0)
            if self._said.empty():
                self._exit = -signal.SIGKILL
            else:
                return self._poll()
        if self._exit is not None and self._kills_after is None:
            # Soon: later the counters tell of others as well.
            self._kills_after = kills()
        return self._exit

    def _hear(self, message: Mapping[str, object]) -> None:
        self._ending |= bool(message.get("ended"))
        if isinstance(looked := message.get("look"), list):
            self._looked = (int(looked[0]), str(looked[1]))
        if "exit" in message:
            self._exit = int(str(message["exit"]))
        if message.get("clean") == 0:
            self._clean = True

    @property
    def ending(self) -> bool:
        """Whether the command has ended, and only how the server did is still being asked."""
        return self.poll() is None and self._ending

    def describe_exit(self) -> str:
        """Return in words how the server ended, ``running`` while it did not."""
        status = self.poll()
        if status is None:
            return "running"
        if self._aftermath is None or self._looked is None:
            return describe_exit(status, self._killer[1])
        return self._aftermath.words(status, *self._looked)

    @property
    def killed_for_memory(self) -> bool:
        """Whether the server ended by SIGKILL since the machine or a limit had no memory left."""
        if self._aftermath is not None:
            return "out of memory (container limit" in self.describe_exit()
        return self.poll() in {-signal.SIGKILL, _SHELL + signal.SIGKILL} and self._killer[0]

    @property
    def _killer(self) -> tuple[bool, str]:
        return who_killed(self.before.kills, self._kills_after or kills())

    def _clean_up(self) -> None:
        """Do what the supervisor could not, since it was killed."""
        while not self._said.empty():
            self._hear(self._said.get())
        if self._aftermath is None or self._clean:
            return
        self._clean = True
        # If it fails, the next run finds what is left.
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(  # noqa: S603 - composed by us
                self._aftermath.clean,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._env,
                timeout=_STOP_TIMEOUT,
                check=False,
            )

    def stop(self) -> int | None:
        """Stop the server and its descendants; return its exit status. Safe to call again."""
        self.stopped = True
        if self._supervisor.stdin is not None and not self._supervisor.stdin.closed:
            self._supervisor.stdin.close()
        try:
            self._supervisor.wait(_STOP_TIMEOUT if self._clean else _CLEAN_TIMEOUT)
        except subprocess.TimeoutExpired:
            # PDEATHSIG takes the server along.
            self._supervisor.kill()
            self._supervisor.wait()
        self._listener.join(1.0)
        if self._supervisor.stdout is not None:
            self._supervisor.stdout.close()
        status = self.poll()
        self._clean_up()
        return status
