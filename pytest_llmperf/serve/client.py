"""Asks a llama-server, and notes when its answers arrive.

While a request is timed, the answer's bytes are only stored with their arrival times; they
are parsed afterwards, since parsing would compete with the server for a small machine's cores.
"""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import httpx

from pytest_llmperf.errors import ServerError, TooSlowError
from pytest_llmperf.serve.ask import Ask, Message, chat, completion, primer, template_body
from pytest_llmperf.serve.stream import Heard, Reply, progress, refused

_CONNECT = 10.0
_LEAST_PATIENCE = 0.001
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Limit:
    """When something is given up.

    Attributes:
        seconds: How long it may take.
        at: ``time.perf_counter()`` at the end.
    """

    seconds: float = math.inf
    at: float = math.inf

    @classmethod
    def of(cls, seconds: float) -> Self:
        """Return a limit that runs from now on; 0 is none."""
        return cls(seconds, time.perf_counter() + seconds) if seconds else cls()


_NO_LIMIT = Limit()


@cache
def _tls() -> ssl.SSLContext:
    # httpx makes one a client, which takes longer than a small model takes to load.
    return ssl.create_default_context()


class Client:
    """Talks to one server.

    Args:
        url: Address of the server.
        key: API key, or None.
        timeout: Seconds without a byte of the answer after which a request counts as hung; pings
            are none.
        post_mortem: Called when the connection breaks; returns how the server died, or None
            if it still lives.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout: float = 300.0,
        post_mortem: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.url = url
        self._timeout = timeout
        self._post_mortem = post_mortem
        self._http = httpx.Client(
            base_url=url,
            # A compressed answer would wait for a full buffer, and is read raw here.
            headers={
                "Accept-Encoding": "identity",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
            timeout=httpx.Timeout(timeout, connect=_CONNECT),
            # A proxy from the environment has no business between us and loopback.
            trust_env=False,
            verify=_tls(),
            # llama-server closes idle connections after a few seconds; one that is reused at
            # that moment looks like a server that died. A new one costs little on loopback.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> Any:  # noqa: ANN401 - JSON is what the server says it is
        """Return the JSON of a route.

        Raises:
            ServerError: If it is not answered with 200 and JSON.
        """
        return self._json("GET", path, None)

    def post(self, path: str, body: object) -> Any:  # noqa: ANN401 - JSON is what the server says it is
        """Send JSON to a route and return the JSON it answers.

        Raises:
            ServerError: If it is not answered with 200 and JSON.
        """
        return self._json("POST", path, body)

    def status(self, path: str, key: str | None = None, timeout: float | None = None) -> int:
        """Return the HTTP status of a route, 0 if nothing answers.

        Args:
            path: The route.
            key: Send this key in place of the server's own.
            timeout: Seconds to wait, in place of the client's own.
        """
        limit = self._timeout if timeout is None else timeout
        headers = {"Authorization": f"Bearer {key}"} if key else None
        try:
            return self._http.get(path, headers=headers, timeout=limit).status_code
        except httpx.HTTPError:
            return 0

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: The text.
            special: Put special tokens where a prompt begins, and read those in the text as what
                they stand for, as is done with a rendered chat.

        Raises:
            ServerError: If the server cannot.
        """
        body: dict[str, object] = {"content": text, "add_special": special}
        if special:
            body["parse_special"] = True
        answer = self._json("POST", "/tokenize", body)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise ServerError("/tokenize answered no list of token ids")
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids.

        Raises:
            ServerError: If the server cannot.
        """
        answer = self._json("POST", "/detokenize", {"tokens": list(tokens)})
        content = answer.get("content") if isinstance(answer, dict) else None
        if not isinstance(content, str):
            raise ServerError("/detokenize answered no text")
        return content

    def render(self, messages: Sequence[Message], *, thinking: bool | None = None) -> str:
        """Return the prompt that the server's chat template makes of messages.

        Args:
            messages: The chat.
            thinking: What the template is told; None for nothing.

        Raises:
            ServerError: If the server cannot.
        """
        answer = self._json("POST", "/apply-template", template_body(messages, thinking))
        prompt = answer.get("prompt") if isinstance(answer, dict) else None
        if not isinstance(prompt, str):
            raise ServerError("/apply-template answered no prompt")
        return prompt

    def _json(self, method: str, path: str, body: object) -> Any:  # noqa: ANN401 - as above
        what = f"{method} {path}"
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._broken(error, what) from error
        if response.status_code != httpx.codes.OK:
            raise refused(response.status_code, response.text, what)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{what}: the answer is no JSON: {response.text[:_SHOWN]}") from error

    def prime(
        self, tokens: Sequence[int], what: str, *, slot: int = 0, limit: Limit = _NO_LIMIT
    ) -> None:
        """Have a slot evaluate tokens and keep them in its cache.

        Args:
            tokens: Token ids.
            what: Names the request in error texts.
            slot: Slot of the server.
            limit: When the request is given up.

        Raises:
            ServerError: If the server answers an error, dies or hangs.
            TooSlowError: If it is given up.
            CheckError: If the answer is not in the form of llama-server's stream.
        """
        asked = primer(tokens, what, slot=slot)
        asked.read(self._send(asked, limit), what)

    def complete(self, prompt: Sequence[int], generate: int, what: str, *, slot: int = 0) -> Reply:
        """Send a cold, greedy completion of fixed length and time it.

        Args:
            prompt: Token ids.
            generate: Tokens to generate, exactly.
            what: Names the request in error texts.
            slot: Slot of the server that answers.

        Raises:
            ServerError: If the server answers an error, dies or hangs.
            CheckError: If the answer is not in the form of llama-server's stream.
        """
        return self.ask([completion(prompt, generate, what, slot=slot)])[0][0]

    def chat(
        self,
        messages: Sequence[Message],
        generate: int,
        what: str,
        *,
        slot: int = 0,
        thinking: bool | None = None,
    ) -> Reply:
        """Send a chat with a greedy answer of fixed length and time it.

        Args:
            messages: The chat, each a ``role`` and a ``content``.
            generate: Tokens to generate, exactly.
            what: Names the request in error texts.
            slot: Slot of the server that answers.
            thinking: What the chat template is told; None for nothing.

        Raises:
            ServerError: If the server answers an error, dies or hangs.
            CheckError: If the answer is not in the form of llama-server's stream.
        """
        return self.ask([chat(messages, generate, what, slot=slot, thinking=thinking)])[0][0]

    def ask(self, asks: Sequence[Ask], limit: Limit = _NO_LIMIT) -> tuple[list[Reply], float]:
        """Send requests at once and time them.

        Each has a thread and a connection of its own, and all wait for the last one to be ready.

        Args:
            asks: The requests.
            limit: When they are given up.

        Returns:
            The replies in the order of ``asks``, and the milliseconds from the first request
            sent to the last byte of the last answer.

        Raises:
            ServerError: If the server answers an error, dies or hangs; of several errors one that
                says that it died or hangs.
            TooSlowError: If they are given up.
            CheckError: If an answer is not in the form of the API that was asked.
        """
        # A request alone is timed without a thread that has to wake up.
        alone = len(asks) == 1
        heard = [self._send(asks[0], limit)] if alone else self._send_together(asks, limit)
        wall = max(one.ended for one in heard) - min(one.started for one in heard)
        replies = [one.read(answer, one.what) for one, answer in zip(asks, heard, strict=True)]
        return replies, wall * 1e3

    def _send_together(self, asks: Sequence[Ask], limit: Limit) -> list[Heard]:
        barrier = threading.Barrier(len(asks), timeout=_CONNECT)
        heard: dict[int, Heard] = {}
        errors: list[Exception] = []

        def send(index: int) -> None:
            try:
                barrier.wait()
                heard[index] = self._send(asks[index], limit)
            except Exception as error:  # noqa: BLE001 - it is raised by the one who waits
                errors.append(error)

        # Daemons, so that a run that is interrupted need not wait for a server that hangs.
        threads = [
            threading.Thread(target=send, args=(index,), name=f"slot {index}", daemon=True)
            for index in range(len(asks))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # What says most of the server: one that hangs must not be asked again.
            kinds = ("timeout", "crashed")
            raise min(errors, key=lambda error: getattr(error, "kind", "") not in kinds)
        return [heard[index] for index in range(len(asks))]

    def _send(self, ask: Ask, limit: Limit) -> Heard:
        """Send a request and store its answer. Nothing is parsed: others may be timed."""
        arrived: list[tuple[float, bytes]] = []
        clock = time.perf_counter
        started = clock()
        # What is given up with nothing arriving waits for no byte longer than that.
        patience = max(min(self._timeout, limit.at - started), _LEAST_PATIENCE)
        try:
            started = clock()
            with self._http.stream(
                "POST",
                ask.path,
                content=ask.content,
                headers={"Content-Type": "application/json"},
                timeout=httpx.Timeout(patience, connect=_CONNECT),
            ) as response:
                heard = clock()
                for chunk in response.iter_raw():
                    now = clock()
                    arrived.append((now, chunk))
                    if now > limit.at:
                        raise too_slow(ask.what, limit.seconds, progress(arrived))
                    if not chunk.startswith(b":") or b"data:" in chunk:
                        heard = now
                    elif now - heard > self._timeout:
                        # Pings come from another thread than the one that hangs.
                        raise httpx.ReadTimeout("nothing but pings")
            ended = clock()
        except httpx.HTTPError as error:
            # Or a write: what begins when the limit is over has no time to be sent.
            if isinstance(error, httpx.TimeoutException) and clock() >= limit.at:
                raise too_slow(ask.what, limit.seconds, progress(arrived)) from error
            raise self._broken(error, ask.what, partial=len(arrived)) from error
        return Heard(arrived, started, ended, response.status_code)

    def _broken(self, error: httpx.HTTPError, what: str, partial: int = 0) -> ServerError:
        after = f" after {partial} parts of the answer" if partial else ""
        if isinstance(error, httpx.ReadTimeout):
            return ServerError(
                f"{what}: the server hung: nothing came for {self._timeout:g} s{after}",
                kind="timeout",
            )
        if died := self._post_mortem():
            return ServerError(f"{what}: the server died{after}: {died}", kind="crashed")
        shown = str(error) or type(error).__name__
        return ServerError(f"{what}: the connection broke{after}: {shown}", kind="http")


def too_slow(what: str, seconds: float, far: str) -> TooSlowError:
    """Return the error of a sample that is given up.

    Args:
        what: Names it.
        seconds: How long it may take.
        far: How far it is, in words.
    """
    return TooSlowError(
        f"{what}: too slow: given up after the {seconds:g} s that one sample may take, {far}; "
        "`limit` of the workload says how long that is"
    )
