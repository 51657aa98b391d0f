"""The error tree.

::

    LlmperfError
    ├── UserError             a mistake in what was asked; exit 4, one line, no traceback
    │   ├── PlanError         the suite file, an .env file or a marker
    │   ├── BuildError        a build that cannot be found, installed or identified
    │   ├── ModelError        a model file that is missing or not what it should be
    │   └── BaselineError     a baseline that cannot be read or written
    └── RunError              the world did not do what was asked of it; fails the test
        ├── ServerError       a server that did not start, died, hung or answered an error
        │   └── OutOfMemoryError  a server that ended because memory ran out
        ├── ToolError         a llama.cpp program that did not do its work
        │   └── PartialPassError  a pass over a corpus that broke off
        ├── TooSlowError      a sample that took longer than its workload allows
        ├── UnmeasuredError   a metric that this build, config or machine does not show
        └── CheckError        an answer that must not be counted (cached, short, truncated)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class LlmperfError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        build: Identity of the build whose program failed, where one did, else None. Two builds of
            one number have one label, so it is not that.
    """

    build: object = None


class UserError(LlmperfError):
    """Something the user can mend: the message names the thing, the place and the mend."""


class PlanError(UserError):
    """A mistake in a suite file, an ``.env`` file or a marker.

    Args:
        message: What is wrong and how to mend it, in one line.
        file: The file at fault, if there is one.
        line: 1-based line in ``file``, if known.
    """

    def __init__(self, message: str, file: Path | None = None, line: int | None = None) -> None:
        self.file = file
        self.line = line
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(where + message)


class BuildError(UserError):
    """A build that cannot be found, installed or identified."""


class ModelError(UserError):
    """A model file that is missing, unreadable or not the one the suite names."""


class BaselineError(UserError):
    """A baseline file that cannot be read, understood or written."""


class RunError(LlmperfError):
    """The run itself failed; the test that needed it fails with this text."""


class ServerError(RunError):
    """A server that did not start, died, hung or answered an error.

    Args:
        message: What happened, naming the request if there was one.
        log: The server's log file, kept after the run.
        kind: ``crashed``, ``timeout``, ``http``, ``start`` or ``foreign``.
    """

    def __init__(self, message: str, *, log: Path | None = None, kind: str = "http") -> None:
        self.log = log
        self.kind = kind
        super().__init__(message)


class OutOfMemoryError(ServerError):
    """A server that ended because memory ran out: an outcome of its own, which can be recorded.

    Args:
        message: What happened, in full.
        what: What ran out, in a few words: ``CUDA0 model buffer of 8984 MiB``.
        log: The server's log file.
        kind: ``start`` or ``crashed``.
    """

    def __init__(self, message: str, *, what: str, log: Path | None, kind: str) -> None:
        self.what = what
        super().__init__(message, log=log, kind=kind)


class LeakError(RunError):
    """A program that ended and left memory of a GPU taken."""


class ToolError(RunError):
    """A program of llama.cpp, such as llama-perplexity, that did not do its work."""


class PartialPassError(ToolError):
    """A pass over a corpus that broke off; what it found until then never passes.

    Args:
        message: What happened.
        planned: Chunks that were to be passed.
        running: Perplexity after each finished chunk.
    """

    def __init__(self, message: str, *, planned: int, running: tuple[float, ...]) -> None:
        self.planned = planned
        self.running = running
        super().__init__(message)


class TooSlowError(RunError):
    """A sample that was given up, since it took longer than the `limit` of its workload.

    Attributes:
        kind: ``timeout``: what the server still does would disturb all that follows.
    """

    kind = "timeout"


class UnmeasuredError(RunError):
    """A metric that this build, config or machine does not show."""


class CheckError(RunError):
    """An answer that is not a measurement: cached, too short, truncated or of another shape."""


@contextmanager
def blamed_on(build: object) -> Iterator[None]:
    """Note the build whose program does the work, in what goes wrong with it.

    Args:
        build: Its identity.
    """
    try:
        yield
    except LlmperfError as error:
        error.build = build
        raise


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `` (nearest: …)`` for an error text, or nothing when nothing is near."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""
