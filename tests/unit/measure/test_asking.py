"""Servers that hide their tokens: what is sent to them, and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.endpoints import FakeOllama, Mask, serving
from support.fakes import CONFIG, fake_server

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import CheckError, ServerError
from pytest_llmperf.measure.launch import Session, text_tokens
from pytest_llmperf.plan.config import LAUNCH, Config, ModelFiles, Turn, Workload
from pytest_llmperf.serve.launch import ServePlan, Server, start

TEXT = Workload("text", (Turn(200, 8), Turn(50, 8)))
CHAT = replace(TEXT, name="chat", api="chat")


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is named."""
    monkeypatch.delenv("LLMPERF_ENDPOINT_MODEL", raising=False)


@contextmanager
def connected(spec: str, config: Config = CONFIG) -> Iterator[Server]:
    """Connect to a running server."""
    build = resolve(parse_spec(spec, {}, Path()), Path(), print)
    with start(build, config, ModelFiles(Path()), ServePlan(Path(), hang=30)) as server:
        yield server


@contextmanager
def masked(folder: Path, faults: str = "", *, silent: bool = False) -> Iterator[tuple[Mask, str]]:
    """Run a fake llama-server behind a proxy that shows OpenAI's API alone."""
    with fake_server(folder, faults) as server:
        key = next((folder / "run").glob("*.key")).read_text("utf-8").strip()
        mask = Mask(server.url, key, silent=silent)
        with serving(mask) as url:
            yield mask, url


def test_an_openai_endpoint_is_measured_by_the_client(tmp_path: Path) -> None:
    """All metrics of requests, none of the start; prompts are about as long as they should be."""
    with masked(tmp_path) as (mask, url), connected(url) as server:
        session = Session(server, text_tokens(server))
        session.settle()
        assert session.launch.samples[LAUNCH] == {}
        assert (session.launch.model, session.slots()) == ("org/tiny", 0)
        session.warm_up(CHAT)
        session.sample(CHAT)
        taken = session.launch.samples["chat"]
        assert {len(values) for values in taken.values()} == {1}
        assert set(taken) >= {"decode_tps", "prefill_tps", "ttft_ms", "itl_ms", "e2e_ms"}
        assert session.launch.command.endswith(f"(a running server: {url}, model org/tiny)")
        sizes = [session._counts["chat", number] for number in (0, 1)]
        assert sizes[0] == pytest.approx(200, rel=0.15)
        assert sizes[1] == pytest.approx(258, rel=0.15)
    bodies = mask.asked[1:]
    assert {body["model"] for body in bodies} == {"org/tiny"}
    assert bodies[0]["stream_options"] == {"include_usage": True}
    # No two prompts begin alike, but for a number they are the same.
    told = [body["messages"][0]["content"] for body in bodies]
    assert len({text[:8] for text in told}) == len(told)
    assert len({text[9:] for text in told}) == 1


def test_chats_think_and_see_there_as_well(tmp_path: Path) -> None:
    """The picture comes after the number."""
    seen = replace(CHAT, image=8, thinking=False)
    with masked(tmp_path) as (mask, url), connected(url) as server:
        Session(server, []).sample(seen)
    content = mask.asked[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text"]
    assert mask.asked[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (TEXT, "sends token ids, which tiny, an OpenAI-compatible endpoint, does not take"),
        (Workload("deep", (Turn(8, 8, depth=8),)), "has a `depth`, which needs llama-server"),
    ],
)
def test_what_an_endpoint_cannot_be_asked_is_refused(
    tmp_path: Path, workload: Workload, message: str
) -> None:
    """Before anything is sent."""
    with masked(tmp_path) as (mask, url), connected(url) as server:
        with pytest.raises(CheckError, match=message):
            Session(server, []).sample(workload)
        assert mask.asked == []


def test_an_endpoint_that_counts_nothing_is_refused(tmp_path: Path) -> None:
    """Speeds need counts."""
    wanted = pytest.raises(CheckError, match="the answer holds no `usage`")
    with masked(tmp_path, silent=True) as (_, url), connected(url) as server, wanted:
        Session(server, []).sample(CHAT)


def test_an_answer_that_stops_early_is_no_measurement(tmp_path: Path) -> None:
    """Not every server can be told to go on."""
    wanted = pytest.raises(CheckError, match="it stopped by eos, not by the limit")
    with masked(tmp_path, "eos") as (_, url), connected(url) as server, wanted:
        Session(server, []).sample(CHAT)


OPTIONS = Config(
    "mine", "tiny", {"ctx-size": 2048, "threads": 2, "flash-attn": "on", "jinja": True}
)


@pytest.mark.parametrize("cached", [None, 3])
def test_an_ollama_is_measured_by_its_own_account(cached: int | None) -> None:
    """Its durations become the metrics; it gets the options that it knows; memory is told."""
    ollama = FakeOllama(cached=cached)
    with serving(ollama) as url, connected(f"ollama:{url}", OPTIONS) as server:
        session = Session(server, text_tokens(server))
        session.settle()
        assert session.launch.samples[LAUNCH] == {"vram_mib": [3.0]}
        assert session.launch.model == "tiny:latest@5a5a5a5a5a5a"
        for workload in (TEXT, CHAT):
            session.warm_up(workload)
            session.sample(workload)
            taken = session.launch.samples[workload.name]
            assert taken["decode_tps"] == pytest.approx([1e3 * 14 / 160])
        count = session._counts["text", 0] - (cached or 0)
        assert count == pytest.approx(200, rel=0.05)
        assert session.launch.command.endswith(
            ", Ollama, model tiny:latest, num_ctx 2048, num_thread 2; not passed on, since Ollama "
            "has no such option: flash-attn, jinja)"
        )
        assert len(set(session.launch.digests.values())) == 2
    plain, talk = ollama.asked[1], ollama.asked[-1]
    assert plain["options"] == {
        "num_ctx": 2048,
        "num_thread": 2,
        "num_predict": 8,
        "temperature": 0,
        "seed": 1,
    }
    assert plain["raw"] is True
    assert [message["role"] for message in talk["messages"]] == ["user", "assistant", "user"]
    prompts = [body["prompt"] for body in ollama.asked[1:] if "prompt" in body]
    assert len({prompt[:8] for prompt in prompts}) == len(prompts)


def test_what_is_asked_is_the_same_in_every_run() -> None:
    """But for the number, which is no part of the digest."""
    digests = set()
    for _ in range(2):
        with serving(FakeOllama()) as url, connected(f"ollama:{url}", OPTIONS) as server:
            session = Session(server, [])
            session.settle()
            session.sample(TEXT)
            digests |= set(session.launch.digests.values())
    assert len(digests) == 1


def test_an_ollama_thinks_and_sees() -> None:
    """In its own words."""
    ollama = FakeOllama()
    with serving(ollama) as url, connected(f"ollama:{url}") as server:
        Session(server, []).sample(replace(CHAT, image=8, thinking=True))
    body = ollama.asked[0]
    assert body["think"] is True
    assert len(body["messages"][0]["images"]) == 1
    assert isinstance(body["messages"][0]["content"], str)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reason": "stop"}, "it stopped by eos"),
        ({"cached": 60}, "60 prompt tokens came from a cache"),
    ],
)
def test_what_ollama_must_not_do_is_refused(fields: dict[str, object], message: str) -> None:
    """It cannot be told to go on past the end of a text, nor to forget."""
    wanted = pytest.raises(CheckError, match=message)
    ollama = FakeOllama(**fields)  # type: ignore[arg-type]
    with serving(ollama) as url, connected(f"ollama:{url}") as server, wanted:
        Session(server, []).sample(TEXT)


def test_the_context_that_ollama_is_asked_for_must_do() -> None:
    """Else it would cut the prompt in silence."""
    wanted = pytest.raises(CheckError, match="long needs 3008 tokens of context, config mine has 2")
    with serving(FakeOllama()) as url, connected(f"ollama:{url}", OPTIONS) as server, wanted:
        Session(server, []).sample(Workload("long", (Turn(3000, 8),)))


def test_a_model_that_went_is_the_servers_error() -> None:
    """With what Ollama says."""
    ollama = FakeOllama()
    with serving(ollama) as url, connected(f"ollama:{url}") as server:
        ollama.models = ()
        with pytest.raises(ServerError, match="HTTP 404: model 'tiny:latest' not found"):
            Session(server, []).sample(TEXT)
        assert Session(server, []).server.client.get("/api/ps") == {"models": []}
