"""Asks a build's program about itself, in the environment its servers get."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence

from pytest_llmperf.errors import BuildError

SCRUBBED = ("LLAMA_", "GGML_", "AIP_", "HF_TOKEN", "LLMPERF_")
"""What would configure a server behind our back, and secrets that are none of its business."""
_TIMEOUT = 120.0


def scrubbed_environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return our environment without what configures llama-server, plus the build's own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(SCRUBBED)}
    return {**env, **added}


def ask_program(
    command: Sequence[str],
    flag: str,
    env: Mapping[str, str],
    name: str,
    forget: Callable[[], object] | None = None,
) -> tuple[str, str, int]:
    """Run a build's program with one flag.

    Args:
        command: Arguments that start the program.
        flag: Such as ``--version``.
        env: Environment variables of the build.
        name: What the build is called in error texts.
        forget: Is called if it did not end in time: what it started may go on without it.

    Returns:
        Standard output, standard error and exit code.

    Raises:
        BuildError: If it cannot be run or does not end.
    """
    try:
        done = subprocess.run(  # noqa: S603 - the user named this program
            [*command, flag],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
            env=scrubbed_environment(env),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if forget is not None:
            forget()
        raise BuildError(f"{name}: cannot run `{flag}`: {error}") from error
    return done.stdout, done.stderr, done.returncode


def answer_of(
    command: Sequence[str],
    flag: str,
    env: Mapping[str, str],
    name: str,
    forget: Callable[[], object] | None = None,
) -> tuple[str, str]:
    """Return what a build's program prints for one flag: standard output, standard error.

    Raises:
        BuildError: If it cannot be run, does not end or fails.
    """
    out, err, status = ask_program(command, flag, env, name, forget)
    if status != 0:
        # Else a missing library would look like a build without options, or without a GPU.
        raise BuildError(f"{name}: `{flag}` ended with {status}: {last_line(err or out)}")
    return out, err


def last_line(text: str) -> str:
    """Return the last line that tells something, or ``no output``."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # docker ends every error so.
    told = [line for line in lines if not line.startswith(("Run 'docker ", "See 'docker "))]
    return (told or lines or ["no output"])[-1]
