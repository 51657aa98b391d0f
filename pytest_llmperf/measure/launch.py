"""Measures one start of one server: its samples, its memory, its load time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pytest_llmperf.errors import CheckError, blamed_on
from pytest_llmperf.measure.asking import Askings
from pytest_llmperf.measure.logfacts import read_log
from pytest_llmperf.measure.on_gpu import OnGpu, require_gpu
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

GPU_WARM_UPS = 2
"""Runs of a workload before it counts on a GPU: the first makes the kernels and graphs of its
shapes, and the second is the first that uses them."""

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
        samples: Workload name to samples; :data:`LAUNCH` for what the start itself shows.
        vram: MiB by GPU index, as NVML tells it; empty where it does not.
        vram_by: What tells the GPU memory: ``processes`` for NVML of the server's own, ``use`` for
            what the GPUs' use grew by where NVML does not name them, ``log`` for the sum of the
            buffers there, for devices that NVML does not know; it lacks what the backend needs.
        gpu: What its GPUs did while it ran, as JSON values; empty where NVML knows none.
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
    samples: dict[str, Samples] = field(default_factory=dict)
    vram: Mapping[int, float] = field(default_factory=dict)
    vram_by: str = ""
    gpu: Mapping[str, object] = field(default_factory=dict)
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
        on_gpu: Its GPUs, looked at since before it started; None for no look at any.
    """

    def __init__(self, server: Server, tokens: list[int], on_gpu: OnGpu | None = None) -> None:
        self.server = server
        self.on_gpu = on_gpu or OnGpu((), lambda _text: None)
        self.begun: dict[str, int] = {}
        """Workload name to the requests that were answered before it."""
        self._pids: set[int] = set()
        self._spent: dict[str, tuple[int, float]] = {}
        self._askings = Askings(server, tokens)
        self._scripts: dict[str, Script] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self.launch = Launch(
            build=server.build.label,
            config=server.config.name,
            command=server.shown_command,
            log=str(server.log or ""),
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
        facts = read_log(self.server.log_text())
        samples: Samples = {
            name: [float(value)]
            for name, value in (
                ("load_ms", self.server.load_ms),
                ("model_mib", facts.model_mib),
                ("kv_mib", facts.kv_mib),
                ("compute_mib", facts.compute_mib),
                ("offloaded_layers", facts.offloaded_layers),
                ("graph_splits", facts.graph_splits),
                ("n_ctx", room or None),
            )
            if value is not None
        }
        if self.server.pid is not None and (tree := process_tree(self.server.pid)):
            samples["rss_mib"] = [rss_mib(tree)]
        if self.server.log is not None:
            # Told even where the process cannot be seen, as of a container in another machine.
            launch.vram, launch.vram_by = self.on_gpu.held_mib(self._processes())
            if not launch.vram and facts.gpu_mib:
                launch.vram_by = "log"
            if held := sum((launch.vram or facts.gpu_mib).values()):
                samples["vram_mib"] = [held]
            require_gpu(self.server.build, self.server.config, facts, self.server.log)
        elif self.server.build.api == "ollama":
            client, model = self.server.client, self.server.build.model
            launch.model = with_digest(client.get("/api/tags"), model)
            if (loaded := memory_mib(client.get("/api/ps"), model)) is not None:
                samples["vram_mib"] = [loaded]
        launch.samples[LAUNCH] = samples

    def _processes(self) -> set[int]:
        """Return the ids of all processes that the server was seen to have."""
        # The number of one that has ended may be another's by now.
        if self.server.pid is not None and not self.server.stopped:
            self._pids |= {process.pid for process in process_tree(self.server.pid)}
        return self._pids

    @property
    def disturbed(self) -> str:
        """What its GPUs did that makes its timings theirs rather than the build's, or ``""``."""
        return self.on_gpu.disturbed

    def stop(self) -> None:
        """Stop the server, and keep what its GPUs did. Safe to call again."""
        launch = self.launch
        try:
            pids = self._processes()
            if not self.server.stopped:
                launch.gpu = self.on_gpu.facts()
                # A server that ends within a tenth of a second is not sampled, but was asked once.
                peak = max(self.on_gpu.peak_mib(pids) or 0.0, sum(launch.vram.values()))
                if peak and LAUNCH in launch.samples:
                    launch.samples[LAUNCH]["vram_peak_mib"] = [peak]
        finally:
            self.server.stop()

    def share(self) -> None:
        """Say that another server of ours is on its GPUs from now on."""
        self.on_gpu.share()

    def close(self, *, check: bool = True, alone: bool = True) -> None:
        """Stop the server, and wait until its GPUs' memory is free. Safe to call again.

        Args:
            check: Whether memory that stays is an error; not where another one is on its way.
            alone: Whether no other server of ours runs there any more.

        Raises:
            LeakError: If it leaves GPU memory taken.
        """
        launch = self.launch
        name = f"{launch.build} for config {launch.config}"
        try:
            self.stop()
        finally:
            with blamed_on(self.server.build.identity):
                self.on_gpu.end(self._pids, name, check=check, alone=alone)

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

    @property
    def warm_ups(self) -> int:
        """How often a workload is run before it counts."""
        return GPU_WARM_UPS if self.server.config.gpu else 1

    def warm_up(self, workload: Workload) -> None:
        """Run the workload as often as it takes, without counting it.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If an answer must not be counted.
        """
        script = self.script(workload)
        for number in range(1, self.warm_ups + 1):
            which = "warm-up" if self.warm_ups == 1 else f"warm-up {number} of {self.warm_ups}"
            self._ask(script, f"{which} of {workload.name}")

    def sample(self, workload: Workload) -> None:
        """Run the workload once and add its sample to the launch.

        Raises:
            ServerError: If the server fails on it.
            CheckError: If an answer must not be counted.
        """
        taken = self.launch.samples.setdefault(workload.name, {})
        number = len(next(iter(taken.values()), [])) + 1
        replies, wall_ms, joules = self._ask(
            self.script(workload), f"sample {number} of {workload.name}"
        )
        for metric, value in measured(replies, workload.parallel, wall_ms).items():
            taken.setdefault(metric, []).append(value)
        if joules is not None:
            # One value for all samples: the counter moves in steps that are long for one request,
            # and the tokens of one that it did not move for were not for nothing.
            before = self._spent.get(workload.name, (0, 0.0))
            tokens = before[0] + sum(reply.predicted_n for reply in replies)
            spent = before[1] + joules
            self._spent[workload.name] = tokens, spent
            if spent > 0:
                taken["tokens_per_joule"] = [tokens / spent]

    def _ask(self, script: Script, purpose: str) -> tuple[list[Reply], float, float | None]:
        """Send the requests, round by round.

        Returns:
            The replies, the rounds' milliseconds, and the energy that the GPUs took meanwhile in
            joules, None where that is not told.
        """
        workload, client = script.workload, self.server.client
        asking = self._askings.of(workload)
        limit = Limit.of(workload.limit)
        replies: list[Reply] = []
        wall_ms = 0.0
        joules: float | None = 0.0
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
            before = self.on_gpu.energy_j()
            taken, ms = client.ask(
                [
                    asking.ask(request, what, slot, workload)
                    for slot, (request, what) in enumerate(zip(requests, names, strict=True))
                ],
                limit,
            )
            after = self.on_gpu.energy_j()
            if joules is None or before is None or after is None:
                joules = None
            else:
                joules += after - before
            for request, reply, what in zip(requests, taken, names, strict=True):
                key = (workload.name, len(replies))
                check(reply, request, what, self._counts.get(key))
                # What nobody tells beforehand is known from the first answer.
                self._counts.setdefault(key, reply.prompt_n + (reply.cache_n or 0))
                replies.append(reply)
                self.launch.requests += 1
            wall_ms += ms
        return replies, wall_ms, joules


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
    except psutil.Error:
        return []


def rss_mib(tree: list[psutil.Process]) -> float:
    """Return the resident memory of the processes together, in MiB."""
    total = 0
    for process in tree:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total / _MIB
