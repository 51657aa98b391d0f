"""What is read out of chats, of OpenAI's chats and of Ollama's lines; how far an answer is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import CheckError, ServerError
from pytest_llmperf.serve.stream import (
    Heard,
    Reader,
    Reply,
    progress,
    read_chat,
    read_ollama,
    read_openai,
)

TIMINGS = {
    "cache_n": 0,
    "prompt_n": 3,
    "prompt_ms": 1.5,
    "predicted_n": 4,
    "predicted_ms": 8.0,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
CLOSING_LINE = {
    "done": True,
    "done_reason": "length",
    "prompt_eval_count": 30,
    "prompt_eval_duration": 5_000_000,
    "eval_count": 4,
    "eval_duration": 40_000_000,
}


def event(**fields: object) -> bytes:
    """An event of a server-sent stream."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def delta(**what: str | None) -> bytes:
    """The event of a piece of a chat's answer."""
    return event(choices=[{"delta": what, "finish_reason": None}])


def over(reason: str = "length") -> bytes:
    """The event that says why an answer ended."""
    return event(choices=[{"delta": {}, "finish_reason": reason}])


def line(**fields: object) -> bytes:
    """A line of Ollama's stream."""
    return json.dumps(fields).encode() + b"\n"


def read(reader: Reader, *chunks: bytes, status: int = 200) -> Reply:
    """Read chunks that arrived one second after another, the first after one second."""
    arrived = list(enumerate(chunks, start=1))
    return reader(Heard(arrived, 0.0, len(chunks) + 1.0, status), "the request")


CHAT = Reply(
    prompt_n=3,
    prompt_ms=1.5,
    predicted_n=4,
    predicted_ms=8.0,
    cache_n=0,
    truncated=False,
    stop_type="limit",
    ttft_ms=2000.0,
    last_ms=4000.0,
    e2e_ms=7000.0,
    draft_n=None,
    draft_accepted_n=None,
    text="hmyes",
)


def test_a_chat_begins_with_its_first_thought_or_word() -> None:
    """The role comes before any token; thoughts are tokens; the timings come last."""
    begin, end = delta(role="assistant", content=None), event(choices=[], timings=TIMINGS)
    thought, word = delta(reasoning_content="hm"), delta(content="yes")
    assert read(read_chat, begin, thought, word, over(), end, b"data: [DONE]\n\n") == CHAT


def test_timings_may_come_with_the_end_itself() -> None:
    """As from builds that were not asked for the counts."""
    end = event(choices=[{"delta": {}, "finish_reason": "stop"}], timings=TIMINGS)
    reply = read(read_chat, delta(content="yes"), end)
    assert (reply.stop_type, reply.ttft_ms, reply.last_ms) == ("eos", 1000.0, 2000.0)


@pytest.mark.parametrize("reader", [read_chat, read_openai])
def test_timings_and_counts_may_come_apart(reader: Reader) -> None:
    """In either order; what an event leaves empty takes nothing away."""
    told = [event(choices=[], timings=TIMINGS, usage=None), event(choices=[], usage=USAGE)]
    for ends in (told, told[::-1]):
        assert read(reader, delta(content="yes"), over(), *ends).predicted_n == 4


def test_a_client_measures_what_the_server_does_not_tell() -> None:
    """The prompt's time is that to the first token, the tokens' that from the first to the last."""
    begin, end = delta(role="assistant"), event(choices=[], usage=USAGE)
    reply = read(read_openai, begin, delta(content="hm"), delta(content="yes"), over(), end)
    want = replace(CHAT, prompt_ms=2000.0, predicted_ms=2000.0, cache_n=None, e2e_ms=6000.0)
    assert reply == want


def test_cached_tokens_are_taken_off_where_they_are_counted() -> None:
    """They were not evaluated."""
    usage = {**USAGE, "prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}
    reply = read(read_openai, delta(content="a"), over(), event(choices=[], usage=usage))
    assert (reply.prompt_n, reply.cache_n) == (6, 4)


@pytest.mark.parametrize("field", ["response", "thinking"])
def test_ollamas_lines_are_read(field: str) -> None:
    """Its nanoseconds become milliseconds."""
    reply = read(read_ollama, line(**{field: "hm"}), line(response="yes"), line(**CLOSING_LINE))
    want = replace(
        CHAT,
        prompt_n=30,
        prompt_ms=5.0,
        predicted_ms=40.0,
        cache_n=None,
        ttft_ms=1000.0,
        last_ms=3000.0,
        e2e_ms=4000.0,
    )
    assert reply == want


def test_ollamas_chats_are_read() -> None:
    """The words are in a message; the newest releases count cached tokens."""
    said = line(message={"role": "assistant", "content": "yes"}, done=False)
    reply = read(read_ollama, said, line(**{**CLOSING_LINE, "prompt_eval_cached_count": 10}))
    assert (reply.text, reply.prompt_n, reply.cache_n) == ("yes", 20, 10)


@pytest.mark.parametrize("reader", [read_chat, read_openai, read_ollama])
def test_an_answer_cut_short_is_refused(reader: Reader) -> None:
    """Nothing, or nothing but a beginning."""
    for chunks in ((), (delta(content="a"),), (line(response="a"),)):
        with pytest.raises(CheckError, match=r"^the request: "):
            read(reader, *chunks)


@pytest.mark.parametrize(
    ("reader", "last", "message"),
    [
        (read_chat, event(choices=[], usage=USAGE), "holds no `timings`"),
        (read_chat, b"", "holds no `timings`"),
        (read_chat, event(timings={"prompt_n": 3}), "`timings` lacks or garbles 'prompt_ms'"),
        (read_openai, b"", "holds no `usage`: the server must know stream_options"),
        (read_openai, event(usage={"prompt_tokens": 3}), "lacks or garbles 'completion_tokens'"),
        (read_openai, event(choices=["?"], usage=USAGE), "a choice of the answer is no object"),
    ],
)
def test_a_chat_without_its_figures_is_refused(reader: Reader, last: bytes, message: str) -> None:
    """The error says what is missing."""
    with pytest.raises(CheckError, match=f"^the request: .*{message}"):
        read(reader, delta(content="a"), over(), last)


def test_ollamas_end_without_its_figures_is_refused() -> None:
    """As that of a model that was only loaded."""
    with pytest.raises(CheckError, match="closing line lacks or garbles 'prompt_eval_count'"):
        read(read_ollama, line(done=True, response=""))


@pytest.mark.parametrize(
    ("reader", "chunk"),
    [
        (read_chat, event(error={"message": "no room"})),
        (read_openai, event(error="no room")),
        (read_ollama, line(error="no room")),
    ],
)
def test_an_error_in_mid_answer_is_the_servers(reader: Reader, chunk: bytes) -> None:
    """In whatever form each API has it."""
    with pytest.raises(ServerError, match=r"^the request: error in mid-answer: no room"):
        read(reader, chunk)


@pytest.mark.parametrize("reader", [read_chat, read_openai, read_ollama])
def test_a_refusal_tells_status_and_message(reader: Reader) -> None:
    """Ollama's is a text, the others' an object."""
    for error in ("no such model", {"message": "no such model"}):
        with pytest.raises(ServerError, match=r"^the request: HTTP 404: no such model"):
            read(reader, line(error=error), status=404)


@given(
    st.sampled_from([read_chat, read_openai, read_ollama]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["choices", "delta", "usage", "timings", "done", "message"]), inner
            )
        ),
        max_leaves=6,
    ),
)
def test_no_answer_gets_past_the_error_tree(reader: Reader, noise: Any) -> None:  # noqa: ANN401 - JSON
    """Whatever is said, the outcome is a reply or one of our own errors."""
    text = json.dumps(noise).encode()
    for chunk in (b"data: " + text + b"\n\n", text + b"\n"):
        try:
            read(reader, delta(content="a"), chunk, over())
        except (CheckError, ServerError):
            continue


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        ([], "before the first token"),
        ([b": ping\n\n"], "before the first token"),
        (
            [event(prompt_progress={"total": 900, "processed": 512})],
            "with 512 of 900 prompt tokens evaluated",
        ),
        (
            [event(prompt_progress={"total": 9, "processed": 9}), event(content="a")],
            "with about 1 tokens generated",
        ),
        ([line(response="a"), line(response="b"), b'{"resp'], "with about 2 tokens generated"),
        ([b"data: {oops\n\n"], "before the first token"),
    ],
)
def test_how_far_an_answer_is_can_be_told(chunks: list[bytes], told: str) -> None:
    """From as much of it as there is."""
    assert progress(list(enumerate(chunks))) == told
