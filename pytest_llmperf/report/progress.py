"""Says what goes on while a test measures, without spoiling pytest's own lines."""

from __future__ import annotations

import shutil
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

    Args:
        config: Of the running pytest.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._capture = config.pluginmanager.getplugin("capturemanager")
        reporter = config.pluginmanager.getplugin("terminalreporter")
        self._reporter: pytest.TerminalReporter | None = reporter
        self._last = 0.0
        self._shown = False

    def __call__(self, text: str) -> None:
        """Show ``text`` for as long as nothing newer comes."""
        reporter = self._reporter
        if reporter is None or reporter.config.get_verbosity() < -1:
            return
        now = time.monotonic()
        if reporter.isatty:
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
        if self._reporter is not None and self._reporter.config.get_verbosity() >= 0:
            for line in run.headline:
                self._write(f"llmperf: {line}", transient=False)

    def _write(self, text: str, *, transient: bool, below: bool = False) -> None:
        reporter = self._reporter
        if reporter is None:
            return
        with self._capture.global_and_fixture_disabled():
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
