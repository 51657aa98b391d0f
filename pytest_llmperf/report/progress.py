"""Says what goes on while a test measures, without spoiling pytest's own lines."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from typing import Protocol

import pytest

_EVERY = 10.0
"""Seconds between lines where there is no terminal to overwrite them on."""


class Announced(Protocol):
    """What :meth:`Progress.announce` reads of a run."""

    @property
    def headline(self) -> list[str]:
        """Lines that say what is compared with what."""


class Progress:
    """A line that is overwritten on a terminal, and one every ten seconds in a log.

    A worker of pytest-xdist has no terminal of its own: it writes lines to standard error, and
    leaves it to the controller to say what is compared with what.

    Args:
        config: Of the running pytest.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._capture = config.pluginmanager.getplugin("capturemanager")
        self._worker = str(getattr(config, "workerinput", {}).get("workerid", ""))
        # A worker has a reporter too, whose lines nobody sees.
        reporter = None if self._worker else config.pluginmanager.getplugin("terminalreporter")
        self._reporter: pytest.TerminalReporter | None = reporter
        self._last = 0.0
        self._shown = False

    def __call__(self, text: str) -> None:
        """Show ``text`` for as long as nothing newer comes."""
        if self._config.get_verbosity() < -1:
            return
        now = time.monotonic()
        if self._reporter is not None and self._reporter.isatty:
            # pytest's own line, `test_speed.py ...`, stays as it is; ours comes below it.
            self._write(f"llmperf: {text}", transient=True, below=not self._shown)
            self._shown = True
        elif now - self._last >= _EVERY:
            self._last = now
            self._write(f"llmperf: {text}", transient=False)

    def clear(self) -> None:
        """Wipe the overwritten line, so that pytest goes on with its own."""
        if self._shown:
            self._shown = False
            self._write("", transient=True)

    def announce(self, run: Announced) -> None:
        """Write what is compared with what, before the first test."""
        if self._worker:
            workeroutput: dict[str, object] = getattr(self._config, "workeroutput", {})
            workeroutput["llmperf_headline"] = run.headline
        elif self._reporter is not None and self._config.get_verbosity() >= 0:
            for line in run.headline:
                self._write(f"llmperf: {line}", transient=False)

    def _write(self, text: str, *, transient: bool, below: bool = False) -> None:
        reporter = self._reporter
        with self._uncaptured():
            if reporter is None:
                if self._worker:
                    # At once and as a whole, or lines of several workers would mix.
                    sys.stderr.write(f"[{self._worker}] {text}\n")
                    sys.stderr.flush()
                return
            if below:
                reporter.ensure_newline()
            if transient:
                width = shutil.get_terminal_size().columns - 1
                reporter.rewrite(text[:width], erase=True)
                if not text:
                    reporter.rewrite("")
            else:
                reporter.ensure_newline()
                reporter.write_line(text)

    def _uncaptured(self) -> contextlib.AbstractContextManager[None]:
        if self._capture is None:
            return contextlib.nullcontext()
        uncaptured: contextlib.AbstractContextManager[None] = (
            self._capture.global_and_fixture_disabled()
        )
        return uncaptured
