"""The fake container engine: an image of the fake server, and what was asked of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fakes import Journal, fake_command

from pytest_llmperf.settings import Containers

PROGRAM = Path(__file__).parents[1] / "fake_engine.py"
IMAGE = "ghcr.io/ggml-org/llama.cpp:server"
ID = "5e" * 32


@dataclass(frozen=True)
class FakeEngine:
    """A fake engine with one image, in a folder of its own."""

    state: Path
    kind: str

    @property
    def command(self) -> tuple[str, ...]:
        """The engine's command."""
        return (sys.executable, "-I", "-S", str(PROGRAM), str(self.state), self.kind)

    def containers(self, *run: str) -> Containers:
        """Return the settings that name it."""
        return Containers(self.command, run)

    def calls(self, *start: str) -> list[list[str]]:
        """Return the arguments of all calls that start so."""
        path = self.state / "calls"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        found = [list(json.loads(line)["arguments"]) for line in lines]
        return [one for one in found if tuple(one[: len(start)]) == start]

    def environments(self) -> list[dict[str, str]]:
        """Return the environments of all calls."""
        lines = (self.state / "calls").read_text("utf-8").splitlines()
        return [dict(json.loads(line)["env"]) for line in lines]

    def left(self) -> list[str]:
        """Return the names of all containers."""
        return sorted(path.stem for path in self.state.glob("*.container"))

    def fail(self, fault: str) -> None:
        """Make it fail: ``start`` of a server, ``slow`` to tell of an end, ``down`` altogether."""
        if fault == "down":
            (self.state / "down").touch()
        else:
            (self.state / "faults").write_text(fault, "utf-8")

    def add(self, name: str, labels: Mapping[str, str]) -> None:
        """Add a container that does not run."""
        record = {"labels": dict(labels), "pid": 0}
        (self.state / f"{name}.container").write_text(json.dumps(record), "utf-8")


def fake_engine(
    folder: Path,
    kind: str = "docker",
    *,
    env: Sequence[str] = (),
    digests: Sequence[str] = (),
    faults: str = "",
    command: Sequence[str] = (),
) -> FakeEngine:
    """Make a fake engine whose one image holds the fake server.

    Args:
        folder: Made for its state.
        kind: ``docker`` or ``podman``.
        env: Environment of the image, as ``NAME=VALUE``.
        digests: Repository digests of the image.
        faults: Of the fake server.
        command: Another program for the image.
    """
    folder.mkdir()
    known: dict[str, Any] = {
        "Id": ID if kind == "podman" else f"sha256:{ID}",
        "RepoDigests": list(digests),
        "Config": {"Env": list(env), "Entrypoint": ["/app/llama-server"]},
    }
    (folder / "images.json").write_text(json.dumps({IMAGE: known}), "utf-8")
    program = list(command) or list(fake_command(Journal(folder / "journal"), faults=faults))
    (folder / "command.json").write_text(json.dumps(program), "utf-8")
    return FakeEngine(folder, kind)


def install(engine: FakeEngine, folder: Path) -> Path:
    """Put a fake engine into a folder of programs, under its own name."""
    folder.mkdir(exist_ok=True)
    path = folder / engine.kind
    path.write_text(f'#!/bin/sh\nexec {shlex.join(engine.command)} "$@"\n', "utf-8")
    path.chmod(0o755)
    return path
