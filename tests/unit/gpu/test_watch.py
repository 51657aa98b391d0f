"""What GPUs do while something runs on them, and who else is there."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from support.nvml import Card, Driver, Task, Work

from pytest_llmperf.gpu import watch as module
from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.gpu.watch import Foreign, GpuUse, GpuWatch, energy_j
from pytest_llmperf.measure.host import is_ours

Pretend = Callable[..., Driver]

OURS = 2**30
STRANGER = 2**30 + 1
ME = os.getpid()
"""A process that exists here, for a foreign one."""


class Clock:
    """Seconds that pass only when a test lets them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Stepped:
    """A watch that looks when it is told to, a second after the last look."""

    def __init__(self, clock: Clock, ours: Collection[int] = (OURS,)) -> None:
        self._clock = clock
        self.asked: list[int] = []
        self.ours = set(ours)
        self.watch = GpuWatch(gpus(), self._is_ours)

    def _is_ours(self, pid: int) -> bool:
        self.asked.append(pid)
        return pid in self.ours

    def look(self, seconds: float = 1.0, *, last: bool = False) -> None:
        """Let time pass and look."""
        self._clock.now += seconds
        self.watch._tick(last=last)

    @property
    def use(self) -> GpuUse:
        """What the first GPU did."""
        return self.watch.uses()[0]


Step = Callable[..., Stepped]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """Makes watches that look when they are told to."""
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(GpuWatch, "_run", lambda _watch: None)
    return lambda **keywords: Stepped(clock, **keywords)


def test_without_gpus_or_nvml_nothing_is_seen(pretend: Pretend) -> None:
    """And no thread is started; GPUs may be made up."""
    pretend(start=9)
    made_up = Gpu(0, "GPU-x", "made up", 1, "1")
    for cards in ((), (made_up,)):
        with GpuWatch(cards, lambda _pid: True) as watch:
            assert watch._thread is None
            assert watch.uses() == ()
            assert watch.peak_mib([1]) is None
            assert (watch.grown_mib(), watch.grown_peak_mib()) == (0.0, 0.0)
    assert energy_j([made_up]) is None


def test_figures_are_told_over_all_samples(pretend: Pretend, step: Step) -> None:
    """Means, medians, peaks and shares, and the rate at which they were taken."""
    driver = pretend(
        Card(rates=(50, 20), sm_clock=1000, memory_clock=3201, energy_mj=5000, reasons=0)
    )
    card = driver.cards[0]
    seen = step()
    for clock, temperature, power, used in ((1980, 40, 100, 10), (1700, 60, 300, 500)):
        card.sm_clock, card.temperature, card.power_mw = clock, temperature, power * 1000
        card.used = used
        card.rates = (clock // 20, 30)
        seen.look(0.5)
    card.energy_mj = 8500
    card.temperature = None
    card.used = 20
    seen.look(0.5)
    use = seen.use
    assert (use.samples, use.seconds, use.rate_hz) == (3, 1.5, 2.0)
    assert use.busy == pytest.approx((99 + 85 + 85) / 3)
    assert use.memory_busy == 30
    assert use.sm_clock_mhz == (1700, 1700, 1980)
    assert use.memory_clock_mhz == 3201
    assert (use.temperature_c, use.used_peak_mib) == (60, 500)
    assert use.power_w == pytest.approx((100 + 300 + 300) / 3)
    assert use.energy_j == 3.5
    assert (use.throttled, use.power_capped, use.disturbed) == ({}, 0.0, "")


def test_what_nvml_does_not_tell_is_none(pretend: Pretend, step: Step) -> None:
    """No figure is made up for it, and nothing disturbs."""
    pretend(Card(total=None))
    seen = step()
    seen.look()
    use = seen.use
    assert (use.busy, use.sm_clock_mhz, use.memory_clock_mhz, use.temperature_c) == (None,) * 4
    assert (use.power_w, use.energy_j, use.used_peak_mib, use.memory_busy) == (None,) * 4
    assert use.disturbed == ""
    assert json.loads(json.dumps(use.to_json()))["busy"] is None


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize(
    ("bits", "name", "words"),
    [
        (0x20, "sw_thermal", "too hot (sw_thermal)"),
        (0x40, "hw_thermal", "too hot (hw_thermal)"),
        (0x80, "hw_power_brake", "the power supply asked for it (hw_power_brake)"),
        (0x08, "hw_slowdown", "slowed down by its hardware (hw_slowdown)"),
    ],
)
def test_throttling_disturbs(
    pretend: Pretend, step: Step, bits: int, name: str, words: str, *, newest: bool
) -> None:
    """With its share of the samples, by the newer name of the function or the older."""
    driver = pretend(Card(reasons=0), newest=newest)
    seen = step()
    for place in range(5):
        driver.cards[0].reasons = bits if place < 2 else 0x01
        seen.look()
    assert seen.use.throttled == {name: 0.4}
    assert seen.use.disturbed == f"GPU 0 throttled in 40 % of the samples: {words}"


def test_throttling_for_two_reasons_is_told_once(pretend: Pretend, step: Step) -> None:
    """Heat engages the hardware's own slowdown too."""
    pretend(Card(reasons=0x48))
    seen = step()
    seen.look()
    assert seen.use.disturbed == (
        "GPU 0 throttled in 100 % of the samples: too hot (hw_thermal), slowed down by its "
        "hardware (hw_slowdown)"
    )


@pytest.mark.parametrize(("of", "disturbs"), [(20, True), (21, False)])
def test_throttling_in_few_samples_does_not_disturb(
    pretend: Pretend, step: Step, of: int, *, disturbs: bool
) -> None:
    """It is told all the same."""
    driver = pretend(Card(reasons=0x08))
    seen = step()
    for _ in range(of):
        seen.look()
        driver.cards[0].reasons = 0
    assert seen.use.throttled == {"hw_slowdown": 1 / of}
    assert bool(seen.use.disturbed) is disturbs


def test_the_power_limit_is_told_and_disturbs_nothing(pretend: Pretend, step: Step) -> None:
    """It belongs to the GPU; so do idleness and clocks that were set."""
    pretend(Card(reasons=0x04 | 0x01 | 0x02))
    seen = step()
    seen.look()
    assert (seen.use.power_capped, seen.use.throttled, seen.use.disturbed) == (1.0, {}, "")


def test_a_foreign_process_that_computes_disturbs(pretend: Pretend, step: Step) -> None:
    """With who it is, what it held at most and how busy it kept the GPU."""
    driver = pretend(Card(total=99999, work=[]))
    card = driver.cards[0]
    seen = step()
    for held, stamp in ((12000, 1000), (500, 2000)):
        card.hold(Task(OURS, 4000), Task(ME, held))
        card.work = [Work(ME, stamp, 45), Work(OURS, stamp, 55)]
        seen.look()
    name = psutil.Process(ME).name()
    assert seen.use.foreign == (Foreign(ME, name, 12000, 45.0, compute=True),)
    assert seen.use.disturbed == (
        f"GPU 0 is shared: {name} (pid {ME}) holds 12000 MiB and keeps it 45 % busy"
    )


@pytest.mark.parametrize(("percent", "disturbs"), [(2, False), (3, True), (65535, True)])
def test_a_foreign_process_that_does_little_does_not_disturb(
    pretend: Pretend, step: Step, percent: int, *, disturbs: bool
) -> None:
    """It is named all the same; no process is more than wholly busy."""
    driver = pretend(Card(work=[]))
    seen = step()
    driver.cards[0].hold(Task(ME, 100))
    driver.cards[0].work = [Work(ME, 1, percent)]
    seen.look()
    assert [one.busy for one in seen.use.foreign] == [min(percent, 100)]
    assert bool(seen.use.disturbed) is disturbs


@pytest.mark.parametrize(("compute", "disturbs"), [(True, True), (False, False)])
def test_where_use_is_untold_those_that_compute_disturb(
    pretend: Pretend, step: Step, *, compute: bool, disturbs: bool
) -> None:
    """A desktop only draws."""
    driver = pretend(Card(work=None))
    driver.cards[0].hold(Task(ME, None, compute=compute, draws=not compute))
    seen = step()
    seen.look()
    [one] = seen.use.foreign
    assert (one.mib, one.busy, one.compute) == (None, None, compute)
    assert bool(seen.use.disturbed) is disturbs
    if disturbs:
        assert seen.use.disturbed.endswith("holds memory and computes there")


def test_use_of_a_process_is_its_mean_over_the_watch(pretend: Pretend, step: Step) -> None:
    """What is untold of a while was nothing; what came before, or is no sample, does not count."""
    driver = pretend(Card(work=[Work(ME, 500, 100)]))
    card = driver.cards[0]
    card.hold(Task(ME, 100))
    seen = step()
    seen.look()
    card.work = [Work(ME, 500, 100), Work(ME, 1500, 40), Work(ME, 0, 99), Work(0, 1600, 99)]
    seen.look()
    seen.look()
    seen.look(last=True)
    # 40 percent since the stamp, two seconds before; nothing in the two after.
    assert [one.busy for one in seen.use.foreign] == [20.0]


def test_a_driver_that_tells_no_samples_tells_of_no_work(pretend: Pretend, step: Step) -> None:
    """The bindings make an error of success with nothing in it."""
    driver = pretend(Card(work=[]))
    driver.cards[0].failing["nvmlDeviceGetProcessUtilization"] = 0
    driver.cards[0].hold(Task(ME, 100))
    seen = step()
    seen.look()
    assert [one.busy for one in seen.use.foreign] == [0.0]
    assert seen.use.disturbed == ""


def test_a_process_of_another_namespace_does_not_disturb(pretend: Pretend, step: Step) -> None:
    """In a container NVML names our own server by a pid that does not exist there."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(STRANGER, 100))
    seen = step()
    seen.look()
    [one] = seen.use.foreign
    assert (one.pid, one.seen, one.name) == (
        STRANGER,
        False,
        "a process that cannot be seen from here",
    )
    assert seen.use.disturbed == ""


def test_whether_a_process_is_ours_is_asked_without_a_lock(pretend: Pretend, step: Step) -> None:
    """Once for one that is; a server in a container may be known as ours only later."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(OURS, 100), Task(ME, 100))
    seen = step()
    locked: list[bool] = []
    ask = seen.watch._ours

    def note(pid: int) -> bool:
        locked.append(seen.watch._lock.locked())
        return ask(pid)

    seen.watch._ours = note
    for _ in range(3):
        seen.look()
    assert seen.use.foreign[0].pid == ME
    seen.ours.add(ME)
    for _ in range(60):
        seen.look()
    assert seen.use.foreign == ()
    assert seen.asked.count(OURS) == 1
    assert not any(locked)


def test_a_foreign_process_is_not_asked_about_for_ever(pretend: Pretend, step: Step) -> None:
    """A few times, each after twice as long."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(ME, 100))
    seen = step()
    for _ in range(100):
        seen.look()
    assert seen.asked == [ME] * 5


def test_a_process_that_ends_while_it_is_asked_about_is_none_of_ours(
    pretend: Pretend, step: Step
) -> None:
    """The question may find nobody; that ends no watch."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(STRANGER, 100))
    seen = step()

    def gone(pid: int) -> bool:
        raise psutil.NoSuchProcess(pid)

    seen.watch._ours = gone
    seen.look()
    assert [one.pid for one in seen.use.foreign] == [STRANGER]


def test_the_peak_is_of_one_time_over_all_gpus(pretend: Pretend, step: Step) -> None:
    """Not the sum of each process's own peak, nor of each GPU's."""
    driver = pretend(Card("GPU-1"), Card("GPU-2"))
    first, second = driver.cards
    seen = step()
    assert seen.watch.peak_mib([1, 2]) is None
    for here, there in (
        ([Task(1, 300), Task(2, 10)], [Task(1, 50)]),
        ([Task(1, 100), Task(2, 150), Task(3, 900)], [Task(1, 100)]),
        ([Task(2, 20)], []),
    ):
        first.hold(*here)
        second.hold(*there)
        seen.look()
        seen.look()
    assert seen.watch.peak_mib([1, 2]) == 360
    assert seen.watch.peak_mib([1]) == 350
    assert seen.watch.peak_mib([4]) is None
    # What did not change is kept once.
    assert len(seen.watch._held) == 3


def test_processes_without_sizes_have_no_peak(pretend: Pretend, step: Step) -> None:
    """Unknown is not 0."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(1, None))
    seen = step()
    seen.look()
    assert seen.watch.peak_mib([1]) is None


def test_growth_is_of_all_gpus_since_the_start(pretend: Pretend, step: Step) -> None:
    """Where NVML does not name the server; less than at the start is no growth."""
    driver = pretend(Card("GPU-1", used=100), Card("GPU-2", used=50))
    first, second = driver.cards
    seen = step()
    for here, there in ((400, 60), (200, 50), (90, 50)):
        first.used, second.used = here, there
        seen.look()
    assert seen.watch.grown_mib() == 0
    assert seen.watch.grown_peak_mib() == 310


def test_a_gpu_that_is_lost_ends_its_sampling(pretend: Pretend, step: Step) -> None:
    """It is told; the other is watched on."""
    driver = pretend(Card("GPU-1"), Card("GPU-2"))
    seen = step()
    seen.look()
    driver.cards[0].lost = 15
    seen.look()
    driver.cards[0].lost = None
    seen.look()
    first, second = seen.watch.uses()
    assert (first.samples, second.samples) == (1, 3)
    assert first.disturbed == "GPU 0 was lost while it was watched: GPU is lost"
    assert second.disturbed == ""


def test_a_gpu_that_is_lost_before_is_told(pretend: Pretend, step: Step) -> None:
    """It was found when the run began."""
    driver = pretend(Card())
    cards = gpus()
    driver.cards.clear()
    assert cards
    seen = step()
    seen.look()
    assert "was lost" in seen.use.disturbed
    assert (seen.use.samples, seen.use.seconds, seen.use.rate_hz) == (0, 0.0, 0.0)


def test_a_mig_instance_has_no_power_of_its_own(pretend: Pretend, step: Step) -> None:
    """Its processes and memory are its own; clocks are its GPU's, energy nobody's."""
    whole = {"sm_clock": 1980, "temperature": 50, "power_mw": 9000, "energy_mj": 7, "reasons": 0x40}
    board = Card("GPU-1", work=[], tasks=[Task(ME, 9)], **whole)  # type: ignore[arg-type]
    instance = Card("MIG-1", "NVIDIA H200 MIG 1g.18gb")
    instance.hold(Task(OURS, 400))
    board.instances = [instance]
    pretend(board)
    seen = step()
    seen.look()
    use = seen.use
    assert use.card.uuid == "MIG-1"
    assert use.sm_clock_mhz == (1980, 1980, 1980)
    assert (use.temperature_c, use.power_w, use.energy_j) == (50, None, None)
    assert "too hot" in use.disturbed
    assert (use.foreign, use.used_peak_mib) == ((), 400)
    assert seen.watch.peak_mib([OURS]) == 400
    assert energy_j(gpus()) is None


def test_energy_is_summed_over_the_gpus(pretend: Pretend) -> None:
    """In joules; one that does not tell leaves the sum unknown."""
    driver = pretend(Card("GPU-1", energy_mj=1500), Card("GPU-2", energy_mj=500))
    assert energy_j(gpus()) == 2.0
    driver.cards[1].energy_mj = None
    assert energy_j(gpus()) is None
    assert energy_j(()) is None


def test_a_use_is_told_in_json_without_the_uuid(pretend: Pretend, step: Step) -> None:
    """Rounded; the UUID would name the machine in public."""
    driver = pretend(
        Card(
            "GPU-secret", limit_mw=700_000, persistence=1, sm_clock=1980, reasons=0x20, work=[],
            power_mw=412_345, energy_mj=1,
        )
    )  # fmt: skip
    driver.cards[0].hold(Task(ME, 500))
    seen = step()
    seen.look()
    seen.look()
    told = json.loads(json.dumps(seen.use.to_json()))
    assert "secret" not in json.dumps(told)
    assert (told["index"], told["power_limit_w"], told["persistence"]) == (0, 700, True)
    assert (told["sm_clock_mhz"], told["power_w"]) == ([1980, 1980, 1980], 412.3)
    assert (told["throttled"], told["samples"]) == ({"sw_thermal": 1.0}, 2)
    [other] = told["foreign"]
    assert (other["pid"], other["mib"], other["busy"]) == (ME, 500, 0.0)


def test_several_disturbances_are_one_line(pretend: Pretend, step: Step) -> None:
    """Whatever they are."""
    driver = pretend(Card(reasons=0x40))
    driver.cards[0].hold(Task(ME, 500))
    seen = step()
    seen.look()
    use = replace(seen.use, lost="GPU is lost")
    assert "\n" not in use.disturbed
    for told in ("was lost", "throttled", "is shared"):
        assert told in use.disturbed


def until(true: Callable[[], bool]) -> None:
    """Wait for something to come true, which it must."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_thread_samples_until_it_is_stopped(pretend: Pretend) -> None:
    """The last sample is of the end; stopping again does nothing."""
    driver = pretend(Card())
    card = driver.cards[0]
    with GpuWatch(gpus(), lambda pid: pid == OURS, rate_hz=200) as watch:
        card.hold(Task(OURS, 300))
        until(lambda: watch.peak_mib([OURS]) == 300)
        assert watch.grown_mib() == 300
        card.hold(Task(OURS, 400))
    watch.stop()
    assert watch.peak_mib([OURS]) == 400
    assert watch.grown_mib() == 400
    assert watch._thread is not None
    assert not watch._thread.is_alive()
    samples = watch.uses()[0].samples
    card.hold(Task(OURS, 999))
    assert (watch.peak_mib([OURS]), watch.uses()[0].samples) == (400, samples)


def test_the_thread_ends_when_every_gpu_is_lost(pretend: Pretend) -> None:
    """There is nothing left to look at."""
    driver = pretend(Card())
    watch = GpuWatch(gpus(), lambda _pid: True, rate_hz=200)
    driver.cards[0].lost = 15
    thread = watch._thread
    assert isinstance(thread, threading.Thread)
    thread.join(60)
    assert not thread.is_alive()
    assert "was lost" in watch.uses()[0].disturbed
    watch.stop()


def test_an_error_of_the_caller_ends_the_sampling_only(pretend: Pretend) -> None:
    """It is told in place of a figure; the thread raises nothing."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(ME, 1))

    def fail(_pid: int) -> bool:
        raise ZeroDivisionError("a mistake")

    watch = GpuWatch(gpus(), fail, rate_hz=200)
    assert watch._thread is not None
    watch._thread.join(60)
    watch.stop()
    assert "ZeroDivisionError: a mistake" in watch.uses()[0].disturbed


def test_a_process_whose_number_is_none_is_no_error(pretend: Pretend) -> None:
    """NVML may name one of 32 bits, which no process can have: it is nobody that can be seen."""
    driver = pretend(Card())
    driver.cards[0].hold(Task(2**32 - 1, 100))
    with GpuWatch(gpus(), is_ours, rate_hz=200) as watch:
        until(lambda: bool(watch.uses()[0].foreign))
    [one] = watch.uses()[0].foreign
    assert not one.seen
    assert watch.uses()[0].disturbed == ""
