"""Lets one thing at a time be measured on this machine, and says who holds it up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pytest_llmperf.errors import RunError


@contextlib.contextmanager
def measuring(path: Path, progress: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock that keeps other measuring on this machine away.

    Args:
        path: The lock file; the kernel frees it when its holder dies.
        progress: Is told whom it waits for.

    Raises:
        RunError: If the lock file cannot be had.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0.05)
    except Timeout:
        progress(f"waiting for {_holder(path)} to finish measuring")
        lock.acquire()
    except OSError as error:
        raise RunError(f"cannot lock {path}: {error.strerror}; set LLMPERF_CACHE") from error
    try:
        _sign(path)
        yield
    finally:
        lock.release()


def _sign(lock: Path) -> None:
    """Say beside the lock who holds it; the lock itself is the kernel's."""
    with contextlib.suppress(OSError):
        lock.with_suffix(".holder").write_text(f"{os.getpid()} {Path.cwd()}", "utf-8")


def _holder(lock: Path) -> str:
    """Return who holds the lock, in words."""
    with contextlib.suppress(OSError, ValueError):
        pid, _, folder = lock.with_suffix(".holder").read_text("utf-8").partition(" ")
        if psutil.pid_exists(int(pid)):
            return f"another run on this machine (pid {pid}, in {folder})"
    return "another run on this machine"
