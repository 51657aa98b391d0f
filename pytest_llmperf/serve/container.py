"""A server in a container: what it is shown of this machine, and how it ended.

The engine's client runs in the foreground under our supervisor, so that its output is the log
and its end the server's. The container itself belongs to the engine, so it is removed by name,
whatever becomes of the client.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pytest_llmperf.build.ask import last_line
from pytest_llmperf.build.container import Container, mount
from pytest_llmperf.errors import BuildError, ServerError
from pytest_llmperf.models.locate import parts
from pytest_llmperf.plan.config import ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.process import Aftermath, describe_exit

_PORT = 8080
"""Where a server listens inside a container whose port is published."""
_STATE = "{{json .State}} {{.HostConfig.Memory}}"
_PLACE = "{{.State.Pid}} {{json .NetworkSettings.Ports}}"
_MIB = 2**20
_KEY_FILE = re.compile(rb"\0/llmperf/llmperf-(\d+)-[0-9a-f]{8}\.key\0")
_FAILED = frozenset({125, 126, 127})
"""Exit codes of an engine's client that could not start the container."""


@dataclass(frozen=True, slots=True)
class Boxed:
    """One server in a container, before it is started.

    Attributes:
        container: The image.
        name: What the container is called; also part of the name of the key file inside, by which
            its main process is known.
        command: Runs it, but for the server's options.
        inside: Path on this machine to path in the container.
        key_file: The key file, inside.
        host: Address the server listens on, inside.
        port: Port it listens on, inside; 0 for a free one.
    """

    container: Container
    name: str
    command: tuple[str, ...]
    inside: Mapping[str, str]
    key_file: PurePosixPath
    host: str
    port: int

    @property
    def aftermath(self) -> Aftermath:
        """How it is seen how the container ended, and how it is removed."""
        engine = self.container.engine
        return Aftermath(
            look=engine.looking_at(self.name, _STATE),
            clean=engine.removing(self.name),
            words=how_it_ended,
        )

    def files(self, files: ModelFiles) -> ModelFiles:
        """Return where the server finds its files."""

        def there(path: Path | None) -> Path | None:
            return None if path is None else Path(self.inside[str(path)])

        main = Path(self.inside[str(files.main)])
        return ModelFiles(main, there(files.draft), there(files.projector))

    def options(self, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """Return options with the paths of files as they are inside."""

        def there(value: str) -> str:
            return self.inside.get(value, value)

        return {
            name: there(value)
            if isinstance(value, str)
            else tuple(map(there, value))
            if isinstance(value, tuple)
            else value
            for name, value in options.items()
        }

    def place(self, url: str) -> tuple[int | None, str]:
        """Return the main process of the running container, and its server's address from here.

        Args:
            url: What the server says it listens on.

        Returns:
            The process id on this machine, None where it cannot be seen from here, and the URL.

        Raises:
            ServerError: If the container is not there, or its port is not.
        """
        engine = self.container.engine
        words = engine.looking_at(self.name, _PLACE)[len(engine.command) :]
        told = engine.says(*words)
        try:
            number, ports = told.stdout.split(" ", 1)
            pid = int(number)
            if self.port:
                url = f"http://127.0.0.1:{json.loads(ports)[f'{_PORT}/tcp'][0]['HostPort']}"
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"the container {self.name} started, but `{engine.command[0]} container inspect` "
                f"does not tell its port: {last_line(told.stderr or told.stdout)}",
                kind="start",
            ) from error
        return (pid if _is_ours(pid, self.key_file.name) else None), url


def box(
    container: Container,
    files: ModelFiles,
    options: Mapping[str, OptionValue],
    key_file: Path,
    *,
    gpu: bool,
    port: int = 0,
    env: Mapping[str, str] | None = None,
) -> Boxed:
    """Return how a server runs in a container.

    Every file it loads is shown to it by itself, under its own name, so that the parts of a split
    one lie beside each other; links are followed here, as their targets are not shown.

    Args:
        container: The image.
        files: What it loads.
        options: Of the server; values that are absolute paths of files are shown to it as well.
        key_file: Read-only for all, in a folder that only we can enter.
        gpu: Whether it is to have the GPUs.
        port: Port on this machine; 0 for a free one.
        env: Variables beside those of the image and the build.

    Raises:
        ModelError: If a part of a split file is missing.
    """
    name = f"llmperf-{os.getpid()}-{secrets.token_hex(4)}"
    inside: dict[str, str] = {}
    flags = [part for one, value in (env or {}).items() for part in ("--env", f"{one}={value}")]
    folders: dict[Path, int] = {}
    shown: dict[str, Path] = {}
    # By the words that name them, since an option may spell a path in a way of its own.
    for path in (*map(str, files.all), *_named(options)):
        absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
        number = folders.setdefault(absolute.parent, len(folders))
        shown |= {f"/models/{number}/{part.name}": part.resolve() for part in parts(absolute)}
        inside[path] = f"/models/{number}/{absolute.name}"
    for target, source in shown.items():
        flags += mount(source, target)
    key = PurePosixPath(f"/llmperf/{name}.key")
    flags += mount(key_file.resolve(), str(key))
    published = container.network != "host"
    if published:
        flags += ["--publish", f"127.0.0.1:{port or ''}:{_PORT}"]
    return Boxed(
        container=container,
        name=name,
        command=container.serving(name, flags, gpu=gpu),
        inside=inside,
        key_file=key,
        host="0.0.0.0" if published else "127.0.0.1",  # noqa: S104 - of the container's own network
        port=_PORT if published else port,
    )


def _named(options: Mapping[str, OptionValue]) -> list[str]:
    """Return the files that options name, such as a LoRA adapter or a chat template."""
    values = [
        one
        for value in options.values()
        for one in (value if isinstance(value, tuple) else (value,))
        if isinstance(one, str) and one.startswith("/")
    ]
    # A text, such as a template, may be what no path can be.
    return [one for one in values if os.path.isfile(one)]  # noqa: PTH113 - Path raises then


def _is_ours(pid: int, key: str) -> bool:
    """Return whether a process of this PID namespace is the container's.

    An engine in another namespace, or on another machine, tells a number that means nothing here.
    """
    try:
        return pid > 0 and key.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def boxed_by(pid: int) -> int | None:
    """Return the process whose server the main process of a container is, None if it is none.

    Args:
        pid: Of this PID namespace.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    found = _KEY_FILE.search(command)
    return int(found[1]) if found else None


def check_signals(label: str, pid: int | None) -> None:
    """Refuse a server that we cannot stop and continue.

    Args:
        label: What its build is called.
        pid: Its process id.

    Raises:
        BuildError: If its process is another user's, as with an engine that runs as root, or is
            not to be seen.
    """
    try:
        if pid is not None:
            os.kill(pid, 0)
            return
    except OSError:
        pass
    raise BuildError(
        f"build {label}: its server cannot be slowed down from here: its process is another "
        "user's; calibrate with a build that is no container, or with podman as this user"
    )


def how_it_ended(status: int, code: int, told: str) -> str:
    """Return in words how a container ended.

    Args:
        status: Exit status of the engine's client, negative for a signal.
        code: Exit code of asking the engine for the container's state.
        told: What it answered: the state as JSON, then the limit of memory in bytes, 0 for none.
    """
    if code != 0:
        if not re.search("no such", told, re.IGNORECASE):
            return (
                f"{describe_exit(status)}; the container engine does not tell how its container "
                f"ended: {last_line(told)}"
            )
        if status in _FAILED:
            return f"the container engine could not make the container (exit code {status})"
        return "its container was removed by somebody else while it ran"
    try:
        state, end = json.JSONDecoder().raw_decode(told)
        limit = int(told[end:].strip() or 0)
    except ValueError:
        return f"{describe_exit(status)}; its container's state cannot be read: {last_line(told)}"
    return _ending(state, limit, status)


def _ending(state: Mapping[str, Any], limit: int, status: int) -> str:
    most = f" of {limit // _MIB} MiB" if limit else ""
    if state.get("Running"):
        return (
            f"the container engine's client ended ({describe_exit(status)}), its container ran on"
        )
    if state.get("OOMKilled"):
        return f"killed: out of memory (container limit{most})"
    error = str(state.get("Error") or "")
    if str(state.get("StartedAt", "")).startswith("0001-"):
        why = f": {error}" if error else ""
        return f"the container engine could not start the container (exit code {status}){why}"
    ended = int(state.get("ExitCode") or 0)
    # Inside, a shell's way to tell of a signal.
    words = describe_exit(128 - ended if 128 < ended < 128 + signal.NSIG else ended)  # noqa: PLR2004 - 128 + signal
    if ended == 128 + signal.SIGKILL and limit:
        words += f"; its container may use {limit // _MIB} MiB of memory"
    return words
