"""A campaign of llama-bench: one build after the other, and what a failure takes with it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.fakes import CONFIG, PATIENCE, add_bench

from pytest_llmperf.build.build import Build
from pytest_llmperf.campaign import base
from pytest_llmperf.campaign.bench import BenchCampaign
from pytest_llmperf.errors import BuildError, RunError, ToolError
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.host import Load
from pytest_llmperf.plan.config import LAUNCH, ModelFiles, Turn, Workload
from pytest_llmperf.serve.launch import ServePlan

EMPTY, DEEP = (Workload(f"d{n}", (Turn(16, 8, n),), tool="llama-bench") for n in (0, 100))


@dataclass
class Lab:
    """Two builds, each with a fake llama-bench."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def build(self, name: str, faults: str | None) -> Build:
        """Return a build; one with the faults None has no llama-bench."""
        if faults is not None:
            add_bench(self.folder / name, f"cpu,{faults}")
        command = (str(self.folder / name / "llama-server"),)
        return Build(name, 9000, "0a1b2c3", "fake", "", command=command)

    def campaign(
        self,
        *,
        new: str | None = "",
        old: str | None = "",
        alone: bool = False,
        **changes: Any,  # noqa: ANN401 - of a dataclass
    ) -> BenchCampaign:
        """Return a campaign; ``new`` and ``old`` are the faults of the two builds."""
        fields: dict[str, Any] = {
            "config": CONFIG,
            "workloads": (EMPTY, DEEP),
            "new": self.build("new", new),
            "base": None if alone else self.build("old", old),
            "files": ModelFiles(self.folder / "m.gguf"),
            "serve": ServePlan(self.folder / "run", PATIENCE, PATIENCE, self.said.append),
            "pairs": 2,
            "leases": Leases(self.folder / "locks", (), (), self.said.append),
            "rng": random.Random(7),  # noqa: S311 - a coin, not a key
        }
        return BenchCampaign(**{**fields, **changes})

    def starts(self, name: str) -> int:
        """Return how often a build's tool was started."""
        journal = self.folder / name / "bench-journal"
        return len(journal.read_text("utf-8").splitlines()) if journal.exists() else 0

    def order(self) -> list[int]:
        """Return the process ids of all starts: those of the baseline, then the others."""
        found = []
        for name in ("old", "new"):
            text = (self.folder / name / "bench-journal").read_text("utf-8")
            found += [int(json.loads(line)["pid"]) for line in text.splitlines()]
        return found


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A folder with two builds."""
    return Lab(tmp_path)


def test_a_block_runs_one_build_after_the_other(lab: Lab) -> None:
    """In the order of a coin flip, which the block tells; it is not paired."""
    campaign = lab.campaign()
    firsts = set()
    for index in range(6):
        pair = campaign.block(index)
        assert not pair.together
        assert pair.orders.keys() == {"d0", "d100"}
        old, new = lab.order()[index], lab.order()[-1]
        assert pair.orders["d0"] == ("b" if pair.base.log < pair.new.log else "n")
        assert old != new
        firsts.add(pair.orders["d0"])
        assert pair.base.samples == pair.new.samples
        assert pair.base.samples["d100"] == {"prefill_tps": [500.0] * 2, "decode_tps": [50.0] * 2}
    assert firsts == {"b", "n"}
    assert (lab.starts("old"), lab.starts("new")) == (6, 6)
    assert campaign.block(0) is campaign.block(0)
    assert campaign.measured == (6, 0)


def test_launches_of_one_build_alone(lab: Lab) -> None:
    """One process a launch, however many depths."""
    campaign = lab.campaign(alone=True)
    assert campaign.launch(1).samples.keys() == {"d0", "d100"}
    assert lab.starts("new") == 2
    with pytest.raises(RunError, match="no second build"):
        campaign.block(0)


def test_a_workload_that_fails_is_not_tried_again(lab: Lab) -> None:
    """By either build; the other workload goes on."""
    campaign = lab.campaign(new="dies@100")
    pair = campaign.block(0)
    assert campaign.failures.keys() == {"d100"}
    assert campaign.blames(campaign.failures["d100"])
    assert pair.new.samples.keys() == {"d0"}
    before = lab.starts("new")
    pair = campaign.block(1)
    assert lab.starts("new") == before + 1
    assert pair.base.samples.keys() == pair.new.samples.keys() == {"d0"}


@pytest.mark.parametrize("lacking", ["new", "old"])
def test_a_build_without_the_tool_is_told_before_the_other_runs(lab: Lab, lacking: str) -> None:
    """Not after minutes of measuring; every test of the config gets the same error."""
    faults: dict[str, str | None] = {"new": "", "old": "", lacking: None}
    campaign = lab.campaign(new=faults["new"], old=faults["old"])
    for _ in range(2):
        with pytest.raises(BuildError, match=f"build {lacking} has no llama-bench"):
            campaign.block(0)
    assert lab.starts("new") == lab.starts("old") == 0


def test_a_model_that_does_not_load_fails_all(lab: Lab) -> None:
    """The tool is not started for each workload to see it again."""
    campaign = lab.campaign(alone=True, new="model")
    with pytest.raises(ToolError, match="failed to load model"):
        campaign.launch(0)
    assert campaign.failures.keys() == {LAUNCH}
    assert campaign.blames(campaign.failures[LAUNCH])


def test_a_disturbed_launch_is_measured_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a server is; the last try tells what disturbed."""

    class Busy:
        def load(self) -> Load:
            return Load(2.0, "make (pid 7) 2.0 of them", 0)

    monkeypatch.setattr(base, "Watch", Busy)
    monkeypatch.setattr(base, "_QUIET_WAIT_S", 0.0)
    launch = lab.campaign(alone=True, foreign_load=0.5).launch(0)
    assert "other programs kept 2.0" in launch.disturbed
    assert lab.starts("new") == 4
