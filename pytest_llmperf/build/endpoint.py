"""A server that already runs: which API it speaks, and what it says of itself."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import httpx

from pytest_llmperf.build.build import ServerApi, parse_build_info
from pytest_llmperf.errors import BuildError, nearest

MODEL_VARIABLE = "LLMPERF_ENDPOINT_MODEL"
"""Environment variable that names the model of a server that has several."""

_TIMEOUT = 60.0
_HASH = 12
_LABEL = 40


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server.

    Attributes:
        api: Its API.
        number: Build number, 0 where it tells none.
        commit: Commit, or ``unknown``.
        label: What it is called where it has no number; ``""`` for no name of its own.
        model: The model that is asked; ``""`` where there is but one and it is not named.
        note: What a person must know of it.
    """

    api: ServerApi
    number: int = 0
    commit: str = "unknown"
    label: str = ""
    model: str = ""
    note: str = ""


def find_endpoint(url: str) -> Endpoint:
    """Return what answers at an address: llama-server, or another that speaks OpenAI's API.

    Args:
        url: Its address.

    Raises:
        BuildError: If neither answers, it wants a key, or it is not said which model is meant.
    """
    status, props = _get(url, "/props", "llama-server")
    if isinstance(props, dict) and "error" not in props:
        number, commit = parse_build_info(str(props.get("build_info", "")))
        return Endpoint("llama-server", number, commit)
    told = f"answered {status}" if status != httpx.codes.OK else "answered no JSON"
    _, listed = _get(url, "/v1/models", "server")
    entries = listed.get("data") if isinstance(listed, dict) else None
    names = [str(one["id"]) for one in entries or [] if isinstance(one, dict) and "id" in one]
    if not names:
        raise BuildError(f"the server at {url} {told} to /props: not llama-server?")
    model = _chosen(names, url)
    return Endpoint(
        "openai",
        label=_named(model.rpartition("/")[2]),
        model=model,
        note=f"{url} is an OpenAI-compatible endpoint, model {model}: only chats are sent, speeds "
        "are those that the client sees, and whether a prompt came from a cache is known only "
        "where the server counts cached tokens",
    )


def find_ollama(url: str) -> Endpoint:
    """Return what an Ollama server says of itself and of the model that is meant.

    Args:
        url: Its address.

    Raises:
        BuildError: If no Ollama answers, or it is not said which model is meant.
    """
    _, told = _get(url, "/api/version", "Ollama")
    version = told.get("version") if isinstance(told, dict) else None
    if not isinstance(version, str):
        raise BuildError(f"the server at {url} tells no version at /api/version: not Ollama?")
    _, listed = _get(url, "/api/tags", "Ollama")
    entries = listed.get("models") if isinstance(listed, dict) else None
    digests = {
        str(one["name"]): str(one.get("digest", ""))
        for one in entries or []
        if isinstance(one, dict) and "name" in one
    }
    if not digests:
        raise BuildError(f"the Ollama at {url} has no model: pull one with `ollama pull`")
    model = _chosen(list(digests), url)
    return Endpoint(
        "ollama",
        label=_named(f"ollama-{version}"),
        model=model,
        note=f"{url} is Ollama {version}, model {model} ({digests[model][:_HASH] or 'no digest'}): "
        "a config gives it context, threads, GPU layers and batch, and nothing else",
    )


def _chosen(names: list[str], url: str) -> str:
    wanted = os.environ.get(MODEL_VARIABLE, "")
    if not wanted and len(names) == 1:
        return names[0]
    if wanted in names:
        return wanted
    shown = ", ".join(names)
    if not wanted:
        raise BuildError(f"{url} has several models: name one by {MODEL_VARIABLE}: {shown}")
    raise BuildError(
        f"{MODEL_VARIABLE}={wanted}: {url} has no such model{nearest(wanted, names)}: "
        f"there are {shown}"
    )


def _named(text: str) -> str:
    """Return a text as a label may be, with room for the name of a variant."""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", text)[:_LABEL].strip("-.") or "endpoint"


def _get(url: str, path: str, what: str) -> tuple[int, Any]:
    """Return status and JSON of a route; None for what is no JSON, or no success."""
    key = os.environ.get("LLMPERF_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(f"{url}{path}", headers=headers, timeout=_TIMEOUT, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise BuildError(f"no {what} answers at {url}: {error}") from error
    if reply.status_code in {401, 403}:
        raise BuildError(f"the server at {url} wants a key: set LLMPERF_API_KEY")
    if reply.status_code != httpx.codes.OK:
        return reply.status_code, None
    try:
        return reply.status_code, reply.json()
    except ValueError:
        return reply.status_code, None
