"""Two passes at once: both builds write, one reader compares, nothing touches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import BinaryIO

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import LlmperfError, ToolError
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.quality.divergence import Summary, compare, summarize
from pytest_llmperf.quality.logits import LogitsReader
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity, run_perplexity


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two passes.

    Attributes:
        build: Whose tool.
        options: Config's options, in the newest names.
        model: GGUF file.
    """

    build: Build
    options: Mapping[str, OptionValue]
    model: Path


@dataclass(frozen=True, slots=True)
class Compared:
    """Two passes over the same tokens.

    Attributes:
        base: The pass that is diverged from.
        new: The pass of the build under test.
        summary: Divergences of the second from the first.
    """

    base: Perplexity
    new: Perplexity
    summary: Summary


def compare_passes(base: Side, new: Side, corpus: Path, plan: PassPlan) -> Compared:
    """Pass a corpus through two models at once and compare every scored token.

    Args:
        base: What is diverged from.
        new: What is judged.
        corpus: Text file.
        plan: Pinned sizes, the same for both.

    Raises:
        BuildError: If a build has no such tool or does not know an option.
        ToolError: If a tool did not get through; what the other did is in its log.
        BaselineError: If the streams are about different tokens, or one of them is damaged.
    """
    meeting = _Meeting()
    passes: dict[str, Perplexity] = {}
    errors: dict[str, LlmperfError] = {}

    def run(name: str, side: Side) -> None:
        try:
            passes[name] = run_perplexity(
                side.build,
                side.options,
                side.model,
                corpus,
                plan,
                consume=lambda stream: meeting.arrive(name, stream, side.build.label),
            )
        except LlmperfError as error:
            errors[name] = error
        finally:
            meeting.leave(name)

    thread = Thread(target=run, args=("base", base), name="llmperf-base-pass", daemon=True)
    thread.start()
    try:
        run("new", new)
    finally:
        meeting.leave("new")
        thread.join()
    _check(passes, errors)
    if meeting.summary is None:  # pragma: no cover - two whole passes have met
        raise ToolError("the two passes were never compared")
    return Compared(passes["base"], passes["new"], meeting.summary)


def _check(passes: Mapping[str, Perplexity], errors: Mapping[str, LlmperfError]) -> None:
    """Raise what went wrong first: a tool's own failure before what it did to the other pass."""
    for name in ("base", "new"):
        if name in passes and passes[name].failure:
            raise ToolError(
                f"llama-perplexity {passes[name].failure}; perplexity so far "
                f"{passes[name].value:.4f}; log: {passes[name].log}"
            )
    own = [error for error in errors.values() if not isinstance(error, _LeftAloneError)]
    if own or errors:
        raise (own or list(errors.values()))[0]


class _LeftAloneError(ToolError):
    """The other pass ended, so there was nothing to compare with."""


@dataclass(slots=True)
class _Meeting:
    """Where the readers of two streams wait for each other; the second pass's thread compares."""

    summary: Summary | None = None
    _readers: dict[str, LogitsReader] = field(default_factory=dict)
    _left: set[str] = field(default_factory=set)
    _changed: Condition = field(default_factory=Condition)

    def arrive(self, name: str, stream: BinaryIO, label: str) -> None:
        """Read a stream together with the other one.

        Raises:
            BaselineError: If a stream is refused.
            ToolError: If the other pass ended before.
        """
        reader = LogitsReader(stream, f"the log-probabilities of {label}")
        other = "base" if name == "new" else "new"
        with self._changed:
            self._readers[name] = reader
            self._changed.notify_all()
            if name == "base":
                # The other thread reads this stream too, and leaves when it is done.
                self._changed.wait_for(lambda: other in self._left)
                if self.summary is None:
                    raise _LeftAloneError("the pass of the build under test ended early")
                return
            self._changed.wait_for(lambda: other in self._readers or other in self._left)
            if other not in self._readers:
                raise _LeftAloneError("the pass of the baseline ended early")
        try:
            self.summary = summarize(compare(self._readers["base"], reader))
        finally:
            self.leave(name)

    def leave(self, name: str) -> None:
        """Say that a pass has ended, or has read all that it will."""
        with self._changed:
            self._left.add(name)
            self._changed.notify_all()
