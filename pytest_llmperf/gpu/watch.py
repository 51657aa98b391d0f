"""Watches GPUs while something runs on them: memory, clocks, power, and who else is there."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import psutil

from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.gpu.memory import Process, process_name, read_processes, read_used
from pytest_llmperf.gpu.nvml import UntoldError, ask, call, constant, handle, nvml

BUSY_PERCENT = 3.0
"""Mean use of the SMs by a foreign process from which it disturbs; a desktop stays below."""

THROTTLED_SHARE = 0.05
"""Share of the samples from which throttling disturbs; a single one may be a change of clocks."""

SLOWDOWNS: Mapping[str, tuple[int, str]] = {
    "hw_thermal": (0x40, "too hot"),
    "sw_thermal": (0x20, "too hot"),
    "hw_power_brake": (0x80, "the power supply asked for it"),
    "hw_slowdown": (0x08, "slowed down by its hardware"),
}
"""Clocks event reasons that say a GPU could not do what it was asked: bit of NVML, words."""

_SW_POWER_CAP = 0x04
_UTILIZATION_S = 1.0
"""Seconds between looks at the processes' use: the driver averages over up to a second."""
_AGAIN_S = 1.0
_ASKED = 5
"""A process that is not ours is asked about again after 1, 2, 4 and 8 s, and then no more."""
_STOP_S = 5.0
_NOTHING = frozenset({0, 6})
"""What NVML returns for no samples: success, as its bindings put it, or not found."""
_FULL = 100.0


@dataclass(frozen=True, slots=True)
class Foreign:
    """A process on a GPU that is none of ours.

    Attributes:
        pid: As NVML tells it.
        name: For people.
        mib: The most it was seen to hold, MiB; None if untold.
        busy: Mean use of the SMs by it, percent; None if untold.
        compute: Whether it computes; otherwise it draws.
        seen: Whether it exists here. One that does not is in another PID namespace, and may as
            well be ours.
    """

    pid: int
    name: str
    mib: float | None
    busy: float | None
    compute: bool
    seen: bool = True

    @property
    def disturbs(self) -> bool:
        """Whether it takes the GPU from others, as far as that can be known."""
        if not self.seen:
            return False
        return self.compute if self.busy is None else self.busy >= BUSY_PERCENT


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What a GPU did while it was watched. None and empty are what NVML does not tell.

    Of a MIG instance, use, clocks and temperature are those of the whole GPU.

    Attributes:
        card: Which.
        seconds: From the start of the watch to its last sample.
        samples: Their number.
        rate_hz: Samples a second.
        used_peak_mib: The most in use by anybody, MiB.
        busy: Mean share of the time in which anything ran, percent.
        memory_busy: Mean share of the time in which memory was read or written, percent.
        sm_clock_mhz: Lowest, median and highest clock of the SMs.
        memory_clock_mhz: Median clock of the memory.
        temperature_c: The highest.
        power_w: Mean; None for a MIG instance.
        energy_j: By the GPU's counter; None for a MIG instance.
        throttled: Name in :data:`SLOWDOWNS` to the share of samples in which it was so.
        power_capped: Share of the samples with clocks lowered for the power limit: a property of
            GPU and limit, no disturbance.
        foreign: Processes that are none of ours.
        lost: Why it could not be watched until the end; ``""`` if it could.
    """

    card: Gpu
    seconds: float
    samples: int
    rate_hz: float
    used_peak_mib: float | None
    busy: float | None
    memory_busy: float | None
    sm_clock_mhz: tuple[float, float, float] | None
    memory_clock_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    energy_j: float | None
    throttled: Mapping[str, float]
    power_capped: float
    foreign: tuple[Foreign, ...]
    lost: str = ""

    @property
    def disturbed(self) -> str:
        """What made timings the GPU's rather than those of what ran on it; ``""`` if nothing."""
        where = f"GPU {self.card.index}"
        told = []
        if self.lost:
            told.append(f"{where} was lost while it was watched: {self.lost}")
        slow = {name: share for name, share in self.throttled.items() if share >= THROTTLED_SHARE}
        if slow:
            why = ", ".join(f"{SLOWDOWNS[name][1]} ({name})" for name in slow)
            told.append(
                f"{where} throttled in {100 * max(slow.values()):.0f} % of the samples: {why}"
            )
        shared = [_shares(one) for one in self.foreign if one.disturbs]
        if shared:
            told.append(f"{where} is shared: {', '.join(shared)}")
        return "; ".join(told)

    def to_json(self) -> dict[str, object]:
        """Return it for reports, with rounded figures; without the UUID, which names a machine."""
        card = self.card
        return {
            "index": card.index,
            "name": card.name,
            "mig": card.mig,
            "driver": card.driver,
            "power_limit_w": _round(card.power_limit_w),
            "persistence": card.persistence,
            "seconds": round(self.seconds, 1),
            "samples": self.samples,
            "rate_hz": round(self.rate_hz, 1),
            "used_peak_mib": _round(self.used_peak_mib),
            "busy": _round(self.busy, 1),
            "memory_busy": _round(self.memory_busy, 1),
            "sm_clock_mhz": self.sm_clock_mhz and [_round(one) for one in self.sm_clock_mhz],
            "memory_clock_mhz": _round(self.memory_clock_mhz),
            "temperature_c": _round(self.temperature_c),
            "power_w": _round(self.power_w, 1),
            "energy_j": _round(self.energy_j, 1),
            "throttled": {name: round(share, 3) for name, share in self.throttled.items()},
            "power_capped": round(self.power_capped, 3),
            "foreign": [
                {
                    "pid": one.pid,
                    "name": one.name,
                    "mib": _round(one.mib),
                    "busy": _round(one.busy, 1),
                    "compute": one.compute,
                }
                for one in self.foreign
            ],
            "lost": self.lost,
        }


def _round(value: float | None, digits: int = 0) -> float | None:
    if value is None:
        return None
    return round(value, digits) if digits else round(value)


def _shares(one: Foreign) -> str:
    """Return how a process shares the GPU, in words."""
    held = "memory" if one.mib is None else f"{one.mib:.0f} MiB"
    busy = "computes there" if one.busy is None else f"keeps it {one.busy:.0f} % busy"
    return f"{one.name} (pid {one.pid}) holds {held} and {busy}"


@dataclass(slots=True)
class _Sample:
    """What one look at one GPU told."""

    used: float | None
    here: dict[int, Process]
    busy: float | None
    memory_busy: float | None
    sm_clock: float | None
    memory_clock: float | None
    temperature: float | None
    power: float | None
    energy: float | None
    reasons: int | None


@dataclass(slots=True)
class _Record:
    """What has been seen of one GPU; written by the watch's thread, read under its lock."""

    card: Gpu
    device: Any
    board: Any
    began: float
    used_first: float | None
    energy_first: float | None
    used: float | None = None
    used_peak: float | None = None
    energy: float | None = None
    first: float = 0.0
    last: float = 0.0
    samples: int = 0
    busy: list[float] = field(default_factory=list)
    memory_busy: list[float] = field(default_factory=list)
    sm_clock: list[float] = field(default_factory=list)
    memory_clock: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    reasons_told: int = 0
    capped: int = 0
    seen: dict[int, Process] = field(default_factory=dict)
    here: dict[int, Process] = field(default_factory=dict)
    lost: str = ""
    # Percent times seconds by pid, and until when it is known; None where NVML does not tell.
    worked: dict[int, float] = field(default_factory=dict)
    worked_until: float | None = None
    stamp: int = 0
    stamped: float = 0.0


@dataclass(slots=True)
class _Known:
    """What is known of a process."""

    name: str
    exists: bool
    ours: bool
    asked: int
    again: float


class GpuWatch:
    """Samples GPUs in a thread from now on, until it is stopped.

    Never raises for what NVML does. Without GPUs or NVML it sees nothing.

    Args:
        cards: Which GPUs.
        ours: Whether a process is of this run. Asked in the watch's thread when a process is first
            seen, with no lock held; for one that is not, a few times again.
        rate_hz: Samples a second.
    """

    def __init__(
        self, cards: Sequence[Gpu], ours: Callable[[int], bool], rate_hz: float = 10.0
    ) -> None:
        self._ours = ours
        self._period = 1 / rate_hz
        self._lock = threading.Lock()
        self._known: dict[int, _Known] = {}
        # What the processes hold on all GPUs, each time that it changed.
        self._held: list[dict[int, float]] = []
        self._grown_peak = 0.0
        self._looked = 0.0
        self._records = [_begin(card) for card in cards] if cards and nvml() is not None else []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if self._records:
            self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take a last sample and end the thread. Safe to call again."""
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            # A driver that hangs keeps its caller for ever; a daemon thread may be left behind.
            self._thread.join(_STOP_S)

    def uses(self) -> tuple[GpuUse, ...]:
        """Return what each GPU did up to now; empty without NVML."""
        with self._lock:
            return tuple(_use(record, self._known) for record in self._records)

    def peak_mib(self, pids: Collection[int]) -> float | None:
        """Return the most that the processes held together at one time, MiB; None if untold."""
        with self._lock:
            sums = [_sum(held, pids) for held in self._held]
        return max((one for one in sums if one is not None), default=None)

    def grown_mib(self) -> float:
        """Return what more is in use than at the start, by anybody, MiB; never below 0.

        Asked anew while the watch runs, else as of its last sample.
        """
        running = self._thread is not None and self._thread.is_alive()
        used = {}
        if running and not self._end.is_set():
            used = {id(record): read_used(record.device) for record in self._records}
        with self._lock:
            grown = self._grown(used)
            self._grown_peak = max(self._grown_peak, grown)
            return grown

    def grown_peak_mib(self) -> float:
        """Return the most that :meth:`grown_mib` has been."""
        with self._lock:
            return self._grown_peak

    def _grown(self, fresh: Mapping[int, float | None]) -> float:
        total = 0.0
        for record in self._records:
            used = fresh.get(id(record))
            used = record.used if used is None else used
            if used is not None and record.used_first is not None:
                total += used - record.used_first
        return max(total, 0.0)

    def _run(self) -> None:
        try:
            due = time.monotonic()
            last = False
            while not last and any(not record.lost for record in self._records):
                last = self._end.is_set()
                self._tick(last=last)
                due = max(due + self._period, time.monotonic())
                self._end.wait(0 if last else due - time.monotonic())
        except Exception as error:  # noqa: BLE001 - whatever happens here ends no measurement
            with self._lock:
                for record in self._records:
                    record.lost = record.lost or f"{type(error).__name__}: {error}"

    def _tick(self, *, last: bool) -> None:
        """Look at every GPU once, and at the processes there."""
        for record in self._records:
            if not record.lost:
                self._sample(record)
        now = time.monotonic()
        if last or now - self._looked >= _UTILIZATION_S:
            self._looked = now
            for record in self._records:
                if not record.lost:
                    _look_at_work(record, self._lock)
        # Unlocked: whether a process is ours may take a walk through all of them.
        known = self._look_at_processes(now)
        with self._lock:
            self._known.update(known)
            held: dict[int, float] = {}
            for record in self._records:
                for pid, one in record.here.items():
                    if one.mib is not None:
                        held[pid] = held.get(pid, 0.0) + one.mib
            if not self._held or held != self._held[-1]:
                self._held.append(held)
            self._grown_peak = max(self._grown_peak, self._grown({}))

    def _sample(self, record: _Record) -> None:
        try:
            sample = _read(record)
        except UntoldError as error:
            with self._lock:
                record.lost = str(error)
                record.here = {}
            return
        with self._lock:
            _note(record, sample, time.monotonic())

    def _look_at_processes(self, now: float) -> dict[int, _Known]:
        """Return what is to be known of processes that are new, or may turn out to be ours."""
        found: dict[int, _Known] = {}
        for pid in {pid for record in self._records for pid in (*record.seen, *record.worked)}:
            known = self._known.get(pid)
            if known is None:
                found[pid] = _Known(
                    name=process_name(pid),
                    exists=_exists(pid),
                    ours=self._is_ours(pid),
                    asked=1,
                    again=now + _AGAIN_S,
                )
            elif not known.ours and known.asked < _ASKED and now >= known.again:
                # The server in a container is known to be ours only once its engine tells its pid,
                # which may be after it began to use the GPU.
                asked = known.asked + 1
                found[pid] = replace(
                    known,
                    ours=self._is_ours(pid),
                    asked=asked,
                    again=now + _AGAIN_S * 2 ** (asked - 1),
                )
        return found

    def _is_ours(self, pid: int) -> bool:
        with suppress(psutil.Error, OSError, OverflowError):
            return self._ours(pid)
        return False


def _exists(pid: int) -> bool:
    # NVML may name a number that no process can have, which psutil.pid_exists() does not take.
    with suppress(OverflowError):
        return psutil.pid_exists(pid)
    return False


def _begin(card: Gpu) -> _Record:
    device = handle(card.uuid)
    board = handle(card.board)
    now = time.monotonic()
    record = _Record(
        card=card,
        device=device,
        board=board,
        began=now,
        used_first=read_used(device),
        energy_first=None if card.mig else read_energy_j(board),
        lost="" if device is not None and board is not None else "it does not answer",
    )
    record.used = record.used_peak = record.used_first
    record.energy = record.energy_first
    if not record.lost:
        _begin_work(record)
    return record


def _begin_work(record: _Record) -> None:
    """Find where the driver's record of what processes do begins to count."""
    # A GPU's processes are those of all its MIG instances.
    samples = None if record.card.mig else _work(record.board, 0)
    if samples is not None:
        record.stamp = max((one.timeStamp for one in samples), default=0)
        record.stamped = record.worked_until = record.began


def _look_at_work(record: _Record, lock: threading.Lock) -> None:
    """Count what processes did since NVML last told anything of it."""
    if record.worked_until is None:
        return
    samples = _work(record.board, record.stamp)
    now = time.monotonic()
    # Some drivers fill up the list with samples that are none.
    fresh = [one for one in samples or () if one.pid and one.timeStamp > record.stamp]
    most: dict[int, float] = {}
    for one in fresh:
        most[one.pid] = max(most.get(one.pid, 0.0), min(float(one.smUtil), _FULL))
    with lock:
        record.worked_until = now
        if fresh:
            # A sample is the mean since the stamp; a process that did nothing has none.
            for pid, percent in most.items():
                record.worked[pid] = record.worked.get(pid, 0.0) + (now - record.stamped) * percent
            record.stamp = max(one.timeStamp for one in fresh)
            record.stamped = now


def _work(board: Any, stamp: int) -> list[Any] | None:  # noqa: ANN401 - a handle of NVML
    """Return NVML's samples of processes since a time stamp; None if it does not tell any."""
    try:
        return list(call("nvmlDeviceGetProcessUtilization", board, stamp))
    except UntoldError as error:
        return [] if error.code in _NOTHING else None


def _read(record: _Record) -> _Sample:
    """Look at a GPU once.

    Raises:
        UntoldError: If it is gone.
    """
    device, board = record.device, record.board
    rates = _told("nvmlDeviceGetUtilizationRates", board)
    reasons = _told("nvmlDeviceGetCurrentClocksEventReasons", board)
    if reasons is None:
        # The name that drivers before 535 know.
        reasons = _told("nvmlDeviceGetCurrentClocksThrottleReasons", board)
    power = None if record.card.mig else _told("nvmlDeviceGetPowerUsage", board)
    return _Sample(
        used=read_used(device),
        here=read_processes(device),
        busy=None if rates is None else rates.gpu,
        memory_busy=None if rates is None else rates.memory,
        sm_clock=_told("nvmlDeviceGetClockInfo", board, constant("NVML_CLOCK_SM", 1)),
        memory_clock=_told("nvmlDeviceGetClockInfo", board, constant("NVML_CLOCK_MEM", 2)),
        temperature=_told("nvmlDeviceGetTemperature", board, constant("NVML_TEMPERATURE_GPU", 0)),
        power=None if power is None else power / 1000,
        energy=None if record.card.mig else read_energy_j(board),
        reasons=reasons,
    )


def _told(name: str, *args: object) -> Any:  # noqa: ANN401 - whatever NVML tells
    """Return what NVML tells, None if it does not.

    Raises:
        UntoldError: If the GPU is gone.
    """
    try:
        return call(name, *args)
    except UntoldError as error:
        if error.gone:
            raise
        return None


def _note(record: _Record, sample: _Sample, now: float) -> None:
    """Add a sample to what has been seen."""
    record.samples += 1
    record.first = record.first or now
    record.last = now
    if sample.used is not None:
        record.used = sample.used
        record.used_peak = max(record.used_peak or 0.0, sample.used)
    if sample.energy is not None:
        record.energy = sample.energy
    for series, value in (
        (record.busy, sample.busy),
        (record.memory_busy, sample.memory_busy),
        (record.sm_clock, sample.sm_clock),
        (record.memory_clock, sample.memory_clock),
        (record.temperature, sample.temperature),
        (record.power, sample.power),
    ):
        if value is not None:
            series.append(value)
    if sample.reasons is not None:
        record.reasons_told += 1
        record.reasons.update(name for name, (bit, _) in SLOWDOWNS.items() if sample.reasons & bit)
        record.capped += bool(sample.reasons & _SW_POWER_CAP)
    record.here = sample.here
    for pid, one in sample.here.items():
        before = record.seen.get(pid, one)
        sizes = [size for size in (one.mib, before.mib) if size is not None]
        record.seen[pid] = Process(max(sizes, default=None), one.compute or before.compute)


def _sum(held: Mapping[int, float], pids: Collection[int]) -> float | None:
    found = [mib for pid, mib in held.items() if pid in pids]
    return sum(found) if found else None


def _use(record: _Record, known: Mapping[int, _Known]) -> GpuUse:
    span = record.last - record.first
    told = record.reasons_told
    spent = None
    if record.energy is not None and record.energy_first is not None:
        spent = record.energy - record.energy_first
    sm = record.sm_clock
    return GpuUse(
        card=record.card,
        seconds=max(record.last - record.began, 0.0),
        samples=record.samples,
        rate_hz=(record.samples - 1) / span if span > 0 else 0.0,
        used_peak_mib=record.used_peak,
        busy=_mean(record.busy),
        memory_busy=_mean(record.memory_busy),
        sm_clock_mhz=(min(sm), statistics.median(sm), max(sm)) if sm else None,
        memory_clock_mhz=statistics.median(record.memory_clock) if record.memory_clock else None,
        temperature_c=max(record.temperature, default=None),
        power_w=_mean(record.power),
        energy_j=spent,
        throttled={name: record.reasons[name] / told for name in SLOWDOWNS if record.reasons[name]},
        power_capped=record.capped / told if told else 0.0,
        foreign=tuple(_foreign(record, known)),
        lost=record.lost,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _foreign(record: _Record, known: Mapping[int, _Known]) -> Iterator[Foreign]:
    """Yield the processes of others, those that hold most first."""
    seconds = 0.0 if record.worked_until is None else record.worked_until - record.began
    found = []
    for pid in {**record.seen, **record.worked}:
        who = known.get(pid)
        if who is None or who.ours:
            continue
        one = record.seen.get(pid, Process(None, compute=False))
        busy = record.worked.get(pid, 0.0) / seconds if seconds > 0 else None
        found.append(Foreign(pid, who.name, one.mib, busy, one.compute, who.exists))
    yield from sorted(found, key=lambda one: (-(one.mib or 0.0), one.pid))


def energy_j(cards: Iterable[Gpu]) -> float | None:
    """Return what the GPUs have used since their driver was loaded, J.

    None without GPUs, and if one of them does not tell, as a MIG instance: its GPU's energy is
    that of all its instances.
    """
    total = 0.0
    asked = False
    for card in cards:
        used = None if card.mig else read_energy_j(handle(card.uuid))
        if used is None:
            return None
        total, asked = total + used, True
    return total if asked else None


def read_energy_j(device: Any) -> float | None:  # noqa: ANN401 - a handle of NVML
    """Return a GPU's counter of energy, J; None if untold."""
    used = None if device is None else ask("nvmlDeviceGetTotalEnergyConsumption", device)
    return None if used is None else used / 1000
