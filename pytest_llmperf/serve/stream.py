"""What an answer was, read once it is over: from its bytes and the times at which they came.

Four forms: llama-server's completions and its chats, the chats of any other server that speaks
OpenAI's API, and Ollama's lines of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from pytest_llmperf.errors import CheckError, ServerError

_SHOWN = 300
_NS_PER_MS = 1e6
# OpenAI's and Ollama's word for what stopped an answer, in llama-server's.
_STOPS = {"length": "limit", "stop": "eos"}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request, times in milliseconds.

    ``prompt_*``, ``predicted_*`` and ``cache_n`` are the server's own account, where it gives one;
    the rest is what the client saw.

    Attributes:
        prompt_n: Prompt tokens evaluated.
        prompt_ms: Time for them.
        predicted_n: Tokens generated.
        predicted_ms: Time for them.
        cache_n: Prompt tokens taken from a cache; None where the server does not say.
        truncated: Whether the context overflowed.
        stop_type: ``limit``, ``eos`` or ``word``.
        ttft_ms: Request sent to first token.
        last_ms: Request sent to last token.
        e2e_ms: Request sent to end of answer.
        draft_n: Tokens drafted, None without speculative decoding.
        draft_accepted_n: Drafted tokens that were accepted.
        text: What was generated; of a chat, thoughts first.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    cache_n: int | None
    truncated: bool
    stop_type: str
    ttft_ms: float
    last_ms: float
    e2e_ms: float
    draft_n: int | None
    draft_accepted_n: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer as it came, times in seconds.

    Attributes:
        arrived: Arrival time and bytes of each part.
        started: When the request was sent.
        ended: When the answer was over.
        status: HTTP status.
    """

    arrived: Sequence[tuple[float, bytes]]
    started: float
    ended: float
    status: int = 200


Reader = Callable[[Heard, str], Reply]
"""Reads an answer; the string names the request in error texts."""


def refused(status: int, text: str, what: str) -> ServerError:
    """Return the error of a request that was answered with another status than 200."""
    try:
        told = json.loads(text)["error"]
        message = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError):
        message = text.strip()
    return ServerError(f"{what}: HTTP {status}: {str(message)[:_SHOWN]}", kind="http")


def progress(arrived: Sequence[tuple[float, bytes]]) -> str:
    """Return how far an answer is that is given up, in words."""
    done = total = parts = 0
    lines = bool(arrived) and arrived[0][1].startswith(b"{")
    with suppress(ValueError, TypeError):
        for _, event in _lines(arrived) if lines else _events(arrived):
            told = event.get("prompt_progress")
            if isinstance(told, dict):
                done, total = int(told.get("processed", 0)), int(told.get("total", 0))
            else:
                parts += 1
    if parts:
        # An event is about a token.
        return f"with about {parts} tokens generated"
    if done < total:
        return f"with {done} of {total} prompt tokens evaluated"
    return "before the first token"


def read_completion(heard: Heard, what: str) -> Reply:
    """Read an answer of llama-server's ``/completion``.

    Raises:
        ServerError: If the server answered an error.
        CheckError: If the answer is not in the form of llama-server's stream.
    """
    first: float | None = None
    last = heard.ended
    text = []
    final: Mapping[str, Any] | None = None
    for when, event in _told(_events(heard.arrived), heard, what):
        text.append(str(event.get("content", "")))
        if event.get("stop"):
            # The last token may come with the closing event alone.
            final, last = event, when
        if first is None and (event.get("content") or event.get("tokens") or final):
            first = when
    if final is None or first is None:
        raise _cut_short(what)
    stop, truncated = str(final.get("stop_type", "unknown")), bool(final.get("truncated", False))
    return _of_llama_server(
        final, heard, (first, last), what, stop=stop, truncated=truncated, text="".join(text)
    )


@dataclass(slots=True)
class _Chat:
    """What the events of a chat said together."""

    first: float | None = None
    last: float = 0.0
    thoughts: str = ""
    content: str = ""
    stop: str | None = None
    closing: dict[str, Any] = field(default_factory=dict)

    def times(self, what: str) -> tuple[float, float]:
        """Return when the first and the last token came."""
        if self.first is None or self.stop is None:
            raise _cut_short(what)
        return self.first, self.last


def _chat(heard: Heard, what: str) -> _Chat:
    found = _Chat()
    for when, event in _told(_events(heard.arrived), heard, what):
        # Where both are told, it need not be by the same event.
        found.closing |= {name: event[name] for name in ("timings", "usage") if event.get(name)}
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        if not isinstance(choice, dict):
            raise CheckError(f"{what}: a choice of the answer is no object")
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        # The field's name is OpenAI's for none and DeepSeek's for all; some servers shorten it.
        thought = str(delta.get("reasoning_content") or delta.get("reasoning") or "")
        said = str(delta.get("content") or "")
        over = choice.get("finish_reason")
        found.thoughts += thought
        found.content += said
        if thought or said or over:
            # The last token may have no text of its own, and come with the end alone.
            found.first = when if found.first is None else found.first
            found.last = when
        if over:
            found.stop = _STOPS.get(str(over), str(over))
    return found


def read_chat(heard: Heard, what: str) -> Reply:
    """Read an answer of llama-server's ``/v1/chat/completions``.

    Raises:
        ServerError: If the server answered an error.
        CheckError: If the answer is not in the form of llama-server's stream.
    """
    found = _chat(heard, what)
    times = found.times(what)
    # A chat does not say whether its context overflowed; the counts of tokens would show it.
    return _of_llama_server(
        found.closing,
        heard,
        times,
        what,
        stop=str(found.stop),
        truncated=False,
        text=found.thoughts + found.content,
    )


def read_openai(heard: Heard, what: str) -> Reply:
    """Read a chat of a server that speaks OpenAI's API and tells no timings.

    The prompt's time is that to the first token, and the time of the tokens that from the first
    to the last one, both as the client saw them.

    Raises:
        ServerError: If the server answered an error.
        CheckError: If the answer is in another form, or lacks the counts of tokens.
    """
    found = _chat(heard, what)
    first, last = found.times(what)
    usage = found.closing.get("usage")
    if not isinstance(usage, dict):
        raise CheckError(
            f"{what}: the answer holds no `usage`: the server must know "
            "stream_options.include_usage"
        )
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    try:
        return Reply(
            prompt_n=int(usage["prompt_tokens"]) - int(cached or 0),
            prompt_ms=(first - heard.started) * 1e3,
            predicted_n=int(usage["completion_tokens"]),
            predicted_ms=(last - first) * 1e3,
            cache_n=None if cached is None else int(cached),
            truncated=False,
            stop_type=str(found.stop),
            ttft_ms=(first - heard.started) * 1e3,
            last_ms=(last - heard.started) * 1e3,
            e2e_ms=(heard.ended - heard.started) * 1e3,
            draft_n=None,
            draft_accepted_n=None,
            text=found.thoughts + found.content,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckError(f"{what}: `usage` lacks or garbles {error}") from error


def read_ollama(heard: Heard, what: str) -> Reply:
    """Read an answer of Ollama's ``/api/generate`` or ``/api/chat``.

    Raises:
        ServerError: If the server answered an error.
        CheckError: If the answer is not in the form of Ollama's stream.
    """
    first: float | None = None
    last = heard.ended
    text = []
    final: Mapping[str, Any] | None = None
    for when, event in _told(_lines(heard.arrived), heard, what):
        message = event.get("message")
        told = message if isinstance(message, dict) else event
        said = str(told.get("thinking") or "") + str(
            told.get("content") or told.get("response") or ""
        )
        text.append(said)
        if event.get("done"):
            final, last = event, when
        if first is None and (said or final):
            first = when
    if final is None or first is None:
        raise _cut_short(what)
    reason = str(final.get("done_reason", "unknown"))
    cached = final.get("prompt_eval_cached_count")
    try:
        return Reply(
            # Ollama counts all tokens of the prompt, cached ones too.
            prompt_n=int(final["prompt_eval_count"]) - int(cached or 0),
            prompt_ms=int(final["prompt_eval_duration"]) / _NS_PER_MS,
            predicted_n=int(final["eval_count"]),
            predicted_ms=int(final["eval_duration"]) / _NS_PER_MS,
            cache_n=None if cached is None else int(cached),
            truncated=False,
            stop_type=_STOPS.get(reason, reason),
            ttft_ms=(first - heard.started) * 1e3,
            last_ms=(last - heard.started) * 1e3,
            e2e_ms=(heard.ended - heard.started) * 1e3,
            draft_n=None,
            draft_accepted_n=None,
            text="".join(text),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckError(f"{what}: the closing line lacks or garbles {error}") from error


def _of_llama_server(
    closing: Mapping[str, Any],
    heard: Heard,
    times: tuple[float, float],
    what: str,
    *,
    stop: str,
    truncated: bool,
    text: str,
) -> Reply:
    timings = closing.get("timings")
    if not isinstance(timings, dict):
        raise CheckError(f"{what}: the answer holds no `timings`")
    first, last = times
    try:
        return Reply(
            prompt_n=int(timings["prompt_n"]),
            prompt_ms=float(timings["prompt_ms"]),
            predicted_n=int(timings["predicted_n"]),
            predicted_ms=float(timings["predicted_ms"]),
            cache_n=int(timings["cache_n"]),
            truncated=truncated,
            stop_type=stop,
            ttft_ms=(first - heard.started) * 1e3,
            last_ms=(last - heard.started) * 1e3,
            e2e_ms=(heard.ended - heard.started) * 1e3,
            draft_n=timings.get("draft_n"),
            draft_accepted_n=timings.get("draft_n_accepted"),
            text=text,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckError(f"{what}: `timings` lacks or garbles {error}") from error


def _cut_short(what: str) -> CheckError:
    return CheckError(f"{what}: the answer ended without its closing event")


Event = tuple[float, Mapping[str, Any]]
"""When it arrived, and what it says."""


def _told(events: Iterator[Event], heard: Heard, what: str) -> Iterator[Event]:
    """Yield the events of an answer; raise what it is no answer for."""
    if heard.status != httpx.codes.OK:
        text = b"".join(chunk for _, chunk in heard.arrived).decode(errors="replace")
        raise refused(heard.status, text, what)
    try:
        for when, event in events:
            if "error" in event:
                error = event["error"]
                message = error.get("message", error) if isinstance(error, dict) else error
                raise ServerError(f"{what}: error in mid-answer: {str(message)[:_SHOWN]}")
            yield when, event
    except ValueError as error:
        raise CheckError(f"{what}: the stream is no JSON: {error}") from error


def _events(arrived: Sequence[tuple[float, bytes]]) -> Iterator[Event]:
    """Yield the events of a server-sent stream.

    An event counts as arrived when its last byte did. Comment lines are pings.
    """
    for when, line in _split(arrived):
        field, _, value = line.partition(b":")
        value = value.strip()
        if field in {b"data", b"error"} and value and value != b"[DONE]":
            event = json.loads(value)
            if field == b"error" and not (isinstance(event, dict) and "error" in event):
                event = {"error": event}
            yield when, _object(event, value)


def _lines(arrived: Sequence[tuple[float, bytes]]) -> Iterator[Event]:
    """Yield the objects of a stream that has one a line."""
    for when, line in _split(arrived):
        if line:
            yield when, _object(json.loads(line), line)


def _split(arrived: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    rest = b""
    for when, chunk in arrived:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield when, line.strip()


def _object(event: object, shown: bytes) -> Mapping[str, Any]:
    if not isinstance(event, dict):
        raise ValueError(f"no object: {shown[:_SHOWN].decode(errors='replace')}")  # noqa: TRY004 - as broken JSON is
    return event
