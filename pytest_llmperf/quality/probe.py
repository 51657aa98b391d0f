"""Passes a corpus through a running ``llama-server``, token by token: the path production takes.

``llama-perplexity`` evaluates a whole chunk at once; a server that answers people evaluates one
token after the other, by other kernels. And a wheel, a container or a remote server has no
``llama-perplexity`` at all. So the server is asked once for each scored token, with everything
before it as the prompt. The prompt cache holds all but the last token of it, and that one is
evaluated as in decoding. Only the first half of a chunk, which is not scored, is evaluated in
batches.

The text is cut, and its tokens are scored, exactly as llama-perplexity does it (``perplexity`` of
its ``perplexity.cpp``), and the log-probabilities come in the layout that it writes
(:mod:`pytest_llmperf.quality.logits`), so whatever reads its stream reads this one.

What ``listed`` does. The server names the log-probabilities of the ``listed`` most likely tokens
and that of the token that came next; all others share what is left of the probability evenly.
Perplexity is exact for any ``listed``, and so is the most likely token. The divergence is not:
between two probed passes what happens within the shared tail is not seen, so it comes out a
little small; against a stream of llama-perplexity the evenness of the tail itself counts as
divergence, so it comes out a little large. With ``listed`` at or above the vocabulary nothing is
shared, and the stream is as exact as the format; the answers are then about 75 bytes a token of
the vocabulary long.

Three things of llama-server matter here. It computes these log-probabilities from the raw logits,
so ``logit_bias`` can choose the token that it samples without changing them: the answer then
holds the log-probability of that token though it is not among the likeliest. Of a sampled token
that is a part of a character only it says nothing (b8352 answers HTTP 500): another one is then
sampled, and the one in question looked up among those listed, or among all. And a probability
below what float32 holds is told as the lowest float32: its NLL is then taken for 87.3 nats, a
lower bound.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.dialect import dialect_of
from pytest_llmperf.errors import (
    BuildError,
    CheckError,
    LlmperfError,
    OutOfMemoryError,
    PlanError,
    ServerError,
    ToolError,
)
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.quality.logits import MOST_VOCAB, LogitsHeader, write_stream
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity
from pytest_llmperf.serve.launch import ServePlan, Server, start

LISTED = 256
"""Default number of tokens whose log-probabilities the server names."""

SPARE = 16
"""Tokens of context that a server needs beyond a chunk."""

LOWEST = float(np.log(np.finfo(np.float32).tiny))
"""What is taken for the log-probability of a token whose probability float32 cannot hold."""

# Rounding of a log-probability, and of a sum of probabilities, that was computed in float32.
_SLACK = 1e-3
# Far above any logit, and still far from where float32 overflows.
_BIAS = 1e6
_UNDERFLOW = -1e30
# A text whose tokens are whole characters with every tokenizer.
_PLAIN = "text"
_UNPARSED = "Failed to parse input"
_QUIET_S = 2.0
_PIPE_BYTES = 1024 * 1024
_FIELDS = ("completion_probabilities", "timings", "tokens_evaluated", "truncated")


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the server says of one position.

    Attributes:
        ids: The most likely tokens, int64, shape ``(listed,)``.
        log_probs: Their log-probabilities, float64, likewise.
        token: The token that came next.
        log_prob: Its log-probability.
        evaluated: Prompt tokens that were evaluated, which are not taken from the cache; 0 if the
            server does not tell.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float64]
    token: int
    log_prob: float
    evaluated: int

    def row(self, n_vocab: int) -> NDArray[np.float32]:
        """Log-probabilities of the whole vocabulary, float32, shape ``(n_vocab,)``.

        What the known tokens leave of the probability, all others share evenly, yet none gets
        more than the least likely one of those listed.
        """
        row = np.full(n_vocab, np.nan)
        row[self.ids] = self.log_probs
        row[self.token] = self.log_prob
        unknown = np.isnan(row)
        if count := np.count_nonzero(unknown):
            left = 1.0 - float(np.exp(row[~unknown]).sum())
            share = math.log(left / count) if left > 0 else -math.inf
            row[unknown] = min(share, float(self.log_probs.min()))
        return row.astype(np.float32)


def run_probes(  # noqa: PLR0917 - those of run_perplexity, and a server's
    build: Build,
    config: Config,
    model: Path,
    corpus: Path,
    plan: PassPlan,
    serve: ServePlan,
    *,
    consume: Callable[[BinaryIO], object] | None = None,
    listed: int = LISTED,
) -> Perplexity:
    """Pass a corpus through a server, one scored token a request.

    The counterpart of :func:`pytest_llmperf.quality.perplexity.run_perplexity`. A server that is
    started for it gets the config's options, but one slot with room for a chunk, and the batch
    sizes of the plan. An endpoint is taken as it is; it should serve nobody else meanwhile.

    A server that cannot keep its cache from one request to the next evaluates the whole prompt
    each time. That is as right, but slow, and not the path of decoding: it is told once, by
    ``plan.progress``.

    Args:
        build: Whose server.
        config: Its options.
        model: GGUF file; an endpoint has its own.
        corpus: Text file, UTF-8.
        plan: Pinned sizes, chunks, progress.
        serve: How the server is started.
        consume: Reads the log-probabilities of every scored token from a stream, in the layout of
            ``--kl-divergence-base``, while they come; it raises if any are missing. It runs in a
            thread of its own.
        listed: How many tokens' log-probabilities the server names a position; see the module's
            text for what that does to divergences.

    Returns:
        The pass, partial if the server failed after the first chunk; see ``Perplexity.failure``.
        ``error`` is computed as the tool does: ``ppl * sqrt(var(nll) / (n - 1))`` over the scored
        tokens, with the variance about the mean.

    Raises:
        BuildError: If the build does not know an option, its slot has no room for a chunk, or it is
            an endpoint that is no llama-server.
        PlanError: If the text is not UTF-8.
        ServerError: If the server does not start, or fails before the first chunk is finished.
        ToolError: If the text is shorter than two chunks, or the pass would take longer than the
            plan's limit.
        CheckError: If an answer is not about the token asked for, or holds what is no
            log-probability.
        LlmperfError: What ``consume`` raised, unless the server itself failed, or the plan's check.
    """
    began = time.monotonic()
    _check_api(build)
    text = _read(corpus)
    if build.url is None:
        build, config = _pinned(build, config, plan)
    with start(build, config, ModelFiles(model), serve) as server:
        _check_room(server, plan)
        if server.log is not None:
            plan.check(server.log)
        task = _Task.prepare(server, text, corpus, plan, listed)
        tally = _Tally(task.header, plan, time.monotonic())
        failure = _pass(task, tally, consume)
    value, error = tally.estimate() if not failure else (tally.running[-1], None)
    return Perplexity(
        value=value,
        error=error,
        running=tuple(tally.running),
        planned=task.header.n_chunk,
        failure=failure,
        command=server.shown_command,
        log=str(server.log or ""),
        seconds=time.monotonic() - began,
        model=Path(str(server.props.get("model_path", ""))).name,
    )


def _pinned(build: Build, config: Config, plan: PassPlan) -> tuple[Build, Config]:
    """Return build and config with the plan's sizes, whatever they say of them."""
    sizes: dict[str, OptionValue] = {
        "ctx-size": plan.context + SPARE,
        "parallel": 1,
        "batch-size": plan.batch,
        "ubatch-size": plan.ubatch,
    }
    # Where servers are started with more, each of some ten thousand requests writes 2 KiB. It is
    # worth that where the log has to show that the GPU is used.
    quiet = {"verbosity": 3} if dialect_of(build).log_verbosity and not config.gpu else {}
    own = {name: value for name, value in build.options.items() if name not in sizes}
    options = {**quiet, **config.options, **sizes}
    return replace(build, options=own), replace(config, options=options)


def _read(corpus: Path) -> str:
    """Return the text as the tool reads it: as it stands, but for one line end at its end."""
    try:
        # Not read_text, which would change the line ends.
        return corpus.read_bytes().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise PlanError(f"{place} is not UTF-8: a server takes no other text", corpus) from error
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}", corpus) from error


def _check_api(build: Build) -> None:
    if build.api == "llama-server":
        return
    kind = "Ollama" if build.api == "ollama" else "an OpenAI-compatible endpoint"
    raise BuildError(
        f"build {build.label} is {kind}, which does not tell its tokens and how likely each is, as "
        "a corpus pass needs: pass the corpus through llama-server, or leave such tests out with "
        '-m "not quality"'
    )


def _check_room(server: Server, plan: PassPlan) -> None:
    needed = plan.context + SPARE
    settings = server.props.get("default_generation_settings")
    room = settings.get("n_ctx") if isinstance(settings, dict) else None
    if isinstance(room, int) and room < needed:
        raise BuildError(
            f"build {server.build.label}: a slot of its server has a context of {room} tokens, and "
            f"probing chunks of {plan.context} needs {needed}: start it with a larger --ctx-size"
        )


@dataclass(frozen=True, slots=True)
class _Task:
    """The server and what it is to be asked.

    Attributes:
        server: Whom to ask.
        header: The text.
        bos: The token that the model begins a text with, None if it has none.
        listed: Tokens to list.
        whole: A token that is whole characters.
        torn: Tokens that were found to be a part of a character.
    """

    server: Server
    header: LogitsHeader
    bos: int | None
    listed: int
    whole: int
    torn: set[int] = field(default_factory=set)

    @classmethod
    def prepare(cls, server: Server, text: str, corpus: Path, plan: PassPlan, listed: int) -> _Task:
        tokens = _tokenize(server, text, add_special=True)
        if len(tokens) < 2 * plan.context:
            raise ToolError(
                f"{corpus}: {len(tokens)} tokens, and probing needs at least {2 * plan.context}, "
                f"twice the context of {plan.context}: take a longer text or a shorter context"
            )
        chunks = len(tokens) // plan.context
        if plan.chunks is not None:
            chunks = min(chunks, plan.chunks)
        if chunks < 1:
            raise ToolError(f"{corpus}: {chunks} chunks were asked for: ask for at least one")
        n_vocab = _vocabulary(server, tokens[: plan.context // 2])
        kept = np.array(tokens[: chunks * plan.context], np.int32).reshape(chunks, plan.context)
        if int(kept.max()) >= n_vocab:
            raise CheckError(
                f"{server.build.label}: the text has token {kept.max()}, outside of the vocabulary "
                f"of {n_vocab} that the server tells"
            )
        kept.setflags(write=False)
        header = LogitsHeader(plan.context, n_vocab, chunks, kept)
        plain = _tokenize(server, _PLAIN, add_special=False)
        begun = _tokenize(server, _PLAIN, add_special=True)
        if not plain:
            raise ServerError(f"/tokenize answered no token of {_PLAIN!r}", log=server.log)
        bos = begun[0] if begun[0] != plain[0] else None
        return cls(server, header, bos, max(1, min(listed, n_vocab)), plain[-1])

    def answers(self, chunk: int) -> Iterator[Answer]:
        """Ask for every scored position of a chunk, in order."""
        tokens: list[int] = self.header.tokens[chunk].tolist()
        if self.bos is not None:
            # For evaluation only; the stream names the token that stands in the text.
            tokens[0] = self.bos
        for position in range(self.header.n_ctx // 2, self.header.n_ctx - 1):
            yield self.ask(chunk, tokens[: position + 1], tokens[position + 1])

    def ask(self, chunk: int, prompt: list[int], token: int) -> Answer:
        """Ask what comes after ``prompt``, and how likely ``token`` is.

        Raises:
            ServerError: If the server fails.
            CheckError: If the answer is not about that.
        """
        where = f"probe of chunk {chunk} token {len(prompt) - 1}"
        if token not in self.torn:
            if answer := self._force(where, prompt, token, self.listed):
                return answer
            self.torn.add(token)
        # Another token is sampled, and the one in question looked up, if need be among all.
        for listed in (self.listed, self.header.n_vocab):
            answer = self._force(where, prompt, self.whole, listed)
            if answer is None:
                break
            if (found := np.flatnonzero(answer.ids == token)).size:
                ids, log_probs = answer.ids[: self.listed], answer.log_probs[: self.listed]
                log_prob = float(answer.log_probs[found[0]])
                return replace(answer, ids=ids, log_probs=log_probs, token=token, log_prob=log_prob)
        raise CheckError(f"{self.server.build.label}: {where}: no log-probabilities came")

    def _force(self, where: str, prompt: list[int], token: int, listed: int) -> Answer | None:
        """Have ``token`` come after ``prompt``; None if the server keeps silent about it."""
        try:
            said = self.server.client.post("/completion", _body(prompt, token, listed))
        except OutOfMemoryError:
            # An outcome of its own, which says all there is to say.
            raise
        except ServerError as error:
            if _UNPARSED in str(error):
                return None
            raise ServerError(f"{where}: {error}", log=self.server.log, kind=error.kind) from error
        if isinstance(said, dict) and not said.get("completion_probabilities"):
            return None
        try:
            return _answer(said, prompt, token, listed, self.header.n_vocab)
        except CheckError as error:
            raise CheckError(f"{self.server.build.label}: {where}: {error}") from error


def _body(prompt: list[int], token: int | None, listed: int) -> dict[str, object]:
    body: dict[str, object] = {
        "prompt": prompt,
        "n_predict": 1,
        "cache_prompt": True,
        "id_slot": 0,
        "temperature": 0,
        "n_probs": listed,
        "post_sampling_probs": False,
        # The rest of an answer is longer than what is asked for: it repeats the prompt.
        "response_fields": _FIELDS,
    }
    if token is not None:
        body["logit_bias"] = [[token, _BIAS]]
    return body


def _answer(
    said: Any,  # noqa: ANN401 - JSON is what the server says it is
    prompt: list[int],
    token: int,
    listed: int,
    n_vocab: int,
) -> Answer:
    try:
        [position] = said["completion_probabilities"]
        top = position["top_logprobs"]
        chosen, log_prob = position["id"], position["logprob"]
        pairs = [(entry["id"], entry["logprob"]) for entry in top]
        asked = said.get("tokens_evaluated", len(prompt))
        timings: Mapping[str, Any] = said.get("timings") or {}
        evaluated = int(timings.get("prompt_n", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckError(f"the answer lacks or garbles {error}") from error
    if chosen != token:
        raise CheckError(
            f"token {chosen} came where {token} was forced: the log-probability is not that "
            "of the text"
        )
    if asked != len(prompt) or said.get("truncated"):
        raise CheckError(f"the server took {asked} of the {len(prompt)} tokens of the prompt")
    if len(pairs) != listed:
        raise CheckError(f"{len(pairs)} tokens are listed where {listed} were asked for")
    for one, value in [*pairs, (token, log_prob)]:
        # The server writes null for what is no number.
        if not isinstance(value, int | float) or not math.isfinite(value) or value > _SLACK:
            raise CheckError(f"token {one} has {value} for a log-probability: did it compute NaN?")
    ids = np.array([one for one, _ in pairs], np.int64)
    if len(np.unique(ids)) != listed or ids.min() < 0 or ids.max() >= n_vocab:
        raise CheckError(f"tokens are listed twice, or lie outside of the vocabulary of {n_vocab}")
    log_probs = _held(np.array([value for _, value in pairs]))
    if (mass := float(np.exp(log_probs).sum())) > 1 + _SLACK:
        raise CheckError(f"the probabilities of the listed tokens sum to {mass:.4g}")
    return Answer(ids, log_probs, token, float(_held(np.array(log_prob))), evaluated)


def _held(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(log_probs < _UNDERFLOW, LOWEST, log_probs)


def _tokenize(server: Server, text: str, *, add_special: bool) -> list[int]:
    body = {"content": text, "add_special": add_special, "parse_special": False}
    answer = server.client.post("/tokenize", body)
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(isinstance(one, int) for one in tokens):
        raise ServerError("/tokenize answered no list of token ids", log=server.log)
    return tokens


def _vocabulary(server: Server, prompt: list[int]) -> int:
    """Return the size of the vocabulary, by counting if the server does not tell it."""
    with contextlib.suppress(ServerError, LookupError, TypeError, AttributeError):
        told = server.client.get("/v1/models")["data"][0]["meta"]["n_vocab"]
        if isinstance(told, int) and 1 < told <= MOST_VOCAB:
            return told
    answer = server.client.post("/completion", _body(prompt, None, MOST_VOCAB))
    try:
        return len(answer["completion_probabilities"][0]["top_logprobs"])
    except (LookupError, TypeError) as error:
        raise CheckError(f"{server.build.label}: an answer lacks or garbles {error}") from error


@dataclass(slots=True)
class _Tally:
    """What the answers add up to, and how far they are."""

    header: LogitsHeader
    plan: PassPlan
    began: float
    nlls: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    _said: float = 0.0
    _warned: bool = False

    def __post_init__(self) -> None:
        self._said = self.began

    def add(self, answer: Answer) -> None:
        """Count an answer in, and now and then say how far it is."""
        self.plan.check_stopped()
        first = len(self.nlls) % self.header.n_scored == 0
        self.nlls.append(-answer.log_prob)
        if answer.evaluated > 1 and not first and not self._warned:
            self._warned = True
            self.plan.progress(
                f"probing: the server evaluated {answer.evaluated} tokens for one, as it does not "
                "keep its cache: right, but slow, and not the path of decoding"
            )
        if len(self.nlls) % self.header.n_scored == 0:
            self.running.append(math.exp(math.fsum(self.nlls) / len(self.nlls)))
        now = time.monotonic()
        if now - self._said >= _QUIET_S:
            self._said = now
            planned = self.header.n_chunk * self.header.n_scored
            left = (now - self.began) / len(self.nlls) * (planned - len(self.nlls))
            if self.running:
                expected = now - self.began + left
                self.plan.check_time(expected, len(self.running), self.header.n_chunk)
            self.plan.progress(
                f"probing: {len(self.running)} of {self.header.n_chunk} chunks, {left:.0f} s left "
                f"({now - self.began:.0f} s)"
            )

    def estimate(self) -> tuple[float, float | None]:
        """Return the perplexity and its standard error, None where the NLLs do not vary."""
        nlls = np.array(self.nlls)
        value = math.exp(float(nlls.mean()))
        variance = float(nlls.var())
        if len(nlls) < 2 or variance <= 0:  # noqa: PLR2004 - one number has no variance
            return value, None
        return value, value * math.sqrt(variance / (len(nlls) - 1))


def _pass(task: _Task, tally: _Tally, consume: Callable[[BinaryIO], object] | None) -> str:
    """Probe every position; return why the pass is partial, ``""`` if it is whole."""
    sink = None if consume is None else _Sink(consume)
    failure = ""
    try:
        if sink is None:
            for _ in _probed(task, tally):
                pass
        else:
            rows = (answer.row(task.header.n_vocab) for answer in _probed(task, tally))
            write_stream(sink, task.header.tokens, rows, n_vocab=task.header.n_vocab)
    except ServerError as error:
        if not tally.running or (sink is not None and error is sink.error):
            raise
        done = f"{len(tally.running)} of {task.header.n_chunk} chunks"
        failure = f"broke off after {done}: {str(error).splitlines()[0]}"
    except BaseException as error:
        if not isinstance(error, LlmperfError):
            # Before the reader is waited for: it may wait for another pass.
            tally.plan.stopped.set()
        raise
    finally:
        if sink is not None:
            sink.close()
    # A stream that breaks off is the server's failure; one that is wrong is its reader's finding.
    if sink is not None and sink.error is not None and not failure:
        raise sink.error
    return failure


def _probed(task: _Task, tally: _Tally) -> Iterator[Answer]:
    for chunk in range(task.header.n_chunk):
        for answer in task.answers(chunk):
            tally.add(answer)
            yield answer


class _Sink:
    """The end of a pipe that is written to, while a thread reads the other.

    Args:
        consume: Reads it.

    Attributes:
        error: What it raised.
    """

    def __init__(self, consume: Callable[[BinaryIO], object]) -> None:
        self.error: Exception | None = None
        self._consume = consume
        source, self._descriptor = os.pipe()
        self._thread = Thread(target=self._work, args=(source,), name="llmperf-logits", daemon=True)
        self._thread.start()

    def _work(self, source: int) -> None:
        # Closed when the reader is done or gives up: whoever writes then hears of it.
        with open(source, "rb", buffering=_PIPE_BYTES) as stream:
            try:
                self._consume(stream)
            except Exception as error:  # noqa: BLE001 - raised again by who writes
                self.error = error

    def write(self, data: bytes, /) -> object:
        """Write all of ``data``; raises what the reader raised."""
        rest = memoryview(data)
        # A reader that has seen enough is none that failed.
        with contextlib.suppress(BrokenPipeError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        if self.error is not None:
            raise self.error
        return None

    def close(self) -> None:
        """Let the reader come to the end, and wait for it."""
        os.close(self._descriptor)
        self._thread.join()
