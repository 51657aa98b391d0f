"""The devices a build can use, by its own ``--list-devices``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_llmperf.build.ask import answer_of
from pytest_llmperf.build.build import Build

_DEVICE = re.compile(r"^\s+(\w+):\s+(.*?)\s+\((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a build: ``CUDA0``, its name, and its memory in MiB."""

    id: str
    name: str
    total_mib: int
    free_mib: int


def devices_of(build: Build) -> tuple[Device, ...]:
    """Return the GPUs that a build sees on this machine; empty for a build of CPU code only.

    Raises:
        BuildError: If the build cannot be asked.
    """
    if not build.command:
        return ()
    text, _ = answer_of(build.command, "--list-devices", build.env, f"build {build.label}")
    return tuple(
        Device(match[1], match[2], int(match[3]), int(match[4])) for match in _DEVICE.finditer(text)
    )
