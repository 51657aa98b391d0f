"""Measures by a build's own ``llama-bench``: one process, or few, for all workloads of a config.

It evaluates random tokens, without HTTP, sampling or chat template, at a depth of the cache that is
filled before its clock starts. What a row says is checked against what was asked; a process that
dies takes only the workload along that it dies of: the others are measured one by one.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from pytest_llmperf.build.bench_dialect import bench_dialect_of, computing
from pytest_llmperf.build.build import Build, parse_build_info
from pytest_llmperf.build.tools import BENCH, tool_of
from pytest_llmperf.errors import (
    CheckError,
    LlmperfError,
    RunError,
    ToolError,
    TooSlowError,
)
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.plan.config import Config, ModelFiles, Turn, Workload
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.client import too_slow
from pytest_llmperf.serve.failure import shortage
from pytest_llmperf.serve.launch import (
    ServePlan,
    out_of_memory,
    server_environment,
    shown,
    tail,
)
from pytest_llmperf.serve.process import ServerProcess
from pytest_llmperf.serve.throttle import Throttle

PROMPT = "random tokens of llama-bench"
"""Stands for the digest of a prompt in the fingerprint."""

# llama-bench: benchmark 3/4: depth run 1/5
_STEP = re.compile(r"^llama-bench: benchmark (\d+)/(\d+): (.+)$", re.MULTILINE)
_REPETITION = re.compile(r"\d+/\d+")
_LOADING = "starting"
_NO_ROOM = re.compile(r"error: failed to (?:load model|create context)")
_NO_MODEL = re.compile(r"error: failed to load model")
_ON_HOST = {"", "CPU", "BLAS"}
_POLL_S = 0.1
_SAY_S = 2.0
_numbers = count(1)

_Workloads = Sequence[Workload]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of ``llama-bench -o jsonl``: the samples of one kind of work at one depth.

    Attributes:
        prompt: Prompt tokens evaluated, 0 if tokens were generated.
        generate: Tokens generated one by one, 0 if a prompt was evaluated.
        depth: Tokens in the cache before that.
        samples: Tokens a second, one value a repetition.
        number: Build number as the tool tells it; 0 where it does not know it.
        commit: Commit hash likewise, or ``unknown``.
        backends: What it could compute with: ``CPU``, ``CUDA``, ``BLAS``.
        gpu_layers: Layers to be put on a GPU; negative for all.
        model: Model file as the tool was told.
    """

    prompt: int
    generate: int
    depth: int
    samples: tuple[float, ...]
    number: int
    commit: str
    backends: tuple[str, ...]
    gpu_layers: int
    model: str

    @property
    def work(self) -> tuple[int, int, int]:
        """What it is a measurement of: prompt, generated tokens, depth."""
        return self.prompt, self.generate, self.depth


def parse_rows(text: str) -> list[Row]:
    """Return the rows in what ``llama-bench -o jsonl`` wrote, among other lines.

    Raises:
        ToolError: If a row cannot be read, or lacks a field.
    """
    found = []
    for line in text.splitlines():
        if not line.startswith('{"'):
            continue
        try:
            raw = json.loads(line)
            number, commit = parse_build_info(f"b{raw['build_number']}-{raw['build_commit']}")
            found.append(
                Row(
                    prompt=int(raw["n_prompt"]),
                    generate=int(raw["n_gen"]),
                    depth=int(raw["n_depth"]),
                    samples=tuple(float(value) for value in raw["samples_ts"]),
                    number=number,
                    commit=commit,
                    backends=tuple(str(raw["backends"]).split(",")),
                    gpu_layers=int(raw["n_gpu_layers"]),
                    model=str(raw["model_filename"]),
                )
            )
        except KeyError as error:
            raise ToolError(f"a row of {BENCH} lacks {error}: {line[:200]}") from error
        except (ValueError, TypeError) as error:
            raise ToolError(f"a row of {BENCH} cannot be read ({error}): {line[:200]}") from error
    return found


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """What is measured, and how.

    Attributes:
        build: Whose tool.
        config: Options and name.
        files: The model.
        repetitions: Samples of each kind of work, ``-r``.
        serve: Run folder, time limits, progress.
        what: Names the launch for people: ``launch 2``.
    """

    build: Build
    config: Config
    files: ModelFiles
    repetitions: int
    serve: ServePlan
    what: str = ""

    @property
    def options(self) -> dict[str, OptionValue]:
        """Options of the config and the build, in the names of the server."""
        return {**self.config.options, **self.build.options}

    @property
    def about(self) -> str:
        """What runs, for people: ``c7: launch 2: b8149's llama-bench``."""
        told = (self.config.name, self.what, f"{self.build.label}'s {BENCH}")
        return ": ".join(filter(None, told))

    def command(self, workloads: Sequence[Workload]) -> list[str]:
        """Return the command that measures workloads which differ in nothing but their depth.

        Raises:
            BuildError: If the build has no such tool, or it cannot take an option.
        """
        turn = _turn(workloads[0])
        depths = sorted({_turn(workload).depth for workload in workloads})
        drafts = bool(self.config.draft) or self.files.draft is not None
        arguments = bench_dialect_of(self.build).arguments(self.options, drafts=drafts)
        return [
            *(str(tool_of(self.build, BENCH)), "--model", str(self.files.main), *arguments),
            *("--n-prompt", str(turn.prompt), "--n-gen", str(turn.generate)),
            *("--n-depth", ",".join(map(str, depths)), "--repetitions", str(self.repetitions)),
            *("--output", "jsonl", "--progress"),
        ]

    def check(self, row: Row) -> None:
        """Refuse a row that is not of what was asked for.

        Raises:
            CheckError: With all that is wrong with it.
        """
        wrong = []
        build = self.build
        if build.number and row.number and build.number != row.number:
            wrong.append(f"it is of build {row.number}, not {build.number}")
        known = {build.commit, row.commit}
        if "unknown" not in known and not _same_commit(build.commit, row.commit):
            wrong.append(f"it is of commit {row.commit}, not {build.commit}")
        if row.model != str(self.files.main):
            wrong.append(f"it is of the model {row.model}, not {self.files.main}")
        if len(row.samples) != self.repetitions:
            wrong.append(f"it has {len(row.samples)} samples, not {self.repetitions}")
        if not all(0 < value < math.inf for value in row.samples):
            wrong.append(f"its samples are not all positive: {list(row.samples)}")
        if self.config.gpu:
            if set(row.backends) <= _ON_HOST:
                wrong.append(f"it ran on the CPU (backends {','.join(row.backends)})")
            if row.gpu_layers == 0 and computing(self.options).get("gpu-layers") not in {0, "0"}:
                wrong.append("it put no layer on a GPU")
        if wrong:
            raise CheckError(
                f"{self.about}: its row of {_shown(row.work)} is not a measurement: "
                f"{'; '.join(wrong)}"
            )


def _same_commit(one: str, other: str) -> bool:
    # Hashes are told in as many digits as git found enough.
    return one.startswith(other) or other.startswith(one)


def _turn(workload: Workload) -> Turn:
    return workload.turns[0]


def _works(workload: Workload) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    turn = _turn(workload)
    return (turn.prompt, 0, turn.depth), (0, turn.generate, turn.depth)


def _shown(work: tuple[int, int, int]) -> str:
    prompt, generate, depth = work
    return f"{f'prompt {prompt}' if prompt else f'generate {generate}'} at depth {depth}"


@dataclass(slots=True)
class Benched:
    """A launch, and what went wrong with which workload.

    Attributes:
        launch: What was measured.
        failures: Workload name to its error.
    """

    launch: Launch
    failures: dict[str, LlmperfError] = field(default_factory=dict)


def run_bench(plan: BenchPlan, workloads: Sequence[Workload]) -> Benched:
    """Measure workloads by the build's own tool.

    Those that differ in nothing but their depth share a process. If it dies, those that it did not
    get to are measured one by one.

    Args:
        plan: What is measured, and how.
        workloads: Of ``llama-bench``.

    Raises:
        BuildError: If the build has no such tool, or it cannot take an option of the config.
        ServerError: If the tool cannot be started at all, or has no memory for the model.
        ToolError: If it cannot do its work whatever the workload, before any of it is done.
    """
    plan.serve.folder.mkdir(parents=True, exist_ok=True)
    done = Benched(Launch(plan.build.label, plan.config.name, "", ""))
    done.launch.model = plan.files.main.name
    groups: dict[tuple[int, int], list[Workload]] = {}
    for workload in sorted(workloads, key=lambda one: _turn(one).depth):
        turn = _turn(workload)
        groups.setdefault((turn.prompt, turn.generate), []).append(workload)
    for group in groups.values():
        ran = _run(plan, group)
        if ran.fatal and ran.failure is not None:
            if not done.launch.samples:
                raise ran.failure
            # It worked a moment ago, so what was measured then stands.
            done.failures |= {workload.name: ran.failure for workload in group}
            continue
        done.launch.command = "; ".join(filter(None, (done.launch.command, ran.command)))
        done.launch.log = done.launch.log or str(ran.log)
        _take(plan, group, ran, done)
    return done


@dataclass(slots=True)
class _Ran:
    """What one process brought, and what ended it before it was done.

    Attributes:
        command: As one would type it.
        log: Its output.
        rows: By what they are a measurement of.
        failure: What went wrong, None if nothing did.
        fatal: Whether that had nothing to do with the workload.
    """

    command: str
    log: Path
    rows: dict[tuple[int, int, int], Row] = field(default_factory=dict)
    failure: RunError | None = None
    fatal: bool = False


def _lacking(workloads: Iterable[Workload], rows: Collection[tuple[int, int, int]]) -> _Workloads:
    return [one for one in workloads if not all(work in rows for work in _works(one))]


def _take(plan: BenchPlan, group: _Workloads, ran: _Ran, done: Benched) -> None:
    """Take the samples of the workloads that were finished, and see to the others."""
    left = _lacking(group, ran.rows)
    for workload in group:
        if workload not in left:
            _take_rows(plan, workload, ran.rows, done)
    slow: Workload | None = None
    for workload in left:
        if slow is not None and 0 < workload.limit <= slow.limit:
            # What is deeper takes longer.
            done.failures[workload.name] = TooSlowError(
                f"{workload.name} was not tried: {slow.name}, which is less deep, took more than "
                f"its limit of {slow.limit:g} s"
            )
            continue
        at_fault = workload is left[0] and isinstance(ran.failure, TooSlowError)
        if ran.failure is not None and (at_fault or len(group) == 1):
            done.failures[workload.name] = ran.failure
        else:
            plan.serve.progress(f"{plan.about}: {workload.name} by itself, after a crash")
            _take(plan, [workload], _run(plan, [workload]), done)
        if isinstance(done.failures.get(workload.name), TooSlowError):
            slow = workload


def _take_rows(
    plan: BenchPlan, workload: Workload, rows: Mapping[tuple[int, int, int], Row], done: Benched
) -> None:
    prefill, decode = (rows[work] for work in _works(workload))
    try:
        plan.check(prefill)
        plan.check(decode)
    except CheckError as error:
        done.failures[workload.name] = error
        return
    launch = done.launch
    launch.samples[workload.name] = {
        "prefill_tps": list(prefill.samples),
        "decode_tps": list(decode.samples),
    }
    launch.digests[workload.name] = PROMPT
    launch.requests += len(prefill.samples) + len(decode.samples)


def _run(plan: BenchPlan, group: _Workloads) -> _Ran:
    """Run the tool once for workloads of the same lengths, the least deep first."""
    command = plan.command(group)
    process = _start(plan, command)
    ran = _Ran(shown(plan.build, command, plan.serve.cards), process.log)
    throttle: Throttle | None = None
    if plan.build.stopped_share:
        throttle = Throttle(process.pid, plan.build.stopped_share)
    try:
        ran.failure = _watch(plan, group, process)
    finally:
        if throttle is not None:
            throttle.stop()
        process.stop()
    text = _text(process.log)
    for row in parse_rows(text):
        if row.work in ran.rows:
            raise ToolError(f"{plan.about}: two rows of {_shown(row.work)}; log: {ran.log}")
        ran.rows[row.work] = row
    steps = [match.group(3) for match in _STEP.finditer(text)]
    unloaded = bool(steps) and steps[-1] == _LOADING and ran.failure is not None
    no_model = not ran.rows and (not steps or unloaded or bool(_NO_MODEL.search(text)))
    if ran.failure is not None:
        ran.fatal = no_model
    elif process.poll() or _lacking(group, ran.rows):
        ran.fatal = no_model
        if _NO_ROOM.search(text) and (no_model or len(group) == 1) and shortage(text) is None:
            # Some builds say why only when they say everything, which would disturb the timing.
            text += _why(plan, group[:1])
        missing = ", ".join(
            _shown(work) for one in group for work in _works(one) if work not in ran.rows
        )
        how = f"{plan.about} ended with {process.describe_exit()}"
        ran.failure = _ended(process, text, f"{how}, without {missing}" if missing else how)
    return ran


def _start(plan: BenchPlan, command: Sequence[str]) -> ServerProcess:
    label = re.sub(r"[^\w.+-]", "_", plan.build.label)
    log = plan.serve.folder / f"bench-{next(_numbers):03d}-{label}-{plan.config.name}.log"
    config_home = plan.serve.folder / "no-config"
    config_home.mkdir(exist_ok=True)
    env = server_environment(plan.build, config_home, plan.serve.cards)
    return ServerProcess(command, log, env)


def _text(log: Path) -> str:
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    # What follows the last line end is half a line.
    return text[: text.rfind("\n") + 1]


def _watch(plan: BenchPlan, group: _Workloads, process: ServerProcess) -> RunError | None:
    """Wait until the tool ends, telling how far it is; return why it was given up, if it was."""
    began = sampled = stepped = said = time.monotonic()
    before: list[tuple[str, str, str]] = []
    while process.poll() is None:
        time.sleep(_POLL_S)
        now = time.monotonic()
        text = _text(process.log)
        steps = _STEP.findall(text)
        if steps != before:
            stepped = now
            if not before or _sample(*steps[-1]) != _sample(*before[-1]):
                sampled = now
            before = steps
        number, of, step = steps[-1] if steps else ("0", "0", _LOADING)
        rows = {row.work for row in parse_rows(text)}
        workload = (_lacking(group, rows) or group)[0]
        if error := _given_up(plan, workload, step, now - sampled, now - stepped):
            return error
        if now - said > _SAY_S:
            said = now
            plan.serve.progress(f"{plan.about} {number}/{of}: {step} ({now - began:.0f} s)")
    return None


def _sample(number: str, _of: str, step: str) -> tuple[str, str]:
    """Return what tells one sample's steps from another's: filling the cache is part of it."""
    repetition = _REPETITION.search(step)
    return number, repetition.group(0) if repetition else step


def _given_up(
    plan: BenchPlan, workload: Workload, step: str, seconds: float, silent: float
) -> RunError | None:
    """Return why the tool is not waited for any longer, None if it is.

    Args:
        plan: What is measured.
        workload: Which of it is being measured.
        step: The last that the tool told.
        seconds: Since the sample began.
        silent: Since the step began.
    """
    if step == _LOADING:
        if silent > plan.serve.timeout:
            return ToolError(
                f"{plan.about} did not load its model in {plan.serve.timeout:g} s: raise "
                "`llmperf_start_timeout` in the ini file"
            )
    elif workload.limit and seconds > workload.limit:
        return too_slow(f"{plan.about}: {workload.name}", workload.limit, f"in its {step}")
    elif not workload.limit and silent > plan.serve.hang:
        return ToolError(
            f"{plan.about}: {workload.name}: nothing came for {plan.serve.hang:g} s, in its "
            f"{step}: raise `llmperf_hang_timeout` in the ini file, or give the workload a `limit`"
        )
    return None


def _why(plan: BenchPlan, group: _Workloads) -> str:
    """Return what the tool says when it says everything, for want of a reason."""
    process = _start(plan, [*replace(plan, repetitions=1).command(group), "--verbose"])
    try:
        _watch(plan, group, process)
    finally:
        process.stop()
    return _text(process.log)


def _ended(process: ServerProcess, text: str, how: str) -> RunError:
    """Return the error of a tool that did not do its work: no memory, or something else."""
    told = f"{how}; log: {process.log}\n{tail(process.log)}"
    lacking = shortage(text)
    if lacking is None and not process.killed_for_memory:
        return ToolError(told)
    # The tool makes its context as long as the depth wants it.
    deep = "leave out what is as deep, or quantize the cache (cache-type-k, cache-type-v)"
    advice = "" if lacking is not None and lacking.purpose in {"model", "compute"} else deep
    return out_of_memory(process, text, lacking, told, advice=advice)
