"""What the client makes of answers, of errors, and of servers that die or hang."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import PATIENCE, Journal, fake_server

from pytest_llmperf.errors import CheckError, ServerError, TooSlowError
from pytest_llmperf.serve.ask import completion
from pytest_llmperf.serve.client import Client, Limit
from pytest_llmperf.serve.stream import Heard, Reply, read_completion, refused

TIMINGS = {
    "cache_n": 0,
    "prompt_n": 3,
    "prompt_ms": 1.5,
    "predicted_n": 4,
    "predicted_ms": 8.0,
}
CLOSING = {"content": "", "stop": True, "stop_type": "limit", "timings": TIMINGS}


def line(event: object) -> bytes:
    """An event as llama-server sends it."""
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


def token(text: str) -> bytes:
    """The event of a token."""
    return line({"content": text, "tokens": [7], "stop": False})


def read(*chunks: bytes, times: Sequence[float] | None = None, ended: float = 9.0) -> Reply:
    """Read chunks that arrived one second after another, the first after one second."""
    arrivals = range(1, len(chunks) + 1) if times is None else times
    heard = Heard(list(zip(arrivals, chunks, strict=True)), 0.0, ended)
    return read_completion(heard, "the request")


def test_a_stream_gives_timings_and_text() -> None:
    """The server's own timings, the text of all events and the times the client saw."""
    last = {**CLOSING, "timings": {**TIMINGS, "draft_n": 9, "draft_n_accepted": 5}}
    assert read(token("a"), token("é"), line(last)) == Reply(
        prompt_n=3,
        prompt_ms=1.5,
        predicted_n=4,
        predicted_ms=8.0,
        cache_n=0,
        truncated=False,
        stop_type="limit",
        ttft_ms=1000.0,
        last_ms=3000.0,
        e2e_ms=9000.0,
        draft_n=9,
        draft_accepted_n=5,
        text="aé",
    )


@given(st.lists(st.integers(0, 400), max_size=12))
def test_it_does_not_matter_where_chunks_are_cut(cuts: list[int]) -> None:
    """Any cut of the same bytes, inside a character too, gives the same reply."""
    whole = b": ping\n\n" + token("naïve") + token("日本") + line(CLOSING)
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    chunks = [whole[a:b] for a, b in pairwise(edges)]
    assert read(*chunks, times=[2.0] * len(chunks)) == read(whole, times=[2.0])


@given(st.lists(st.floats(0, 100), min_size=4, max_size=4))
def test_the_first_token_comes_before_the_end(gaps: list[float]) -> None:
    """ttft_ms <= last_ms <= e2e_ms, whatever the arrival times."""
    times = [sum(gaps[: i + 1]) for i in range(3)]
    reply = read(token("a"), token("b"), line(CLOSING), times=times, ended=sum(gaps))
    assert 0 <= reply.ttft_ms <= reply.last_ms <= reply.e2e_ms


def test_an_event_arrives_with_its_last_byte() -> None:
    """A first event in two chunks counts from the second chunk."""
    event = token("a")
    assert read(event[:10], event[10:], line(CLOSING)).ttft_ms == 2000.0


def test_pings_and_empty_parts_are_not_the_first_token() -> None:
    """Comment lines and events without content start no clock."""
    reply = read(b": ping\n\n", line({"content": "", "stop": False}), token("a"), line(CLOSING))
    assert reply.ttft_ms == 3000.0
    assert reply.text == "a"


def test_a_token_without_text_is_a_token() -> None:
    """The first part of a character that takes two tokens has no text, but is the first token."""
    first = line({"content": "", "tokens": [3], "stop": False})
    assert read(first, token("é"), line(CLOSING)).ttft_ms == 1000.0


def test_one_token_may_come_with_the_closing_event_alone() -> None:
    """Then first and last token arrived together."""
    reply = read(b": ping\n\n", line({**CLOSING, "content": "a"}))
    assert reply.ttft_ms == reply.last_ms == 2000.0


def test_other_clients_conventions_are_read() -> None:
    """Windows line ends, event names, ids and a closing `[DONE]` change nothing."""
    plain = read(token("a") + line(CLOSING))
    dressed = b"id: 1\r\nevent: part\r\n" + (token("a") + line(CLOSING)).replace(b"\n", b"\r\n")
    assert read(dressed + b"data: [DONE]\n\n") == plain


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"code": 500, "message": "no room"}}\n\n',
        b'error: {"code": 500, "message": "no room"}\n\n',
        b'error: {"error": {"message": "no room"}}\n\n',
        b'error: "no room"\n\n',
        b'data: {"error": "no room"}\n\n',
    ],
)
def test_an_error_in_mid_answer_is_the_servers(event: bytes) -> None:
    """Every form of error event becomes a ServerError with the request and the message."""
    with pytest.raises(ServerError, match="the request: error in mid-answer: no room"):
        read(token("a"), event, line(CLOSING))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (b"", "ended without its closing event"),
        (token("a"), "ended without its closing event"),
        (line(CLOSING).rstrip(), "ended without its closing event"),
        (b"data: {oops\n\n", "the stream is no JSON"),
        (b"data: \xff\n\n", "the stream is no JSON"),
        (b"data: 17\n\n", "the stream is no JSON: no object: 17"),
        (b"data: [1, 2]\n\n", "the stream is no JSON: no object"),
        (line({**CLOSING, "timings": None}), "holds no `timings`"),
        (line({"content": "", "stop": True}), "holds no `timings`"),
        (line({**CLOSING, "timings": {"prompt_n": 3}}), "`timings` lacks or garbles 'prompt_ms'"),
        (
            line({**CLOSING, "timings": {**TIMINGS, "cache_n": "x"}}),
            "`timings` lacks or garbles invalid literal",
        ),
        (line({**CLOSING, "timings": {**TIMINGS, "prompt_ms": None}}), "lacks or garbles"),
        (line({**CLOSING, "timings": {**TIMINGS, "prompt_n": 1e999}}), "lacks or garbles"),
    ],
)
def test_what_is_no_answer_of_llama_server_isrefused(chunk: bytes, message: str) -> None:
    """A stream cut short, of another form or without timings is a CheckError."""
    with pytest.raises(CheckError, match=f"^the request: .*{message}"):
        read(chunk)


@given(st.binary(max_size=80), st.sampled_from([b"data: ", b"error: ", b"", b": "]))
def test_no_bytes_get_past_the_error_tree(noise: bytes, field: bytes) -> None:
    """Whatever arrives, the outcome is a reply or one of our own errors."""
    try:
        reply = read(field + noise + b"\n\n", line(CLOSING))
    except (CheckError, ServerError):
        return
    assert reply.predicted_n == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"error": {"message": "too long"}}', "GET /x: HTTP 400: too long"),
        ('{"error": "too long"}', "GET /x: HTTP 400: too long"),
        ("  <html>bad gateway</html>\n", "GET /x: HTTP 400: <html>bad gateway</html>"),
        ("", "GET /x: HTTP 400: "),
        ("y" * 1000, "GET /x: HTTP 400: " + "y" * 300),
    ],
)
def test_a_refusal_tells_status_and_message(text: str, message: str) -> None:
    """The server's message if it gives one, else the beginning of what it said."""
    error = refused(400, text, "GET /x")
    assert error.kind == "http"
    assert str(error).startswith(message)
    assert len(str(error)) < 400


def test_requests_are_answered(tmp_path: Path) -> None:
    """JSON of a route, token ids of a text, status of a route, and a timed completion."""
    with fake_server(tmp_path) as server:
        client = server.client
        assert client.get("/props")["default_generation_settings"] == {"n_ctx": 1024}
        assert client.tokenize("abcdefgh") == [97, 101]
        assert client.status("/health") == 200
        assert client.status("/props", key="wrong") == 401
        reply = client.complete([1, 2, 3], 4, "the request")
    assert (reply.prompt_n, reply.predicted_n, reply.stop_type) == (3, 4, "limit")
    assert 0 < reply.ttft_ms <= reply.last_ms <= reply.e2e_ms


def test_requests_at_once_are_answered_in_their_order(tmp_path: Path) -> None:
    """Each has a slot of its own; the time is that of all together."""
    asks = [completion([1] * n, n, f"request {n}", slot=n - 5) for n in (5, 6, 7)]
    with fake_server(tmp_path) as server:
        replies, wall_ms = server.client.ask(asks)
    assert [(reply.prompt_n, reply.predicted_n) for reply in replies] == [(5, 5), (6, 6), (7, 7)]
    assert wall_ms >= max(reply.e2e_ms for reply in replies)
    asked = Journal(tmp_path / "journal").entries("completion")
    assert {entry["prompt"]: entry["slot"] for entry in asked} == {5: 0, 6: 1, 7: 2}


def test_a_request_alone_takes_as_long_as_itself(tmp_path: Path) -> None:
    """One at once is one by itself, in slot 0."""
    with fake_server(tmp_path) as server:
        replies, wall_ms = server.client.ask([completion([1, 2], 3, "the request")])
        server.client.complete([1, 2], 3, "another", slot=4)
    assert wall_ms == pytest.approx(replies[0].e2e_ms)
    asked = Journal(tmp_path / "journal").entries("completion")
    assert [entry["slot"] for entry in asked] == [0, 4]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("http500#6", "^request 6: HTTP 500: Failed to parse input"),
        ("no-timings#6", "^request 6: the answer holds no `timings`"),
        ("crash#6", "^request [567]: the server died"),
    ],
)
def test_one_of_several_that_fails_fails_them_all(tmp_path: Path, fault: str, message: str) -> None:
    """The error names the request; nothing is left running."""
    asks = [completion([1] * n, 4, f"request {n}", slot=n - 5) for n in (5, 6, 7)]
    with fake_server(tmp_path, fault) as server:
        with pytest.raises((CheckError, ServerError), match=message):
            server.client.ask(asks)
        assert not [one for one in threading.enumerate() if one.name.startswith("slot ")]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no-close", "the request: the answer ended without its closing event"),
        ("no-timings", "the request: the answer holds no `timings`"),
    ],
)
def test_answers_cut_short_arerefused(tmp_path: Path, fault: str, message: str) -> None:
    """An answer that is whole for HTTP, but not for llama-server, is a CheckError."""
    with fake_server(tmp_path, fault) as server, pytest.raises(CheckError, match=message):
        server.client.complete([1], 4, "the request")


@pytest.mark.parametrize(
    ("fault", "field", "value"),
    [
        ("short", "predicted_n", 3),
        ("cached", "cache_n", 5),
        ("truncated", "truncated", True),
        ("eos", "stop_type", "eos"),
    ],
)
def test_what_must_not_be_counted_is_handed_on(
    tmp_path: Path, fault: str, field: str, value: object
) -> None:
    """An answer that is no measurement is still a reply; its caller checks."""
    with fake_server(tmp_path, fault) as server:
        assert getattr(server.client.complete([1] * 9, 4, "the request"), field) == value


def test_refusals_name_request_and_reason(tmp_path: Path) -> None:
    """HTTP errors of completions and of other routes are ServerErrors of kind `http`."""
    with fake_server(tmp_path, "http500@2,error@3,odd-tokens") as server:
        client = server.client
        client.complete([1], 2, "first")
        with pytest.raises(
            ServerError, match=r"^second: HTTP 500: Failed to parse input"
        ) as caught:
            client.complete([1], 2, "second")
        assert caught.value.kind == "http"
        with pytest.raises(ServerError, match=r"^third: error in mid-answer: the compute failed"):
            client.complete([1], 2, "third")
        assert client.complete([1], 2, "fourth").predicted_n == 2
        with pytest.raises(ServerError, match=r"^GET /nowhere: HTTP 404: File Not Found"):
            client.get("/nowhere")
        with pytest.raises(ServerError, match="/tokenize answered no list of token ids"):
            client.tokenize("text")


@pytest.mark.parametrize("fault", ["hang", "pings"])
def test_a_server_that_hangs_is_a_timeout(tmp_path: Path, fault: str) -> None:
    """Nothing for longer than the limit, or nothing but pings, ends as kind `timeout`."""
    with fake_server(tmp_path, fault, hang=1.0) as server:
        with pytest.raises(ServerError, match=r"^the request: the server hung") as caught:
            server.client.complete([1], 4, "the request")
        assert caught.value.kind == "timeout"
        assert server.alive()


@pytest.mark.parametrize(
    ("fault", "how"),
    [("crash", r"killed by SIGSEGV \(exit 139\)"), ("exit", "exit code 1")],
)
def test_a_server_that_dies_is_a_crash(tmp_path: Path, fault: str, how: str) -> None:
    """A server that dies in mid-answer is told with exit status, log file and end of the log."""
    with fake_server(tmp_path, f"{fault}@1") as server:
        with pytest.raises(ServerError, match=f"^the request: the server died.*: {how}") as caught:
            server.client.complete([1], 4, "the request")
        assert caught.value.kind == "crashed"
        assert str(server.log) in str(caught.value)
        assert "    | main: server is listening on" in str(caught.value)
        assert not server.alive()
        with pytest.raises(ServerError, match="the server died") as again:
            server.client.get("/props")
        assert again.value.kind == "crashed"


def test_a_server_that_is_not_there_is_told() -> None:
    """Without a process to look at, a connection that fails is of kind `http`; status() is 0."""
    client = Client("http://127.0.0.1:9", None, timeout=PATIENCE)
    try:
        assert client.status("/health") == 0
        with pytest.raises(ServerError, match="GET /props: the connection broke") as caught:
            client.get("/props")
        assert caught.value.kind == "http"
    finally:
        client.close()


def test_answers_are_asked_for_uncompressed() -> None:
    """The raw bytes are timed and read, so no server may be invited to compress them."""
    client = Client("http://127.0.0.1:9", "secret")
    request = client._http.build_request("POST", "/completion")
    client.close()
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["authorization"] == "Bearer secret"


def test_a_chat_is_answered(tmp_path: Path) -> None:
    """Thoughts and words are its text; its prompt is what the template makes of it."""
    talk = [{"role": "user", "content": "What is that?"}]
    with fake_server(tmp_path) as server:
        client = server.client
        reply = client.chat(talk, 5, "the chat", slot=2)
        assert (reply.text, reply.predicted_n, reply.stop_type) == ("taaaa", 5, "limit")
        assert reply.prompt_n == len(client.tokenize(client.render(talk), special=True))
        assert 0 < reply.ttft_ms <= reply.last_ms <= reply.e2e_ms
        mute = client.chat(talk, 5, "the chat", thinking=False)
        assert mute.prompt_n > reply.prompt_n
        assert client.render(talk, thinking=False).endswith("<assistant><think></think>")
    slots = [entry["slot"] for entry in Journal(tmp_path / "journal").entries("completion")]
    assert slots == [2, 0]


def test_tokens_become_text_and_text_tokens(tmp_path: Path) -> None:
    """There and back."""
    with fake_server(tmp_path) as server:
        assert server.client.tokenize(server.client.detokenize([97, 98])) == [97, 98]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("odd-tokens", "/detokenize answered no text"), ("odd-template", "answered no prompt")],
)
def test_odd_answers_of_text_routes_are_errors(tmp_path: Path, fault: str, message: str) -> None:
    """They name the route."""
    with fake_server(tmp_path, fault) as server:
        ask = server.client.render if fault == "odd-template" else server.client.detokenize
        with pytest.raises(ServerError, match=f"{message}$"):
            ask([])


def test_a_primed_slot_holds_what_it_was_given(tmp_path: Path) -> None:
    """A prompt that goes on from there is evaluated from there; another slot knows nothing."""
    with fake_server(tmp_path) as server:
        client = server.client
        client.prime(list(range(40)), "the primer", slot=1)
        prompt = list(range(50))
        deep, cold = (
            client.ask([completion(prompt, 4, "the request", slot=slot, depth=40)])[0][0]
            for slot in (1, 0)
        )
        assert (deep.cache_n, deep.prompt_n) == (40, 10)
        assert (cold.cache_n, cold.prompt_n) == (0, 50)
        # A cold request asks for no cache, whatever lies there.
        assert client.complete(prompt, 4, "the request", slot=1).cache_n == 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("slow", "with about [1-9] tokens generated"),
        ("mute", "before the first token"),
        ("hang", "with about 1 tokens generated"),
        ("crawl", "with 3 of 7 prompt tokens evaluated"),
    ],
)
def test_what_takes_too_long_is_given_up(tmp_path: Path, fault: str, told: str) -> None:
    """The error names request, limit and how far it was; the server is not taken for dead."""
    with fake_server(tmp_path, fault) as server:
        ask = completion([1] * 7, 40, "the request")
        with pytest.raises(
            TooSlowError, match=rf"^the request: too slow: given up after the 0.5 s .* {told};"
        ) as caught:
            server.client.ask([ask], Limit.of(0.5))
        assert caught.value.kind == "timeout"
        assert server.alive()


def test_a_limit_that_has_passed_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    """Not even for a server that is quick."""
    with fake_server(tmp_path, "slow") as server:
        passed = Limit(0.1, at=0.0)
        with pytest.raises(TooSlowError, match=r"after the 0\.1 s"):
            server.client.prime([1, 2, 3], "the primer", limit=passed)


def test_a_hang_within_the_limit_is_a_hang(tmp_path: Path) -> None:
    """The shorter of the two says what it is."""
    with fake_server(tmp_path, "mute", hang=0.5) as server:
        with pytest.raises(ServerError, match=r"the server hung: nothing came for 0\.5 s"):
            server.client.ask([completion([1], 4, "the request")], Limit.of(60))
        assert Limit.of(0) == Limit()


def test_several_that_take_too_long_are_given_up_together(tmp_path: Path) -> None:
    """Nothing is left running."""
    asks = [completion([1] * n, 40, f"request {n}", slot=n) for n in range(3)]
    with fake_server(tmp_path, "slow") as server:
        with pytest.raises(TooSlowError, match=r"^request [012]: too slow"):
            server.client.ask(asks, Limit.of(0.5))
        assert not [one for one in threading.enumerate() if one.name.startswith("slot ")]


def test_what_cannot_be_sent_within_the_limit_is_too_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt takes its time on the way to the server as well."""

    def stream(*_: object, **__: object) -> None:
        raise httpx.WriteTimeout("timed out")

    with fake_server(tmp_path) as server:
        monkeypatch.setattr(server.client._http, "stream", stream)
        with pytest.raises(TooSlowError, match=r"after the 0\.1 s"):
            server.client.prime([1, 2, 3], "the primer", limit=Limit(0.1, at=0.0))
        with pytest.raises(ServerError, match="the connection broke"):
            server.client.prime([1, 2, 3], "the primer", limit=Limit.of(60))
