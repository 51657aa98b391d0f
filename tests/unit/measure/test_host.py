"""What else the host does while something is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure import host
from pytest_llmperf.measure.host import UNSTEADY, Load, Watch, unsteady

_SPIN = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"


def processor_time(seconds: float) -> float:
    """Use the processor for so long and return how long that took."""
    began = time.monotonic()
    while time.process_time() < seconds:
        pass
    return time.monotonic() - began


def test_our_own_work_is_not_foreign() -> None:
    """What this process and its children use does not count, however much it is."""
    child = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        watch = Watch()
        used = time.process_time()
        processor_time(used + 0.5)
        load = watch.load()
        mine = psutil.Process(child.pid).cpu_times()
    finally:
        child.kill()
        child.wait()
    assert mine.user > 0.1
    assert f"pid {child.pid}" not in load.worst


def test_what_ended_meanwhile_was_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of ours that is done when the load is read was no foreign load."""
    readings = [
        host._Reading(0.0, busy=10.0, steal=0.0, used={}, family=(), boxed=(), mine=1, throttled=0),
        host._Reading(2.0, busy=14.0, steal=0.0, used={}, family=(), boxed=(), mine=4, throttled=0),
    ]
    monkeypatch.setattr(host, "_read", lambda: readings.pop(0))
    assert Watch().load().cores == pytest.approx(0.5)


def test_what_a_child_did_is_ours_once_it_has_ended() -> None:
    """All of it, as soon as it is collected, and none of it twice."""
    before = host._read().mine
    child = subprocess.Popen([sys.executable, "-c", "sum(range(30_000_000))"])
    child.wait()
    own = time.process_time()
    spent = host._read().mine - before
    assert spent > 0.05
    assert spent < own + sum(psutil.Process().cpu_times()[2:4]) + 0.1


def test_containers_of_servers_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """They descend from their engine; with theirs the processes in them."""
    monkeypatch.setattr(host, "server_pids", lambda: {50, 99})
    monkeypatch.setattr("os.getpid", lambda: 10)
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 40: 1, 50: 40, 51: 50, 60: 1}
    assert host._ours(parents) == ({10, 11, 12}, {50, 51})


def test_other_workers_of_the_run_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their servers, also those in containers; what else runs is not."""
    monkeypatch.setattr(host, "server_pids", set[int])
    monkeypatch.setattr(host, "boxed_by", {50: 31, 70: 71}.get)
    monkeypatch.setattr(host, "_family", {20})
    parents = {1: 0, 20: 1, 30: 20, 31: 20, 32: 31, 40: 1, 50: 40, 51: 50, 70: 40, 71: 1}
    assert host._ours(parents) == ({20, 30, 31, 32}, {50, 51})


def test_what_another_worker_does_itself_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a model, or runs tests that measure nothing; its servers stay ours."""
    monkeypatch.setattr(host, "_family", {20})
    parents = {1: 0, 20: 1, os.getpid(): 20, 31: 20, 32: 31, 33: 1}
    assert host._siblings(parents) == {31}
    program = "import time\nfor _ in range(10**9): pass"
    with subprocess.Popen([sys.executable, "-c", program]) as sibling:
        try:
            family = {os.getppid(), os.getpid(), sibling.pid}
            monkeypatch.setattr(host, "_ours", lambda _parents: (family, set()))
            monkeypatch.setattr(host, "_siblings", lambda _parents: {sibling.pid})
            watch = host.Watch()
            processor_time(0.3)
            while f"(pid {sibling.pid})" not in watch.load().worst:
                pass
        finally:
            sibling.kill()


def test_a_worker_on_another_machine_has_no_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller's number means nothing there."""
    monkeypatch.setattr(host, "_family", set[int]())
    host.share(psutil.Process().ppid())
    assert host._family == {psutil.Process().ppid()}
    assert host.is_ours(psutil.Process().ppid())
    host.share(99_999_999)
    assert host._family == set()
    assert not host.is_ours(psutil.Process().ppid())


def test_what_descends_from_us_is_ours() -> None:
    """However far; not what has ended, nor what never was."""
    program = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input()'],"
        " stdin=subprocess.PIPE); print(p.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        far = int(child.stdout.readline())
        assert host.is_ours(psutil.Process().pid)
        assert host.is_ours(child.pid)
        assert host.is_ours(far)
        assert not host.is_ours(1)
        child.communicate(b"\n")
    assert not host.is_ours(child.pid)
    assert not host.is_ours(99_999_999)


def test_a_container_of_another_worker_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whose server its main process is."""
    parent = psutil.Process().ppid()
    monkeypatch.setattr(host, "_family", {parent})
    monkeypatch.setattr(host, "boxed_by", {1: psutil.Process().pid}.get)
    assert host.is_ours(1)
    monkeypatch.setattr(host, "boxed_by", {1: 1}.get)
    assert not host.is_ours(1)


def test_a_container_of_ours_is_known_before_its_engine_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a model is loaded for minutes, its process is on the GPU, and not yet a server's."""
    monkeypatch.setattr(host, "_family", set[int]())
    monkeypatch.setattr(host, "server_pids", set[int])
    monkeypatch.setattr(host, "boxed_by", {1: os.getpid()}.get)
    assert host.is_ours(1)
    monkeypatch.setattr(host, "boxed_by", {1: 99_999_999}.get)
    assert not host.is_ours(1)


def test_a_neighbour_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy process that is not ours is told with its name, pid and cores."""
    child = subprocess.Popen([sys.executable, "-c", _SPIN])
    try:
        monkeypatch.setattr(host, "_ours", lambda _parents: ({psutil.Process().pid}, set()))
        watch = Watch()
        until = time.monotonic() + 20
        load = watch.load()
        # A crowded machine may give it little at first.
        while load.cores < 0.05 and time.monotonic() < until:
            time.sleep(0.2)
            load = watch.load()
        told = load.told(0.01)
    finally:
        child.kill()
        child.wait()
    assert "other programs kept" in told
    assert load.cores > 0.01


def test_foreign_load_below_the_limit_does_not_count() -> None:
    """Only what exceeds the limit is told, and heat always is."""
    assert Load(0.4, "make (pid 7) 0.4 of them", 0).told(0.5) == ""
    told = Load(1.6, "make (pid 7) 1.5 of them", 0).told(0.5)
    assert "kept 1.6 of " in told
    assert told.endswith("make (pid 7) 1.5 of them")
    assert "throttled 3 times" in Load(0.0, "", 3).told(0.5)


def test_stolen_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host gives the time to other guests there is no process to name."""
    clock = {"steal": 0.0, "user": 10.0, "idle": 10.0}

    class Times(tuple[float, ...]):
        __slots__ = ()

        steal = property(lambda self: self[0])
        idle = property(lambda self: self[1])

    def cpu_times() -> Times:
        return Times((clock["steal"], clock["idle"], clock["user"]))

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(psutil, "process_iter", lambda _fields: [])
    watch = Watch()
    clock["steal"] += 5.0
    load = watch.load()
    assert load.cores > 0
    assert "the host's other guests" in load.worst


def test_throttling_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's counters of all cores are added up; those that cannot be read are left out."""
    for core, text in (("cpu0", "3\n"), ("cpu1", "4\n"), ("cpu2", "?")):
        folder = tmp_path / core / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(text)
    monkeypatch.setattr(host, "Path", lambda _path: tmp_path)
    assert host._throttled() == 7


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        ([100.0, 101.0, 99.0], ""),
        ([100.0, 50.0, 101.0], ""),
        ([100.0, 50.0, 160.0], "scatter"),
        ([100.0, 120.0, 150.0], "drift"),
        ([150.0, 120.0, 100.0, 80.0], "drift"),
        ([100.0, 200.0], ""),
        ([0.0, 1.0, 2.0], ""),
    ],
)
def test_unsteady_launches_are_named(samples: list[float], word: str) -> None:
    """Drift and scatter are told with the samples; one spike among good ones is not."""
    told = unsteady(samples)
    assert (word in told) if word else not told
    if word:
        assert f"{samples[0]:.4g}, " in told


@given(st.lists(st.floats(1, 1.2), min_size=3, max_size=12), st.floats(0.01, 1000))
def test_small_wobble_is_steady_at_any_scale(wobble: list[float], scale: float) -> None:
    """What stays within the limit is never unsteady."""
    assert UNSTEADY > 0.2
    assert not unsteady([scale * value for value in wobble])


def test_a_watch_sees_this_machine() -> None:
    """It works on the real counters: a finite number of cores, no more than there are."""
    watch = Watch()
    time.sleep(0.05)
    load = watch.load()
    assert 0 <= load.cores <= (psutil.cpu_count() or 1) + 1
    assert SimpleNamespace(load=load).load.throttled >= 0
