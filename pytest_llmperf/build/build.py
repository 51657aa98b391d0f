"""A llama.cpp build: what it is called and how its server is started."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_llmperf.build.container import Container
from pytest_llmperf.plan.options import OptionValue

_VERSION = (
    re.compile(r"version:\s*(\d+)\s*\(([^)\s]+)\)"),
    re.compile(r"version:\s*\S+\s*\(build\s+(\d+),\s*commit\s+([^)\s]+)\)"),
)
_BUILD_INFO = re.compile(r"^b?(\d+)-(\S+)$")
# `git rev-list --count` of a shallow clone: such a number says nothing about the build.
_SHALLOW = 1


_PLACES = frozenset({"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH"})
"""Environment variables that say where a build lies, not how it works."""

ServerApi = Literal["llama-server", "openai", "ollama"]
"""What a server speaks: llama-server's own API, OpenAI's chats alone, or Ollama's own."""


@dataclass(frozen=True, slots=True)
class Build:
    """One llama.cpp binary set, found and identified.

    Attributes:
        label: What it is called: ``b8156``, or what the user calls it.
        number: Build number; 0 when the build does not know it.
        commit: Commit hash as the build tells it, or ``unknown``.
        source: The spec it came from.
        sha256: Hash of the programs and libraries, of a container image its id, or ``""`` for an
            endpoint.
        command: Arguments that start its server, options excluded; of a container those that ask
            its program; empty for an endpoint.
        url: Address of a running server, or None.
        options: Server options it adds to every config.
        env: Environment variables its servers get.
        note: What a person must know about it, such as an unknown number.
        stopped_share: Share of the time in which its servers are stopped: the known slowdown that
            calibration measures its verdicts with.
        container: The image it is in, or None.
        api: What its server speaks; anything but llama-server's own API for an endpoint alone.
        model: Which model of an endpoint with several is asked.
    """

    label: str
    number: int
    commit: str
    source: str
    sha256: str
    command: tuple[str, ...] = ()
    url: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    stopped_share: float = 0.0
    container: Container | None = None
    api: ServerApi = "llama-server"
    model: str = ""

    @property
    def host_env(self) -> Mapping[str, str]:
        """What its environment variables are to a process of ours: none of a container's."""
        return {} if self.container is not None else self.env

    @property
    def conditions(self) -> dict[str, str]:
        """What it adds to the conditions of measuring beside its options, for fingerprints.

        Its environment variables, and what its container may use of the machine; nothing where
        there is nothing of the kind. Which program of an image runs tells builds apart, as the
        image does.
        """
        env = {name: value for name, value in self.env.items() if name not in _PLACES}
        told = {
            "env": " ".join(f"{name}={value}" for name, value in sorted(env.items())),
            "run": " ".join(self.container.limits) if self.container is not None else "",
        }
        return {name: value for name, value in told.items() if value}

    @property
    def forget(self) -> Callable[[], object] | None:
        """What to call when a question to its program did not end, or None."""
        return self.container.forget if self.container is not None else None

    def tool(self, name: str) -> Path | None:
        """Return another program of the build, which lies beside its server; None without one.

        A wheel, a container and an endpoint have none.

        Args:
            name: Such as ``llama-bench``.
        """
        if self.url is None and len(self.command) == 1:
            path = Path(self.command[0]).with_name(name)
            if path.is_file() and os.access(path, os.X_OK):
                return path
        return None

    @property
    def identity(self) -> tuple[object, ...]:
        """What two builds must differ in to be worth comparing."""
        options = tuple(sorted((k, str(v)) for k, v in self.options.items()))
        return (
            self.sha256,
            self.url,
            self.model,
            self.command,
            options,
            tuple(sorted(self.env.items())),
        )

    def describe(self) -> str:
        """Return one line for people: label, number, commit, source, hash."""
        known = f"build {self.number}" if self.number else "build number unknown"
        commit = "" if self.commit == "unknown" else f", commit {self.commit}"
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        if self.container is not None and self.container.digest:
            digest += f", {self.container.digest}"
        return f"{self.label} ({known}{commit}, {self.source}{digest})"


def parse_version(text: str) -> tuple[int, str]:
    """Return (number, commit) from what ``--version`` prints, in either shape.

    Returns:
        ``(0, "unknown")`` for what is not told; a shallow clone's number 1 counts as not told.
    """
    for shape in _VERSION:
        if match := shape.search(text):
            number = int(match.group(1))
            return (0 if number <= _SHALLOW else number), match.group(2)
    return 0, "unknown"


def parse_build_info(text: str) -> tuple[int, str]:
    """Return (number, commit) from ``build_info`` of ``/props``, such as ``b11434-0a1b2c3``."""
    match = _BUILD_INFO.match(text.strip())
    if match is None:
        return 0, "unknown"
    number = int(match.group(1))
    return (0 if number <= _SHALLOW else number), match.group(2)


def hash_files(files: Iterable[Path]) -> str:
    """Return the SHA-256 over the names and contents of ``files``, in the order of the names."""
    digest = hashlib.sha256()
    # Names alone do not order two files of one name in two folders.
    for name, content in sorted((path.name, _digest(path)) for path in files):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
