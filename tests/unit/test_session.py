"""One run: tolerances, what is compared with what, GPUs, servers, results and run folders."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from filelock import FileLock
from support.fakes import Journal, add_bench, eventually, fake_command, write_program
from support.streams import CHUNKS, Lab, made_up

from pytest_llmperf import session
from pytest_llmperf.beginning import (
    KEPT_RUNS,
    _comparison,
    begin,
    check_baseline_name,
    run_folder,
)
from pytest_llmperf.budget import Budget
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.devices import Device
from pytest_llmperf.errors import (
    BaselineError,
    BuildError,
    OutOfMemoryError,
    PlanError,
    RunError,
    ServerError,
    TooSlowError,
)
from pytest_llmperf.gate import Absent, Record, SideBySide, Stored
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.judge import store
from pytest_llmperf.judge.references import find_reference
from pytest_llmperf.judge.store import Failure
from pytest_llmperf.judge.verdict import Outcome
from pytest_llmperf.measure import launch, logfacts
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.measure.on_gpu import OnGpu
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plan.config import LAUNCH, Case, Config, CorpusPass, Turn, Workload
from pytest_llmperf.plan.suite import Suite, load_suite
from pytest_llmperf.recording import stale_entries, write_baselines
from pytest_llmperf.session import Run, Worker, _measured, check_metrics
from pytest_llmperf.settings import Settings

SUITE = """
[models.m]
file = "model.gguf"

[builds.fork]
source = "./fork/llama-server"

[builds.broken]
source = "nothing that is a build"

[configs.one]
model = "m"
options = {{ threads = 1, ctx-size = 1024 }}
tolerances = {{ decode_tps = 0.02 }}

[configs.two]
extends = "one"

[configs.card]
extends = "one"
gpu = true

[configs.plain]
model = "m"

[configs.lost]
model = "gone"

[models.gone]
file = "gone.gguf"

[workloads.w24]
turns = [{{ prompt = 24, generate = 4 }}]

[workloads.w40]
turns = [{{ prompt = 40, generate = 4 }}]

[workloads.d8]
tool = "llama-bench"
turns = [{{ depth = 8, prompt = 24, generate = 4 }}]

[passes.p]
corpus = "words.txt"
context = 32

[tolerances]
decode_tps = 0.03
ttft_ms = 0.04
{more}
"""
ANSWERS = ("ppl", "kld_mean", "same_top", "kld_p999")


@dataclass
class Said:
    """What a run said of its progress."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        """Note a line."""
        self.lines.append(text)

    def clear(self) -> None:
        """Wipe what is shown."""


@dataclass
class Project:
    """A user's folder with a suite file, a model, baselines and two fake builds."""

    root: Path
    said: Said = field(default_factory=Said)
    runs: list[Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.root / "model.gguf").write_bytes(b"GGUF" * 16)
        self.faults()
        self.faults("fork", number=9000)

    @property
    def journal(self) -> Journal:
        """What the fake servers noted."""
        return Journal(self.root / "journal")

    def faults(self, name: str = "new", faults: str = "", *, number: int = 9001) -> None:
        """Write a build with these faults."""
        command = fake_command(self.journal, number=number, faults=faults)
        write_program(self.root / name / "llama-server", command)

    def suite(self, more: str = "") -> Suite:
        """Return the suite."""
        path = self.root / "llmperf.toml"
        path.write_text(SUITE.format(more=more), "utf-8")
        return load_suite(path)

    def settings(
        self,
        *,
        baseline: str | None = None,
        update: bool = False,
        tolerances: Mapping[str, float] | None = None,
    ) -> Settings:
        """Return settings of a run in this folder, on a machine called `lab`."""
        return Settings(
            baseline=baseline,
            update=update,
            build="./new/llama-server",
            suite=self.root / "llmperf.toml",
            models=(self.root,),
            strict=False,
            report=None,
            budget=0.0,
            machine="lab",
            baselines=self.root / "baselines",
            cache=self.root / "cache",
            root=self.root,
            tolerances=tolerances or {},
            launches=3,
            pairs=2,
        )

    def run(
        self,
        cases: Sequence[Case] | None = None,
        *,
        baseline: str | None = None,
        update: bool = False,
        tolerances: Mapping[str, float] | None = None,
    ) -> Run:
        """Return a run that has begun."""
        settings = self.settings(baseline=baseline, update=update, tolerances=tolerances)
        suite = self.suite()
        chosen = suite.cases(["one"], ["w24", "w40"]) if cases is None else cases
        # As at the end of a process: who holds the host would be waited for.
        for run in self.runs:
            run.close()
        self.runs.append(begin(settings, suite, chosen, self.said))
        return self.runs[-1]

    def record(self, label: str, *, machine: str = "lab", number: int | None = None) -> Path:
        """Write a baseline of one case."""
        path = self.root / "baselines" / label / f"{machine}.json"
        entry = store.Measured({"machine": machine}, {"decode_tps": [[1.0], [2.0], [3.0]]})
        store.update(
            path,
            build={"label": label} if number is None else {"label": label, "number": number},
            machine={"key": machine},
            recorded={"at": "2026-02-27", "by": "measured", "source": "a test"},
            measured={"one/w24": entry},
        )
        return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A user's folder; locks of baseline files go into it, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return Project(tmp_path)


def case_of(run: Run, config: str, workload: str | None = None) -> Case:
    """Return a case of the run's suite."""
    return run.suite.cases([config], [workload] if workload else None)[0]


# -- tolerances -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "config", "own", "expected"),
    [
        ("decode_tps", "one", 0.01, 0.01),
        ("decode_tps", "one", 0.0, 0.0),
        ("decode_tps", "one", None, 0.02),
        ("decode_tps", "two", None, 0.02),
        ("decode_tps", "lost", None, 0.03),
        ("ttft_ms", "one", None, 0.04),
        ("itl_ms", "one", None, 0.06),
        ("e2e_ms", "one", None, METRICS["e2e_ms"].tolerance),
    ],
)
def test_the_nearest_tolerance_wins(
    project: Project, metric: str, config: str, own: float | None, expected: float
) -> None:
    """Test over config over suite file over ini over the metric's default; 0 is a tolerance."""
    ini = {"decode_tps": 0.05, "ttft_ms": 0.05, "itl_ms": 0.06}
    run = project.run(tolerances=ini)
    assert run.tolerance(METRICS[metric], run.suite.configs[config], own) == expected


# -- what to compare with ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [None, "b8149", "fork", "./fork", "embedded", "http://127.0.0.1:8080"]
)
def test_a_baseline_that_is_recorded_or_a_build_is_taken(
    project: Project, name: str | None
) -> None:
    """Labels, names of builds and build specs; whether a build is there is seen later."""
    project.record("b8149", machine="another")
    check_baseline_name(project.settings(baseline=name), project.suite())


def test_another_baseline_name_lists_all_there_are(project: Project) -> None:
    """The error names the nearest, what is recorded, the builds and how a spec looks."""
    project.record("b8149")
    project.record("b8200", machine="another")
    with pytest.raises(PlanError) as caught:
        check_baseline_name(project.settings(baseline="b8148"), project.suite())
    text = str(caught.value)
    for part in (
        "--baseline=b8148",
        "(nearest: b8149)",
        "recorded: b8149, b8200",
        "[builds]: fork, broken",
        "pypi:xllamacpp==0.2.12",
        str(project.root / "baselines"),
    ):
        assert part in text


def test_without_any_baseline_the_list_says_none(project: Project) -> None:
    """No folder of baselines is no other error."""
    with pytest.raises(PlanError, match="recorded: none"):
        check_baseline_name(project.settings(baseline="b1"), project.suite())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pypi:numpy==1.0", "numpy holds no llama.cpp server"),
        ("pypi:xllamacpp", "with an exact version"),
        ("ollama:127.0.0.1:1", "write ollama:http"),
    ],
)
def test_a_spec_of_a_known_kind_says_what_is_wrong_with_it(
    project: Project, name: str, message: str
) -> None:
    """A spec that cannot be had is told as such, not as an unknown name."""
    with pytest.raises(BuildError, match=message):
        check_baseline_name(project.settings(baseline=name), project.suite())


def test_updating_compares_with_nothing(project: Project) -> None:
    """A run that records starts one build only, whatever is recorded."""
    project.record("b9000")
    run = project.run(update=True)
    assert run.comparison == Record()
    assert run.base is None


def test_a_label_that_cannot_be_a_folder_is_refused_before_measuring(project: Project) -> None:
    """A build whose label names no baseline is not recorded after an hour's measuring."""
    run = project.run()
    build = replace(run.new, label="../b1")
    with pytest.raises(BaselineError, match="baseline name"):
        _comparison(project.settings(update=True), run.suite, build, project.said)


def test_without_a_name_the_newest_of_this_machine_is_taken(project: Project) -> None:
    """The highest build number that was recorded here."""
    project.record("b8149", number=8149)
    path = project.record("b8200", number=8200)
    project.record("b9999", machine="another", number=9999)
    comparison = project.run().comparison
    assert isinstance(comparison, Stored)
    assert (comparison.label, comparison.path) == ("b8200", str(path))


def test_a_recorded_name_wins_over_a_build_of_that_name(project: Project) -> None:
    """What was recorded here under the name is taken; the build is not started."""
    project.record("fork")
    run = project.run(baseline="fork")
    assert isinstance(run.comparison, Stored)
    assert run.base is None


@pytest.mark.parametrize("name", ["fork", "./fork", "./fork/llama-server"])
def test_a_build_is_measured_side_by_side(project: Project, name: str) -> None:
    """A name in [builds] or a spec; also if it was recorded on another machine."""
    project.record("fork", machine="another")
    run = project.run(baseline=name)
    assert run.comparison == SideBySide()
    assert run.base is not None
    assert (run.new.label, run.base.number) == ("b9001", 9000)


def test_a_build_that_is_not_there_ends_the_run(project: Project) -> None:
    """Build under test and baseline alike."""
    with pytest.raises(BuildError, match="no such file"):
        project.run(baseline="./nowhere/llama-server")


@pytest.mark.parametrize("name", [None, "b8149"])
def test_nothing_of_this_machine_is_told_with_the_mend(project: Project, name: str | None) -> None:
    """A baseline of another machine is none: every gate fails, with the command that mends it."""
    project.record("b8149", machine="another")
    comparison = project.run(baseline=name).comparison
    assert isinstance(comparison, Absent)
    assert "(lab)" in comparison.reason
    assert "--update-baselines" in comparison.reason
    assert "--baseline=SPEC" in comparison.reason


def test_a_broken_baseline_file_ends_the_run(project: Project) -> None:
    """A file that cannot be read is an error of the user's, with its name."""
    path = project.record("b8149")
    path.write_text("{", "utf-8")
    with pytest.raises(BaselineError, match=str(path)):
        project.run(baseline="b8149")


def test_the_headline_says_what_is_compared(project: Project) -> None:
    """Both builds, or build and baseline; the same build twice is pointed out."""
    run = project.run(baseline="fork")
    assert run.headline[0].startswith("build under test b9001 (build 9001, commit 0a1b2c3")
    assert run.headline[1].startswith("side by side with ")
    assert "machine lab" in run.headline[-1]
    assert "both are the same build" in project.run(baseline="./new").headline[2]
    assert "nothing is recorded for this machine (lab)" in project.run().headline[1]
    assert "recording a baseline in" in project.run(update=True).headline[1]
    project.record("b8149")
    assert project.run().headline[1].startswith("baseline b8149, ")


# -- gates ------------------------------------------------------------------------------------


def test_an_unknown_metric_is_refused(project: Project) -> None:
    """With the nearest name; nothing is measured."""
    run = project.run()
    with pytest.raises(PlanError, match=r"no metric `decode_tp` \(nearest: decode_tps\)"):
        run.gate("test", case_of(run, "one", "w24"), {"decode_tp": None})
    assert project.journal.starts() == []


def test_a_model_that_is_not_there_fails_every_metric(project: Project) -> None:
    """Each metric has an ERROR verdict with the same text, and the result is kept."""
    run = project.run(update=True)
    result = run.gate("test", case_of(run, "lost"), {"rss_mib": None, "kv_mib": None})
    assert [v.outcome for v in result.verdicts] == [Outcome.ERROR, Outcome.ERROR]
    assert "no gone.gguf in" in result.verdicts[0].reason
    assert project.journal.starts() == []


def test_what_is_recorded_is_passed_by_the_next_run(project: Project) -> None:
    """Three launches serve all tests of a config; the file they make compares with new ones."""
    run = project.run(update=True)
    case = case_of(run, "one", "w24")
    speed = run.gate("speed", case, {"decode_tps": None, "prefill_tps": None})
    other = run.gate("other", case_of(run, "one", "w40"), {"decode_tps": None})
    memory = run.gate("memory", case_of(run, "one"), {"kv_mib": None, "n_ctx": None})
    assert {v.outcome for r in (speed, other, memory) for v in r.verdicts} == {Outcome.RECORDED}
    assert len(project.journal.starts()) == 3
    written = write_baselines(run.settings, [speed, other, memory])
    path = project.root / "baselines" / "b9001" / "lab.json"
    assert {one.path for one in written} == {path}
    assert store.load(path).results.keys() == {"one/w24", "one/w40", "one/launch"}

    again = project.run()
    assert isinstance(again.comparison, Stored)
    result = again.gate("speed", case, {"decode_tps": None, "prefill_tps": 0.01})
    assert [v.outcome for v in result.verdicts] == [Outcome.PASS, Outcome.PASS]
    assert [v.tolerance for v in result.verdicts] == [0.02, 0.01]
    exact = again.gate("memory", case_of(run, "one"), {"kv_mib": None})
    assert exact.verdicts[0].outcome is Outcome.PASS
    assert result.base is not None
    assert "measured 20" in result.base.about


def test_what_is_too_slow_is_recorded_with_its_limit(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the next run knows whether it had as long."""
    run = project.run(update=True)
    case = case_of(run, "one", "w24")
    assert case.workload is not None
    case = replace(case, workload=replace(case.workload, limit=60.0))
    campaign = run.campaign(case.config, case.tool)
    error = TooSlowError("given up after 60 s")
    monkeypatch.setattr(type(campaign), "_run_alone", Mock(side_effect=error))
    result = run.gate("speed", case, {"decode_tps": None, "ttft_ms": None})
    assert {verdict.outcome for verdict in result.verdicts} == {Outcome.RECORDED}
    assert result.fingerprint["limit"] == 60.0
    [written] = write_baselines(run.settings, [type(result).loads(result.dumps())])
    assert store.load(written.path).failures == {case.key: Failure("too-slow", str(error))}


def test_a_crash_leaves_what_was_measured_before_it_comparable(project: Project) -> None:
    """The fingerprint still tells the tokens of a workload that came before the crash."""
    run = project.run(update=True)
    healthy = run.gate("speed", case_of(run, "one", "w24"), {"decode_tps": None})
    project.faults("new", "crash#40")
    crashing = project.run(update=True)
    result = crashing.gate("speed", case_of(run, "one", "w24"), {"decode_tps": None})
    assert result.verdicts[0].outcome is Outcome.RECORDED
    assert result.fingerprint == healthy.fingerprint
    failed = crashing.gate("other", case_of(run, "one", "w40"), {"decode_tps": None})
    assert failed.verdicts[0].outcome is Outcome.ERROR
    assert "killed by SIGSEGV" in failed.verdicts[0].reason


def test_a_side_by_side_result_tells_both_sides(project: Project) -> None:
    """Builds, commands and logs of both, and the samples of the build under test."""
    run = project.run(baseline="fork")
    result = run.gate("memory", case_of(run, "one"), {"kv_mib": None})
    assert result.verdicts[0].outcome is Outcome.PASS
    assert result.base is not None
    for side, label in ((result.new, "b9001"), (result.base, run.base.label if run.base else "")):
        assert side.label == label
        assert "--ctx-size 1024" in side.command
        assert [Path(log).parent for log in side.logs] == [run.folder]
    assert result.measured == {"kv_mib": [[4.0]]}
    assert type(result).loads(result.dumps()) == result


def test_a_fingerprint_tells_what_must_be_equal(project: Project) -> None:
    """Machine, protocol, model, options; under a workload its lengths and its tokens, too."""
    run = project.run()
    launch = Launch("b1", "one", "", "", digests={"w24": "abc"})
    alone = run.fingerprint(case_of(run, "one"), launch)
    assert alone.keys() >= {"machine", "gpu", "driver", "cpu", "protocol", "model", "options"}
    assert alone["machine"] == "lab"
    assert "ctx-size=1024" in str(alone["options"])
    under = run.fingerprint(case_of(run, "one", "w24"), launch)
    assert under.items() > alone.items()
    assert under["prompt"] == "abc"
    assert run.fingerprint(case_of(run, "one", "w40"), launch)["prompt"] == "unknown"
    shorter = replace(run.suite.configs["one"], options={"ctx-size": 512})
    assert run.fingerprint(Case(shorter, None), launch) != alone


def test_what_a_build_adds_is_part_of_the_fingerprint(project: Project) -> None:
    """As its options are; a build that adds nothing says nothing of it."""
    run = project.run()
    launch = Launch("b1", "one", "", "")
    plain = run.fingerprint(case_of(run, "one"), launch)
    assert plain.keys().isdisjoint({"env", "run"})
    run.new = replace(run.new, env={"GGML_CUDA_DISABLE_GRAPHS": "1"})
    told = run.fingerprint(case_of(run, "one"), launch)
    assert told == {**plain, "env": "GGML_CUDA_DISABLE_GRAPHS=1"}


def test_ollama_is_asked_with_options_and_they_are_told(project: Project) -> None:
    """Of a config those that a request can set; another running server has its own."""
    run = project.run()
    launch = Launch("b1", "one", "", "", model="m@5a")
    run.new = replace(run.new, url="http://h", api="ollama", model="m")
    asked = run.fingerprint(case_of(run, "one"), launch)
    assert (asked["model"], asked["options"]) == ("m@5a", "num_ctx=1024 num_thread=1")
    run.new = replace(run.new, api="openai")
    assert run.fingerprint(case_of(run, "one"), launch)["options"] == "of the running server"


def test_llama_bench_is_measured_by_itself(project: Project) -> None:
    """Its workloads start no server; those of the server start no llama-bench."""
    for name, number in (("new", 9001), ("fork", 9000)):
        add_bench(project.root / name, "cpu", number=number)
    run = project.run(baseline="fork")
    case = case_of(run, "one", "d8")
    run = project.run([case, case_of(run, "one", "w24")], baseline="fork")
    result = run.gate("bench", case, {"decode_tps": None, "ttft_ms": None})
    decode, ttft = result.verdicts
    assert decode.base == decode.new == pytest.approx(100 / 1.08)
    assert '"paired": false' in json.dumps(decode.evidence)
    assert ttft.outcome is Outcome.ERROR
    assert "llama-bench tells prefill_tps and decode_tps" in ttft.reason
    assert "--n-depth 8" in result.new.command
    assert project.journal.starts() == []
    again = run.gate("speed", case_of(run, "one", "w24"), {"decode_tps": None})
    assert "llama-server" in again.new.command
    assert again.measured.keys() == {"decode_tps"}


def test_a_fingerprint_of_llama_bench_minds_what_it_takes(project: Project) -> None:
    """Another context of the server, or another template, changes nothing of its work."""
    run = project.run()
    case = case_of(run, "one", "d8")
    launch = Launch("b1", "one", "", "", digests={"d8": "random"})
    found = run.fingerprint(case, launch)
    assert found["tool"] == "llama-bench"
    assert "tool" not in run.fingerprint(case_of(run, "one", "w24"), launch)
    wider = replace(case.config, options={**case.config.options, "ctx-size": 8, "jinja": True})
    assert run.fingerprint(replace(case, config=wider), launch) == found
    other = replace(case.config, options={**case.config.options, "cache-type-k": "q8_0"})
    assert run.fingerprint(replace(case, config=other), launch) != found


def test_samples_of_a_metric_are_taken_from_where_they_belong() -> None:
    """Timings from the case's workload, what a start shows from the start; none are left out."""
    case = Case(Config("c", "m"), None)
    assert _measured(case, [], [METRICS["rss_mib"]]) == {}
    launches = [
        Launch("b1", "c", "", "", samples={LAUNCH: {"rss_mib": [1.0]}}),
        Launch("b1", "c", "", "", samples={}),
        Launch("b1", "c", "", "", samples={LAUNCH: {"rss_mib": [3.0]}}),
    ]
    assert _measured(case, launches, [METRICS["rss_mib"], METRICS["decode_tps"]]) == {
        "rss_mib": [[1.0], [3.0]]
    }


def test_entries_that_no_case_makes_any_more_are_stale(project: Project) -> None:
    """Those of configs and workloads that have gone from the suite file, by file."""
    run = project.run(update=True)
    result = run.gate("speed", case_of(run, "one", "w24"), {"decode_tps": None})
    written = write_baselines(run.settings, [result])
    assert stale_entries(run.suite, written) == {}
    fewer = replace(run.suite, workloads={})
    assert stale_entries(fewer, written) == {written[0].path: ["one/w24"]}


# -- gates of answers -------------------------------------------------------------------------

SPEED = Case(Config("c", "m"), Workload("w", (Turn(8, 4),)))
START = Case(Config("c", "m"))
READ = Case(Config("c", "m"), corpus_pass=CorpusPass("p", "text.txt"))


@pytest.mark.parametrize(
    ("case", "metrics"),
    [
        (SPEED, ("decode_tps", "rss_mib", "n_ctx")),
        (START, ("rss_mib", "load_ms")),
        (READ, ANSWERS),
        (READ, ("ppl", "same_top")),
        (READ, ("kld_p999",)),
        (READ, ()),
    ],
)
def test_metrics_that_a_case_shows_are_taken(case: Case, metrics: Sequence[str]) -> None:
    """Of a server's start and answers, or of a text that is passed."""
    check_metrics(case, metrics)


@pytest.mark.parametrize(
    ("case", "metrics", "said"),
    [
        (READ, ("kld_men",), "no metric `kld_men` (nearest: kld_mean): there are decode_tps, "),
        (
            SPEED,
            ("decode_tps", "kld_mean"),
            "kld_mean needs a corpus pass: name some in the marker llmperf(passes=[...])",
        ),
        (START, ("ppl",), "ppl needs a corpus pass: name some in the marker"),
        (
            READ,
            ("kld_mean", "decode_tps"),
            "decode_tps is measured by asking a server, not by a corpus pass: name workloads in",
        ),
        (READ, ("rss_mib",), "rss_mib is measured by asking a server, not by a corpus pass"),
        (
            READ,
            ("kld_max",),
            "kld_max occurs in published figures only: gate one of ppl, kld_mean, same_top, ",
        ),
        (
            READ,
            ("ppl",),
            "ppl alone never passes, since answers can change with the perplexity unchanged: gate",
        ),
    ],
)
def test_metrics_that_a_case_does_not_show_are_refused(
    case: Case, metrics: Sequence[str], said: str
) -> None:
    """With what would be right, in one line."""
    with pytest.raises(PlanError) as caught:
        check_metrics(case, metrics)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@dataclass
class Answering:
    """Runs of a build with a tool that passes texts, in a user's folder."""

    project: Project

    def __post_init__(self) -> None:
        (self.project.root / "words.txt").write_text("words " * 100, "utf-8")

    @property
    def path(self) -> Path:
        """The baseline file of the build."""
        return self.project.root / "baselines" / "b1" / "lab.json"

    @property
    def kept(self) -> list[Path]:
        """The references beside it."""
        return sorted(self.path.with_suffix("").iterdir())

    def run(self, noise: float = 0.0, fault: str = "", *, update: bool = False) -> Run:
        """Return a run of a build whose answers are disturbed so, or so with a K cache of q4_0."""
        lab = Lab(self.project.root)
        run = self.project.run(update=update)
        plain, worse = (
            lab.stream(f"{kind}-{noise}", made_up(noise + more))
            for kind, more in (("f16", 0.0), ("q4_0", 1.0))
        )
        run.new = lab.build("b1", plain, fault, q4_0=worse)
        return run

    def case(self, run: Run, **changes: object) -> Case:
        """Return the case of the run's suite, its config changed like this."""
        [case] = run.suite.cases(["plain"], None, ["p"])
        return replace(case, config=replace(case.config, **changes))  # type: ignore[arg-type]  # names of fields

    def record(self, run: Run, case: Case) -> list[store.Change]:
        """Record all metrics of a case; return what changed."""
        result = run.gate("answers", case, dict.fromkeys(ANSWERS))
        assert {v.outcome for v in result.verdicts} == {Outcome.RECORDED}
        [written] = write_baselines(run.settings, [type(result).loads(result.dumps())])
        assert written.path == self.path
        return list(written.changes)


@pytest.fixture
def answering(project: Project) -> Answering:
    """Runs of a build with a tool."""
    return Answering(project)


def test_recorded_answers_are_passed_by_the_next_run(answering: Answering) -> None:
    """The file holds the chunks, the reference lies beside it, and the next run compares."""
    run = answering.run(update=True)
    case = answering.case(run)
    assert {change.metric for change in answering.record(run, case)} == set(ANSWERS)
    baseline = store.load(answering.path)
    entry, fingerprint = baseline.results["plain/p"], baseline.fingerprints["plain/p"]
    assert {len(entry[name].launches or ()) for name in ANSWERS} == {CHUNKS}
    assert answering.kept == [find_reference(answering.path, str(fingerprint["reference"]))]

    again = answering.run()
    assert isinstance(again.comparison, Stored)
    result = again.gate("answers", case, {"kld_mean": 0.05, "ppl": None})
    assert [v.outcome for v in result.verdicts] == [Outcome.PASS, Outcome.PASS]
    assert [v.tolerance for v in result.verdicts] == [0.05, METRICS["ppl"].tolerance]
    assert result.measured.keys() == {"kld_mean", "ppl"}
    assert result.fingerprint == fingerprint
    assert result.reference == str(answering.kept[0])
    assert result.base is not None
    assert result.base.label == "b1"
    assert "llama-perplexity" in result.new.command
    assert [Path(log).parent for log in result.new.logs] == [again.folder]
    assert type(result).loads(result.dumps()) == result

    worse = answering.run(noise=1.0).gate("answers", case, {"kld_mean": None})
    assert worse.verdicts[0].outcome is Outcome.REGRESSION


def test_recording_the_same_again_changes_nothing(answering: Answering) -> None:
    """Not a byte, and the reference is the one that was there."""
    run = answering.run(update=True)
    answering.record(run, answering.case(run))
    text, kept = answering.path.read_bytes(), answering.kept
    again = answering.run(update=True)
    assert answering.record(again, answering.case(again)) == []
    assert (answering.path.read_bytes(), answering.kept) == (text, kept)


def test_no_memory_for_a_pass_does_not_wipe_recorded_answers(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its conditions are known before it is made, without tokens and reference."""
    run = answering.run(update=True)
    case = answering.case(run)
    answering.record(run, case)
    text, kept = answering.path.read_bytes(), answering.kept
    again = answering.run(update=True)
    error = OutOfMemoryError("no room", what="a buffer", log=None, kind="start")
    monkeypatch.setattr(type(again.passes), "alone", Mock(side_effect=error))
    result = again.gate("answers", case, {"ppl": None, "kld_mean": None})
    assert {verdict.outcome for verdict in result.verdicts} == {Outcome.RECORDED}
    with pytest.raises(BaselineError, match="under the same conditions"):
        write_baselines(again.settings, [result])
    assert (answering.path.read_bytes(), answering.kept) == (text, kept)


def test_answers_of_other_options_take_the_place_of_the_old(answering: Answering) -> None:
    """The new reference stays, the old one goes."""
    run = answering.run(update=True)
    answering.record(run, answering.case(run))
    [old] = answering.kept
    again = answering.run(update=True)
    case = answering.case(again, options={"cache-type-k": "q4_0"})
    changes = answering.record(again, case)
    assert changes
    assert all(change.replaced for change in changes)
    [new] = answering.kept
    assert new != old
    fingerprint = store.load(answering.path).fingerprints["plain/p"]
    assert find_reference(answering.path, str(fingerprint["reference"])) == new
    result = answering.run().gate("answers", case, {"kld_mean": None})
    assert result.verdicts[0].outcome is Outcome.PASS


def test_configs_with_the_same_reference_share_it(answering: Answering) -> None:
    """It stays for as long as one of them names it."""
    run = answering.run(update=True)
    answering.record(run, answering.case(run))
    lossy = answering.case(run, name="lossy", options={"cache-type-k": "q4_0"}, against="plain")
    [kept] = answering.kept
    answering.record(run, lossy)
    assert answering.kept == [kept]
    baseline = store.load(answering.path)
    assert baseline.results.keys() == {"plain/p", "lossy/p"}
    assert baseline.results["lossy/p"]["kld_mean"].value > 0.01


def test_speeds_and_answers_of_a_build_share_a_file(project: Project, answering: Answering) -> None:
    """Recording speeds leaves answers and their references alone."""
    run = answering.run(update=True)
    answering.record(run, answering.case(run))
    kept = answering.kept
    build = run.new
    speed = project.run(update=True)
    result = speed.gate("speed", case_of(speed, "one", "w24"), {"decode_tps": None})
    side = replace(
        result.new,
        label="b1",
        build={**result.new.build, "label": "b1", "number": build.number, "commit": build.commit}
        | {"sha256": build.sha256},
    )
    write_baselines(speed.settings, [replace(result, new=side)])
    assert store.load(answering.path).results.keys() == {"one/w24", "plain/p"}
    assert answering.kept == kept


def test_another_build_of_the_same_label_records_nothing(answering: Answering) -> None:
    """The store refuses it; what was recorded stays as it was."""
    run = answering.run(update=True)
    answering.record(run, answering.case(run))
    text, kept = answering.path.read_bytes(), answering.kept
    other = answering.run(noise=1.0, update=True)
    other.new = replace(other.new, sha256="f" * 64)
    result = other.gate("answers", answering.case(other), dict.fromkeys(ANSWERS))
    with pytest.raises(BaselineError, match="sha256"):
        write_baselines(other.settings, [result])
    assert answering.path.read_bytes() == text
    assert set(kept) <= set(answering.kept)


def test_a_pass_that_breaks_off_fails_every_metric(answering: Answering) -> None:
    """And records nothing."""
    run = answering.run(fault="killed", update=True)
    result = run.gate("answers", answering.case(run), {"ppl": None, "kld_mean": 0.5})
    assert [v.outcome for v in result.verdicts] == [Outcome.ERROR, Outcome.ERROR]
    assert [v.tolerance for v in result.verdicts] == [METRICS["ppl"].tolerance, 0.5]
    assert (result.measured, result.fingerprint, result.reference) == ({}, {}, "")
    assert write_baselines(run.settings, [result]) == []
    assert not answering.path.parent.exists()


def test_a_side_by_side_pass_tells_both_sides(answering: Answering) -> None:
    """Commands and logs of both builds; there is no reference to keep."""
    run = answering.run()
    lab = Lab(answering.project.root)
    run.base = lab.build("b0", lab.stream("base", made_up()))
    run.comparison = SideBySide()
    result = run.gate("answers", answering.case(run), dict.fromkeys(ANSWERS))
    assert {v.outcome for v in result.verdicts} == {Outcome.PASS}
    assert result.base is not None
    for side, label in ((result.new, "b1"), (result.base, "b0")):
        assert side.label == label
        assert f"/{label}/llama-perplexity" in side.command
        assert len(side.logs) == 1
    assert result.reference == ""


def test_a_text_that_is_not_there_fails_the_gate(answering: Answering) -> None:
    """As an ERROR that names the pass and the folders."""
    (answering.project.root / "words.txt").unlink()
    run = answering.run(update=True)
    result = run.gate("answers", answering.case(run), {"kld_mean": None})
    assert result.verdicts[0].outcome is Outcome.ERROR
    assert "pass `p`: no words.txt in" in result.verdicts[0].reason


def test_entries_of_passes_are_stale_once_the_pass_has_gone(answering: Answering) -> None:
    """Those of a pass of the suite file are not."""
    run = answering.run(update=True)
    result = run.gate("answers", answering.case(run), {"kld_mean": None})
    written = write_baselines(run.settings, [result])
    assert stale_entries(run.suite, written) == {}
    fewer = replace(run.suite, passes={})
    assert stale_entries(fewer, written) == {answering.path: ["plain/p"]}


# -- GPUs -------------------------------------------------------------------------------------


def test_a_gpu_config_runs_where_the_build_sees_a_gpu(project: Project) -> None:
    """The build's own list of devices decides."""
    run = project.run(update=True)
    result = run.gate("memory", case_of(run, "card"), {"kv_mib": None})
    assert result.verdicts[0].outcome is Outcome.RECORDED


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ((), "this machine has no GPU that the build can use"),
        (
            (Gpu(0, "GPU-1", "RTX 5080", 16303, "580"),),
            "b9001 sees no GPU, though this machine has RTX",
        ),
    ],
)
def test_without_a_gpu_every_gpu_config_fails(
    project: Project, monkeypatch: pytest.MonkeyPatch, cards: tuple[Gpu, ...], message: str
) -> None:
    """It fails, it does not skip, and never runs on the CPU in silence."""
    project.faults("new", "no-gpu")
    monkeypatch.setattr("pytest_llmperf.session.gpus", lambda: cards)
    run = project.run(update=True)
    for _ in range(2):
        result = run.gate("memory", case_of(run, "card"), {"kv_mib": None})
        assert result.verdicts[0].outcome is Outcome.ERROR
        assert message in result.verdicts[0].reason
    with pytest.raises(BuildError, match=message):
        run.server(run.suite.configs["card"])
    assert project.journal.starts() == []


def test_fewer_layers_on_the_gpu_fail_every_case_by_name(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded with whatever is gated, shown only where they fail, and no more is measured then."""
    run = project.run(update=True)
    case = case_of(run, "card", "w24")
    run.selected = {"card": [case]}
    recorded = run.gate("speed", case, {"decode_tps": None})
    assert [verdict.metric for verdict in recorded.verdicts] == ["decode_tps"]
    assert recorded.measured["offloaded_layers"] == [[5.0]] * 3
    write_baselines(run.settings, [recorded])
    again = project.run(baseline="b9001")
    again.selected = {"card": [case]}
    assert [one.metric for one in again.gate("s", case, {"decode_tps": None}).verdicts] == [
        "decode_tps"
    ]
    read = logfacts.read_log
    monkeypatch.setattr(launch, "read_log", lambda text: replace(read(text), offloaded_layers=2))
    fewer = project.run(baseline="b9001")
    fewer.selected = {"card": [case]}
    first, second = fewer.gate("s", case, {"decode_tps": None}, Budget(600.0)).verdicts
    assert (first.metric, first.outcome) == ("offloaded_layers", Outcome.REGRESSION)
    assert "offloaded_layers is 2 layers, 5 in the baseline" in first.reason
    assert second.metric == "decode_tps"
    assert "was not measured until it is clear: offloaded_layers fails" in second.reason
    [campaign] = fewer._campaigns.values()
    assert campaign.measured[1] <= 3, "what cannot pass is not measured until it is clear"


def test_a_test_marked_gpu_makes_its_config_one(project: Project) -> None:
    """All selected tests of the config share its launches, whichever comes first."""
    run = project.run(update=True)
    case = case_of(run, "one")
    run.selected = {"one": [case, replace(case, config=replace(case.config, gpu=True))]}
    for marked in (False, True):
        run.gate("memory", case, {"kv_mib": None}, gpu=marked)
    [campaign] = run._campaigns.values()
    assert campaign.config.gpu
    assert run.server(case.config).config.gpu
    run.close()


def test_without_a_gpu_a_mark_fails_its_own_test_only(project: Project) -> None:
    """Another one of the same config goes on without."""
    project.faults("new", "no-gpu")
    run = project.run(update=True)
    case = case_of(run, "one")
    run.selected = {"one": [case, replace(case, config=replace(case.config, gpu=True))]}
    outcomes = [
        run.gate("memory", case, {"kv_mib": None}, gpu=marked).verdicts[0].outcome
        for marked in (True, False)
    ]
    assert outcomes == [Outcome.ERROR, Outcome.RECORDED]


def test_a_build_that_cannot_tell_its_gpus_fails_every_test(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second test is not let through because the first has asked already."""

    def fail(_build: object) -> None:
        raise BuildError("cannot run `--list-devices`")

    monkeypatch.setattr("pytest_llmperf.session.devices_of", fail)
    run = project.run(update=True)
    for _ in range(2):
        result = run.gate("memory", case_of(run, "card"), {"kv_mib": None})
        assert result.verdicts[0].outcome is Outcome.ERROR
        assert "cannot run `--list-devices`" in result.verdicts[0].reason
    assert project.journal.starts() == []


# -- a server for tests -----------------------------------------------------------------------


def test_one_server_serves_the_tests_of_a_config(project: Project) -> None:
    """It is started once, again for another config, again when it died, and stopped at the end."""
    run = project.run()
    one, two = run.suite.configs["one"], run.suite.configs["two"]
    first = run.server(one)
    assert run.server(one) is first
    second = run.server(two)
    assert not first.alive()
    assert second.pid is not None
    os.kill(second.pid, 9)
    assert eventually(lambda: not second.alive())
    third = run.server(two)
    assert third is not second
    assert third.alive()
    run.close()
    assert not third.alive()
    run.close()


def test_measuring_stops_the_server_of_the_tests(project: Project) -> None:
    """Nothing else of ours runs while a launch is measured."""
    run = project.run(update=True)
    server = run.server(run.suite.configs["one"])
    run.gate("memory", case_of(run, "one"), {"kv_mib": None})
    assert not server.alive()


def test_the_memory_of_the_tests_own_server_is_waited_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything else is started there; a start that failed is not left behind either."""
    ended: list[tuple[bool, bool]] = []

    class Looked(OnGpu):
        def end(
            self, pids: Collection[int], name: str, *, check: bool = True, alone: bool = True
        ) -> None:
            ended.append((bool(pids), check))
            super().end(pids, name, check=check, alone=alone)

    monkeypatch.setattr(session, "OnGpu", Looked)
    run = project.run(update=True)
    server = run.server(run.suite.configs["one"])
    assert not ended
    run.close_server()
    assert (ended, server.alive()) == ([(True, False)], False)
    project.faults("new", "start-exit")
    again = project.run(update=True)
    with pytest.raises(ServerError):
        again.server(again.suite.configs["one"])
    assert ended[1:] == [(False, False)]


def test_a_server_that_does_not_start_is_an_error_each_time(project: Project) -> None:
    """The fixture's error names the exit and the log."""
    project.faults("new", "start-exit")
    run = project.run()
    for _ in range(2):
        with pytest.raises(ServerError, match="exit code 3"):
            run.server(run.suite.configs["one"])


# -- leases -----------------------------------------------------------------------------------


def held_locks(project: Project) -> set[str]:
    """Return the locks that somebody holds."""
    held = set()
    for path in (project.root / "cache" / "locks").glob("*.lock"):
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except TimeoutError:
            held.add(path.stem)
        else:
            lock.release()
    return held


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> tuple[Gpu, ...]:
    """Two GPUs that this machine is made to have."""
    made = tuple(Gpu(index, f"GPU-{index}", "Made-up", 16000, "1") for index in range(2))
    for name in ("session.gpus", "session.all_gpus", "serve.launch.gpus"):
        monkeypatch.setattr(f"pytest_llmperf.{name}", lambda: made)
    monkeypatch.setattr("pytest_llmperf.campaign.base.gpu_warnings", lambda _cards: [])
    monkeypatch.setattr("pytest_llmperf.campaign.servers.fits_twice", lambda *_, **__: True)
    return made


def test_options_that_a_build_lacks_are_told_before_anything_is_waited_for(
    project: Project,
) -> None:
    """No lease is taken for what cannot be started."""
    project.faults("new", "older")
    run = project.run(update=True)
    case = case_of(run, "one")
    case = replace(case, config=replace(case.config, options={"cache-ram": 64}))
    run.prepare(case, {"kv_mib": None})
    [verdict] = run.gate("memory", case, {"kv_mib": None}).verdicts
    assert verdict.outcome is Outcome.ERROR
    assert "has no option --cache-ram" in verdict.reason
    assert held_locks(project) == set()
    assert project.journal.starts() == []


def test_a_build_is_asked_for_its_options_once_a_config(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs would be waited for in every test."""
    asked: list[str] = []

    def hangs(build: Build, config: Config) -> None:
        asked.append(f"{build.label} {config.name}")
        raise BuildError("`--help` did not end within 120 s")

    monkeypatch.setattr("pytest_llmperf.session.check_options", hangs)
    run = project.run(baseline="fork")
    for _ in range(2):
        run.prepare(case_of(run, "one"), {"kv_mib": None})
        result = run.gate("memory", case_of(run, "one"), {"kv_mib": None})
        assert "did not end within 120 s" in result.verdicts[0].reason
        assert result.base is not None, "the failure names both builds"
    assert len(asked) == 1


@pytest.mark.usefixtures("cards")
def test_a_lease_lasts_until_the_config_is_left(project: Project) -> None:
    """All launches and servers of a config are on one card, however many tests it has."""
    run = project.run(update=True)
    case = case_of(run, "card")
    for _ in range(2):
        assert run.gate("memory", case, {"kv_mib": None}).verdicts[0].outcome is Outcome.RECORDED
        assert held_locks(project) == {"host", "gpu-GPU-0"}
    server = run.server(case.config)
    assert server.shown_command.startswith("CUDA_VISIBLE_DEVICES=GPU-0 ")
    seen = {entry["env"]["CUDA_VISIBLE_DEVICES"] for entry in project.journal.entries("start")}
    assert seen == {"GPU-0"}
    run.leave_config()
    assert not server.alive()
    assert held_locks(project) == set()
    run.leave_config()


@pytest.mark.usefixtures("cards")
def test_a_worker_takes_the_card_of_its_number(project: Project) -> None:
    """And keeps its logs in a folder of its own, within that of the run."""
    name = f"run-20260101-000000-{os.getpid()}"
    settings = project.settings(update=True)
    suite = project.suite()
    run = begin(settings, suite, suite.cases(["card"]), project.said, Worker("gw1", name))
    run.gate("memory", case_of(run, "card"), {"kv_mib": None})
    assert held_locks(project) == {"host", "gpu-GPU-1"}
    run.close()
    assert run.folder == project.root / ".llmperf" / name / "gw1"
    assert (project.root / ".llmperf" / "latest").resolve() == run.folder.parent
    assert run.headline[-1].endswith(f"logs in {run.folder.parent}")


@pytest.mark.parametrize(("name", "number"), [("gw0", 0), ("gw12", 12), ("other", 0)])
def test_a_worker_has_a_number(name: str, number: int) -> None:
    """Also one that was given a name of the user's own."""
    worker = Worker(name, "run-20260101-000000-77")
    assert (worker.number, worker.controller) == (number, 77)


@pytest.mark.usefixtures("cards")
def test_what_no_cuda_keeps_apart_is_exclusive(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that uses the GPUs by Vulkan uses any of them."""
    device = Device("Vulkan0", "Made-up", 16000, 15000)
    monkeypatch.setattr("pytest_llmperf.session.devices_of", lambda _build: (device,))
    run = project.run(update=True)
    run.gate("memory", case_of(run, "card"), {"kv_mib": None})
    assert held_locks(project) == {"host", "gpu-GPU-0", "gpu-GPU-1"}
    run.close()


@pytest.mark.usefixtures("cards")
def test_more_cards_than_there_are_is_an_error_of_the_test(project: Project) -> None:
    """And of a test that wants a server."""
    run = project.run(update=True)
    case = case_of(run, "card")
    case = replace(case, config=replace(case.config, gpus=3))
    result = run.gate("memory", case, {"kv_mib": None})
    assert result.verdicts[0].outcome is Outcome.ERROR
    assert "config card needs 3 GPUs, this machine has 2" in result.verdicts[0].reason
    with pytest.raises(RunError, match="needs 3 GPUs"):
        run.server(case.config)
    assert held_locks(project) == set()


@pytest.mark.usefixtures("cards")
def test_a_larger_lease_takes_the_place_of_a_smaller(project: Project) -> None:
    """It does not grow, or two could wait for each other; a smaller one needs nothing."""
    run = project.run(update=True)
    card = case_of(run, "card")
    run.gate("memory", card, {"kv_mib": None})
    assert held_locks(project) == {"host", "gpu-GPU-0"}
    both = replace(card, config=replace(card.config, gpus=2))
    server = run.server(both.config)
    assert held_locks(project) == {"host", "gpu-GPU-0", "gpu-GPU-1"}
    # All that there are need no telling.
    assert not server.shown_command.startswith("CUDA")
    run.prepare(card, {"kv_mib": None})
    assert server.alive()
    run.close()


@pytest.mark.usefixtures("cards")
def test_cards_are_in_the_fingerprint_where_there_are_several(project: Project) -> None:
    """One is what was meant before there was a choice."""
    run = project.run(update=True)
    card = case_of(run, "card")
    both = replace(card, config=replace(card.config, gpus=2))
    launch = Launch("b9001", "card", "", "")
    assert "gpus" not in run.fingerprint(card, launch)
    assert run.fingerprint(both, launch)["gpus"] == 2


def test_waiting_is_not_on_the_budget(project: Project) -> None:
    """It is done before the clock starts; what goes wrong then is for gate() to tell."""
    run = project.run(update=True)
    case = case_of(run, "one")
    run.prepare(case, ["no_such_metric"])
    assert held_locks(project) == set()
    run.prepare(case, ["kv_mib"])
    assert held_locks(project) == {"host"}
    run.close()
    assert held_locks(project) == set()


# -- run folders ------------------------------------------------------------------------------


def test_oldrun_folders_go(tmp_path: Path) -> None:
    """The newest are kept, together with the new one as many as are meant to be."""
    gone = 99_999_999
    for day in range(1, 16):
        (tmp_path / f"run-202601{day:02d}-000000-{gone}").mkdir()
    folder = run_folder(tmp_path)
    left = sorted(path.name for path in tmp_path.glob("run-*"))
    assert len(left) == KEPT_RUNS
    assert left[-1] == folder.name
    assert left[0] == f"run-20260107-000000-{gone}"
    assert (tmp_path / "latest").resolve() == folder
    assert (tmp_path / ".gitignore").read_text("utf-8") == "*\n"


def test_folders_of_runs_that_go_on_stay(tmp_path: Path) -> None:
    """Many processes of one run, or a run beside this one, keep their logs and keys."""
    for day in range(1, 16):
        (tmp_path / f"run-202601{day:02d}-000000-{os.getpid()}").mkdir()
    run_folder(tmp_path)
    assert len(list(tmp_path.glob("run-*"))) == 16


def test_other_things_in_the_folder_stay(tmp_path: Path) -> None:
    """Files and folders of other names are the user's, and `latest` may be one of them."""
    (tmp_path / "latest").mkdir()
    for name in ("notes", "run-file"):
        (tmp_path / name).write_text("mine", "utf-8")
    for day in range(1, 16):
        (tmp_path / f"run-202601{day:02d}-000000-mine").mkdir()
    folder = run_folder(tmp_path)
    assert folder.is_dir()
    assert (tmp_path / "notes").exists()
    assert (tmp_path / "run-file").exists()
    assert (tmp_path / "latest").is_dir()


def test_the_headline_warns_of_what_may_go_wrong(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is nearly full; GPUs that others use, where a selected config needs one."""
    monkeypatch.setattr(session, "disk_warnings", lambda _folders: ["warning: the disk"])
    monkeypatch.setattr(session, "gpu_warnings", lambda: ["warning: the GPU"])
    run = project.run()
    assert [line for line in run.headline if line.startswith("warning")] == ["warning: the disk"]
    run.selected = {"c": [Case(Config("c", "m", gpu=True))]}
    assert "warning: the GPU" in run.headline
