"""What is sent: a body for each API, which makes a greedy answer of fixed length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.stream import (
    Reader,
    read_chat,
    read_completion,
    read_ollama,
    read_openai,
)

Message = Mapping[str, object]
"""One message of a chat: ``role`` and ``content``."""

_SEED = 1
# Longer than any pause between two requests of a run.
_KEEP_ALIVE = "30m"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        what: Names it in error texts.
        path: The route.
        content: The body, JSON.
        read: Reads the answer.
    """

    what: str
    path: str
    content: bytes
    read: Reader


def completion(
    prompt: Sequence[int], generate: int, what: str, *, slot: int = 0, depth: int = 0
) -> Ask:
    """Ask llama-server to go on from token ids.

    Args:
        prompt: Token ids.
        generate: Tokens to generate, exactly.
        what: Names the request in error texts.
        slot: Slot of the server that answers.
        depth: How many of the prompt's tokens are in the slot's cache, by :func:`primer`; 0 for a
            cold request.
    """
    return _ask(what, "/completion", read_completion, _completion(prompt, generate, slot, depth))


def primer(tokens: Sequence[int], what: str, *, slot: int = 0) -> Ask:
    """Ask a slot of llama-server to evaluate tokens and keep them in its cache.

    Args:
        tokens: Token ids.
        what: Names the request in error texts.
        slot: Slot of the server.
    """
    # No token is asked for, yet one is made; it is not evaluated, so the cache ends with ours. A
    # long prompt tells how far it is, so that work is not taken for a server that hangs.
    body = {**_completion(tokens, 0, slot, len(tokens)), "return_progress": True}
    return _ask(what, "/completion", read_completion, body)


def chat(
    messages: Sequence[Message],
    generate: int,
    what: str,
    *,
    slot: int = 0,
    thinking: bool | None = None,
) -> Ask:
    """Ask llama-server for the answer to a chat.

    Args:
        messages: The chat.
        generate: Tokens to generate, exactly.
        what: Names the request in error texts.
        slot: Slot of the server that answers.
        thinking: What the template is told; None for nothing.
    """
    body = {
        **template_body(messages, thinking),
        "max_tokens": generate,
        "ignore_eos": True,
        "temperature": 0,
        "seed": _SEED,
        "cache_prompt": False,
        "id_slot": slot,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return _ask(what, "/v1/chat/completions", read_chat, body)


def template_body(messages: Sequence[Message], thinking: bool | None) -> dict[str, object]:  # noqa: FBT001 - three values
    """Return what llama-server's chat template is given, for ``/apply-template`` too."""
    told = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    return {"messages": list(messages), **told}


def openai_chat(
    model: str,
    messages: Sequence[Message],
    generate: int,
    what: str,
    *,
    thinking: bool | None = None,
) -> Ask:
    """Ask any server that speaks OpenAI's API for the answer to a chat.

    Args:
        model: Its name there.
        messages: The chat.
        generate: Most tokens to generate.
        what: Names the request in error texts.
        thinking: What the template is told; None for nothing.
    """
    body = {
        "model": model,
        **template_body(messages, thinking),
        "max_tokens": generate,
        # Not OpenAI's own, but known to llama.cpp, vLLM and SGLang, and passed over by others.
        "ignore_eos": True,
        "temperature": 0,
        "seed": _SEED,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return _ask(what, "/v1/chat/completions", read_openai, body)


def ollama_completion(
    model: str, prompt: str, generate: int, what: str, *, options: Mapping[str, OptionValue]
) -> Ask:
    """Ask Ollama to go on from a text, without a template.

    Args:
        model: Its tag there.
        prompt: The text.
        generate: Most tokens to generate.
        what: Names the request in error texts.
        options: Ollama's ``options``.
    """
    body = {"prompt": prompt, "raw": True, **_ollama(model, generate, options)}
    return _ask(what, "/api/generate", read_ollama, body)


def ollama_chat(
    model: str,
    messages: Sequence[Message],
    generate: int,
    what: str,
    *,
    thinking: bool | None = None,
    options: Mapping[str, OptionValue],
) -> Ask:
    """Ask Ollama for the answer to a chat; the arguments are those of the others."""
    body: dict[str, object] = {"messages": list(messages), **_ollama(model, generate, options)}
    if thinking is not None:
        body["think"] = thinking
    return _ask(what, "/api/chat", read_ollama, body)


def _ollama(model: str, generate: int, options: Mapping[str, OptionValue]) -> dict[str, object]:
    fixed = {"num_predict": generate, "temperature": 0, "seed": _SEED}
    return {
        "model": model,
        "stream": True,
        "keep_alive": _KEEP_ALIVE,
        "options": {**options, **fixed},
    }


def _completion(prompt: Sequence[int], generate: int, slot: int, depth: int) -> dict[str, object]:
    return {
        "prompt": list(prompt),
        "n_predict": generate,
        "ignore_eos": True,
        "temperature": 0,
        "seed": _SEED,
        "cache_prompt": depth > 0,
        "id_slot": slot,
        "stream": True,
    }


def _ask(what: str, path: str, read: Reader, body: Mapping[str, object]) -> Ask:
    return Ask(what, path, json.dumps(body).encode(), read)
