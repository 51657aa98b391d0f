"""The devices a build can use, by its own ``--list-devices``."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError

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
    try:
        done = subprocess.run(  # noqa: S603 - the build's own program
            [*build.command, "--list-devices"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
            env={**os.environ, **build.env},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"build {build.label}: cannot run `--list-devices`: {error}") from error
    if done.returncode != 0:
        # Else a missing CUDA library would look like a machine without a GPU.
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BuildError(
            f"build {build.label}: `--list-devices` ended with {done.returncode}: "
            f"{said[-1] if said else 'no output'}"
        )
    return tuple(
        Device(match[1], match[2], int(match[3]), int(match[4]))
        for match in _DEVICE.finditer(done.stdout)
    )
