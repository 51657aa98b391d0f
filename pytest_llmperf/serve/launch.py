"""Starts one server of one build for one config, and knows that it is the one answering."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from pytest_llmperf.build.ask import scrubbed_environment
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.dialect import Dialect, dialect_of
from pytest_llmperf.errors import BuildError, OutOfMemoryError, ServerError
from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.plan.config import Config, ModelFiles, is_exclusive
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.client import Client
from pytest_llmperf.serve.container import Boxed, box, check_signals
from pytest_llmperf.serve.failure import Shortage, free_before, limits, shortage
from pytest_llmperf.serve.ollama import told_options
from pytest_llmperf.serve.process import ServerProcess
from pytest_llmperf.serve.throttle import Throttle

DEFAULTS: Mapping[str, OptionValue] = {"parallel": 1, "cache-ram": 0, "offline": True}
"""Options of every server unless the config says otherwise.

One slot, since four share the context otherwise; no prompt cache in RAM, since copying it
happens just before the clock starts; no network.
"""

# What follows the address shows that it is whole: a log may be read in the middle of a line.
_LISTENING = re.compile(rb"listening on (https?://[^\s,]+)[\s,]")
_CARDS = "CUDA_VISIBLE_DEVICES"
_CONFIG_FILE = re.compile(rb"using config file: *(\S+)\s")
_POLL = 0.005
# A server that accepts but does not answer must not outwait the start timeout.
_PROBE = 2.0
_TAIL_LINES = 20
# How long after a broken connection its server's end may come to be known.
_DEATH = 2.0
_numbers = count(1)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ServePlan:
    """How servers of one run are started.

    Attributes:
        folder: Run folder; logs and key files go there.
        timeout: Seconds a server may take to become ready.
        hang: Seconds without a byte after which a request counts as hung.
        progress: Is told when a start takes more than two seconds.
        cards: The GPUs that they may use; empty for all that there are.
    """

    folder: Path
    timeout: float = 600.0
    hang: float = 300.0
    progress: Callable[[str], None] = field(default=lambda _text: None)
    cards: tuple[Gpu, ...] = ()


class Server:
    """A running server, ready and known to be ours. Use it as a context manager, or stop it.

    Attributes:
        build: The build it is of.
        config: The config it runs.
        command: Its full command, or ``()`` for an endpoint; holds no key.
        url: Its address.
        client: Talks to it.
        log: Its log file, or None for an endpoint.
        load_ms: Process start to ready, in milliseconds; None for an endpoint.
        props: What ``/props`` answered; empty for an endpoint that is no llama-server.
        stopped: Whether :meth:`stop` was called.
    """

    def __init__(
        self,
        *,
        build: Build,
        config: Config,
        command: tuple[str, ...],
        client: Client,
        process: ServerProcess | None,
        load_ms: float | None,
        props: Mapping[str, Any],
        key_file: Path | None,
        shown: str = "",
    ) -> None:
        self.build = build
        self.config = config
        self.command = command
        self.url = client.url
        self.client = client
        self.log = process.log if process else None
        self.load_ms = load_ms
        self.props = props
        self.stopped = False
        self._process = process
        self._key_file = key_file
        self._shown = shown
        self._throttle: Throttle | None = None
        if process is not None and build.stopped_share:
            self._throttle = Throttle(process.server_pid or process.pid, build.stopped_share)

    @property
    def pid(self) -> int | None:
        """Process id of the server, None for an endpoint and where it cannot be seen from here."""
        return self._process.server_pid if self._process else None

    @property
    def shown_command(self) -> str:
        """The command as one would type it, with the variables that choose its GPUs."""
        if self.command:
            return self._shown or shlex.join(self.command)
        about = ""
        if self.build.api == "ollama":
            about = f", {told_options(self.config, self.build.model)}"
        elif self.build.api == "openai":
            about = f", model {self.build.model}"
        return f"(a running server: {self.url}{about})"

    def log_text(self) -> str:
        """Return the whole log so far."""
        return self.log.read_text("utf-8", errors="replace") if self.log else ""

    def alive(self) -> bool:
        """Return whether the server still runs."""
        return self._process is None or self._process.poll() is None

    def stop(self) -> None:
        """Stop the server and all its processes. Safe to call again."""
        self.stopped = True
        self.client.close()
        if self._throttle is not None:
            # A stopped process would not hear that it is to end.
            self._throttle.stop()
        if self._process is not None:
            self._process.stop()
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def tail(log: Path, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log, indented, for an error text."""
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    kept = text.rstrip().splitlines()[-lines:]
    return "\n".join(f"    | {line}" for line in kept) or "    | (the log is empty)"


def server_options(build: Build, config: Config) -> dict[str, OptionValue]:
    """Return the options a config's server gets on a build: defaults, config, build."""
    return {**DEFAULTS, **config.options, **build.options}


def needs(config: Config, builds: Iterable[Build | None]) -> tuple[int, bool]:
    """Return what measuring a config on builds takes of this machine.

    Returns:
        How many GPUs, and whether nothing else may be measured meanwhile.
    """
    started = [build for build in builds if build is not None and build.url is None]
    if not started:
        # Which GPUs a running server has is its own affair.
        return 0, True
    exclusive = any(
        is_exclusive(replace(config, options=server_options(build, config)))
        # One that chooses its GPUs itself cannot be kept to those of a lease.
        or _CARDS in _own_variables(build)
        for build in started
    )
    return config.cards, exclusive


def _own_variables(build: Build) -> Mapping[str, str]:
    return dict(build.container.env) if build.container is not None else build.env


def card_environment(build: Build, cards: Sequence[Gpu]) -> dict[str, str]:
    """Return the variable that leaves a build's programs these GPUs alone.

    Empty where they are all that there are, or the build has a choice of its own.
    """
    if not cards or len(cards) >= len(gpus()) or _CARDS in _own_variables(build):
        return {}
    # By their ids: numbers mean others to CUDA than to NVML, and in a container.
    return {_CARDS: ",".join(card.uuid for card in cards)}


def shown(build: Build, command: Sequence[str], cards: Sequence[Gpu]) -> str:
    """Return a command as one would type it, with the variables that choose its GPUs."""
    # Those of a container are in its command.
    chosen = {} if build.container is not None else card_environment(build, cards)
    return shlex.join([*(f"{name}={value}" for name, value in chosen.items()), *command])


def server_environment(
    build: Build, config_home: Path, cards: Sequence[Gpu] = ()
) -> dict[str, str]:
    """Return our environment without what would configure a server behind our back.

    That of a container is part of its command; its engine's client gets ours.

    Args:
        build: Whose program; its own variables win over all others.
        config_home: An empty folder.
        cards: The GPUs that it may use; empty for all that there are.
    """
    if build.container is not None:
        return scrubbed_environment({})
    env = scrubbed_environment({**card_environment(build, cards), **build.env})
    # llama-server reads $XDG_CONFIG_HOME/llama.cpp/config.ini; ours is an empty folder.
    if "XDG_CONFIG_HOME" not in build.env:
        env["XDG_CONFIG_HOME"] = str(config_home)
    return env


def compose(
    build: Build,
    config: Config,
    files: ModelFiles,
    key_file: Path,
    port: int = 0,
    *,
    boxed: Boxed | None = None,
) -> tuple[str, ...]:
    """Return the full command of a server.

    With a model that drafts the build is told to use it, where it does not do so unasked.

    Args:
        build: Whose server.
        config: Options.
        files: What it loads.
        key_file: Holds its key.
        port: Port to listen on; 0 for a free one.
        boxed: The container it runs in, for a build in an image.

    Raises:
        BuildError: If the build does not know an option of the config.
    """
    dialect = dialect_of(build)
    options = server_options(build, config)
    program, host, key = build.command, "127.0.0.1", str(key_file)
    if boxed is not None:
        options, files = boxed.options(options), boxed.files(files)
        program, host, port, key = boxed.command, boxed.host, boxed.port, str(boxed.key_file)
    for name in DEFAULTS.keys() - config.options.keys() - build.options.keys():
        # A build that lacks the option lacks what the default switches off.
        if not dialect.supports(name):
            del options[name]
    _add_files(options, files, dialect)
    if "verbosity" not in options and (level := dialect.log_verbosity):
        options["verbosity"] = level
    try:
        arguments = dialect.arguments(options)
    except BuildError as error:
        raise BuildError(f"config {config.name}: {error}") from error
    owned = ["--host", host, "--port", str(port), "--api-key-file", key]
    return (*program, "--model", str(files.main), *arguments, *owned)


def check_options(build: Build, config: Config) -> None:
    """Refuse a config that a build's server has no options for, without starting it.

    Raises:
        BuildError: If it lacks one, or does not tell its options.
    """
    if build.url is None:
        some = Path("model")
        compose(build, config, ModelFiles(some, draft=some if config.draft else None), some)


def _add_files(options: dict[str, OptionValue], files: ModelFiles, dialect: Dialect) -> None:
    for name, value in (("spec-draft-model", files.draft), ("mmproj", files.projector)):
        if value is not None:
            options[name] = str(value)
    if files.draft is not None:
        # A build that has no word for it drafts with the model because it is there.
        if dialect.offers("spec-type", "draft-simple"):
            options.setdefault("spec-type", "draft-simple")
        elif options.get("spec-type") == "draft-simple":
            del options["spec-type"]


def start(
    build: Build, config: Config, files: ModelFiles, plan: ServePlan, *, port: int = 0
) -> Server:
    """Start a server and wait until it is ready.

    Args:
        build: Build to start; an endpoint is only connected to.
        config: Options and names.
        files: What it loads.
        plan: Run folder and time limits.
        port: Fixed port; 0 lets the system choose a free one.

    Raises:
        BuildError: If the build does not know an option of the config.
        ServerError: If it does not start, dies, takes too long, or if a server that is not ours
            answers in its place.
    """
    if build.url is not None:
        return _connect(build, config, plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    label = re.sub(r"[^\w.+-]", "_", build.label)
    log = _new_log(plan.folder, f"{label}-{config.name}")
    name = log.stem
    key = secrets.token_urlsafe(24)
    key_file = _write_key(plan.folder, name, key, shared=build.container is not None)
    config_home = plan.folder / "no-config"
    config_home.mkdir(exist_ok=True)
    boxed: Boxed | None = None
    try:
        if build.container is not None:
            options = server_options(build, config)
            boxed = box(
                build.container,
                files,
                options,
                key_file,
                gpu=config.gpu,
                port=port,
                env=card_environment(build, plan.cards),
            )
        command = compose(build, config, files, key_file, port, boxed=boxed)
        began = time.perf_counter()
        process = ServerProcess(
            command,
            log,
            server_environment(build, config_home, plan.cards),
            boxed.aftermath if boxed is not None else None,
        )
    except BaseException:
        key_file.unlink(missing_ok=True)
        if not log.stat().st_size:
            log.unlink()
        raise
    client: Client | None = None
    told = shown(build, command, plan.cards)
    starting = _Start(process, plan, began, told)
    try:
        url = starting.listening(f"{build.label} for config {config.name}")
        if boxed is not None:
            process.server_pid, url = boxed.place(url)
        client = Client(url, key, timeout=plan.hang, post_mortem=lambda: _post_mortem(process))
        starting.healthy(client)
        load_ms = (time.perf_counter() - began) * 1e3
        props = _prove_ours(client, process)
        if build.stopped_share:
            check_signals(build.label, process.server_pid)
    except BaseException:
        if client is not None:
            client.close()
        process.stop()
        key_file.unlink(missing_ok=True)
        raise
    return Server(
        build=build,
        config=config,
        command=command,
        client=client,
        process=process,
        load_ms=load_ms,
        props=props,
        key_file=key_file,
        shown=told,
    )


def _new_log(folder: Path, name: str) -> Path:
    """Make an empty log file of a number that is not taken.

    Another process may use the same run folder, and an older log would tell of another port.
    """
    while True:
        log = folder / f"{next(_numbers):03d}-{name}.log"
        with contextlib.suppress(FileExistsError):
            log.touch(exist_ok=False)
            return log


def _write_key(folder: Path, name: str, key: str, *, shared: bool) -> Path:
    """Write a key file that only we can read, or, shared, whoever is shown it.

    A container's server may run as any user. What keeps all others from the file is its folder.
    """
    if shared:
        folder /= "keys"
        folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{name}.key"
    path.touch(mode=0o600)
    path.write_text(key + "\n", "utf-8")
    if shared:
        path.chmod(0o444)
    return path


def _connect(build: Build, config: Config, plan: ServePlan) -> Server:
    client = Client(str(build.url), os.environ.get("LLMPERF_API_KEY"), timeout=plan.hang)
    try:
        # Another API than llama-server's has nothing like it.
        props = _props(client) if build.api == "llama-server" else {}
    except BaseException:
        client.close()
        raise
    return Server(
        build=build,
        config=config,
        command=(),
        client=client,
        process=None,
        load_ms=None,
        props=props,
        key_file=None,
    )


def _props(client: Client) -> Mapping[str, Any]:
    props = client.get("/props")
    if not isinstance(props, dict):
        raise ServerError(f"{client.url} answers /props, but not as llama-server does")
    return props


def _told(log: Path, command: str = "") -> str:
    first = f"  command: {command}\n" if command else ""
    return f"{first}  log: {log}\n{tail(log)}"


def _ended(
    what: str, process: ServerProcess, command: str = "", kind: str = "start"
) -> ServerError:
    """Return the error of a server that ended by itself: its memory ran out, or something else.

    Args:
        what: What it did not live to do, naming build and config or the request.
        process: It has ended.
        command: Is shown, where the caller of the error does not do so.
        kind: Of the error.
    """
    log = process.log
    how = f"{what}: {process.describe_exit()}"
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    told = f"{how}\n{_told(log, command)}"
    lacking = shortage(text)
    if lacking is None and not process.killed_for_memory:
        return ServerError(told, log=log, kind=kind)
    return out_of_memory(process, text, lacking, told, kind=kind)


def out_of_memory(
    process: ServerProcess,
    text: str,
    lacking: Shortage | None,
    how: str,
    *,
    kind: str = "start",
    advice: str = "",
) -> OutOfMemoryError:
    """Return the error of a program whose memory ran out.

    Args:
        process: It has ended.
        text: Its log.
        lacking: What there was no memory for; None if it was killed without a word.
        how: What it did not live to do, and how it ended.
        kind: Of the error.
        advice: What may help; by default as the shortage says.
    """
    # Who is killed has no time to say what for.
    what = "host memory" if lacking is None else lacking.words
    lacking = lacking or Shortage("CPU", "", None)
    free = free_before(text, lacking.device)
    where = lacking.device or "its device"
    if lacking.device == "CPU":
        before, where = process.before, "the host"
        free = min(before.available_mib, before.kills.limit_mib or before.available_mib)
    told = "" if free is None else f", {free:.0f} MiB were free on {where} before it started"
    if lacking.device == "CPU" and (limited := limits()):
        told += f"; {limited}"
    return OutOfMemoryError(
        f"out of memory: {what} could not be allocated{told}: {advice or lacking.advice}\n  {how}",
        what=what,
        log=process.log,
        kind=kind,
    )


def _post_mortem(process: ServerProcess) -> str | None:
    """Return how a server died that broke a connection, None if it lives.

    Raises:
        OutOfMemoryError: If its memory ran out.
    """
    # The connection breaks a moment before the exit is known.
    deadline = time.monotonic() + _DEATH
    while True:
        waits = time.monotonic() < deadline or process.ending
        if process.poll() is not None:
            error = _ended("the server died", process, kind="crashed")
            if isinstance(error, OutOfMemoryError):
                raise error
            return f"{process.describe_exit()}\n{_told(process.log)}"
        if not waits:
            return None
        time.sleep(0.02)


class _Start:
    """A server on its way to be ready: what is waited for, and what ends the waiting.

    Args:
        process: It.
        plan: Time limits and progress.
        began: When it was started, by ``time.perf_counter()``.
        command: As one would type it.
    """

    def __init__(self, process: ServerProcess, plan: ServePlan, began: float, command: str) -> None:
        self._process, self._plan, self._began, self._command = process, plan, began, command
        self._next = 2.0

    def listening(self, what: str) -> str:
        """Return the address that the log tells, once it does."""
        seen = 0

        def look() -> str:
            nonlocal seen
            log = self._process.log
            size = log.stat().st_size if log.exists() else 0
            if size == seen:
                return ""
            seen = size
            content = log.read_bytes()
            if used := _CONFIG_FILE.search(content):
                read = f"{what} read {used.group(1).decode()}"
                raise self._failed(f"{read}: move it away, it changes the options", "start")
            found = _LISTENING.search(content)
            if found is None:
                return ""
            return found.group(1).decode().replace("//0.0.0.0:", "//127.0.0.1:")

        return self._until(look, what, what, lambda: f"{what} was not ready within")

    def healthy(self, client: Client) -> None:
        """Wait until its ``/health`` is well."""
        about = f"{client.url}/health"
        status: int | None = None

        def look() -> bool:
            nonlocal status
            status = client.status("/health", timeout=_PROBE)
            return status == httpx.codes.OK

        self._until(
            look, about, "the server", lambda: f"{about} answered {status or 'nothing'} for"
        )

    def _until(self, look: Callable[[], _T], awaited: str, who: str, late: Callable[[], str]) -> _T:
        """Look until something is found, telling now and then that it takes its time."""
        while True:
            # Asked first: what it said before it ended counts.
            ended = self._process.poll() is not None
            if found := look():
                return found
            if ended:
                raise _ended(f"{who} ended before it was ready", self._process, self._command)
            waited = time.perf_counter() - self._began
            if waited > self._next:
                self._plan.progress(f"waiting for {awaited}: {waited:.0f} s")
                self._next = waited + 5.0
            if waited > self._plan.timeout:
                raise self._failed(f"{late()} {self._plan.timeout:g} s", "timeout")
            time.sleep(_POLL)

    def _failed(self, reason: str, kind: str) -> ServerError:
        log = self._process.log
        return ServerError(f"{reason}\n{_told(log, self._command)}", log=log, kind=kind)


def _prove_ours(client: Client, process: ServerProcess) -> Mapping[str, Any]:
    """Return ``/props``, once it is sure that the server we started is the one answering.

    Only ours knows the random key: it takes that one and refuses another.
    """
    foreign = ServerError(
        f"another server answers at {client.url}, not the one started (pid {process.pid})",
        log=process.log,
        kind="foreign",
    )
    refuses = client.status("/props", key="not the key") in {401, 403}
    try:
        props = _props(client)
    except ServerError as error:
        if error.kind == "crashed":
            raise
        raise foreign from error
    if not refuses or process.poll() is not None:
        raise foreign
    return props
