"""Measures one start of one server: its samples, its memory, its load time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pytest_llmperf.errors import CheckError
from pytest_llmperf.measure.asking import Askings
from pytest_llmperf.measure.gpu import vram_mib
from pytest_llmperf.measure.logfacts import LogFacts, read_log
from pytest_llmperf.measure.prompts import Request, Script
from pytest_llmperf.models.text import text
from pytest_llmperf.plan.config import LAUNCH, Turn, Workload
from pytest_llmperf.serve.client import Limit
from pytest_llmperf.serve.launch import Server, server_options
from pytest_llmperf.serve.ollama import memory_mib, with_digest
from pytest_llmperf.serve.stream import Reply

PROTOCOL = 1
"""Raised when the way of measuring changes so that older results no longer compare."""

Samples = dict[str, list[float]]
"""Metric name to one value a sample."""

_MIB = 1024 * 1024
_SHARED = 32
_SALT = 8
"""How far two prompts may be apart that differ in a number of eight digits, in tokens."""
_PROBE = Workload("probe", (Turn(prompt=512, generate=16),))
"""Sent once to every fresh server before anything is measured.

It touches all weights and makes the backend allocate what it allocates late, so that memory is
read in the same state whichever workloads follow.
"""


@dataclass(slots=True)
class Launch:
    """One start of one server with all that was measured on it.

    Attributes:
        build: Label of the build.
        config: Name of the config.
        command: As one would type it.
        log: Path of the log, ``""`` for an endpoint.
        started: Unix time.
        samples: Workload name to samples; :data:`LAUNCH` for what the start itself shows.
        facts: What the log tells about memory.
        vram: MiB by GPU index, as NVML tells it; empty where it does not.
        vram_by_log: Whether the GPU memory is the sum of the buffers that the log tells, for
            devices that NVML does not know; it lacks what the backend itself needs.
        requests: Requests answered, warm-ups included.
        digests: Workload name to the digest of its token ids.
        model: Name of the model file, as the server tells it.
        disturbed: What made its timings those of the machine rather than the build; ``""`` if
            nothing did.
    """

    build: str
    config: str
    command: str
    log: str
    started: float
    samples: dict[str, Samples] = field(default_factory=dict)
    facts: LogFacts | None = None
    vram: Mapping[int, float] = field(default_factory=dict)
    vram_by_log: bool = False
    requests: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    model: str = ""
    disturbed: str = ""


def text_tokens(server: Server) -> list[int]:
    """Return the shipped text as the server cuts it; nothing where it does not show its tokens.

    Raises:
        ServerError: If the server cannot.
    """
    return server.client.tokenize(text()) if server.build.api == "llama-server" else []


class Session:
    """Measures on one running server.

    Args:
        server: Ready server.
        tokens: Ids of the shipped text under the model's tokenizer, see :func:`text_tokens`.
    """

    def __init__(self, server: Server, tokens: list[int]) -> None:
        self.server = server
        self._askings = Askings(server, tokens)
        self._scripts: dict[str, Script] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self.launch = Launch(
            build=server.build.label,
            config=server.config.name,
            command=server.shown_command,
            log=str(server.log or ""),
            started=time.time(),
            model=server.build.model or Path(str(server.props.get("model_path", ""))).name,
        )

    def settle(self) -> None:
        """Send the probe request and read memory, load time and the log.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If the answer must not be counted.
        """
        room = self.context()
        prompt = min(_PROBE.tokens - 16, max(room - 24, 1)) if room else 512
        if (unseen := self._askings.unseen) is not None:
            unseen.calibrate()
            self.launch.requests += 1
        else:
            probe = Workload("probe", (Turn(prompt, 16),))
            self._ask(self._askings.of(probe).script(probe), "probe")
        launch = self.launch
        samples: Samples = {}
        if self.server.load_ms is not None:
            samples["load_ms"] = [self.server.load_ms]
        launch.facts = facts = read_log(self.server.log_text())
        for name, value in (
            ("model_mib", facts.model_mib),
            ("kv_mib", facts.kv_mib),
            ("compute_mib", facts.compute_mib),
            ("offloaded_layers", facts.offloaded_layers),
            ("graph_splits", facts.graph_splits),
            ("n_ctx", room or None),
        ):
            if value is not None:
                samples[name] = [float(value)]
        if self.server.pid is not None and (tree := process_tree(self.server.pid)):
            samples["rss_mib"] = [rss_mib(tree)]
            launch.vram = vram_mib([process.pid for process in tree])
        if self.server.log is not None:
            # Told even where the process cannot be seen, as of a container in another machine.
            launch.vram_by_log = not launch.vram and bool(facts.gpu_mib)
            if on_gpu := sum((launch.vram or facts.gpu_mib).values()):
                samples["vram_mib"] = [on_gpu]
        elif self.server.build.api == "ollama":
            client, model = self.server.client, self.server.build.model
            launch.model = with_digest(client.get("/api/tags"), model)
            if (held := memory_mib(client.get("/api/ps"), model)) is not None:
                samples["vram_mib"] = [held]
        launch.samples[LAUNCH] = samples

    def context(self) -> int:
        """Return the context of one slot in tokens, 0 if the server does not say."""
        settings = self.server.props.get("default_generation_settings")
        value = settings.get("n_ctx", 0) if isinstance(settings, dict) else 0
        return int(value) if isinstance(value, int | float) else 0

    def _asked_context(self) -> int:
        """Return the context that each request asks for, 0 where none does."""
        asked = self.server.config.options.get("ctx-size")
        return asked if isinstance(asked, int) and self.server.build.api == "ollama" else 0

    def slots(self) -> int:
        """Return how many requests are answered at once, 0 where neither server nor config says."""
        if self.server.build.api != "llama-server":
            return 0
        value = self.server.props.get("total_slots")
        if not isinstance(value, int):
            value = server_options(self.server.build, self.server.config).get("parallel")
        # -1 leaves the number to the server.
        return max(value, 0) if isinstance(value, int) else 0

    def script(self, workload: Workload) -> Script:
        """Return the workload's requests.

        Raises:
            CheckError: If the server has too few slots for them, or too little context.
        """
        if workload.name not in self._scripts:
            config, slots = self.server.config.name, self.slots()
            room = self.context() or self._asked_context()
            if slots and workload.parallel > slots:
                raise CheckError(
                    f"workload {workload.name} sends {workload.parallel} requests at once, config "
                    f"{config} has slots for {slots}: set parallel = {workload.parallel} in its "
                    "options, and ctx-size to as many times the context of one"
                )
            script = self._askings.of(workload).script(workload)
            options = server_options(self.server.build, self.server.config)
            # Slots have a context each, unless they share the one that the server tells.
            sharing = workload.parallel if options.get("kv-unified") is True else 1
            need = max(script.tokens, workload.tokens) * sharing
            if room and need > room:
                raise CheckError(
                    f"workload {workload.name} needs {need} tokens of context, config "
                    f"{config} has {room}: raise ctx-size or shorten the workload"
                )
            self._scripts[workload.name] = script
            self.launch.digests[workload.name] = script.digest
        return self._scripts[workload.name]

    def warm_up(self, workload: Workload) -> None:
        """Run the workload once without counting it.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If an answer must not be counted.
        """
        self._ask(self.script(workload), f"warm-up of {workload.name}")

    def sample(self, workload: Workload) -> None:
        """Run the workload once and add its sample to the launch.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If an answer must not be counted.
        """
        taken = self.launch.samples.setdefault(workload.name, {})
        number = len(next(iter(taken.values()), [])) + 1
        replies, wall_ms = self._ask(self.script(workload), f"sample {number} of {workload.name}")
        for metric, value in measured(replies, workload.parallel, wall_ms).items():
            taken.setdefault(metric, []).append(value)

    def _ask(self, script: Script, purpose: str) -> tuple[list[Reply], float]:
        """Send the requests, round by round; return the replies and the rounds' milliseconds."""
        workload, client = script.workload, self.server.client
        asking = self._askings.of(workload)
        limit = Limit.of(workload.limit)
        replies: list[Reply] = []
        wall_ms = 0.0
        for requests in script.rounds:
            names = [
                f"{self.server.config.name} on {self.server.build.label}: {purpose}, request "
                f"{number} of {len(script.requests)} ({_shown(request, workload)})"
                for number, request in enumerate(requests, start=len(replies) + 1)
            ]
            for slot, (request, what) in enumerate(zip(requests, names, strict=True)):
                if request.depth:
                    tokens = request.prompt[: request.depth]
                    client.prime(tokens, f"{what}, before the clock starts", slot=slot, limit=limit)
            taken, ms = client.ask(
                [
                    asking.ask(request, what, slot, workload)
                    for slot, (request, what) in enumerate(zip(requests, names, strict=True))
                ],
                limit,
            )
            for request, reply, what in zip(requests, taken, names, strict=True):
                key = (workload.name, len(replies))
                check(reply, request, what, self._counts.get(key))
                # What nobody tells beforehand is known from the first answer.
                self._counts.setdefault(key, reply.prompt_n + (reply.cache_n or 0))
                replies.append(reply)
                self.launch.requests += 1
            wall_ms += ms
        return replies, wall_ms


def _shown(request: Request, workload: Workload) -> str:
    depth = f"depth {request.depth}, " if request.depth else ""
    prompt: str = str(len(request.prompt) - request.depth) if request.prompt else "of unseen tokens"
    picture = f" and a picture of {workload.image} pixels" if workload.image else ""
    return f"{depth}prompt {prompt}{picture}, generate {request.generate} tokens"


def check(reply: Reply, request: Request, what: str, known: int | None = None) -> None:
    """Refuse an answer that is not the full-length work that was asked for.

    Args:
        reply: The answer.
        request: What was asked for.
        what: Names the request.
        known: Prompt tokens of an earlier answer to it, where nobody tells them beforehand.

    Raises:
        CheckError: If more or fewer tokens came from a cache than lay there on purpose, tokens are
            missing, or the context overflowed.
    """
    generate = request.generate
    prompt = _wrong_prompt if request.prompt else _wrong_unseen_prompt
    wrong = prompt(reply, request, known)
    if reply.predicted_n != generate:
        wrong.append(f"{reply.predicted_n} of {generate} tokens were generated")
    if reply.stop_type != "limit":
        wrong.append(f"it stopped by {reply.stop_type}, not by the limit")
    if reply.truncated:
        wrong.append("the context overflowed")
    if not all(0 < ms < math.inf for ms in (reply.prompt_ms, reply.predicted_ms)):
        wrong.append("its timings are not positive")
    if wrong:
        raise CheckError(f"{what}: not a measurement: {'; '.join(wrong)}")


def _wrong_prompt(reply: Reply, request: Request, known: int | None) -> list[str]:
    """Return what is wrong with how a prompt was evaluated whose tokens are known."""
    wrong = []
    prompt = len(request.prompt) - request.depth
    if reply.cache_n != request.depth:
        meant = f", not {request.depth}" if request.depth else ""
        wrong.append(f"{reply.cache_n} prompt tokens came from a cache{meant}")
    if request.counted and reply.prompt_n != prompt:
        wrong.append(f"{reply.prompt_n} of {prompt} prompt tokens were evaluated")
    if request.pictured and reply.prompt_n <= prompt:
        wrong.append(f"the picture made no tokens: {reply.prompt_n} were evaluated")
    if request.pictured and known is not None and reply.prompt_n != known:
        wrong.append(f"{reply.prompt_n} prompt tokens were evaluated, and {known} before")
    return wrong


def _wrong_unseen_prompt(reply: Reply, _request: Request, known: int | None) -> list[str]:
    """Return what is wrong with how a prompt was evaluated by a server that hides its tokens."""
    wrong = []
    # The first words of a template may be in the cache of a server that we cannot switch off.
    if reply.cache_n is not None and reply.cache_n > _SHARED:
        wrong.append(f"{reply.cache_n} prompt tokens came from a cache")
    sent = reply.prompt_n + (reply.cache_n or 0)
    if known is not None and abs(sent - known) > _SALT:
        wrong.append(f"its prompt has {sent} tokens, and had {known} before")
    return wrong


def timings(replies: list[Reply]) -> dict[str, float]:
    """Return one sample: the metrics of one pass over a workload.

    ``decode_tps`` is (predicted_n - 1) / predicted_ms summed over the turns, since the first
    token is the prompt's work; builds differ in whether ``predicted_per_second`` counts it, so
    that field is never used. ``prefill_tps`` is prompt_n / prompt_ms summed likewise; ``ttft_ms``
    and ``itl_ms`` are means over the turns, ``e2e_ms`` is the sum.
    """
    gaps = sum(reply.predicted_n - 1 for reply in replies)
    return {
        "decode_tps": 1e3 * gaps / sum(reply.predicted_ms for reply in replies),
        "prefill_tps": 1e3 * sum(r.prompt_n for r in replies) / sum(r.prompt_ms for r in replies),
        "ttft_ms": statistics.fmean(reply.ttft_ms for reply in replies),
        "itl_ms": sum(reply.last_ms - reply.ttft_ms for reply in replies) / gaps,
        "e2e_ms": sum(reply.e2e_ms for reply in replies),
    }


def measured(replies: list[Reply], parallel: int, wall_ms: float) -> dict[str, float]:
    """Return one sample: the metrics of one pass over a workload, by itself or in parallel.

    Of parallel requests the metrics of :func:`timings` are those of one among the others: means
    over them, so that one which starves shows. ``aggregate_tps`` is all generated tokens by the
    time that all together took, prompts included. ``draft_acceptance`` is accepted by drafted
    tokens of all requests, in percent; it is left out where nothing was drafted.

    Args:
        replies: Of all turns and parallel requests.
        parallel: Requests that were sent at once.
        wall_ms: First request sent to last byte of the last, summed over the turns.
    """
    found = timings(replies)
    found["e2e_ms"] /= parallel
    found["aggregate_tps"] = 1e3 * sum(reply.predicted_n for reply in replies) / wall_ms
    if drafted := sum(reply.draft_n or 0 for reply in replies):
        accepted = sum(reply.draft_accepted_n or 0 for reply in replies)
        found["draft_acceptance"] = 100 * accepted / drafted
    return found


def process_tree(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants that still live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rss_mib(tree: list[psutil.Process]) -> float:
    """Return the resident memory of the processes together, in MiB."""
    total = 0
    for process in tree:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / _MIB
