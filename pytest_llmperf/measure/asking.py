"""How the servers of each API are asked: what makes a workload's requests, and what is sent."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pytest_llmperf.errors import CheckError
from pytest_llmperf.measure.picture import base64_picture
from pytest_llmperf.measure.prompts import (
    Cut,
    Request,
    Script,
    digest_of,
    write_chats,
    write_script,
)
from pytest_llmperf.models.text import text
from pytest_llmperf.plan.config import Turn, Workload
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.ask import (
    Ask,
    Message,
    chat,
    completion,
    ollama_chat,
    ollama_completion,
    openai_chat,
)
from pytest_llmperf.serve.launch import Server
from pytest_llmperf.serve.ollama import ollama_options

_MARKER = "<__media__>"
# English text has between three and five characters a token with every tokenizer of today.
_CHARACTERS = 4.0
# Eight digits are as many tokens as any other eight.
_SALTS = (10**7, 10**8 - 1)


class Asking(Protocol):
    """Asks one server in one way."""

    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload.

        Raises:
            CheckError: If they cannot be made for this server.
            ServerError: If the server does not help to make them.
        """

    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:
        """Return what is sent for a request."""


class Askings:
    """All ways to ask one server.

    Args:
        server: The server.
        tokens: Ids of the shipped text under the model's tokenizer, empty where nobody tells.
    """

    def __init__(self, server: Server, tokens: Sequence[int]) -> None:
        self._server = server
        self.unseen: Unseen | None = None
        """How a server is asked that does not show its tokens."""
        self._completions = Completions(tokens)
        self._chats = Chats(server, tokens)
        if server.build.api == "openai":
            self.unseen = OpenAiChats(server)
        elif server.build.api == "ollama":
            self.unseen = OllamaTexts(server)

    def of(self, workload: Workload) -> Asking:
        """Return how the server is asked for a workload.

        Raises:
            CheckError: If it cannot be asked so.
        """
        label = self._server.build.label
        if self.unseen is None:
            return self._chats if workload.api == "chat" else self._completions
        if any(turn.depth for turn in workload.turns):
            raise CheckError(
                f"workload {workload.name} has a `depth`, which needs llama-server: {label} does "
                "not let us say what lies in its cache"
            )
        if workload.api != "chat" and isinstance(self.unseen, OpenAiChats):
            raise CheckError(
                f"workload {workload.name} sends token ids, which {label}, an OpenAI-compatible "
                'endpoint, does not take: ask it by a workload with api = "chat"'
            )
        return self.unseen


@dataclass(frozen=True, slots=True)
class Completions:
    """Token ids to llama-server's ``/completion``."""

    tokens: Sequence[int]

    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload."""
        return write_script(workload, self.tokens)

    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:  # noqa: ARG002 - as all
        """Return what is sent for a request."""
        return completion(request.prompt, request.generate, what, slot=slot, depth=request.depth)


@dataclass(frozen=True, slots=True)
class Chats:
    """Messages to llama-server's ``/v1/chat/completions``, with the prompt that they become."""

    server: Server
    tokens: Sequence[int]

    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload, each with the prompt that the template makes."""
        self._check(workload)
        # The lengths are those of the text; what the template adds comes on top.
        plain = write_script(replace(workload, turns=(Turn(workload.tokens, 2),)), self.tokens)
        client = self.server.client

        def cut(number: int, begin: int, count: int) -> str:
            return client.detokenize(plain.requests[number].prompt[begin : begin + count])

        requests = []
        for number, (messages, generate) in enumerate(write_chats(workload, cut)):
            shown = with_picture(messages, workload, number % workload.parallel)
            requests.append(
                Request(
                    tuple(self._rendered(shown, workload)),
                    generate,
                    messages=tuple(shown),
                    pictured=workload.image > 0,
                )
            )
        sent = [[list(one.prompt), one.generate] for one in requests]
        return Script(workload, tuple(requests), digest_of([sent, _pictures(requests)]))

    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:
        """Return what is sent for a request."""
        return chat(request.messages, request.generate, what, slot=slot, thinking=workload.thinking)

    def _check(self, workload: Workload) -> None:
        config, client = self.server.config, self.server.client
        modalities = self.server.props.get("modalities")
        sees = isinstance(modalities, dict) and modalities.get("vision") is True
        if workload.image and not sees:
            raise CheckError(
                f"workload {workload.name} sends a picture, and the server of config {config.name} "
                "takes none: give its model a projector, [models."
                f"{config.model}] projector = NAME in the suite file"
            )
        if workload.thinking is not None:
            asked: list[Message] = [{"role": "user", "content": "Why?"}]
            if client.render(asked, thinking=True) == client.render(asked, thinking=False):
                raise CheckError(
                    f"workload {workload.name} sets `thinking`, and the chat template of config "
                    f"{config.name} makes the same prompt of true and false: leave it out, or give "
                    "a template that knows `enable_thinking` by the option chat-template-file"
                )

    def _rendered(self, messages: Sequence[Message], workload: Workload) -> list[int]:
        client = self.server.client
        prompt = client.render(messages, thinking=workload.thinking)
        marker = self.server.props.get("media_marker")
        if isinstance(marker, str) and marker:
            # Drawn anew at every start; it stands for the picture and is no text of the prompt.
            prompt = prompt.replace(marker, _MARKER)
        return client.tokenize(prompt.replace(_MARKER, ""), special=True)


class Unseen(ABC):
    """Asks a server that does not show its tokens, so texts are cut to about their length.

    Nor does it promise a cold prompt, so each request begins with a number of its own, and shares
    no more with an earlier one than its template's first words.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._characters = _CHARACTERS
        self._numbers = random.SystemRandom()

    @abstractmethod
    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload."""

    @abstractmethod
    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:
        """Return what is sent for a request."""

    @abstractmethod
    def plain(self, request: Request, what: str, workload: Workload) -> Ask:
        """Return what is sent for a request where the cache is of no account."""

    def calibrate(self) -> None:
        """Learn from a first answer how many characters a token has.

        It is the same request every time, so that all later ones are of the same text.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If it does not count its tokens.
        """
        probe = Workload("probe", (Turn(prompt=128, generate=8),), api="chat")
        (request,) = self.script(probe).requests
        (reply,), _ = self.server.client.ask(
            [self.plain(request, f"{self.server.build.label}: probe", probe)]
        )
        if count := reply.prompt_n + (reply.cache_n or 0):
            self._characters *= probe.turns[0].prompt / count

    def _cut(self, workload: Workload) -> Cut:
        whole = text()
        repeats = -(-int(workload.tokens * self._characters) // len(whole)) + 2

        def cut(number: int, begin: int, count: int) -> str:
            at = number * len(whole) // workload.parallel + round(begin * self._characters)
            stream = whole * repeats
            return stream[at : at + round(count * self._characters)]

        return cut

    def _salted(self, messages: Sequence[Message]) -> list[Message]:
        first, *rest = messages
        content = first["content"]
        salt = f"{self._numbers.randint(*_SALTS)} "
        if isinstance(content, str):
            return [{**first, "content": salt + content}, *rest]
        parts: list[Mapping[str, Any]] = [{"type": "text", "text": salt}]
        parts += content if isinstance(content, list) else []
        return [{**first, "content": parts}, *rest]


class OpenAiChats(Unseen):
    """Messages to a server that speaks OpenAI's API."""

    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload, cut to about their length."""
        requests = tuple(
            Request(
                (),
                generate,
                messages=tuple(with_picture(messages, workload, number % workload.parallel)),
            )
            for number, (messages, generate) in enumerate(
                write_chats(workload, self._cut(workload))
            )
        )
        sent = [[list(one.messages), one.generate] for one in requests]
        return Script(workload, requests, digest_of([self.server.build.model, sent]))

    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:  # noqa: ARG002 - as all
        """Return what is sent for a request."""
        salted = replace(request, messages=tuple(self._salted(request.messages)))
        return self.plain(salted, what, workload)

    def plain(self, request: Request, what: str, workload: Workload) -> Ask:
        """Return what is sent for a request where the cache is of no account."""
        model, thinking = self.server.build.model, workload.thinking
        return openai_chat(model, request.messages, request.generate, what, thinking=thinking)


class OllamaTexts(Unseen):
    """Texts or messages to Ollama's own API."""

    def script(self, workload: Workload) -> Script:
        """Return the requests of a workload, cut to about their length."""
        written = write_chats(workload, self._cut(workload))
        requests = []
        for number, (messages, generate) in enumerate(written):
            if workload.api == "chat":
                first, *rest = messages
                if workload.image:
                    seen = base64_picture(workload.image, number % workload.parallel)
                    first = {**first, "images": [seen]}
                requests.append(Request((), generate, messages=(first, *rest)))
            else:
                whole = "".join(str(message["content"]) for message in messages)
                requests.append(Request((), generate, text=whole))
        sent = [[one.text, list(one.messages), one.generate] for one in requests]
        build = self.server.build
        known = [build.model, self._options]
        return Script(workload, tuple(requests), digest_of([known, sent]))

    def ask(self, request: Request, what: str, slot: int, workload: Workload) -> Ask:  # noqa: ARG002 - as all
        """Return what is sent for a request."""
        if request.messages:
            salted = replace(request, messages=tuple(self._salted(request.messages)))
        else:
            salted = replace(request, text=f"{self._numbers.randint(*_SALTS)} {request.text}")
        return self.plain(salted, what, workload)

    def plain(self, request: Request, what: str, workload: Workload) -> Ask:
        """Return what is sent for a request where the cache is of no account."""
        model, generate, options = self.server.build.model, request.generate, self._options
        if not request.messages:
            return ollama_completion(model, request.text, generate, what, options=options)
        return ollama_chat(
            model,
            request.messages,
            generate,
            what,
            thinking=workload.thinking,
            options=options,
        )

    @property
    def _options(self) -> Mapping[str, OptionValue]:
        return ollama_options(self.server.config)[0]


def with_picture(messages: Sequence[Message], workload: Workload, number: int) -> list[Message]:
    """Return messages with the workload's picture, if it has one, in the first of them."""
    if not workload.image:
        return list(messages)
    first, *rest = messages
    url = f"data:image/png;base64,{base64_picture(workload.image, number)}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": first["content"]},
    ]
    return [{**first, "content": parts}, *rest]


def _pictures(requests: Sequence[Request]) -> list[str]:
    """Return a hash of each request's messages, where they hold pictures."""
    return [digest_of(list(one.messages)) for one in requests if one.pictured]
