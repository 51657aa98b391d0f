"""What is said while a test measures: on a terminal, in a log, and by a worker of pytest-xdist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf.report import progress as module
from pytest_llmperf.report.progress import Progress


class Reporter:
    """pytest's reporter, as far as progress uses it."""

    def __init__(self, *, isatty: bool) -> None:
        self.isatty = isatty
        self.lines: list[str] = []

    def write_line(self, line: str) -> None:
        """Note a line."""
        self.lines.append(line)

    def rewrite(self, line: str, *, erase: bool = False) -> None:
        """Note a line that takes the place of the one before."""
        self.lines.append(f"{'over ' if erase else ''}{line}")

    def ensure_newline(self) -> None:
        """Note that what was there stays."""
        self.lines.append("---")


class Capture:
    """pytest's capturing, which is switched off for our lines."""

    off = 0

    @contextlib.contextmanager
    def global_and_fixture_disabled(self) -> Iterator[None]:
        """Switch it off for a while."""
        self.off += 1
        yield


def config(
    reporter: Reporter | None, *, worker: str = "", verbosity: int = 0, capture: bool = True
) -> Any:  # noqa: ANN401 - stands for pytest's
    """Return a config with this reporter."""
    known = {"terminalreporter": reporter, "capturemanager": Capture() if capture else None}
    made = SimpleNamespace(
        pluginmanager=SimpleNamespace(getplugin=known.get), get_verbosity=lambda: verbosity
    )
    if worker:
        made.workerinput, made.workeroutput = {"workerid": worker}, {}
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is set."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_terminal_shows_the_newest(clock: SimpleNamespace) -> None:
    """Below pytest's own line, one over the other, and wiped at the end."""
    assert clock
    reporter = Reporter(isatty=True)
    progress = Progress(config(reporter))
    progress("one")
    progress("two")
    progress.clear()
    progress.clear()
    assert reporter.lines == ["---", "over llmperf: one", "over llmperf: two", "over ", ""]


def test_a_log_gets_a_line_now_and_then(clock: SimpleNamespace) -> None:
    """Every ten seconds the newest."""
    reporter = Reporter(isatty=False)
    progress = Progress(config(reporter))
    for _ in range(4):
        progress(f"at {clock.now:.0f}")
        clock.now += 6
    progress.clear()
    assert reporter.lines == ["---", "llmperf: at 1000", "---", "llmperf: at 1012"]


@pytest.mark.parametrize("capture", [True, False])
def test_a_worker_says_who_it_is(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str], *, capture: bool
) -> None:
    """On standard error, now and then; its reporter's lines would be seen by nobody."""
    reporter = Reporter(isatty=True)
    progress = Progress(config(reporter, worker="gw1", capture=capture))
    for _ in range(4):
        progress(f"at {clock.now:.0f}")
        clock.now += 6
    progress.clear()
    assert reporter.lines == []
    assert capsys.readouterr().err == "[gw1] llmperf: at 1000\n[gw1] llmperf: at 1012\n"


def test_a_worker_leaves_the_headline_to_the_controller() -> None:
    """It sends the lines along."""
    reporter = Reporter(isatty=True)
    made = config(reporter, worker="gw0")
    Progress(made).announce(SimpleNamespace(headline=["build", "machine"]))
    assert reporter.lines == []
    assert made.workeroutput == {"llmperf_headline": ["build", "machine"]}


def test_the_headline_is_written_before_the_first_test() -> None:
    """Line by line, unless pytest is to be quiet."""
    reporter = Reporter(isatty=True)
    headline = SimpleNamespace(headline=["build", "machine"])
    Progress(config(reporter)).announce(headline)
    assert reporter.lines == ["---", "llmperf: build", "---", "llmperf: machine"]
    Progress(config(reporter, verbosity=-1)).announce(headline)
    Progress(config(None)).announce(headline)
    assert len(reporter.lines) == 4


@pytest.mark.parametrize("worker", ["", "gw0"])
def test_very_quiet_says_nothing(capsys: pytest.CaptureFixture[str], worker: str) -> None:
    """Nor does a process without a terminal that is no worker."""
    reporter = Reporter(isatty=True)
    Progress(config(reporter, verbosity=-2, worker=worker))("one")
    Progress(config(None))("one")
    assert reporter.lines == []
    assert capsys.readouterr().err == ""
