"""Makes a server slower by a known share: stops and continues it many times a second.

For calibration only. A server that is stopped for a tenth of the time works for nine tenths of it;
what that does to a metric is measured, not assumed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

PERIOD = 0.02
"""Seconds of one stop-and-go cycle: shorter than a request, longer than the kernel's time slice."""


class Throttle:
    """Stops a process group for a share of the time until it is told to leave it alone.

    Args:
        pid: Leader of the process group.
        share: Share of the time in which it is stopped, from above 0 to below 1.
    """

    def __init__(self, pid: int, share: float) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, not {share}")
        self._pid = pid
        self._share = share
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._cycle, daemon=True, name="llmperf-throttle")
        self._thread.start()

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, number)

    def _cycle(self) -> None:
        while not self._done.wait(PERIOD * (1 - self._share)):
            self._send(signal.SIGSTOP)
            try:
                self._done.wait(PERIOD * self._share)
            finally:
                self._send(signal.SIGCONT)

    def stop(self) -> None:
        """Let the process run; safe to call again."""
        self._done.set()
        self._thread.join()
        self._send(signal.SIGCONT)
