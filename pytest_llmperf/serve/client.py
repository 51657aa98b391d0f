"""Asks a llama-server, and notes when its answers arrive.

While a request is timed, the answer's bytes are only stored with their arrival times; they
are parsed afterwards, since parsing would compete with the server for a small machine's cores.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx

from pytest_llmperf.errors import CheckError, ServerError

_CONNECT = 10.0
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered completion request, times in milliseconds.

    ``prompt_*``, ``predicted_*`` and ``cache_n`` are the server's own ``timings``; the rest is
    what the client saw.

    Attributes:
        prompt_n: Prompt tokens evaluated.
        prompt_ms: Time for them.
        predicted_n: Tokens generated.
        predicted_ms: Time for them.
        cache_n: Prompt tokens taken from a cache.
        truncated: Whether the context overflowed.
        stop_type: ``limit``, ``eos`` or ``word``.
        ttft_ms: Request sent to first token.
        last_ms: Request sent to last token.
        e2e_ms: Request sent to end of answer.
        draft_n: Tokens drafted, None without speculative decoding.
        draft_accepted_n: Drafted tokens that were accepted.
        text: What was generated.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    cache_n: int
    truncated: bool
    stop_type: str
    ttft_ms: float
    last_ms: float
    e2e_ms: float
    draft_n: int | None
    draft_accepted_n: int | None
    text: str


@dataclass(frozen=True, slots=True)
class _Heard:
    """An answer as it came, times in seconds: (arrival, bytes), when sent, when over, status."""

    arrived: Sequence[tuple[float, bytes]]
    started: float
    ended: float
    status: int


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

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens.

        Raises:
            ServerError: If the server cannot.
        """
        answer = self._json("POST", "/tokenize", {"content": text, "add_special": False})
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens):
            raise ServerError("/tokenize answered no list of token ids")
        return tokens

    def _json(self, method: str, path: str, body: object) -> Any:  # noqa: ANN401 - as above
        what = f"{method} {path}"
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._broken(error, what) from error
        if response.status_code != httpx.codes.OK:
            raise _refused(response.status_code, response.text, what)
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{what}: the answer is no JSON: {response.text[:_SHOWN]}") from error

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
        return self._read(self._send(_content(prompt, generate, slot), what), what)

    def complete_together(
        self, requests: Sequence[tuple[Sequence[int], int, str]]
    ) -> tuple[list[Reply], float]:
        """Send completions at once, the first to slot 0 and so on, and time them.

        Each has a thread and a connection of its own, and all wait for the last one to be ready.

        Args:
            requests: What :meth:`complete` takes: prompt, tokens to generate, name.

        Returns:
            The replies in the order of the requests, and the milliseconds from the first request
            sent to the last byte of the last answer.

        Raises:
            ServerError: If the server answers an error, dies or hangs; of several errors one that
                says that it died or hangs.
            CheckError: If an answer is not in the form of llama-server's stream.
        """
        names = [what for _, _, what in requests]
        contents = [
            _content(prompt, generate, slot) for slot, (prompt, generate, _) in enumerate(requests)
        ]
        if len(requests) == 1:
            # As a request alone is timed, without a thread that has to wake up.
            heard = [self._send(contents[0], names[0])]
        else:
            heard = self._send_together(contents, names)
        wall = max(one.ended for one in heard) - min(one.started for one in heard)
        replies = [self._read(one, what) for one, what in zip(heard, names, strict=True)]
        return replies, wall * 1e3

    def _send_together(self, contents: Sequence[bytes], names: Sequence[str]) -> list[_Heard]:
        barrier = threading.Barrier(len(contents), timeout=_CONNECT)
        heard: dict[int, _Heard] = {}
        errors: list[Exception] = []

        def send(index: int) -> None:
            try:
                barrier.wait()
                heard[index] = self._send(contents[index], names[index])
            except Exception as error:  # noqa: BLE001 - it is raised by the one who waits
                errors.append(error)

        # Daemons, so that a run that is interrupted need not wait for a server that hangs.
        threads = [
            threading.Thread(target=send, args=(index,), name=f"slot {index}", daemon=True)
            for index in range(len(contents))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # What says most of the server: one that hangs must not be asked again.
            kinds = ("timeout", "crashed")
            raise min(errors, key=lambda error: getattr(error, "kind", "") not in kinds)
        return [heard[index] for index in range(len(contents))]

    def _send(self, content: bytes, what: str) -> _Heard:
        """Send a completion and store its answer. Nothing is parsed: others may be timed."""
        arrived: list[tuple[float, bytes]] = []
        clock = time.perf_counter
        try:
            started = clock()
            with self._http.stream(
                "POST", "/completion", content=content, headers={"Content-Type": "application/json"}
            ) as response:
                heard = clock()
                for chunk in response.iter_raw():
                    now = clock()
                    arrived.append((now, chunk))
                    if not chunk.startswith(b":") or b"data:" in chunk:
                        heard = now
                    elif now - heard > self._timeout:
                        # Pings come from another thread than the one that hangs.
                        raise httpx.ReadTimeout("nothing but pings")
            ended = clock()
        except httpx.HTTPError as error:
            raise self._broken(error, what, partial=len(arrived)) from error
        return _Heard(arrived, started, ended, response.status_code)

    @staticmethod
    def _read(heard: _Heard, what: str) -> Reply:
        if heard.status != httpx.codes.OK:
            text = b"".join(chunk for _, chunk in heard.arrived).decode(errors="replace")
            raise _refused(heard.status, text, what)
        return _read_stream(heard.arrived, heard.started, heard.ended, what)

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


def _content(prompt: Sequence[int], generate: int, slot: int) -> bytes:
    """Return the body of a cold, greedy completion of fixed length."""
    body = {
        "prompt": list(prompt),
        "n_predict": generate,
        "ignore_eos": True,
        "temperature": 0,
        "seed": 1,
        "cache_prompt": False,
        "id_slot": slot,
        "stream": True,
    }
    return json.dumps(body).encode()


def _refused(status: int, text: str, what: str) -> ServerError:
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()
    return ServerError(f"{what}: HTTP {status}: {str(message)[:_SHOWN]}", kind="http")


def _events(arrived: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Yield (arrival time, event) of a server-sent stream.

    An event counts as arrived when its last byte did. Comment lines are pings.
    """
    rest = b""
    for when, chunk in arrived:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            field, _, value = line.strip().partition(b":")
            value = value.strip()
            if field in {b"data", b"error"} and value and value != b"[DONE]":
                event = json.loads(value)
                if field == b"error" and not (isinstance(event, dict) and "error" in event):
                    event = {"error": event}
                if not isinstance(event, dict):
                    raise ValueError(f"no object: {value[:_SHOWN].decode(errors='replace')}")
                yield when, event


def _read_stream(
    arrived: Sequence[tuple[float, bytes]], started: float, ended: float, what: str
) -> Reply:
    first: float | None = None
    last = ended
    text = []
    final: Mapping[str, Any] | None = None
    try:
        for when, event in _events(arrived):
            if "error" in event:
                error = event["error"]
                message = error.get("message", error) if isinstance(error, dict) else error
                raise ServerError(f"{what}: error in mid-answer: {str(message)[:_SHOWN]}")
            text.append(str(event.get("content", "")))
            if event.get("stop"):
                # The last token may come with the closing event alone.
                final, last = event, when
            if first is None and (event.get("content") or event.get("tokens") or final):
                first = when
    except ValueError as error:
        raise CheckError(f"{what}: the stream is no JSON: {error}") from error
    if final is None or first is None:
        raise CheckError(f"{what}: the answer ended without its closing event")
    timings = final.get("timings")
    if not isinstance(timings, dict):
        raise CheckError(f"{what}: the answer holds no `timings`")
    try:
        return Reply(
            prompt_n=int(timings["prompt_n"]),
            prompt_ms=float(timings["prompt_ms"]),
            predicted_n=int(timings["predicted_n"]),
            predicted_ms=float(timings["predicted_ms"]),
            cache_n=int(timings["cache_n"]),
            truncated=bool(final.get("truncated", False)),
            stop_type=str(final.get("stop_type", "unknown")),
            ttft_ms=(first - started) * 1e3,
            last_ms=(last - started) * 1e3,
            e2e_ms=(ended - started) * 1e3,
            draft_n=timings.get("draft_n"),
            draft_accepted_n=timings.get("draft_n_accepted"),
            text="".join(text),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckError(f"{what}: `timings` lacks or garbles {error}") from error
