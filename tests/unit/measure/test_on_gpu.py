"""A program's GPUs: watched while it runs, waited for once it has ended."""

from __future__ import annotations

import json
import os
import threading
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

    def short(self: Release, pids: set[int], progress: object = None, *, alone: bool = True) -> str:
        del progress
        return wait(self, pids, timeout=0.05, alone=alone)

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
        # As the config wants it, in whatever words.
        for options in ({"gpu-layers": 0}, {"n-gpu-layers": "0"}, {"device": "none"}):
            server.config = replace(server.config, options=options)
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


def test_beside_another_server_the_growth_of_the_use_is_nobodys(pretend: Pretend) -> None:
    """Where NVML names no process: what each was seen to take before the other came stays its."""
    card = Card(used=100.0)
    pretend(card)
    first = OnGpu(gpus(), print)
    card.used = 400.0
    assert first.held_mib({MINE}) == ({0: 300.0}, "use")
    first.share()
    second = OnGpu(gpus(), print)
    card.used = 900.0
    assert second.held_mib({MINE}) == ({0: 500.0}, "use")
    second.share()
    first.share()
    card.used = 950.0
    assert second.held_mib({MINE}) == ({0: 550.0}, "use")
    assert (first.peak_mib({MINE}), second.peak_mib({MINE})) == (300.0, 500.0)
    card.used = 100.0
    first.end((), "b1")
    second.end((), "b2")


def test_beside_another_server_only_names_prove_a_leak(pretend: Pretend) -> None:
    """One that is started again is held to what its forerunner found, once all have ended."""
    card = Card(used=100.0)
    pretend(card)
    first = OnGpu(gpus(), print)
    card.used = 900.0
    first.end((), "b1", alone=False)
    again = OnGpu(gpus(), print, instead=first)
    card.used = 600.0
    with pytest.raises(LeakError, match="GPU 0: 500 MiB more in use"):
        again.end((), "b1")
    card.hold(Task(MINE, 800.0))
    named = OnGpu(gpus(), print)
    with pytest.raises(LeakError, match=f"pid {MINE}"):
        named.end({MINE}, "b1", alone=False)


def test_processes_that_nvml_names_leave_no_room_for_a_guess(pretend: Pretend) -> None:
    """Another program's growth is not a peak of ours, though ours ended before a look at it."""
    card = Card()
    pretend(card)
    card.failing["nvmlDeviceGetUtilizationRates"] = 15
    seen = OnGpu(gpus(), print)
    card.hold(Task(MINE, 300.0), beside=4000.0)
    assert seen.held_mib({MINE}) == ({0: 300.0}, "processes")
    seen._watch.grown_mib()
    assert seen.peak_mib({MINE}) is None
    seen.end((), "b1", check=False)


def test_guests_are_neither_foreign_nor_a_leak(pretend: Pretend) -> None:
    """A running server that is asked too may be on the same GPU, by whatever process."""
    card = Card()
    pretend(card)
    seen = OnGpu(gpus(), print, guests=True)
    card.hold(Task(os.getppid(), 100.0), beside=500.0)
    while seen._watch.peak_mib({os.getppid()}) is None:
        pass
    assert seen.disturbed == ""
    seen.end((), "b1")


def test_a_request_that_the_counter_of_energy_did_not_move_for_counts(
    tmp_path: Path, pretend: Pretend
) -> None:
    """The counter moves in steps longer than a request: the next one pays for both."""
    card = Card(energy_mj=0)
    pretend(card)
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)), OnGpu(gpus(), print))
        session.warm_up(WORK)
        taken = session.launch.samples
        session.sample(WORK)
        assert "tokens_per_joule" not in taken[WORK.name], "nothing to divide by"
        ask = server.client.ask

        def asked(*arguments: object) -> object:
            card.energy_mj = (card.energy_mj or 0) + 40_000
            return ask(*arguments)  # type: ignore[arg-type]  # passed on as they are

        server.client.ask = asked  # type: ignore[assignment,method-assign]  # to count
        session.sample(WORK)
        assert taken[WORK.name]["tokens_per_joule"] == pytest.approx([16 / 40.0])
        card.energy_mj = None
        server.client.ask = ask  # type: ignore[method-assign]  # as it was
        session.sample(WORK)
        assert taken[WORK.name]["tokens_per_joule"] == pytest.approx([16 / 40.0]), "left out"
        session.close()


def test_a_server_that_cannot_be_stopped_leaves_no_thread(
    tmp_path: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption while it is stopped ends the watch all the same."""
    pretend(Card())
    before = threading.active_count()
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)), OnGpu(gpus(), print))
        running = threading.active_count()

        def interrupt() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(server), "stop", lambda _self: interrupt())
            with pytest.raises(KeyboardInterrupt):
                session.close(check=False)
        assert threading.active_count() == running - 1
    assert threading.active_count() <= before
