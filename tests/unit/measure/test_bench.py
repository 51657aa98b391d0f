"""Measuring by llama-bench: what its rows say, and what goes wrong with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import PATIENCE, add_bench, goes

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import (
    BuildError,
    CheckError,
    OutOfMemoryError,
    ToolError,
    TooSlowError,
)
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.measure.bench import PROMPT, Benched, BenchPlan, parse_rows, run_bench
from pytest_llmperf.plan.config import Config, ModelFiles, Turn, Workload
from pytest_llmperf.serve.launch import ServePlan

DATA = Path(__file__).parents[2] / "data"


def bench(name: str, depth: int, prompt: int = 16, *, limit: float = 0.0) -> Workload:
    """A workload of llama-bench."""
    return Workload(name, (Turn(prompt, 8, depth),), tool="llama-bench", limit=limit)


EMPTY, SOME, MUCH = bench("d0", 0), bench("d100", 100), bench("d300", 300)
ALL = (EMPTY, SOME, MUCH)


@dataclass
class Lab:
    """A folder with a build whose llama-bench is a fake one."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def plan(self, faults: str = "", **changes: Any) -> BenchPlan:  # noqa: ANN401 - of a dataclass
        """Return a plan; ``changes`` are to its fields, ``hang`` and ``timeout`` to its limits."""
        add_bench(self.folder, faults)
        serve = ServePlan(
            self.folder / "run",
            timeout=changes.pop("timeout", PATIENCE),
            hang=changes.pop("hang", PATIENCE),
            progress=self.said.append,
        )
        build = Build(
            "b9000", 9000, "0a1b2c3d", "fake", "", command=(str(self.folder / "llama-server"),)
        )
        plan = BenchPlan(
            build, Config("one", "tiny"), ModelFiles(self.folder / "m.gguf"), 3, serve, "launch 1"
        )
        return replace(plan, **changes)

    def run(
        self,
        faults: str = "",
        workloads: tuple[Workload, ...] = ALL,
        **changes: Any,  # noqa: ANN401 - of a dataclass
    ) -> Benched:
        """Measure, and see to it that no process is left."""
        try:
            return run_bench(self.plan(faults, **changes), workloads)
        finally:
            assert all(goes(entry["pid"]) for entry in self.starts())

    def starts(self) -> list[dict[str, Any]]:
        """Return process id and arguments of every start."""
        journal = self.folder / "bench-journal"
        lines = journal.read_text("utf-8").splitlines() if journal.exists() else []
        return [json.loads(line) for line in lines]

    def depths(self) -> list[str]:
        """Return what every start was asked of."""
        return [one["arguments"][one["arguments"].index("--n-depth") + 1] for one in self.starts()]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A folder with a fake llama-bench."""
    return Lab(tmp_path)


@pytest.mark.parametrize(
    ("build", "number", "commit", "layers"),
    [("49bfdde", 0, "49bfdde", 99), ("b11434", 11434, "unknown", -1)],
)
def test_rows_of_real_builds(build: str, number: int, commit: str, layers: int) -> None:
    """Prefill and decode at two depths, among lines of progress; a shallow clone has no number."""
    rows = parse_rows((DATA / f"bench-{build}.log").read_text("utf-8"))
    assert [row.work for row in rows] == [(32, 0, 0), (0, 8, 0), (32, 0, 64), (0, 8, 64)]
    for row in rows:
        assert (row.number, row.commit, row.gpu_layers) == (number, commit, layers)
        assert (row.backends, row.model) == (("CPU",), "model.gguf")
        assert len(row.samples) == 3
        assert min(row.samples) > 0


def test_a_row_that_lacks_a_field_is_told() -> None:
    """The error names it: another version may call it otherwise."""
    with pytest.raises(ToolError, match="lacks 'n_depth'"):
        parse_rows('{"build_commit": "a", "build_number": 1, "n_prompt": 1, "n_gen": 0}')


def test_depths_share_one_process(lab: Lab) -> None:
    """Least deep first, whatever the order of the workloads; samples are the tool's own."""
    done = lab.run("cpu", (MUCH, EMPTY, SOME))
    assert done.failures == {}
    assert lab.depths() == ["0,100,300"]
    launch = done.launch
    assert launch.samples == {
        "d0": {"prefill_tps": [1000.0] * 3, "decode_tps": [100.0] * 3},
        "d100": {"prefill_tps": [500.0] * 3, "decode_tps": [50.0] * 3},
        "d300": {"prefill_tps": [250.0] * 3, "decode_tps": [25.0] * 3},
    }
    assert (launch.build, launch.config, launch.model) == ("b9000", "one", "m.gguf")
    assert set(launch.digests.values()) == {PROMPT}
    assert launch.requests == 18
    assert "--n-prompt 16 --n-gen 8 --n-depth 0,100,300 --repetitions 3" in launch.command
    assert Path(launch.log).is_file()


def test_other_lengths_need_another_process(lab: Lab) -> None:
    """A workload of another prompt at the same depth keeps its own samples."""
    done = lab.run("cpu", (EMPTY, bench("other", 100, prompt=32)))
    assert done.failures == {}
    assert lab.depths() == ["0", "100"]
    assert done.launch.samples.keys() == {"d0", "other"}
    assert done.launch.command.count("--n-depth") == 2


def test_what_was_measured_outlives_a_later_process_that_cannot_load(lab: Lab) -> None:
    """The failure is that of the workloads it would have measured, and of no other."""
    done = lab.run("cpu,model@100", (EMPTY, bench("other", 100, prompt=32)))
    assert done.launch.samples.keys() == {"d0"}
    assert done.failures.keys() == {"other"}
    assert "failed to load model" in str(done.failures["other"])


def test_two_names_of_one_depth(lab: Lab) -> None:
    """It is measured once, for both."""
    done = lab.run("cpu", (SOME, bench("again", 100)))
    assert lab.depths() == ["100"]
    assert done.launch.samples["d100"] == done.launch.samples["again"]


def test_no_workload_left_starts_nothing(lab: Lab) -> None:
    """Where all have failed before."""
    assert lab.run("", ()).launch.samples == {}
    assert lab.starts() == []


@pytest.mark.parametrize(
    ("fault", "how"), [("dies", "exit code 3"), ("killed", "SIGKILL"), ("lost", "exit code 0")]
)
def test_what_dies_at_a_depth_fails_alone(lab: Lab, fault: str, how: str) -> None:
    """The others are measured, those after it one by one; the error names the missing row."""
    done = lab.run(f"cpu,{fault}@100")
    assert done.launch.samples.keys() == {"d0", "d300"}
    assert done.failures.keys() == {"d100"}
    error = done.failures["d100"]
    assert isinstance(error, ToolError)
    assert how in str(error)
    assert "generate 8 at depth 100" in str(error)
    assert "b9000's llama-bench" in str(error)
    # What lost a row went on to the end.
    assert lab.depths() == ["0,100,300", "100", *(["300"] if fault != "lost" else [])]
    assert any("by itself, after a crash" in one for one in lab.said)


def test_out_of_memory_is_told_as_such(lab: Lab) -> None:
    """Builds that say so only when they say everything are asked to; each depth is its own."""
    done = lab.run("cpu,full@100,full@300")
    assert done.launch.samples.keys() == {"d0"}
    assert done.failures.keys() == {"d100", "d300"}
    for error in done.failures.values():
        assert isinstance(error, OutOfMemoryError)
        assert error.what == "CPU context buffer"
        told = r"out of memory: CPU context buffer .* MiB were free on the host"
        assert re.match(told, str(error))
        assert "leave out what is as deep" in str(error)
    assert lab.depths() == ["0,100,300", "100", "100", "300", "300"]


def test_what_takes_too_long_is_given_up(lab: Lab) -> None:
    """By the limit of its workload; what is deeper is not tried, what has more time is."""
    slow, deeper = bench("d100", 100, limit=0.5), bench("d300", 300, limit=0.5)
    patient = bench("d400", 400, limit=PATIENCE)
    done = lab.run("cpu,hangs@100", (EMPTY, slow, deeper, patient))
    assert done.launch.samples.keys() == {"d0", "d400"}
    assert "given up after the 0.5 s that one sample may take, in its depth run 1/3" in str(
        done.failures["d100"]
    )
    assert "d300 was not tried: d100, which is less deep" in str(done.failures["d300"])
    assert all(isinstance(error, TooSlowError) for error in done.failures.values())
    assert lab.depths() == ["0,100,300,400", "400"]


def test_what_hangs_without_a_limit_is_given_up(lab: Lab) -> None:
    """By the limit of silence that holds for servers."""
    done = lab.run("cpu,hangs@100", (EMPTY, SOME), hang=0.5)
    assert done.launch.samples.keys() == {"d0"}
    assert "nothing came for 0.5 s" in str(done.failures["d100"])


@pytest.mark.parametrize(
    ("faults", "changes", "told"),
    [
        ("model", {}, "failed to load model"),
        ("loading", {"timeout": 0.5}, "did not load its model in 0.5 s"),
        ("cpu,twice", {}, "two rows of prompt 16 at depth 0"),
        ("cpu,odd", {}, "cannot be read"),
    ],
)
def test_what_no_workload_is_to_blame_for(
    lab: Lab, faults: str, changes: dict[str, Any], told: str
) -> None:
    """It ends the launch, rather than one workload after the other."""
    with pytest.raises(ToolError, match=told):
        lab.run(faults, **changes)
    assert len(lab.starts()) <= 2


@pytest.mark.parametrize(
    ("faults", "gpu", "told"),
    [
        ("cpu,short@0", False, "it has 2 samples, not 3"),
        ("cpu,foreign", False, "it is of build 9999, not 9000; it is of commit beef123"),
        ("cpu,foreign", False, "it is of the model other.gguf"),
        ("cpu", True, r"it ran on the CPU \(backends CPU\)"),
    ],
)
def test_rows_are_checked(lab: Lab, faults: str, told: str, *, gpu: bool) -> None:
    """What is not of the build, the model and the work that was asked for does not count."""
    config = Config("one", "tiny", gpu=gpu)
    done = lab.run(faults, (EMPTY,), config=config)
    assert done.launch.samples == {}
    with pytest.raises(CheckError, match=told):
        raise done.failures["d0"]


def test_layers_that_are_not_on_the_gpu_are_told(lab: Lab) -> None:
    """Unless the config wants none there."""
    card = Config("one", "tiny", gpu=True)
    plan = lab.plan(config=card)
    assert run_bench(plan, (EMPTY,)).failures == {}
    none = replace(card, options={"gpu-layers": 0})
    assert run_bench(replace(plan, config=none), (EMPTY,)).failures == {}
    row = replace(parse_rows((DATA / "bench-b11434.log").read_text("utf-8"))[0], gpu_layers=0)
    with pytest.raises(CheckError, match="it put no layer on a GPU"):
        plan.check(row)


def test_options_that_it_cannot_take_start_nothing(lab: Lab) -> None:
    """Nor does a config that drafts, or a build without the tool."""
    for config in (
        Config("one", "tiny", {"spec-type": "ngram-mod"}),
        Config("one", "t", draft="t"),
    ):
        with pytest.raises(BuildError, match="cannot take"):
            lab.run(config=config)
    plan = lab.plan()
    (lab.folder / "llama-bench").unlink()
    with pytest.raises(BuildError, match="b9000 has no llama-bench beside its server"):
        run_bench(plan, ALL)
    assert lab.starts() == []


def test_the_tool_sees_the_cards_of_its_lease(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its command says so."""
    cards = tuple(Gpu(index, f"GPU-{index}", "card", 1000, "1") for index in range(2))
    monkeypatch.setattr("pytest_llmperf.serve.launch.gpus", lambda: cards)
    serve = replace(lab.plan().serve, cards=cards[1:])
    done = lab.run("cpu", serve=serve)
    chosen = "CUDA_VISIBLE_DEVICES=GPU-1 "
    assert all(one.startswith(chosen) for one in done.launch.command.split("; "))
