"""The devices a build can use, by its own ``--list-devices``."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from pytest_llmperf.build.ask import answer_of
from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError

_DEVICE = re.compile(r"^\s+(\w+):\s+(.*?)\s+\((\d+) MiB, (\d+) MiB free\)\s*$", re.MULTILINE)
# Listed as well, since it computes, but on the CPU: "BLAS: Accelerate (0 MiB, 0 MiB free)".
_CPU = re.compile(r"BLAS|AMX|CPU")


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a build: ``CUDA0``, its name, and its memory in MiB."""

    id: str
    name: str
    total_mib: int
    free_mib: int


def devices_command(build: Build) -> tuple[str, ...]:
    """Return the command that lists the devices of a build."""
    program = build.command if build.container is None else build.container.asking(gpu=True)
    return (*program, "--list-devices")


def devices_of(build: Build) -> tuple[Device, ...]:
    """Return the GPUs that a build sees on this machine; empty for a build of CPU code only.

    Raises:
        BuildError: If the build cannot be asked.
    """
    if not build.command:
        return ()
    *command, flag = devices_command(build)
    name = f"build {build.label}"
    try:
        text, _ = answer_of(command, flag, build.host_env, name, build.forget)
    except BuildError as error:
        if build.container is None or not build.container.gpu:
            raise
        raise BuildError(
            f"{error} (asked with {shlex.join(build.container.gpu)}: install NVIDIA's container "
            "toolkit, or name the devices in [builds.NAME] run)"
        ) from error
    return tuple(
        Device(match[1], match[2], int(match[3]), int(match[4]))
        for match in _DEVICE.finditer(text)
        if not _CPU.match(match[1])
    )
