"""The container engine of this machine, docker or podman, by its command line.

Containers of a run carry a label that names the process they belong to, so that those of a run
that was killed can be told from those of one that still goes on.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_llmperf.build.ask import last_line, scrubbed_environment
from pytest_llmperf.errors import BuildError

LABEL = "pytest-llmperf."
"""How the labels of our containers begin."""
OWNER = f"{LABEL}owner"
"""Label of every container of ours: which process it belongs to."""
USE = f"{LABEL}use"
"""Label that tells what a container is for: ``ask`` or ``serve``."""
_TIMEOUT = 60.0
_START_FIELD = 19
"""Of /proc/PID/stat behind the name: ticks from boot to the start of the process."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A container engine that answers.

    Attributes:
        command: Its program and its global flags.
        podman: Whether it is podman; else it takes docker's flags.
    """

    command: tuple[str, ...]
    podman: bool

    def says(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of its subcommands.

        Raises:
            BuildError: If it cannot be run or does not end.
        """
        return _run((*self.command, *arguments))

    def removing(self, name: str) -> tuple[str, ...]:
        """Return the command that ends and removes a container at once, with what it wrote."""
        # podman asks politely first, and waits ten seconds; docker does not.
        at_once = ("--time", "0") if self.podman else ()
        return (*self.command, "rm", "--force", "--volumes", *at_once, name)

    def remove(self, *names: str) -> None:
        """End and remove containers.

        Raises:
            BuildError: If the engine cannot be run or does not end.
        """
        # One by one: podman removes none of several when one of them has just gone.
        for name in names:
            self.says(*self.removing(name)[len(self.command) :])

    def looking_at(self, name: str, form: str) -> tuple[str, ...]:
        """Return the command that tells a container's state in the form of a Go template."""
        return (*self.command, "container", "inspect", "--format", form, name)

    def remove_all(self, **labels: str) -> None:
        """End and remove the containers that have all these labels of ours.

        Args:
            labels: ``owner`` and ``use`` with their values.
        """
        filters = [f"label={LABEL}{key}={value}" for key, value in labels.items()]
        if found := self._ids(*filters):
            self.remove(*found)

    def reap(self) -> tuple[str, ...]:
        """Remove containers of ours whose owner is gone; return their ids.

        Those of other users, other PID namespaces and other machines are left alone, as nothing
        can be known of their owners.
        """
        found = self._ids(f"label={OWNER}")
        if not found:
            return ()
        form = f'{{{{.Id}}}} {{{{.State.Running}}}} {{{{index .Config.Labels "{OWNER}"}}}}'
        told = self.says("container", "inspect", "--format", form, *found)
        lines = [line.split() for line in told.stdout.splitlines()]
        left = tuple(
            one[0]
            for one in lines
            if len(one) == 3 and is_left(one[2], running=one[1] != "false")  # noqa: PLR2004 - id, running, owner
        )
        if left:
            self.remove(*left)
        return left

    def _ids(self, *filters: str) -> list[str]:
        flags = [part for one in filters for part in ("--filter", one)]
        return self.says("ps", "--all", "--quiet", "--no-trunc", *flags).stdout.split()


def find_engine(given: Sequence[str]) -> Engine:
    """Return the engine: the one given, or docker if its engine answers, else podman.

    Args:
        given: Command with global flags, or nothing.

    Raises:
        BuildError: If there is none that answers; the text says what to do.
    """
    return _find(tuple(given))


@lru_cache(maxsize=8)
def _find(given: tuple[str, ...]) -> Engine:
    if given:
        if why := _silent(given):
            raise BuildError(
                f"the container engine `{shlex.join(given)}` does not answer: {why} "
                "(ini llmperf_container or LLMPERF_CONTAINER names it)"
            )
        return Engine(given, _is_podman(given))
    reasons = []
    for name in ("docker", "podman"):
        if shutil.which(name) is None:
            reasons.append(f"{name} is not on PATH")
        elif why := _silent((name,)):
            reasons.append(f"`{name} version` says: {why}")
        else:
            return Engine((name,), _is_podman((name,)))
    raise BuildError(
        f"no container engine answers: {'; '.join(reasons)}. Start docker or install podman, or "
        "name another command with ini llmperf_container or LLMPERF_CONTAINER"
    )


def _silent(command: tuple[str, ...]) -> str:
    """Return why an engine does not answer, ``""`` if it does."""
    try:
        told = _run((*command, "version"))
    except BuildError as error:
        return str(error)
    return "" if told.returncode == 0 else last_line(told.stderr or told.stdout)


def _is_podman(command: tuple[str, ...]) -> bool:
    # podman also answers to the name docker.
    return "podman" in _run((*command, "--version")).stdout.lower()


def _run(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603 - the user named this engine
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
            env=scrubbed_environment({}),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"cannot run `{shlex.join(command)}`: {error}") from error


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that a container belongs to.

    Attributes:
        pid: Process id.
        start: Ticks from boot to its start, as process ids are used again.
        user: Whose process it is.
        namespace: PID namespace in which ``pid`` is told.
        boot: Which boot of which machine.
    """

    pid: int
    start: str
    user: int
    namespace: str
    boot: str

    def __str__(self) -> str:
        return f"{self.pid}-{self.start}-{self.user}-{self.namespace}-{self.boot}"


def owner() -> Owner:
    """Return this process as the owner of containers."""
    namespace, boot = _place()
    return Owner(os.getpid(), started(os.getpid()), os.getuid(), namespace, boot)


def is_left(label: str, *, running: bool) -> bool:
    """Return whether a container's owner is known to be gone.

    Args:
        label: Value of :data:`OWNER`.
        running: Whether the container runs. One of another boot that runs is another machine's.
    """
    fields = label.split("-", 4)
    if len(fields) != 5 or not fields[0].isdecimal():  # noqa: PLR2004 - the fields of Owner
        return False
    pid, start, user, namespace, boot = fields
    mine = owner()
    if not mine.boot or user != str(mine.user):
        return False
    if boot != mine.boot:
        return not running
    return namespace == mine.namespace and started(int(pid)) != start


def started(pid: int) -> str:
    """Return when a process was started, in ticks since boot; ``gone`` if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return "gone"
    # The name, in parentheses, may hold anything.
    fields = stat.rpartition(")")[2].split()
    return "gone" if fields[0] in {"Z", "X"} else fields[_START_FIELD]


def _place() -> tuple[str, str]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "", ""
    # Enough to tell boots apart; the whole would tell more of the machine than a report should.
    return namespace.strip("pid:[]"), boot.replace("-", "")[:12]
