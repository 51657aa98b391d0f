"""One pytest run: what was asked for, which builds, what to compare with, what came out.

Loaded only once a selected test uses a fixture of this plugin.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pytest_llmperf.budget import Budget
from pytest_llmperf.build.bench_dialect import computing
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.devices import devices_command, devices_of
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import is_spec, parse_spec
from pytest_llmperf.build.tools import BENCH
from pytest_llmperf.campaign.base import Campaign, PairedLaunches
from pytest_llmperf.campaign.bench import BenchCampaign
from pytest_llmperf.campaign.servers import ServerCampaign
from pytest_llmperf.errors import BuildError, LlmperfError, PlanError, nearest
from pytest_llmperf.gate import (
    Absent,
    Comparison,
    Fingerprint,
    Question,
    Stored,
    differences,
    failed_with,
    failure_in,
    no_launch,
    unmeasured,
)
from pytest_llmperf.gpu.cards import all_gpus, gpus
from pytest_llmperf.gpu.nvml import Kind, status
from pytest_llmperf.judge.chunks import QUALITY
from pytest_llmperf.judge.priors import Priors
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.launch import PROTOCOL, Launch, process_tree
from pytest_llmperf.measure.machine import machine, machine_fingerprint
from pytest_llmperf.measure.on_gpu import OnGpu
from pytest_llmperf.metrics import METRICS, PUBLISHED_ONLY, Metric
from pytest_llmperf.models.corpus import locate_corpus
from pytest_llmperf.models.locate import check_sha256, files_of, locate, sha256
from pytest_llmperf.passes import Passed, Passes
from pytest_llmperf.plan.config import LAUNCH, Case, Config, ModelFiles, Tool
from pytest_llmperf.plan.options import told
from pytest_llmperf.plan.suite import Suite
from pytest_llmperf.preflight import disk_warnings, gpu_warnings
from pytest_llmperf.quality_gate import QualityQuestion, not_alone
from pytest_llmperf.report.result import Result, Side
from pytest_llmperf.roof import DECODE, memory_of, roofline
from pytest_llmperf.serve.launch import (
    ServePlan,
    Server,
    check_options,
    needs,
    server_options,
    start,
)
from pytest_llmperf.serve.ollama import ollama_options
from pytest_llmperf.settings import Settings

_OF_BUILD = frozenset({"options", "env", "run"})
"""Parts of a fingerprint that tell how a build is started."""

GUARDS = ("offloaded_layers",)
"""Metrics that every case of a GPU config is judged by as well, where they are known."""


class Progress(Protocol):
    """Says what goes on."""

    def __call__(self, text: str) -> None:
        """Show ``text`` for as long as nothing newer comes."""

    def clear(self) -> None:
        """Wipe what is shown."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of pytest-xdist.

    Attributes:
        name: Such as ``gw1``.
        run: Name of the folder that all workers of the run share.
    """

    name: str
    run: str

    @property
    def controller(self) -> int:
        """Process id of the controller, on its own machine."""
        return int(self.run.rpartition("-")[2])

    @property
    def number(self) -> int:
        """Its number, from 0 on."""
        digits = self.name.removeprefix("gw")
        return int(digits) if digits.isdecimal() else 0


@dataclass(slots=True)
class Run:
    """Everything one pytest run knows.

    Attributes:
        settings: What it was told.
        suite: The suite file.
        new: The build under test.
        base: The build measured side by side, or None.
        comparison: What to compare with.
        folder: Run folder: logs.
        progress: Says what goes on.
        seed: Seed of the coin flips.
        selected: Cases of the selected tests, by config.
        priors: What calibration found of this machine's noise.
        worker: Which worker of pytest-xdist this is, or None.
    """

    settings: Settings
    suite: Suite
    new: Build
    base: Build | None
    comparison: Comparison
    folder: Path
    progress: Progress
    seed: int
    selected: Mapping[str, Sequence[Case]]
    priors: Priors = field(default_factory=Priors)
    worker: Worker | None = None
    _leases: Leases | None = None
    _leased: bool = False
    _campaigns: dict[tuple[str, bool, Tool], Campaign] = field(default_factory=dict)
    _rematches: dict[tuple[str, bool, Tool], Campaign] = field(default_factory=dict)
    _lacking: dict[str, LlmperfError | None] = field(default_factory=dict)
    _passes: Passes | None = None
    _recorded: Build | LlmperfError | None = None
    _models: dict[str, Path] = field(default_factory=dict)
    _server: Server | None = None
    _on_gpu: OnGpu | None = None
    _gpu_error: LlmperfError | None = None
    _gpu_checked: bool = False
    _cuda: bool = True

    # -- what test authors reach through the fixtures ------------------------------------

    def prepare(self, case: Case, asked: Collection[str], *, gpu: bool = False) -> None:
        """Wait until the GPUs and the host are free for what :meth:`gate` will measure.

        So that a test's budget does not pay for the waiting. What goes wrong is for gate() to tell.

        Args:
            case: Config and workload.
            asked: Metric names.
            gpu: Whether the test is marked ``gpu``, whatever its config says.
        """
        with suppress(LlmperfError):
            check_metrics(case, asked)
            case = replace(case, config=self._with_gpu(case.config, marked=gpu))
            self._require_gpu(needed=case.config.gpu)
            self._check_options(case)
            self._lease_for(case)

    def gate(
        self,
        nodeid: str,
        case: Case,
        asked: Mapping[str, float | None],
        budget: Budget | None = None,
        *,
        gpu: bool = False,
    ) -> Result:
        """Judge metrics of a case.

        Args:
            nodeid: The test.
            case: Config and workload.
            asked: Metric name to the test's own tolerance, or None for the next lower source.
            budget: What the test may spend on measuring again; by default that of the settings.
            gpu: Whether the test is marked ``gpu``, whatever its config says.

        Raises:
            PlanError: If there is no such metric, or the case cannot show it.
        """
        check_metrics(case, asked)
        case = replace(case, config=self._with_gpu(case.config, marked=gpu))
        try:
            self._require_gpu(needed=case.config.gpu)
            self._check_options(case)
            # First, since a model may have to be made, which would disturb who measures now.
            self._lease_for(case)
            if case.corpus_pass is not None:
                return self._gate_quality(nodeid, case, asked)
            campaign = self.campaign(case.config, case.tool)
        except LlmperfError as error:
            verdicts = [unmeasured(METRICS[name], error) for name in asked]
            return Result(
                nodeid,
                case.key,
                self._side(self.new, ()),
                self._base_side(()),
                self.machine_key,
                tuple(verdicts),
                options=self._options,
            )
        budget = Budget(self.settings.budget) if budget is None else budget

        def judge(name: str, own: float | None) -> Verdict:
            question = Question(
                campaign=campaign,
                case=case,
                metric=METRICS[name],
                tolerance=self.tolerance(METRICS[name], case.config, own),
                budget=budget,
                launches=self.settings.launches,
                fingerprint=lambda launch: self.fingerprint(case, launch),
                priors=self.priors,
                rematch=lambda: self.rematch(case),
                begun=lambda: self._rematches.get(_key(case.config, case.tool)),
            )
            return question.answer(self.comparison)

        guards = _guards(case, asked)
        failing = [
            verdict
            for name in guards
            if (verdict := judge(name, None)).outcome is Outcome.REGRESSION
        ]
        if failing:
            # It fails whatever the others say, and may be very slow: no more time is spent on it.
            budget.close()
        others = [judge(name, own) for name, own in asked.items()]
        verdicts = [*failing, *(_unfinished(one, failing) for one in others)]
        return self._result(nodeid, case, campaign, verdicts, (*guards, *asked))

    def _gate_quality(self, nodeid: str, case: Case, asked: Mapping[str, float | None]) -> Result:
        """Judge quality metrics of a case by passes over its corpus."""
        passes = self.passes
        verdicts: list[Verdict] = []
        base: Passed | None = None
        new: Passed | None = None
        for name, own in asked.items():
            metric = METRICS[name]
            tolerance = self.tolerance(metric, case.config, own)
            question = QualityQuestion(passes, case, metric, tolerance)
            verdict, its_base, its_new = question.answer(self.comparison)
            verdicts.append(verdict)
            base, new = its_base or base, its_new or new
        sides = [self._passed_side(self.new, new)]
        if self.base is not None:
            sides.append(self._passed_side(self.base, base))
        measured = {name: new.values[name] for name in asked} if new is not None else {}
        # A file that the config names has its place already.
        own = new is not None and not passes.names_file(case.config)
        reference = new.reference if own and new is not None else None
        fingerprint: Fingerprint = {}
        if new is not None:
            fingerprint = passes.fingerprint(case, new)
        elif failure_in(verdicts):
            fingerprint = passes.conditions(case)
        return Result(
            nodeid=nodeid,
            case=case.key,
            new=sides[0],
            base=sides[1] if len(sides) > 1 else self._base_side(()),
            machine=self.machine_key,
            verdicts=not_alone(verdicts),
            fingerprint=fingerprint,
            options=self._options,
            measured=measured,
            reference=str(reference or ""),
        )

    def _passed_side(self, build: Build, passed: Passed | None) -> Side:
        side = self._side(build, ())
        if passed is None:
            return side
        logs = (passed.log,) if passed.log else ()
        return replace(side, command=passed.command, logs=logs, gpu=passed.gpu)

    def server(self, config: Config, *, gpu: bool = False) -> Server:
        """Return a running server of the build under test, started once a config.

        Args:
            config: The config.
            gpu: Whether the test is marked ``gpu``, whatever its config says.

        Raises:
            LlmperfError: If it cannot be started.
        """
        config = self._with_gpu(config, marked=gpu)
        if self._server is not None and (self._server.config != config or not self._server.alive()):
            self.close_server()
        if self._server is None:
            self._require_gpu(needed=config.gpu)
            files = self.files(config) if self.new.url is None else ModelFiles(Path())
            self._lease_for(Case(config))
            cards = self.leases.held[: config.cards]
            watched = cards if self.new.url is None else ()
            self._on_gpu = OnGpu(watched, self.progress)
            plan = replace(self._serve_plan(), cards=cards)
            try:
                self._server = start(self.new, config, files, plan)
            except BaseException:
                self._on_gpu.end((), config.name, check=False)
                raise
        return self._server

    def leave_config(self) -> None:
        """Stop what runs of a config, and let others have its GPUs and the host."""
        self.close_server()
        if self._leased:
            self._leased = False
            self.leases.release()

    def close_server(self) -> None:
        """Stop the server that :meth:`server` started, if it runs."""
        if self._server is not None:
            pid, name = self._server.pid, self._server.config.name
            pids = [process.pid for process in process_tree(pid)] if pid is not None else []
            self._server.stop()
            self._server = None
            if self._on_gpu is not None:
                # What comes next on the GPU shall find it free; who leaks there is told by gates.
                self._on_gpu.end(pids, name, check=False)

    def _with_gpu(self, config: Config, *, marked: bool) -> Config:
        """Return a config that gets a GPU if a test of it is marked so.

        All selected tests of a config share its servers, so what one of them needs all get; those
        that are not marked themselves do without where there is none.
        """
        if config.gpu:
            return config
        asked = any(case.config.gpu for case in self.selected.get(config.name, ()))
        return replace(config, gpu=marked or (asked and self._lacks_gpu() is None))

    # -- what the rest of the run needs --------------------------------------------------

    @property
    def machine_key(self) -> str:
        """Key of this machine's baselines."""
        return str(machine(self.settings.machine)["key"])

    def tolerance(self, metric: Metric, config: Config, own: float | None) -> float:
        """Return a metric's tolerance: the test's over the suite file's over the ini's."""
        for table in (config.tolerances, self.suite.tolerances, self.settings.tolerances):
            if own is None:
                own = table.get(metric.name)
        return metric.tolerance if own is None else own

    @property
    def leases(self) -> Leases:
        """The GPUs and the host, as far as others leave them to us."""
        if self._leases is None:
            self._leases = Leases(
                self.settings.cache / "locks",
                gpus(),
                all_gpus(),
                self.progress,
                first=0 if self.worker is None else self.worker.number,
            )
        return self._leases

    @property
    def passes(self) -> Passes:
        """The passes of this run, made on first use."""
        if self._passes is None:
            folders = (self.suite.path.parent, *self.settings.models)
            self._passes = Passes(
                new=self.new,
                base=self.base,
                configs=self.suite.configs,
                model=self.model,
                corpus=lambda one: locate_corpus(one, folders),
                serve=self._serve_plan(),
                cache=self.settings.cache,
                leases=self.leases,
                suite_folder=self.suite.path.parent,
                limit=self.settings.pass_limit,
                machine=json.dumps(machine_fingerprint(self.settings.machine), sort_keys=True),
                before=self.close_server,
            )
        return self._passes

    def campaign(self, config: Config, tool: Tool) -> Campaign:
        """Return the campaign of a config by one of a build's programs, made on first use.

        Raises:
            LlmperfError: If the config's model or a GPU it needs is not there.
        """
        key = _key(config, tool)
        if key not in self._campaigns:
            self._campaigns[key] = self._campaign(config, tool, self.base)
        return self._campaigns[key]

    def rematch(self, case: Case) -> Campaign:
        """Return the campaign of the build under test against the recorded baseline's build.

        Raises:
            LlmperfError: If that build, as it was recorded, cannot be started here.
        """
        key = _key(case.config, case.tool)
        if key not in self._rematches:
            if self._recorded is None:
                try:
                    self._recorded = self._recorded_build()
                except LlmperfError as error:
                    self._recorded = error
            if isinstance(self._recorded, LlmperfError):
                raise self._recorded
            self._check_as_recorded(self._recorded, case)
            self._rematches[key] = self._campaign(case.config, case.tool, self._recorded)
        return self._rematches[key]

    def _recorded_build(self) -> Build:
        if not isinstance(self.comparison, Stored):
            raise BuildError("nothing is compared with a recorded baseline")
        known = self.comparison.baseline.build
        label = self.comparison.label
        named = label if label in self.suite.builds else str(known.get("source") or "")
        if not is_spec(named, self.suite.builds, self.settings.root):
            raise BuildError(f"the build of {label} ({named or 'source unknown'}) is not to be had")
        spec = parse_spec(named, self.suite.builds, self.settings.root)
        found = resolve(spec, self.settings.cache, self.progress, self.settings.containers)
        if found.sha256 != known.get("sha256"):
            raise BuildError(f"{named} is not the build that was recorded as {label}")
        return found

    def _check_as_recorded(self, build: Build, case: Case) -> None:
        """Refuse a build whose entry in the suite file was another when it was recorded."""
        if not isinstance(self.comparison, Stored):  # pragma: no cover - else nothing is recorded
            return
        known = self.comparison.baseline.fingerprints.get(case.key, {})
        now = _conditions(build, case)
        differing = differences({name: known[name] for name in known.keys() & _OF_BUILD}, now)
        if differing:
            raise BuildError(
                f"{self.comparison.label} would not be started as it was recorded "
                f"({'; '.join(differing)}): see its entry in [builds]"
            )

    def _campaign(self, config: Config, tool: Tool, base: Build | None) -> Campaign:
        self._require_gpu(needed=config.gpu)
        cases = self.selected.get(config.name, ())
        wanted = {c.workload.name for c in cases if c.workload and c.tool == tool}
        kind = BenchCampaign if tool == BENCH else ServerCampaign
        return kind(
            config=config,
            workloads=[w for w in self.suite.workloads.values() if w.name in wanted],
            new=self.new,
            base=base,
            files=self.files(config) if self._needs_model else ModelFiles(Path()),
            serve=self._serve_plan(),
            pairs=self.settings.pairs,
            leases=self.leases,
            rng=random.Random(f"{self.seed}:{config.name}"),  # noqa: S311 - a coin, not a key
            before=self.close_server,
            foreign_load=self.settings.foreign_load,
        )

    def model(self, config: Config) -> Path:
        """Return the model file of a config.

        Raises:
            ModelError: If it is not there or not the one named.
        """
        return self._located(config.model)

    def files(self, config: Config) -> ModelFiles:
        """Return all files that a server of a config loads.

        Raises:
            ModelError: If one is not there or not the one named.
        """
        return files_of(config, self.suite.models, self._located)

    def _located(self, name: str) -> Path:
        model = self.suite.models[name]
        if model.name not in self._models:
            path = locate(model, self.settings.models, self.settings.cache, self.suite.models)
            if model.sha256:
                check_sha256(model, path, self.settings.cache)
            self._models[model.name] = path
        return self._models[model.name]

    def fingerprint(self, case: Case, launch: Launch) -> Fingerprint:
        """Return what must be equal for another result to be comparable with this launch."""
        found: dict[str, str | int | float | bool] = {
            **machine_fingerprint(self.settings.machine),
            "protocol": PROTOCOL,
            **_conditions(self.new, case),
        }
        if case.tool != "llama-server":
            found["tool"] = case.tool
        if case.config.cards > 1:
            # Unsaid where it is one: what was recorded before there was a choice stays valid.
            found["gpus"] = case.config.cards
        if self.new.url is not None:
            # What a running server was started with is its own affair, but for what it is asked.
            asked = told(ollama_options(case.config)[0]) if self.new.api == "ollama" else ""
            found |= {"model": launch.model, "options": asked or "of the running server"}
        else:
            files = self.files(case.config)
            for name, path in (
                ("model", files.main),
                ("draft", files.draft),
                ("projector", files.projector),
            ):
                if path is not None:
                    found[name] = sha256(path, self.settings.cache)
        if case.workload is not None:
            found["workload"] = case.workload.digest()
            found["prompt"] = launch.digests.get(case.workload.name, "unknown")
        elif launch.vram_by == "log":
            found["vram"] = "by the log"
        elif launch.vram_by == "use":
            found["vram"] = "by the GPU's use"
        return found

    @property
    def headline(self) -> list[str]:
        """Lines that say what is compared with what, for the start of the run."""
        lines = [f"build under test {self.new.describe()}"]
        if self.base is not None:
            lines.append(f"side by side with {self.base.describe()}")
            if self.base.identity == self.new.identity:
                lines.append("both are the same build: what differs is noise")
        elif isinstance(self.comparison, Stored):
            lines.append(f"baseline {self.comparison.label}, {self.comparison.path}")
        elif isinstance(self.comparison, Absent):
            lines.append(self.comparison.reason)
        else:
            lines.append(f"recording a baseline in {self.settings.baselines}")
        lines += [build.note for build in (self.new, self.base) if build and build.note]
        lines += disk_warnings([self.folder, self.settings.cache])
        if any(case.config.gpu for cases in self.selected.values() for case in cases):
            lines += gpu_warnings()
        noise = f"noise {self.priors.about}" if self.priors.about else "noise not calibrated"
        folder = self.folder if self.worker is None else self.folder.parent
        return [*lines, f"machine {self.machine_key}, {noise}, logs in {folder}"]

    def close(self) -> None:
        """Stop what still runs, and let others have the machine."""
        self.leave_config()

    # -- inside ----------------------------------------------------------------------------

    @property
    def _options(self) -> str:
        """What to type to compare the same things again."""
        given = [("--llmperf-build", self.settings.build), ("--baseline", self.settings.baseline)]
        return " ".join(f"{name}={shlex.quote(value)}" for name, value in given if value)

    def _check_options(self, case: Case) -> None:
        """Tell what a server's builds lack before anything waits for another run to end."""
        if case.tool == BENCH or case.corpus_pass is not None:
            return
        name = case.config.name
        if name not in self._lacking:
            # Kept, whatever it is: a program that hangs is not asked again for every test.
            self._lacking[name] = self._look_for_options(case.config)
        if (lacking := self._lacking[name]) is not None:
            raise lacking

    def _look_for_options(self, config: Config) -> LlmperfError | None:
        try:
            for build in filter(None, (self.new, self.base)):
                check_options(build, config)
        except LlmperfError as error:
            return error
        return None

    def _lease_for(self, case: Case) -> None:
        """Take what a case needs of the machine, for all tests of its config one after the other.

        So that every launch of a config is on one card, and what a test's servers leave there is
        no other's trouble.

        Raises:
            RunError: If the machine has fewer GPUs.
        """
        sides = (self.new, self.base)
        cards, exclusive = (
            self.passes.needs(case) if case.corpus_pass else needs(case.config, sides)
        )
        # What uses GPUs by other means than CUDA, such as Vulkan, cannot be kept to one of them.
        exclusive = exclusive or not self._cuda
        if self._leased and not self.leases.covers(cards, exclusive=exclusive):
            # A lease cannot grow: whoever did it might wait for another that does so too.
            self.leave_config()
        if not self._leased:
            what = f"config {case.config.name}"
            self.leases.acquire(cards, exclusive=exclusive, what=what)
            self._leased = True

    def _serve_plan(self) -> ServePlan:
        return ServePlan(
            folder=self.folder,
            timeout=self.settings.start_timeout,
            hang=self.settings.hang_timeout,
            progress=self.progress,
        )

    @property
    def _needs_model(self) -> bool:
        """Whether any server is started here, and not only connected to."""
        return any(build is not None and build.url is None for build in (self.new, self.base))

    def _require_gpu(self, *, needed: bool) -> None:
        if needed and (error := self._lacks_gpu()) is not None:
            raise error

    def _lacks_gpu(self) -> LlmperfError | None:
        """Return why a build has no GPU here, None if all have one."""
        if not self._gpu_checked:
            self._gpu_checked = True
            try:
                self._gpu_error = self._look_for_gpu()
            except LlmperfError as error:
                self._gpu_error = error
        return self._gpu_error

    def _look_for_gpu(self) -> LlmperfError | None:
        for build in (self.new, self.base):
            if build is None or build.url is not None:
                continue
            if found := devices_of(build):
                self._cuda = self._cuda and all(one.id.startswith("CUDA") for one in found)
                continue
            if cards := gpus():
                return BuildError(
                    f"build {build.label} sees no GPU, though this machine has {cards[0].name}: it "
                    "would run on the CPU (a CPU build, or its GPU runtime is missing); see what "
                    f"`{shlex.join(devices_command(build))}` says"
                )
            state = status()
            broken = f" ({state.reason})" if state.kind is Kind.BROKEN else ""
            return BuildError(
                f"this machine has no GPU that the build can use{broken}: run these tests on the "
                'GPU runner, or leave them out with -m "not gpu"'
            )
        return None

    def _side(self, build: Build, launches: Sequence[Launch]) -> Side:
        return Side(
            label=build.label,
            about=build.describe(),
            build={
                "label": build.label,
                "number": build.number,
                "commit": build.commit,
                "source": build.source,
                "sha256": build.sha256,
            },
            command=launches[-1].command if launches else "",
            logs=tuple(launch.log for launch in launches if launch.log),
            gpu=_gpu_use(launches),
        )

    def _base_side(self, launches: Sequence[Launch]) -> Side | None:
        """Return the baseline's side: a build, or a record with what was started to settle it."""
        if self.base is not None:
            return self._side(self.base, launches)
        if not isinstance(self.comparison, Stored):
            return None
        block = self.comparison.baseline.build
        number = f"build {block.get('number')}" if block.get("number") else "number unknown"
        made = self.comparison.baseline.recorded
        about = (
            f"{self.comparison.label} ({number}, commit {block.get('commit') or 'unknown'}, "
            f"{block.get('source')}; {made.get('by')} {made.get('at')}, {self.comparison.path})"
        )
        side = Side(label=self.comparison.label, about=about)
        if not launches or not isinstance(self._recorded, Build):
            return side
        started = self._side(self._recorded, launches)
        about = f"{about}; started today to settle what the record leaves open or suspects"
        return replace(started, label=side.label, about=about, build=side.build)

    def _result(
        self,
        nodeid: str,
        case: Case,
        campaign: Campaign,
        verdicts: Sequence[Verdict],
        metrics: Sequence[str],
    ) -> Result:
        blocks, alone = campaign.measured
        pairs = [campaign.block(index) for index in range(blocks)]
        launches = [campaign.launch(index) for index in range(alone)]
        rematch = self._rematches.get(_key(case.config, case.tool))
        again: list[PairedLaunches] = []
        settled = any(verdict.settled for verdict in verdicts)
        if rematch is not None and (settled or {LAUNCH, case.where} & rematch.failures.keys()):
            again = [rematch.block(index) for index in range(rematch.measured[0])]
        new = [*(pair.new for pair in pairs), *launches, *(pair.new for pair in again)]
        base = self._base_side([pair.base for pair in (*pairs, *again)])
        failure = failure_in(verdicts)
        fingerprint: Fingerprint = {}
        if new or failure is not None:
            fingerprint = self.fingerprint(case, new[0] if new else no_launch())
        if failure is not None:
            fingerprint = failed_with(fingerprint, failure, case)
        return Result(
            nodeid=nodeid,
            case=case.key,
            new=self._side(self.new, new),
            base=base,
            machine=self.machine_key,
            verdicts=tuple(verdicts),
            fingerprint=fingerprint,
            options=self._options,
            measured=_measured(case, new, [METRICS[name] for name in metrics]),
            partial=_partial(campaign, case) or (_partial(rematch, case) if rematch else {}),
            roofline=self._roofline(case, verdicts, new),
        )

    def _roofline(
        self, case: Case, verdicts: Sequence[Verdict], launches: Sequence[Launch]
    ) -> Mapping[str, object]:
        """Return how near decoding came to what the memory allows; empty where that is unknown."""
        decode = next((one for one in verdicts if one.metric == DECODE), None)
        if self.new.url is not None or not launches or decode is None:
            return {}
        # A lease of the whole machine holds more cards than the config takes.
        cards = self.leases.held[: case.config.cards]
        memory = memory_of(case, cards, self.settings.bandwidth)
        splits = launches[0].samples.get(LAUNCH, {}).get("graph_splits", [None])
        options = server_options(self.new, case.config)
        model = self.files(case.config).main
        return roofline(case, model, options, memory, decode, splits=splits[0])


def _unfinished(verdict: Verdict, failing: Sequence[Verdict]) -> Verdict:
    """Return what is left open because others fail anyway, saying so."""
    if "cut_short" not in verdict.evidence or verdict.outcome is not Outcome.INCONCLUSIVE:
        return verdict
    why = f"{verdict.metric} was not measured until it is clear: {failing[0].metric} fails"
    return replace(verdict, reason=why)


def _key(config: Config, tool: Tool) -> tuple[str, bool, Tool]:
    """Return what campaigns are kept by: a test's mark may make a config one of a GPU."""
    return config.name, config.gpu, tool


def _conditions(build: Build, case: Case) -> dict[str, str]:
    """Return what a fingerprint holds of how a build is started for a case."""
    options = server_options(build, case.config)
    if case.tool == BENCH:
        options = computing(options)
    # What a running server was started with is its own affair.
    own = build.conditions if build.url is None else {}
    return {"options": told(options), **own}


def _gpu_use(launches: Sequence[Launch]) -> Mapping[str, object]:
    """Return what GPUs did under the last launch, or the last one that something disturbed."""
    watched = [launch for launch in launches if launch.gpu]
    for launch in reversed([one for one in watched if one.disturbed] or watched):
        return launch.gpu
    return {}


def check_metrics(case: Case, asked: Collection[str]) -> None:
    """Refuse metrics that a case cannot show.

    Raises:
        PlanError: With what would be right.
    """
    for name in asked:
        if name not in METRICS:
            raise PlanError(
                f"no metric `{name}`{nearest(name, METRICS)}: there are {', '.join(METRICS)}"
            )
        quality = METRICS[name].scope == "quality"
        if quality and case.corpus_pass is None:
            raise PlanError(
                f"{name} needs a corpus pass: name some in the marker llmperf(passes=[...])"
            )
        if not quality and case.corpus_pass is not None:
            raise PlanError(
                f"{name} is measured by asking a server, not by a corpus pass: name workloads in "
                "the marker, llmperf(workloads=[...])"
            )
        if name in PUBLISHED_ONLY:
            raise PlanError(
                f"{name} occurs in published figures only: gate one of {', '.join(QUALITY)}"
            )
    if set(asked) == {"ppl"}:
        raise PlanError(
            "ppl alone never passes, since answers can change with the perplexity unchanged: gate "
            "kld_mean or same_top beside it"
        )


def _guards(case: Case, asked: Collection[str]) -> tuple[str, ...]:
    """Return the metrics that are judged with every case of their kind, and shown if they fail.

    A build that offloads fewer layers than before is slower for that, which no figure of speed
    says by itself.
    """
    if not case.config.gpu or case.tool == BENCH:
        return ()
    return tuple(name for name in GUARDS if name not in asked)


def _partial(campaign: Campaign, case: Case) -> Mapping[str, object]:
    """Return what was answered of a workload that failed, as JSON values."""
    name = case.where
    if name not in campaign.failures or name not in campaign.partial:
        return {}
    return asdict(campaign.partial[name])


def _measured(
    case: Case, launches: Sequence[Launch], metrics: Sequence[Metric]
) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {}
    for metric in metrics:
        name = case.where if metric.scope == "request" else LAUNCH
        values = [launch.samples.get(name, {}).get(metric.name) for launch in launches]
        if taken := [list(value) for value in values if value]:
            found[metric.name] = taken
    return found
