"""What becomes of a server's answers, and of servers and readers that fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.build.build import Build, ServerApi
from pytest_llmperf.errors import (
    BuildError,
    CheckError,
    OutOfMemoryError,
    PlanError,
    ServerError,
    ToolError,
)
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.quality import probe
from pytest_llmperf.quality.logits import LogitsReader, pack_rows
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity
from pytest_llmperf.quality.probe import LOWEST, SPARE, Answer, run_probes
from pytest_llmperf.serve.client import Client
from pytest_llmperf.serve.launch import ServePlan, Server

VOCAB, CONTEXT, SCORED, CHUNKS, BOS = 12, 8, 3, 3, 0
TEXT = "What a server says of a text"
BUILD = Build("b1", 1, "abc", "fake", "00", ("llama-server",))
CONFIG = Config("one", "m", {"threads": 1})
UNPARSED = "Failed to parse input at pos 0: ?"
DIED = "killed by SIGSEGV (exit 139)\n  log: a.log\n    | the last line"


def tokens_of(text: str) -> list[int]:
    """A token a letter, never the first of the vocabulary."""
    return [1 + ord(letter) % (VOCAB - 1) for letter in text]


def log_probs_of(prompt: list[int]) -> NDArray[np.float64]:
    """What the fake model says after a prompt: every token of it counts."""
    logits = np.random.default_rng(prompt).normal(scale=3, size=VOCAB)
    result: NDArray[np.float64] = logits - np.log(np.exp(logits).sum())
    return result


def scored(text: str = TEXT, chunks: int = CHUNKS, bos: int | None = None) -> list[list[int]]:
    """Prompt and next token of every scored position, in order."""
    found, tokens = [], tokens_of(text)
    for chunk in range(chunks):
        part = tokens[chunk * CONTEXT : (chunk + 1) * CONTEXT]
        if bos is not None:
            part[0] = bos
        found += [part[: at + 2] for at in range(CONTEXT // 2, CONTEXT - 1)]
    return found


def nlls(positions: list[list[int]]) -> list[float]:
    """The fake model's NLL of each."""
    return [-float(log_probs_of(given)[token]) for *given, token in positions]


Spoil = Callable[[dict[str, Any]], object]


@dataclass
class Lab:
    """A fake server, and passes of a text by it."""

    folder: Path
    patch: pytest.MonkeyPatch
    adds_bos: bool = False
    meta: object = field(default_factory=lambda: {"n_vocab": VOCAB})
    n_ctx: object = 4096
    caches: bool = True
    limit: float = math.inf
    torn: set[int] = field(default_factory=set)
    refuses: bool = False
    breaks_at: int = 0
    spoils_at: int = 0
    spoil: Spoil = field(default=lambda _answer: None)
    asked: list[list[int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer as llama-server does."""
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"meta": self.meta}]})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            assert body["parse_special"] is False
            bos = [BOS] if self.adds_bos and body["add_special"] else []
            return httpx.Response(200, json={"tokens": bos + tokens_of(body["content"])})
        answer = self.complete(body)
        if body.get("logit_bias", [[None]])[0][0] in self.torn:
            if self.refuses:
                return httpx.Response(500, json={"error": {"message": UNPARSED}})
            del answer["completion_probabilities"]
        return httpx.Response(200, content=json.dumps(answer))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what is said after a prompt."""
        prompt, before = body["prompt"], self.asked[-1] if self.asked else []
        self.asked.append(prompt)
        if len(self.asked) == self.breaks_at:
            raise httpx.RemoteProtocolError("Server disconnected")
        log_probs = log_probs_of(prompt)
        [[chosen, _]] = body.get("logit_bias", [[int(log_probs.argmax()), 0]])
        order = np.argsort(-log_probs)[: body["n_probs"]].tolist()
        cached = len(before) if self.caches and prompt[: len(before)] == before else 0
        answer: dict[str, Any] = {
            "completion_probabilities": [
                {
                    "id": chosen,
                    "logprob": log_probs[chosen],
                    "top_logprobs": [{"id": one, "logprob": log_probs[one]} for one in order],
                }
            ],
            "timings": {"prompt_n": len(prompt) - cached, "cache_n": cached},
            "tokens_evaluated": len(prompt),
            "truncated": False,
        }
        if len(self.asked) == self.spoils_at:
            self.spoil(answer)
        return answer

    def start(self, build: Build, config: Config, _files: ModelFiles, _plan: ServePlan) -> Server:
        """Stand in for the start of a server."""
        client = Client("http://fake", None, post_mortem=lambda: DIED)
        client.close()
        transport = httpx.MockTransport(self.answer)
        self.patch.setattr(
            client, "_http", httpx.Client(base_url="http://fake", transport=transport)
        )
        self.configs.append(config)
        server = Server(
            build=build,
            config=config,
            command=("llama-server", "--a-option"),
            client=client,
            process=None,
            load_ms=None,
            props={"default_generation_settings": {"n_ctx": self.n_ctx}},
            key_file=None,
        )
        self.servers.append(server)
        return server

    def run(
        self,
        *,
        text: str | bytes = TEXT,
        chunks: int | None = None,
        listed: int = 256,
        consume: Callable[[BinaryIO], object] | None = None,
        build: Build = BUILD,
    ) -> Perplexity:
        """Pass a text."""
        corpus = self.folder / "text.txt"
        corpus.write_bytes(text.encode() if isinstance(text, str) else text)
        plan = PassPlan(
            CONTEXT, 4, 2, chunks, self.folder, limit=self.limit, progress=self.said.append
        )
        serve = ServePlan(self.folder)
        model = Path("m.gguf")
        try:
            return run_probes(
                build, CONFIG, model, corpus, plan, serve, consume=consume, listed=listed
            )
        finally:
            assert all(server.stopped for server in self.servers)

    def stream(self, text: str = TEXT) -> LogitsReader:
        """Pass a text and return the stream."""
        taken: list[bytes] = []
        self.run(text=text, consume=lambda stream: taken.append(stream.read()))
        return LogitsReader(BytesIO(taken[0]), "the stream")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A fake server that is well."""
    lab = Lab(tmp_path, monkeypatch)
    monkeypatch.setattr(probe, "start", lab.start)
    monkeypatch.setattr(probe, "dialect_of", lambda _build: SimpleNamespace(log_verbosity=4))
    return lab


def first(answer: dict[str, Any]) -> dict[str, Any]:
    """The one position of an answer."""
    found: dict[str, Any] = answer["completion_probabilities"][0]
    return found


@pytest.mark.parametrize("listed", [1, 5, 256])
def test_perplexity_is_that_of_the_scored_tokens(lab: Lab, listed: int) -> None:
    """Whatever is listed: ``exp`` of the mean NLL, its error, and what it was after each chunk."""
    found, expected = lab.run(listed=listed), nlls(scored())
    assert lab.asked == [given for *given, _ in scored()]
    assert found.value == pytest.approx(math.exp(np.mean(expected)))
    spread = np.std(expected) / math.sqrt(len(expected) - 1)
    assert found.error == pytest.approx(found.value * spread)
    ends = [SCORED * chunk for chunk in range(1, CHUNKS + 1)]
    assert found.running == pytest.approx([math.exp(np.mean(expected[:end])) for end in ends])
    assert (found.planned, found.failure, found.partial) == (CHUNKS, "", False)
    assert (found.command, found.log) == ("llama-server --a-option", "")


def test_the_stream_is_the_one_that_the_tool_writes(lab: Lab) -> None:
    """With the whole vocabulary listed: header, text, and every row as packed from the logits."""
    reader = lab.stream()
    header = reader.header
    assert (header.n_ctx, header.n_vocab, header.n_chunk) == (CONTEXT, VOCAB, CHUNKS)
    assert header.tokens.ravel().tolist() == tokens_of(TEXT)[: CHUNKS * CONTEXT]
    packed = pack_rows([log_probs_of(given) for *given, _ in scored()])
    rows = np.concatenate([block.quanta.copy() for block in reader])
    assert rows.tolist() == packed[:, 4 : 4 + VOCAB].tolist()


def test_a_first_token_that_the_model_adds_is_evaluated_only(lab: Lab) -> None:
    """It stands before the text and in place of each chunk's first token, but not in the stream."""
    lab.adds_bos = True
    reader = lab.stream()
    tokens = [BOS, *tokens_of(TEXT)]
    assert reader.header.tokens.ravel().tolist() == tokens[: CHUNKS * CONTEXT]
    assert [prompt[0] for prompt in lab.asked] == [BOS] * CHUNKS * SCORED
    assert lab.asked[SCORED][1:] == tokens[CONTEXT + 1 : CONTEXT + 1 + CONTEXT // 2]


@pytest.mark.parametrize(("chunks", "planned"), [(None, 3), (2, 2), (9, 3)])
def test_chunks_end_with_the_text(lab: Lab, chunks: int | None, planned: int) -> None:
    """As many as asked for, but no more than whole ones are there."""
    found = lab.run(chunks=chunks)
    assert len(found.running) == found.planned == planned


def test_no_chunk_is_an_error(lab: Lab) -> None:
    """There is nothing to say of none."""
    with pytest.raises(ToolError, match=r"0 chunks were asked for: ask for at least one"):
        lab.run(chunks=0)


def test_the_text_is_taken_as_it_stands(lab: Lab) -> None:
    """Line ends too, but for one at the end, which the tool drops."""
    text = "one\r\ntwo\r\nsix and seven\n\n"
    reader = lab.stream(text)
    assert reader.header.tokens.ravel().tolist() == tokens_of(text)[:24]
    with pytest.raises(ToolError):
        lab.run(text="a" * 15 + "\n")


def test_too_little_text_is_an_error(lab: Lab) -> None:
    """Two chunks are the least, as with the tool."""
    with pytest.raises(ToolError, match=r"text.txt: 15 tokens, and probing needs at least 16"):
        lab.run(text="a" * 15)


def test_an_empty_text_is_an_error(lab: Lab) -> None:
    """As any that is too short."""
    with pytest.raises(ToolError, match=r"text.txt: 0 tokens"):
        lab.run(text="")


def test_a_text_that_cannot_be_sent_is_an_error(lab: Lab) -> None:
    """JSON holds no bytes that are no text; the place is named."""
    with pytest.raises(PlanError, match=r"text\.txt: byte 3 is not UTF-8"):
        lab.run(text=b"abc\xff" * 9)


def test_a_text_that_is_not_there_is_an_error(lab: Lab) -> None:
    """By its name."""
    with pytest.raises(PlanError, match=r"none\.txt: cannot be read: No such file"):
        run_probes(BUILD, CONFIG, Path("m"), lab.folder / "none.txt", PassPlan(), ServePlan(Path()))


def test_a_server_of_ours_gets_room_for_a_chunk(lab: Lab) -> None:
    """One slot, the sizes of the plan, and what the config says besides."""
    lab.run()
    assert lab.configs[0].options == {
        "threads": 1,
        "verbosity": 3,
        "ctx-size": CONTEXT + SPARE,
        "parallel": 1,
        "batch-size": 4,
        "ubatch-size": 2,
    }


def test_a_running_server_is_taken_as_it_is(lab: Lab) -> None:
    """It is asked with the config's own options."""
    found = lab.run(build=replace(BUILD, url="http://fake"))
    assert not found.partial
    assert lab.configs == [CONFIG]


@pytest.mark.parametrize(
    ("api", "kind"), [("openai", "an OpenAI-compatible endpoint"), ("ollama", "Ollama")]
)
def test_another_api_than_llama_servers_is_refused(lab: Lab, api: ServerApi, kind: str) -> None:
    """In one line, with what is missing; it is not even asked."""
    with pytest.raises(BuildError) as caught:
        lab.run(build=replace(BUILD, url="http://fake", api=api))
    assert str(caught.value).startswith(f"build b1 is {kind}, which does not tell its tokens and")
    assert '-m "not quality"' in str(caught.value)
    assert "\n" not in str(caught.value)
    assert lab.configs == []


def test_a_running_server_without_room_is_an_error(lab: Lab) -> None:
    """Before anything is asked, and with what mends it."""
    lab.n_ctx = CONTEXT
    with pytest.raises(BuildError, match=r"context of 8 tokens, .* needs 24: .* larger --ctx-size"):
        lab.run(build=replace(BUILD, url="http://fake"))
    assert not lab.asked


@pytest.mark.parametrize("meta", [None, {}, {"n_vocab": "many"}])
def test_a_vocabulary_that_is_not_told_is_counted(lab: Lab, meta: object) -> None:
    """By asking once for all there is."""
    lab.meta = meta
    assert lab.stream().header.n_vocab == VOCAB
    assert len(lab.asked) == 1 + CHUNKS * SCORED


def test_a_vocabulary_that_does_not_hold_the_text_is_an_error(lab: Lab) -> None:
    """The server then tells that of another model."""
    lab.meta = {"n_vocab": 5}
    with pytest.raises(CheckError, match=r"outside of the vocabulary of 5"):
        lab.run()


def test_a_server_that_dies_on_the_way_leaves_a_partial_pass(lab: Lab) -> None:
    """What was found is kept, its exit status is told in one line, and its log is no answer."""
    lab.breaks_at = 2 * SCORED + 2
    found = lab.run(consume=read_all)
    assert found.partial
    assert found.failure == (
        "broke off after 2 of 3 chunks: probe of chunk 2 token 5: POST /completion: "
        "the server died: killed by SIGSEGV (exit 139)"
    )
    expected = nlls(scored())[: 2 * SCORED]
    assert found.value == found.running[-1] == pytest.approx(math.exp(np.mean(expected)))
    assert (len(found.running), found.planned, found.error) == (2, 3, None)


def test_memory_that_runs_out_stays_an_outcome_of_its_own(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be recorded, so it must not come out as any failure of a server."""

    def broken(*_: object, **__: object) -> None:
        raise OutOfMemoryError("out of memory: no", what="CUDA0 buffer", log=None, kind="crashed")

    monkeypatch.setattr(Client, "_broken", broken)
    lab.breaks_at = 1
    with pytest.raises(OutOfMemoryError, match=r"^out of memory: no$"):
        lab.run()


def read_all(stream: BinaryIO) -> None:
    """Read a stream as those do who need all of it."""
    for _ in LogitsReader(stream, "the stream"):
        pass


@pytest.mark.parametrize("at", [1, SCORED])
@pytest.mark.parametrize("consume", [None, read_all])
def test_a_server_that_dies_in_the_first_chunk_is_an_error(
    lab: Lab, at: int, consume: Callable[[BinaryIO], object] | None
) -> None:
    """With its log, and whatever the reader of a stream that was cut says."""
    lab.breaks_at = at
    with pytest.raises(ServerError, match=r"probe of chunk 0 token \d: .* SIGSEGV") as caught:
        lab.run(consume=consume)
    assert caught.value.kind == "crashed"
    assert "the last line" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda answer: first(answer).update(id=BOS), r"token 0 came where \d+ was forced"),
        (lambda answer: first(answer).update(logprob=None), r"None for a log-probability"),
        (lambda answer: first(answer).update(logprob=math.nan), r"nan for a log-probability"),
        (lambda answer: first(answer).update(logprob=0.5), r"0\.5 for a log-probability"),
        (
            lambda answer: first(answer)["top_logprobs"][3].update(logprob=-math.inf),
            r"-inf for a log-probability",
        ),
        (lambda answer: first(answer)["top_logprobs"].pop(), r"4 tokens are listed where 5"),
        (
            lambda answer: [one.update(logprob=-0.1) for one in first(answer)["top_logprobs"]],
            r"sum to 4\.52",
        ),
        (lambda answer: first(answer)["top_logprobs"][1].update(id=VOCAB), r"or lie outside"),
        (
            lambda answer: first(answer)["top_logprobs"].__setitem__(
                0, first(answer)["top_logprobs"][1]
            ),
            r"listed twice",
        ),
        (lambda answer: answer.update(truncated=True), r"the server took 5 of the 5 tokens"),
        (lambda answer: answer.update(tokens_evaluated=4), r"the server took 4 of the 5 tokens"),
        (lambda answer: answer.update(completion_probabilities=[1, 2]), r"lacks or garbles"),
        (lambda answer: first(answer).update(top_logprobs=[{}]), r"lacks or garbles 'id'"),
        (lambda answer: answer.update(timings=[1]), r"lacks or garbles"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error(lab: Lab, spoil: Spoil, why: str) -> None:
    """In whichever chunk; it names the build and the place, and is never counted."""
    lab.spoils_at, lab.spoil = SCORED + 1, spoil
    with pytest.raises(CheckError, match=rf"b1: probe of chunk 1 token 4: .*{why}"):
        lab.run(listed=5, consume=read_all)


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("listed", [1, 256])
def test_a_token_that_is_no_whole_character(lab: Lab, listed: int, *, refuses: bool) -> None:
    """The server says nothing of it, or fails: it is looked up, and then asked for so at once."""
    whole = tokens_of("text")[-1]
    lab.torn, lab.refuses = set(range(VOCAB)) - {whole}, refuses
    found = lab.run(listed=listed, consume=read_all)
    assert found.value == pytest.approx(math.exp(np.mean(nlls(scored()))))
    first_time = len({token for *_, token in scored()} - {whole})
    if listed >= VOCAB:
        assert len(lab.asked) == CHUNKS * SCORED + first_time


def test_a_server_that_tells_no_log_probabilities(lab: Lab) -> None:
    """Not even of a token that is whole characters."""
    lab.torn = set(range(VOCAB))
    with pytest.raises(CheckError, match=r"b1: probe of chunk 0 token 4: no log-probabilities"):
        lab.run()


def test_a_server_that_tells_no_more_than_it_must(lab: Lab) -> None:
    """Timings and counts are not needed."""
    lab.spoils_at = 1
    lab.spoil = lambda answer: [answer.pop(one) for one in ("timings", "tokens_evaluated")]
    assert not lab.run().partial


def test_a_probability_beyond_float32_is_a_lower_bound(lab: Lab) -> None:
    """The lowest float stands for it, and would else be the perplexity."""
    lab.spoils_at = 1
    lab.spoil = lambda answer: first(answer).update(logprob=-3.4028234663852886e38)
    expected = [-LOWEST, *nlls(scored())[1:]]
    assert lab.run(listed=1).value == pytest.approx(math.exp(np.mean(expected)))


def test_a_reader_that_gives_up_ends_the_pass(lab: Lab) -> None:
    """Its error is raised, and the server is not asked for the rest."""

    def consume(stream: BinaryIO) -> None:
        stream.read(10)
        raise CheckError("row 3 is damaged")

    with pytest.raises(CheckError, match="row 3 is damaged"):
        lab.run(text=TEXT * 400, consume=consume)
    # The pipe holds what is written before the reader comes to it.
    assert len(lab.asked) < len(TEXT) * 400 // CONTEXT * SCORED


@pytest.mark.parametrize("kind", [CheckError, ServerError])
def test_a_reader_that_gives_up_at_the_end(lab: Lab, kind: type[Exception]) -> None:
    """Its error is raised though all has been written, and is never taken for the server's."""

    def consume(stream: BinaryIO) -> None:
        stream.read()
        raise kind("not the same text")

    with pytest.raises(kind, match="not the same text"):
        lab.run(consume=consume)


def test_a_reader_that_has_seen_enough(lab: Lab) -> None:
    """One that ends without an error does not end the pass."""
    found = lab.run(text=TEXT * 40, consume=lambda stream: stream.read(10))
    assert len(found.running) == len(TEXT) * 40 // CONTEXT


def test_a_cache_that_is_not_kept_is_told_once(lab: Lab) -> None:
    """It is right all the same."""
    lab.caches = False
    found = lab.run()
    assert found.value == pytest.approx(math.exp(np.mean(nlls(scored()))))
    [told] = lab.said
    assert told.startswith("probing: the server evaluated 6 tokens for one")


def test_a_cache_that_is_kept_is_not_spoken_of(lab: Lab) -> None:
    """The first request of a chunk evaluates its first half."""
    lab.run()
    assert not lab.said


def test_it_says_how_far_it_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks done, and the time that is left and that has passed."""
    monkeypatch.setattr(probe, "_QUIET_S", 0.0)
    lab.run()
    assert len(lab.said) == CHUNKS * SCORED
    assert lab.said[SCORED].startswith("probing: 1 of 3 chunks, ")
    assert lab.said[-1].startswith("probing: 3 of 3 chunks, 0 s left (")


def test_a_pass_that_would_take_too_long_is_refused(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as a chunk has shown how fast it goes."""
    monkeypatch.setattr(probe, "_QUIET_S", 0.0)
    lab.limit = 0.0
    with pytest.raises(ToolError, match=r"3 chunks would take 0 s, reckoned from 1, and the limit"):
        lab.run(consume=read_all)
    assert len(lab.asked) == SCORED


def test_numbers_that_do_not_vary_have_no_error(lab: Lab) -> None:
    """One scored token tells nothing of how far others lie."""
    corpus = lab.folder / "text.txt"
    corpus.write_text("abcdefgh", "utf-8")
    plan = PassPlan(context=3, chunks=1, folder=lab.folder)
    found = run_probes(BUILD, CONFIG, Path("m"), corpus, plan, ServePlan(lab.folder))
    assert found.error is None
    assert len(found.running) == 1


@given(
    st.lists(st.floats(-60, 10), min_size=2, max_size=40), st.integers(1, 40), st.integers(0, 39)
)
def test_a_row_is_a_distribution(logits: list[float], listed: int, token: int) -> None:
    """What is known stays as it is; the others are even, and no likelier than any listed one."""
    values = np.array(logits)
    values -= values.max() + np.log(np.exp(values - values.max()).sum())
    ids = np.argsort(-values)[:listed]
    token %= len(values)
    row = Answer(ids, values[ids], token, float(values[token]), 1).row(len(values))
    known = sorted({*ids.tolist(), token})
    assert row[known] == pytest.approx(values[known], rel=1e-6)
    assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    rest = np.delete(row, known)
    assert len(set(rest.tolist())) <= 1
    assert (rest <= np.float32(values[ids].min())).all()
