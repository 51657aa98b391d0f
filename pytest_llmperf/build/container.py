"""Builds in container images: what an image is, and how its program is run.

By the command line of docker or podman alone. What differs between the two is here and in
:mod:`pytest_llmperf.build.engine`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmperf.build.ask import SCRUBBED, last_line
from pytest_llmperf.build.engine import OWNER, USE, Engine, owner
from pytest_llmperf.errors import BuildError

_OWNED = {
    "--name": "every container gets a name of its own",
    "--detach": "a server's output is read as it runs",
    "-d": "a server's output is read as it runs",
    "--rm": "how a server ended is asked before its container is removed",
    "--restart": "a server that dies is to be seen",
    "--tty": "a server has no terminal",
    "-t": "a server has no terminal",
    "--interactive": "a server has no terminal",
    "-i": "a server has no terminal",
    "-it": "a server has no terminal",
    "--entrypoint": "name it with [builds.NAME] program",
    "--pull": "an image is never pulled in the middle of a run",
}
_SHAPING = {
    *("--cpus", "--cpuset-cpus", "--cpuset-mems", "--cpu-quota", "--cpu-period", "--cpu-shares"),
    *("-c", "--memory", "-m", "--memory-swap", "--env", "-e", "--env-file"),
}
"""Flags of ``run`` that give a server less of the machine, or other variables. The others are what
an engine needs to show it devices, files and networks."""
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Container:
    """An image of llama-server, found, and how it is run on this machine.

    Attributes:
        engine: What runs it.
        image: Its id, which cannot come to mean another image in the middle of a run.
        digest: Its name with the digest a registry knows it by, or ``""``.
        unset: Environment variables of the image that would configure a server behind our back.
        env: Environment variables that its containers get.
        run: The user's own flags of ``run``.
        gpu: Flags that let it use the GPUs.
        program: Program that is run instead of the image's entry point, or ``""``.
        always_gpu: Whether its program does not even start without a GPU's driver.
    """

    engine: Engine
    image: str
    digest: str = ""
    unset: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    run: tuple[str, ...] = ()
    gpu: tuple[str, ...] = ()
    program: str = ""
    always_gpu: bool = False

    @property
    def network(self) -> str:
        """The network that the user's flags name, or ``""``."""
        return _value_of(self.run, "--network", "--net")

    @property
    def limits(self) -> tuple[str, ...]:
        """The user's flags that shape what is computed with, sorted: ``--cpus=2``."""
        found = []
        for index, flag in enumerate(self.run):
            name, equals, value = flag.partition("=")
            if name in _SHAPING:
                given = value if equals else next(iter(self.run[index + 1 : index + 2]), "")
                found.append(f"{name}={given}")
        return tuple(sorted(found))

    def asking(self, *, gpu: bool = False) -> tuple[str, ...]:
        """Return the command that asks its program, but for the question.

        The container has no network, and is gone afterwards.
        """
        alone = () if self.network else ("--network=none",)
        return self._command(("--rm", *alone), use="ask", gpu=gpu)

    def serving(self, name: str, flags: Sequence[str], *, gpu: bool) -> tuple[str, ...]:
        """Return the command that runs its server in the foreground, but for the options.

        Args:
            name: What the container is called.
            flags: Of ``run``: ports and mounts.
            gpu: Whether it is to have the GPUs.
        """
        return self._command(("--name", name, *flags), use="serve", gpu=gpu)

    def forget(self) -> None:
        """Remove containers of this process that were asked something and never ended."""
        self.engine.remove_all(owner=str(owner()), use="ask")

    def _command(self, flags: tuple[str, ...], *, use: str, gpu: bool) -> tuple[str, ...]:
        labels = ("--label", f"{OWNER}={owner()}", "--label", f"{USE}={use}")
        return (
            *(*self.engine.command, "run", "--pull=never", *labels, *_confined(self.engine)),
            *self._environment(),
            *flags,
            *(self.gpu if gpu or self.always_gpu else ()),
            *self.run,
            *(("--entrypoint", self.program) if self.program else ()),
            self.image,
        )

    def _environment(self) -> tuple[str, ...]:
        # docker takes a variable away that is named without a value and not set here; podman then
        # leaves the image's, and has a flag.
        flag = "--unsetenv" if self.engine.podman else "--env"
        # llama-server reads $XDG_CONFIG_HOME/llama.cpp/config.ini, which an image may hold.
        given = {"XDG_CONFIG_HOME": "/nonexistent", **dict(self.env)}
        return (
            *(part for name in self.unset if name not in given for part in (flag, name)),
            *(part for name, value in given.items() for part in ("--env", f"{name}={value}")),
        )


def _confined(engine: Engine) -> tuple[str, ...]:
    """Return flags that take from a container what a server does not need."""
    flags = [
        # Model files may be readable by their owner alone, who need not be the container's user.
        *("--cap-drop=ALL", "--cap-add=DAC_OVERRIDE", "--security-opt=no-new-privileges"),
    ]
    if Path("/sys/fs/selinux/enforce").exists():
        # Else the user's models would have to be labelled anew.
        flags.append("--security-opt=label=disable")
    if engine.podman:
        # A proxy's address may hold a password.
        flags.append("--http-proxy=false")
    return tuple(flags)


def find_image(engine: Engine, image: str) -> dict[str, Any]:
    """Return what the engine knows of an image that is here.

    Raises:
        BuildError: If it is not here; nothing is pulled.
    """
    told = engine.says("image", "inspect", image)
    if told.returncode != 0:
        why = last_line(told.stderr)
        pull = f"{engine.command[0]} pull {image}"
        if re.search(r"no such|not known|not found|unable to find", why, re.IGNORECASE):
            raise BuildError(f"docker:{image}: the image is not here: `{pull}`")
        raise BuildError(f"docker:{image}: {why} (is the image here? `{pull}`)")
    try:
        found = json.loads(told.stdout)[0]
        found["Id"] = str(found["Id"]).removeprefix("sha256:")
    except (ValueError, LookupError, TypeError) as error:
        raise BuildError(
            f"docker:{image}: `{engine.command[0]} image inspect` told nothing"
        ) from error
    if not isinstance(found, dict) or not _HEX.fullmatch(found["Id"]):
        raise BuildError(f"docker:{image}: the image has no id that is a SHA-256")
    return found


def container_of(
    engine: Engine,
    image: str,
    *,
    run: Sequence[str],
    program: str,
    env: Mapping[str, str],
    visible: str | None,
) -> Container:
    """Return an image as something to run.

    Args:
        engine: What runs it.
        image: Name, tag, digest or id.
        run: The user's flags of ``run``: the machine's, then the build's.
        program: Program to run instead of the entry point, or ``""``.
        env: Environment variables for its containers.
        visible: ``CUDA_VISIBLE_DEVICES`` of this machine, or None.

    Raises:
        BuildError: If it is not here, or a flag is one of ours.
    """
    for flag in run:
        name = flag.partition("=")[0]
        if name in _OWNED:
            raise BuildError(
                f"docker:{image}: `{flag}` is not for the flags of run: {_OWNED[name]}"
            )
    found = find_image(engine, image)
    config = found.get("Config") or {}
    names = [str(entry).partition("=")[0] for entry in config.get("Env") or ()]
    return Container(
        engine=engine,
        image=found["Id"] if engine.podman else f"sha256:{found['Id']}",
        digest=_digest(image, found.get("RepoDigests") or ()),
        unset=tuple(name for name in names if name.startswith(SCRUBBED)),
        env=tuple(sorted(env.items())),
        run=tuple(run),
        gpu=gpu_flags(engine, run, None if "CUDA_VISIBLE_DEVICES" in env else visible),
        program=program,
    )


def entry_point(engine: Engine, image: str) -> str:
    """Return an image's own entry point for an error text."""
    config = find_image(engine, image).get("Config") or {}
    words = config.get("Entrypoint") or ()
    return " ".join(words) if words else "none"


def gpu_flags(engine: Engine, run: Sequence[str], visible: str | None) -> tuple[str, ...]:
    """Return the flags that let a container use NVIDIA's GPUs.

    Args:
        engine: docker or podman.
        run: The user's flags; those that name devices stand alone.
        visible: ``CUDA_VISIBLE_DEVICES``: indices or UUIDs; None for all GPUs.
    """
    if _value_of(run, "--gpus", "--device"):
        return ()
    chosen: list[str] = []
    for one in (visible or "").split(","):
        # As CUDA reads it: what follows a device that is none does not count.
        if one.strip() in {"", "-1", "NoDevFiles"}:
            break
        chosen.append(one.strip())
    if visible is not None and not chosen:
        return ()
    if engine.podman:
        return tuple(
            part for one in chosen or ["all"] for part in ("--device", f"nvidia.com/gpu={one}")
        )
    return ("--gpus", f'"device={",".join(chosen)}"' if chosen else "all")


def mount(source: Path, target: str) -> tuple[str, str]:
    """Return the flags that show a file in a container, read-only.

    Unlike ``-v``, this fails where there is no such file, and makes no folder of its name.
    """
    line = io.StringIO()
    fields = ["type=bind", f"source={source}", f"destination={target}", "readonly"]
    csv.writer(line, lineterminator="").writerow(fields)
    return ("--mount", line.getvalue())


def _digest(image: str, digests: Sequence[str]) -> str:
    """Return the repository digest of an image by its own name, or by any a registry knows."""
    known = [one for one in digests if not one.startswith("localhost/")]
    name = re.sub(r"(@.*|:[^/]*)$", "", image)
    own = [one for one in known if one.partition("@")[0].endswith(name)]
    return next(iter([*own, *known]), "")


def _value_of(flags: Sequence[str], *names: str) -> str:
    """Return the last value of a flag in either way to write it, ``""`` if it is not there."""
    found = ""
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if name in names:
            found = value if equals else next(iter(flags[index + 1 : index + 2]), "")
    return found
