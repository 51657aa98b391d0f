"""Watches one server for its parent and ends it, whatever becomes of the parent.

A program of its own, run as ``python -I -S supervisor.py LOG [AFTERMATH] -- COMMAND...``; it
imports nothing but the standard library. It starts COMMAND in a session of its own with its
output in LOG, and then waits for one of:

* end of file on its standard input: the parent is done, or dead, even by SIGKILL, since the
  kernel closes the pipe. The server is asked to stop, then killed, with all its descendants;
* the server's own end, which it reports.

It writes JSON lines to its standard output: ``{"pid": 123}`` at the start, ``{"exit": 0}``
(negative for a signal) at the end. If the supervisor itself is killed, Linux ends the server
(``PR_SET_PDEATHSIG``).

AFTERMATH is for a server whose process is a client of something else, such as a container
engine: JSON of two commands. The client's end is told at once as ``{"ended": true}``, the output of
``look`` as ``{"look": [code, output]}`` before the exit; ``clean`` is run after it, whatever ended
the server, and told as ``{"clean": code}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

GRACE = 5.0
"""Seconds between asking a server to stop and killing it."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TICK = 0.05
AFTER = 30.0
"""Most seconds for one command of the aftermath."""


def _prctl(option: int, value: int) -> None:
    # Linux only; elsewhere the pipe alone guards the server.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _say(**what: object) -> None:
    # The parent may be gone; what is said then is for nobody.
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


def _children() -> list[int]:
    """Return living children: as a subreaper, also those whose own parent died."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _reap() -> None:
    """Kill and collect what the server left behind, also outside its process group."""
    deadline = time.monotonic() + GRACE
    while (left := _children()) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(_TICK)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _after(command: list[str]) -> tuple[int, str]:
    """Run a command of the aftermath; return its exit code and its output."""
    try:
        done = subprocess.run(  # noqa: S603 - the caller composed this command
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=AFTER,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def _watch(process: subprocess.Popen[bytes], signals: int) -> None:
    """Return once the server has ended, or is to end."""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "parent")
        selector.register(signals, selectors.EVENT_READ, "signal")
        stopping = False
        while process.poll() is None and not stopping:
            for key, _ in selector.select():
                received = os.read(key.fd, 4096)
                stopping |= key.data == "parent" or signal.SIGTERM in received


def _end(process: subprocess.Popen[bytes], aftermath: dict[str, list[str]]) -> None:
    """End the server if it still runs, and whatever it left behind."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        if not _wait(process, GRACE):
            _say(killed=True)
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
    # The group outlives its leader when the server forked.
    _signal_group(process.pid, signal.SIGKILL)
    if aftermath:
        # The engine may take its time to tell how.
        _say(ended=True)
        # Before anything is killed: what watches a container may be a child of ours by now.
        _say(look=_after(aftermath["look"]))
        _say(exit=process.returncode)
        _say(clean=_after(aftermath["clean"])[0])
        _reap()
    else:
        _reap()
        _say(exit=process.returncode)


def main(arguments: list[str]) -> int:
    """Run the command, watch it and the parent, leave nothing behind."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:split], arguments[split + 1 :]
    if len(own) not in {1, 2} or not command:
        sys.stderr.write("usage: supervisor.py LOG [AFTERMATH] -- COMMAND...\n")
        return 2
    log = own[0]
    aftermath: dict[str, list[str]] = json.loads(own[1]) if len(own) > 1 else {}
    # Ctrl-C reaches the whole foreground group; the parent decides what it means, not we.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # SIGTERM to the supervisor means: stop the server and end.
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    signal.set_wakeup_fd(stop_write)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def in_server() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    try:
        output = Path(log).open("ab")  # noqa: SIM115 - closed once the server has it
    except OSError as error:
        _say(error=f"{log}: {error.strerror}")
        return 1
    try:
        with output:
            process = subprocess.Popen(  # noqa: S603 - the caller composed this command
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=in_server,  # noqa: PLW1509 - this program has one thread
            )
    except OSError as error:
        _say(error=f"{command[0]}: {error.strerror}")
        return 1
    _say(pid=process.pid)

    _watch(process, stop_read)
    _end(process, aftermath)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
