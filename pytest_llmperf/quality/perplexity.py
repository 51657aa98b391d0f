"""Runs a build's own ``llama-perplexity`` and takes what it says, however it ends.

The tool ends with exit code 0 on almost everything that goes wrong: too little text, a failed
decode, numbers that are none. So nothing counts but the lines that a whole run prints, and each
that is missing is an error. What it had found before it died is kept and reported as partial.

It also loses lines: b11434 was seen to end well without its last lines in every second pass on a
busy machine (docs/llama-cpp.md). So a pass without them is made again, a few times, unless its
log-probabilities have all been read, which is proof enough that it went through.

Its log-probabilities can be read as it writes them: it is given a FIFO for its file, and nothing of
them touches the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import BinaryIO

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.dialect import dialect_of
from pytest_llmperf.build.tools import PERPLEXITY, tool_of
from pytest_llmperf.errors import LlmperfError, OutOfMemoryError, ToolError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.failure import shortage
from pytest_llmperf.serve.launch import server_environment, shown, tail
from pytest_llmperf.serve.process import ServerProcess

_PLANNED = re.compile(r"calculating perplexity over (\d+) chunks")
_RUNNING = re.compile(r"\[(\d+)\]\s*(-?\d+\.\d+|-?nan|-?inf)")
_FINAL = re.compile(r"Final estimate: PPL = (\S+) \+/- (\S+)")
# What the tool says when it gives up; it ends with exit code 0 all the same.
_COMPLAINTS = (
    re.compile(r".*you need at least \d+ tokens.*"),
    re.compile(r".*failed to (?:eval|decode|open|tokenize|load).*", re.IGNORECASE),
    re.compile(r".*Unexpected negative standard deviation.*"),
    re.compile(r".*error: .*"),
)
_CONFIG_FILE = re.compile(r"using config file: *(\S+)")
_LOST = "ended with exit code 0 without its last lines"
_TRIES = 4
_POLL_S = 0.1
_QUIET_S = 2.0
_PIPE_BYTES = 1024 * 1024
_numbers = count(1)


class LeftAloneError(ToolError):
    """What a pass was to be compared with ended, so there is nothing to go on for."""


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How a corpus is passed through a model. All of it changes the numbers, so all is pinned.

    Attributes:
        context: Tokens of a chunk; the second half of each is scored.
        batch: Logical batch, ``-b``.
        ubatch: Physical batch, ``-ub``; 1 takes the kernels of decoding.
        chunks: Chunks to pass, None for the whole corpus.
        folder: Run folder; log and FIFO go there.
        start: Most seconds until the first chunk begins: loading the model, cutting the text.
        limit: Most seconds that a pass may take, or be expected to take once its first chunks have
            shown how fast it goes.
        stopped: Set when the run is given up: whoever passes or waits gives up too.
        progress: Is told how far it is, at most every two seconds.
        check: Is given the log once all is loaded, and raises where that is not as it should be.
    """

    context: int = 512
    batch: int = 512
    ubatch: int = 512
    chunks: int | None = None
    folder: Path = Path()
    start: float = math.inf
    limit: float = math.inf
    stopped: Event = field(default_factory=Event, compare=False)
    progress: Callable[[str], None] = field(default=lambda _text: None)
    check: Callable[[Path], None] = field(default=lambda _log: None)

    def check_stopped(self) -> None:
        """Give up where the run was given up.

        Raises:
            LeftAloneError: If it was.
        """
        if self.stopped.is_set():
            raise LeftAloneError("the run was given up")

    def check_time(self, seconds: float, done: int, planned: int) -> None:
        """Refuse a pass that takes too long before it has taken it.

        Args:
            seconds: What all of it is expected to take.
            done: Chunks that this is reckoned from.
            planned: Chunks in all.

        Raises:
            ToolError: If that is more than the limit.
        """
        if seconds > self.limit:
            raise ToolError(
                f"{planned} chunks would take {seconds:.0f} s, reckoned from {done}, and the limit "
                f"is {self.limit:.0f} s: pass fewer `chunks`, or raise `llmperf_pass_limit` in the "
                "ini file"
            )


@dataclass(frozen=True, slots=True)
class Perplexity:
    """What one pass found.

    Attributes:
        value: Perplexity: the final estimate, or that of the last chunk of a partial pass; NaN if
            the tool lost its last lines, though its log-probabilities have all been read.
        error: Its standard error as the tool states it, None if it did not.
        running: Perplexity after each finished chunk.
        planned: Chunks that were to be passed; 0 if the tool did not get that far.
        failure: Why it is partial, ``""`` if it is whole.
        command: As one would type it.
        log: Its output.
        seconds: Wall time.
        model: Name of the model file as a server tells it, ``""`` by the tool.
    """

    value: float
    error: float | None
    running: tuple[float, ...]
    planned: int
    failure: str
    command: str
    log: str
    seconds: float
    model: str = ""

    @property
    def partial(self) -> bool:
        """Whether chunks are missing: such a result never passes."""
        return bool(self.failure)


def compose(
    build: Build, options: Mapping[str, OptionValue], model: Path, corpus: Path, plan: PassPlan
) -> list[str]:
    """Return the command of a pass; options of the server alone are left out.

    Its log tells which devices the buffers are on, as that of a server does.

    Raises:
        BuildError: If neither the tool nor the server of the build knows an option.
    """
    program = str(tool_of(build, PERPLEXITY))
    tool = dialect_of(replace(build, command=(program,)))
    server = dialect_of(build)
    known = {name: v for name, v in options.items() if tool.supports(name)}
    for name in options.keys() - known.keys():
        if not server.supports(name):
            # Let the dialect word it.
            server.arguments({name: options[name]})
    pinned: dict[str, OptionValue] = {
        "ctx-size": plan.context,
        "batch-size": plan.batch,
        "ubatch-size": plan.ubatch,
    }
    if plan.chunks is not None:
        pinned["chunks"] = plan.chunks
    if "verbosity" not in known and (level := tool.log_verbosity):
        pinned["verbosity"] = level
    arguments = tool.arguments({**known, **pinned})
    return [program, "--model", str(model), "--file", str(corpus), *arguments]


def run_perplexity(
    build: Build,
    options: Mapping[str, OptionValue],
    model: Path,
    corpus: Path,
    plan: PassPlan,
    *,
    consume: Callable[[BinaryIO], object] | None = None,
    cards: Sequence[Gpu] = (),
) -> Perplexity:
    """Pass a corpus through a model by the build's own tool.

    Args:
        build: Whose tool.
        options: Config's options, in the newest names.
        model: GGUF file.
        corpus: Text file.
        plan: Pinned sizes, folder, progress.
        consume: Reads the log-probabilities of every scored token from a stream, in the layout of
            ``--kl-divergence-base``, while the tool writes them; it raises if any are missing. It
            runs in a thread of its own.
        cards: The GPUs that the tool may use; empty for all that there are.

    Returns:
        The pass, partial if the tool did not get through; see ``Perplexity.failure``.

    Raises:
        BuildError: If the build has no such tool or does not know an option.
        ServerError: If the tool cannot be started at all.
        ToolError: If it ended before the first chunk was finished.
        OutOfMemoryError: If it did so because memory ran out.
        LlmperfError: What ``consume`` raised, unless the tool itself failed, or the plan's check.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for left in reversed(range(_TRIES)):
        command = compose(build, options, model, corpus, plan)
        found, wrong = _once(build, command, plan, consume, cards)
        if wrong is not None:
            raise wrong
        if found.failure != _LOST:
            break
        if consume is not None:
            # Every row has come, as its reader knows; only what it says of them has not.
            found = replace(found, value=math.nan, failure="")
            break
        plan.progress("perplexity: the tool's last lines are lost" + (", again" if left else ""))
    if found.failure and not found.running:
        # b11434 ends so without a word, every time.
        hint = ": is the text at least twice the context?" if found.failure == _LOST else ""
        log = Path(found.log)
        told = f"{PERPLEXITY} {found.failure}{hint}; log: {log}\n{tail(log)}"
        if lacking := shortage(_text(log)):
            raise OutOfMemoryError(
                f"out of memory: {lacking.words} could not be allocated: {lacking.advice}\n"
                f"  {told}",
                what=lacking.words,
                log=log,
                kind="start",
            )
        raise ToolError(told)
    # A short one has ended before anybody looked.
    plan.check(Path(found.log))
    return replace(found, seconds=time.monotonic() - began)


def _once(
    build: Build,
    command: list[str],
    plan: PassPlan,
    consume: Callable[[BinaryIO], object] | None,
    cards: Sequence[Gpu],
) -> tuple[Perplexity, Exception | None]:
    """Run the tool once; return what its log says, and what was wrong with its stream."""
    label = re.sub(r"[^\w.+-]", "_", build.label)
    log = plan.folder / f"perplexity-{next(_numbers):03d}-{label}.log"
    with contextlib.ExitStack() as stack:
        reader: _Reader | None = None
        if consume is not None:
            reader = stack.enter_context(_reading(log.with_suffix(".fifo"), consume))
            command = [*command, "--kl-divergence-base", str(reader.path)]
        config_home = plan.folder / "no-config"
        config_home.mkdir(exist_ok=True)
        process = ServerProcess(command, log, server_environment(build, config_home, cards))
        try:
            ended = _watch(process, log, plan, reader)
        except BaseException as error:
            if not isinstance(error, LlmperfError):
                # Before the reader is waited for: it may wait for another pass.
                plan.stopped.set()
            raise
        finally:
            status = process.stop()
    how = process.describe_exit()
    told = shown(build, command, cards)
    found = replace(_outcome(log, status, how), command=told, log=str(log))
    wrong = None if reader is None else reader.error
    whole = not found.failure or (found.failure == _LOST and len(found.running) == found.planned)
    if isinstance(wrong, LeftAloneError) and whole:
        return found, wrong
    if wrong is not None and found.failure == _LOST:
        # Not only lines are missing, so the tool gave up without a word.
        done = f"{len(found.running)} of {found.planned} chunks"
        return replace(found, failure=f"ended after {done}, with exit code 0: {wrong}"), None
    # A stream that breaks off is the tool's failure; one that is wrong is its reader's finding.
    return found, None if wrong is not None and ended and found.failure else wrong


@dataclass(slots=True)
class _Reader:
    path: Path
    stop: Event
    done: Event
    error: Exception | None = None


@contextlib.contextmanager
def _reading(path: Path, consume: Callable[[BinaryIO], object]) -> Iterator[_Reader]:
    """Make a FIFO and read it in a thread until its writer is done or gone."""
    try:
        os.mkfifo(path, 0o600)
    except OSError as error:
        raise ToolError(f"{path}: cannot make a FIFO there: {error.strerror}") from error
    reader = _Reader(path, Event(), Event())
    # Opened before the writer starts, and without waiting for it: it may die before it opens it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def work() -> None:
        try:
            if _data_comes(descriptor, reader.stop):
                os.set_blocking(descriptor, True)
                with open(descriptor, "rb", buffering=_PIPE_BYTES, closefd=False) as stream:
                    consume(stream)
            else:
                reader.error = ToolError("it wrote no log-probabilities")
        except Exception as error:  # noqa: BLE001 - raised again by who waits for it
            reader.error = error
        finally:
            reader.done.set()

    thread = Thread(target=work, name="llmperf-logits", daemon=True)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    thread.start()
    try:
        yield reader
    finally:
        reader.stop.set()
        thread.join()
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _data_comes(descriptor: int, stop: Event) -> bool:
    """Wait for the first byte; False if whoever should write it is gone."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not any(event & select.POLLIN for _, event in poll.poll(_POLL_S * 1000)):
        if stop.is_set():
            return False
    return True


def _watch(process: ServerProcess, log: Path, plan: PassPlan, reader: _Reader | None) -> bool:
    """Wait until the tool ends, telling how far it is; False if its reader gave up before."""
    began = said = time.monotonic()
    first: tuple[float, int] | None = None
    checked = False
    while process.poll() is None:
        if reader is not None and reader.error is not None:
            # It may have given up because the tool is about to be gone.
            time.sleep(_QUIET_S)
            return process.poll() is not None
        time.sleep(_POLL_S)
        plan.check_stopped()
        now = time.monotonic()
        if now - said < _QUIET_S:
            continue
        said = now
        planned, running = _progress(_text(log))
        if not planned and now - began > plan.start:
            raise ToolError(
                f"{PERPLEXITY} did not begin its first chunk in {plan.start:.0f} s: raise "
                f"`llmperf_start_timeout` in the ini file; log: {log}"
            )
        if planned and not checked:
            # Before hours are spent on it.
            checked = True
            plan.check(log)
        plan.check_time(now - began, len(running), planned)
        if running and first is None:
            first = now, len(running)
        left = ""
        if first is not None and len(running) > first[1]:
            each = (now - first[0]) / (len(running) - first[1])
            rest = each * (planned - len(running))
            plan.check_time(now - began + rest, len(running), planned)
            left = f", {rest:.0f} s left"
        what = f"{len(running)} of {planned} chunks{left}" if planned else "loading"
        plan.progress(f"perplexity: {what} ({now - began:.0f} s)")
    if reader is not None:
        # The tool has written all that it will; what is in the pipe is still to be read.
        reader.stop.set()
        # It may wait for another pass, and be interrupted meanwhile.
        while not reader.done.wait(_POLL_S):
            plan.check_stopped()
    return True


def _text(log: Path) -> str:
    return log.read_text("utf-8", errors="replace") if log.exists() else ""


def _progress(text: str) -> tuple[int, tuple[float, ...]]:
    match = _PLANNED.search(text)
    return (int(match.group(1)) if match else 0), _running(text)


def _running(text: str) -> tuple[float, ...]:
    """Return the running perplexities in their order, up to the first that is missing."""
    found: list[float] = []
    for number, value in _RUNNING.findall(text):
        if int(number) == len(found) + 1:
            found.append(float(value))
    return tuple(found)


def _outcome(log: Path, status: int | None, how: str) -> Perplexity:
    """Return what the log says, with the reason if it is not a whole pass."""
    text = _text(log)
    planned, running = _progress(text)
    final = _FINAL.search(text)
    failure = _failure(text, (status, how), planned, running, final)
    finite = tuple(value for value in running if math.isfinite(value))
    if failure or final is None:
        value = finite[-1] if finite else math.nan
        return Perplexity(value, None, finite, planned, failure, "", str(log), 0.0)
    value, error = float(final.group(1)), float(final.group(2))
    return Perplexity(value, error, running, planned, "", "", str(log), 0.0)


def _failure(
    text: str,
    end: tuple[int | None, str],
    planned: int,
    running: tuple[float, ...],
    final: re.Match[str] | None,
) -> str:
    status, how = end
    done = f"after {len(running)} of {planned} chunks" if planned else "before the first chunk"
    complaint = next((m.group(0).strip() for c in _COMPLAINTS if (m := c.search(text))), "")
    whole = final is not None and all(_is_number(final.group(i)) for i in (1, 2))
    # The last chunk's running estimate is the final one, but for its error.
    told = whole or (final is None and 0 < planned == len(running))
    used = _CONFIG_FILE.search(text)
    found = (
        (used is not None, f"read {used and used.group(1)}: move it away, it changes the options"),
        (status is None, f"did not end {done}"),
        (bool(status), f"ended with {how} {done}"),
        (not all(map(math.isfinite, running)), "found a perplexity that is no number"),
        (final is None and bool(complaint), f"gave up {done}: {complaint}"),
        (final is not None and not whole, f"ended {done} with an estimate that is no number"),
        (not told or (whole and len(running) != planned), _LOST),
    )
    return next((why for failed, why in found if failed), "")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
