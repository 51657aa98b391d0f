"""Two passes at once: both builds write, one reader compares, nothing touches the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, Event, Thread
from typing import BinaryIO

from pytest_llmperf.errors import LlmperfError, RunError, ToolError
from pytest_llmperf.quality.divergence import TokenDivergences, compare
from pytest_llmperf.quality.logits import LogitsReader
from pytest_llmperf.quality.perplexity import LeftAloneError, PassPlan, Perplexity
from pytest_llmperf.quality.side import Side

_LOOK_S = 0.2
# A server that is just being started cannot be interrupted; it dies with this process.
_PATIENCE_S = 5.0


@dataclass(frozen=True, slots=True)
class Compared:
    """Two passes over the same tokens.

    Attributes:
        base: The pass that is diverged from.
        new: The pass of the build under test.
        tokens: Divergences of the second from the first.
    """

    base: Perplexity
    new: Perplexity
    tokens: TokenDivergences


def compare_passes(base: Side, new: Side, corpus: Path, plan: PassPlan) -> Compared:
    """Pass a corpus through two models at once and compare every scored token.

    Args:
        base: What is diverged from.
        new: What is judged.
        corpus: Text file.
        plan: Pinned sizes, the same for both.

    Raises:
        BuildError: If a build has no such tool or does not know an option.
        RunError: If a pass did not get through; what the other did is in its log.
        BaselineError: If the streams are about different tokens, or one of them is damaged.
    """
    plan = replace(plan, stopped=Event())
    meeting = _Meeting(plan)
    passes: dict[str, Perplexity] = {}
    errors: dict[str, Exception] = {}

    def run(name: str, side: Side) -> None:
        try:
            passes[name] = side.run(
                corpus, plan, lambda stream: meeting.arrive(name, stream, side.build.label)
            )
        except Exception as error:  # noqa: BLE001 - raised again once both have ended
            errors[name] = error
        finally:
            meeting.leave(name)

    thread = Thread(target=run, args=("base", base), name="llmperf-base-pass", daemon=True)
    thread.start()
    try:
        run("new", new)
    except BaseException:
        plan.stopped.set()
        raise
    finally:
        thread.join(_PATIENCE_S if plan.stopped.is_set() else None)
    if errors:
        raise min(errors.values(), key=_consequence)
    if meeting.tokens is None:  # pragma: no cover - two whole passes have met
        raise ToolError("the two passes were never compared")
    return Compared(passes["base"], passes["new"], meeting.tokens)


def _consequence(error: Exception) -> int:
    """Rank errors: a program's own failure, the stream it broke off, what that did to the other."""
    if isinstance(error, LeftAloneError):
        return 2
    return 0 if isinstance(error, RunError) or not isinstance(error, LlmperfError) else 1


@dataclass(slots=True)
class _Meeting:
    """Where the readers of two streams wait for each other; the second pass's thread compares."""

    plan: PassPlan
    tokens: TokenDivergences | None = None
    _readers: dict[str, LogitsReader] = field(default_factory=dict)
    _left: set[str] = field(default_factory=set)
    _changed: Condition = field(default_factory=Condition)

    def arrive(self, name: str, stream: BinaryIO, label: str) -> None:
        """Read a stream together with the other one.

        Raises:
            BaselineError: If a stream is refused.
            LeftAloneError: If the other pass ended before, or the run was given up.
        """
        reader = LogitsReader(stream, f"the log-probabilities of {label}")
        other = "base" if name == "new" else "new"
        with self._changed:
            self._readers[name] = reader
            self._changed.notify_all()
            if name == "base":
                # The other thread reads this stream too, and leaves when it is done.
                self._wait(lambda: other in self._left)
                if self.tokens is None:
                    raise LeftAloneError("the pass of the build under test ended early")
                return
            self._wait(lambda: other in self._readers or other in self._left)
            if other not in self._readers:
                raise LeftAloneError("the pass of the baseline ended early")
        try:
            self.tokens = compare(self._readers["base"], reader)
        finally:
            self.leave(name)

    def leave(self, name: str) -> None:
        """Say that a pass has ended, or has read all that it will."""
        with self._changed:
            self._left.add(name)
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not self._changed.wait_for(condition, _LOOK_S):
            self.plan.check_stopped()
