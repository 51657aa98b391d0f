"""A program's GPUs: watched while it runs, waited for once it has ended."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.fakes import fake_server
from support.nvml import Card, Task

from pytest_llmperf.errors import CheckError, LeakError
from pytest_llmperf.gpu.cards import gpus
from pytest_llmperf.gpu.memory import Release
from pytest_llmperf.measure import on_gpu as module
from pytest_llmperf.measure.launch import GPU_WARM_UPS, Session
from pytest_llmperf.measure.on_gpu import OnGpu
from pytest_llmperf.plan.config import LAUNCH, Turn, Workload

from .conftest import Pretend

WORK = Workload("short", (Turn(40, 8),))
MINE = os.getpid()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits fifteen seconds for memory that will not come back."""
    wait = Release.wait

    def short(self: Release, pids: set[int], progress: object = None) -> str:
        del progress
        return wait(self, pids, timeout=0.05)

    monkeypatch.setattr(Release, "wait", short)


def test_without_gpus_nothing_is_seen_and_nothing_waited_for() -> None:
    """As on a laptop: no memory, no energy, no facts, no error."""
    seen = OnGpu((), print)
    assert seen.held_mib({MINE}) == ({}, "")
    assert (seen.peak_mib({MINE}), seen.energy_j()) == (None, None)
    assert (seen.facts(), seen.disturbed) == ({}, "")
    seen.end({MINE}, "b1")


def test_memory_of_a_program_is_told_by_its_processes(pretend: Pretend) -> None:
    """And the most of it at a time, though it holds less by now."""
    card = Card()
    pretend(card)
    seen = OnGpu(gpus(), print)
    card.hold(Task(MINE, 300.0), Task(1, 50.0))
    seen.facts()
    while not seen.peak_mib({MINE}):
        pass
    card.hold(Task(MINE, 200.0), Task(1, 50.0))
    assert seen.held_mib({MINE}) == ({0: 200.0}, "processes")
    assert seen.peak_mib({MINE}) == 300.0
    card.hold()
    seen.end({MINE}, "b1")


def test_where_nvml_names_no_process_the_growth_of_the_use_is_told(pretend: Pretend) -> None:
    """As in a container, whose process ids the driver does not know."""
    card = Card(used=100.0)
    pretend(card)
    seen = OnGpu(gpus(), print)
    card.used = 105.0
    assert seen.held_mib({MINE}) == ({}, ""), "what the driver takes for itself"
    card.used = 400.0
    assert seen.held_mib({MINE}) == ({0: 300.0}, "use")
    card.used = 250.0
    assert seen.peak_mib({MINE}) == 300.0
    card.used = 100.0
    seen.end({MINE}, "b1")


def test_memory_that_stays_is_an_error(pretend: Pretend) -> None:
    """It names what left it, the GPU and the size; with another error on its way it is silent."""
    card = Card(used=100.0)
    pretend(card)
    seen = OnGpu(gpus(), print)
    card.used = 612.0
    message = r"^b1 for config c7 ended, and its GPU memory is not free: GPU 0: 512 MiB more in use"
    with pytest.raises(LeakError, match=message):
        seen.end((), "b1 for config c7")
    seen.end((), "b1 for config c7")
    card.used = 100.0
    unchecked = OnGpu(gpus(), print)
    card.used = 612.0
    unchecked.end((), "b1", check=False)


def test_a_session_records_what_the_gpu_does(tmp_path: Path, pretend: Pretend) -> None:
    """Memory, its peak, energy for each workload, and the facts once it is closed."""
    card = Card(energy_mj=0, power_mw=300_000, limit_mw=700_000, rates=(50, 20))
    pretend(card)

    def work(memory: Card) -> None:
        memory.energy_mj = (memory.energy_mj or 0) + 40_000

    on_gpu = OnGpu(gpus(), print)
    with fake_server(tmp_path) as server:
        server.config = replace(server.config, gpu=True)
        card.hold(Task(server.pid or 0, 500.0))
        session = Session(server, list(range(600)), on_gpu)
        session.settle()
        assert session.launch.samples[LAUNCH]["vram_mib"] == [500.0]
        assert session.launch.vram_by == "processes"
        session.warm_up(WORK)
        assert session.launch.requests == 1 + GPU_WARM_UPS
        ask = session.server.client.ask

        def asked(*arguments: object) -> object:
            work(card)
            return ask(*arguments)  # type: ignore[arg-type]  # passed on as they are

        session.server.client.ask = asked  # type: ignore[assignment,method-assign]  # to count
        session.sample(WORK)
        session.sample(WORK)
        taken = session.launch.samples[WORK.name]
        assert taken["tokens_per_joule"] == pytest.approx([16 / 80.0]), "of both samples together"
        assert len(taken["decode_tps"]) == 2
        session.stop()
        card.hold()
        session.close()
        assert session.launch.samples[LAUNCH]["vram_peak_mib"] == [500.0]
        told = json.dumps(session.launch.gpu["cards"])
        assert '"name": "NVIDIA H200", "mig": false' in told
        assert '"power_limit_w": 700' in told


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("offloaded 0/5 layers to GPU", "0 of 5 layers are on a GPU"),
        ("CPU model buffer size = 12.5 MiB", r"all its buffers are the CPU's \(CPU\)"),
    ],
)
def test_a_server_that_fell_back_to_the_cpu_is_refused(tmp_path: Path, log: str, told: str) -> None:
    """By what its log says; unless the config wants no layer there."""
    with fake_server(tmp_path) as server:
        server.config = replace(server.config, gpu=True)
        server.log_text = lambda: f"load: {log}\n"  # type: ignore[method-assign]  # another log
        session = Session(server, list(range(600)))
        with pytest.raises(CheckError, match=f"b9000 fell back to the CPU: .*{told}"):
            session.settle()
        server.config = replace(server.config, options={"gpu-layers": 0})
        Session(server, list(range(600))).settle()


def test_what_disturbs_is_told_of_the_first_gpu_that_says_so(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program that computes there."""
    card = Card()
    pretend(card)
    monkeypatch.setattr(module, "is_ours", lambda pid: pid != os.getppid())
    seen = OnGpu(gpus(), print)
    card.hold(Task(os.getppid(), 100.0))
    while not seen.disturbed:
        pass
    assert seen.disturbed.startswith("GPU 0 is shared: ")
    seen.end((), "b1", check=False)
