"""A stand-in for ``pynvml`` whose GPUs do what a test says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf.gpu import cards as cards_module
from pytest_llmperf.gpu import nvml as nvml_module

MIB = 1024 * 1024

WORDS = {
    0: "Success",
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    9: "Driver Not Loaded",
    12: "NVML Shared Library Not Found",
    13: "Function Not Found",
    15: "GPU is lost",
    18: "RM has detected an NVML/RM version mismatch.",
    999: "Unknown Error",
}
"""Return codes and what NVML says of them."""


class NVMLError(Exception):
    """As in pynvml: raised by code."""

    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(WORDS[value])


class NVMLLibraryMismatchError(Exception):
    """As in pynvml: no child of NVMLError."""


@dataclass
class Task:
    """A process on a GPU.

    Attributes:
        pid: Its id.
        mib: What it holds; None where NVML does not tell.
        compute: Whether it is in the list of those that compute.
        draws: Whether it is in the list of those that draw.
    """

    pid: int
    mib: float | None
    compute: bool = True
    draws: bool = False


@dataclass
class Work:
    """A sample of what a process does: microseconds, and percent of the SMs."""

    pid: int
    stamp: int
    percent: int


@dataclass
class Card:
    """A GPU of the fake driver, or a MIG instance; whatever is None is not supported.

    A function in ``failing`` fails with its code; ``lost`` fails them all.
    """

    uuid: str = "GPU-1"
    name: str | bytes = "NVIDIA H200"
    total: float | None = 1000.0
    used: float = 0.0
    reserved: float = 0.0
    tasks: list[Task] = field(default_factory=list)
    work: list[Work] | None = None
    limit_mw: int | None = None
    persistence: int | None = None
    memory_clock: int | None = None
    bus_width: int | None = None
    rates: tuple[int, int] | None = None
    sm_clock: int | None = None
    temperature: int | None = None
    power_mw: int | None = None
    energy_mj: int | None = None
    reasons: int | None = None
    instances: list[Card | None] | None = None
    slices: tuple[int, int] = (0, 0)
    failing: dict[str, int] = field(default_factory=dict)
    lost: int | None = None
    on_memory: Callable[[Card], None] | None = None
    """Called each time the memory is asked for, to change what comes."""

    def hold(self, *tasks: Task, beside: float = 0.0) -> None:
        """Let just these processes be there, and ``beside`` MiB be in use by nobody."""
        self.tasks = list(tasks)
        self.used = sum(task.mib or 0.0 for task in tasks) + beside


def _value(value: object) -> Any:  # noqa: ANN401 - as NVML's functions
    if value is None:
        raise NVMLError(3)
    return value


class Driver:
    """A machine's GPUs behind the functions of ``pynvml`` that the package uses.

    Args:
        cards: The GPUs, in NVML's order.
        version: Of the driver.
        start: Code with which NVML does not start; None if it does.
        newest: Whether the driver knows the newer functions.
    """

    def __init__(
        self,
        *cards: Card,
        version: str | bytes = "580.1",
        start: int | None = None,
        newest: bool = True,
    ) -> None:
        self.cards = list(cards)
        self.version = version
        self.start = start
        self.newest = newest
        self.asked: list[str] = []

    def module(self) -> ModuleType:
        """Return it as a module."""
        module = ModuleType("pynvml")
        vars(module).update(
            NVMLError=NVMLError,
            NVMLLibraryMismatchError=NVMLLibraryMismatchError,
            NVML_DEVICE_MIG_ENABLE=1,
            NVML_CLOCK_SM=1,
            NVML_CLOCK_MEM=2,
            NVML_TEMPERATURE_GPU=0,
            nvmlMemory_v2=0x02000028,
            nvmlInit=self._init,
            nvmlSystemGetDriverVersion=lambda: self.version,
            nvmlDeviceGetCount=lambda: len(self.cards),
            nvmlDeviceGetHandleByIndex=self._by_index,
            nvmlDeviceGetHandleByUUID=self._by_uuid,
        )
        functions: dict[str, Callable[..., object]] = {
            "nvmlDeviceGetUUID": lambda card: card.uuid,
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetMemoryInfo": self._memory,
            "nvmlDeviceGetComputeRunningProcesses": lambda card: self._newer(card, "compute"),
            "nvmlDeviceGetGraphicsRunningProcesses": lambda card: self._newer(card, "draws"),
            "nvmlDeviceGetComputeRunningProcesses_v2": lambda card: _list(card, "compute"),
            "nvmlDeviceGetGraphicsRunningProcesses_v2": lambda card: _list(card, "draws"),
            "nvmlDeviceGetPowerManagementLimit": lambda card: _value(card.limit_mw),
            "nvmlDeviceGetPersistenceMode": lambda card: _value(card.persistence),
            "nvmlDeviceGetMaxClockInfo": lambda card, _kind: _value(card.memory_clock),
            "nvmlDeviceGetMemoryBusWidth": lambda card: _value(card.bus_width),
            "nvmlDeviceGetMigMode": lambda card: [int(_value(card.instances) is not None)] * 2,
            "nvmlDeviceGetMaxMigDeviceCount": lambda card: len(_value(card.instances)),
            "nvmlDeviceGetMigDeviceHandleByIndex": _instance,
            "nvmlDeviceGetGpuInstanceId": lambda card: card.slices[0],
            "nvmlDeviceGetComputeInstanceId": lambda card: card.slices[1],
            "nvmlDeviceGetUtilizationRates": lambda card: SimpleNamespace(
                gpu=_value(card.rates)[0], memory=_value(card.rates)[1]
            ),
            "nvmlDeviceGetClockInfo": lambda card, kind: _value(
                card.sm_clock if kind == 1 else card.memory_clock
            ),
            "nvmlDeviceGetTemperature": lambda card, _sensor: _value(card.temperature),
            "nvmlDeviceGetPowerUsage": lambda card: _value(card.power_mw),
            "nvmlDeviceGetTotalEnergyConsumption": lambda card: _value(card.energy_mj),
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda card: _value(card.reasons),
            "nvmlDeviceGetCurrentClocksEventReasons": self._event_reasons,
            "nvmlDeviceGetProcessUtilization": _work,
        }
        for name, function in functions.items():
            setattr(module, name, self._guarded(name, function))
        return module

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the package find this driver; what it remembers of another is forgotten."""
        module = self.module()
        monkeypatch.setattr(nvml_module, "_load", lambda: module)
        forget()

    def _init(self) -> None:
        if self.start is not None:
            raise NVMLError(self.start)

    def _guarded(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def guarded(card: Card, *args: object) -> object:
            self.asked.append(name)
            if card.lost is not None:
                raise NVMLError(card.lost)
            if name in card.failing:
                raise NVMLError(card.failing[name])
            return function(card, *args)

        return guarded

    def _by_index(self, index: int) -> Card:
        card = self.cards[index]
        if card.lost is not None:
            raise NVMLError(card.lost)
        return card

    def _by_uuid(self, uuid: str) -> Card:
        for card in self.cards:
            for one in (card, *(card.instances or ())):
                if one is not None and one.uuid == uuid:
                    return self._by_index(self.cards.index(card)) if one is card else one
        raise NVMLError(6)

    def _memory(self, card: Card, version: int | None = None) -> SimpleNamespace:
        if version is not None and not self.newest:
            raise NVMLError(13)
        if card.on_memory is not None:
            card.on_memory(card)
        total = _value(card.total)
        # The first version counts what the driver keeps for itself as used.
        used = card.used if version is not None else card.used + card.reserved
        free = total - card.used - card.reserved
        return SimpleNamespace(total=int(total * MIB), used=int(used * MIB), free=int(free * MIB))

    def _newer(self, card: Card, kind: str) -> list[SimpleNamespace]:
        if not self.newest:
            raise NVMLError(13)
        return _list(card, kind)

    def _event_reasons(self, card: Card) -> int:
        if not self.newest:
            raise NVMLError(13)
        return int(_value(card.reasons))


def forget() -> None:
    """Forget what was found of this machine's GPUs."""
    for remembered in (
        nvml_module._start,
        nvml_module.status,
        nvml_module.cards_found,
        cards_module.all_gpus,
        cards_module.gpus,
    ):
        # A test may have put another in its place.
        with suppress(AttributeError):
            remembered.cache_clear()


def _list(card: Card, kind: str) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            pid=task.pid, usedGpuMemory=None if task.mib is None else int(task.mib * MIB)
        )
        for task in card.tasks
        if getattr(task, kind)
    ]


def _instance(card: Card, place: int) -> Card:
    instance = _value(card.instances)[place]
    if instance is None:
        raise NVMLError(6)
    assert isinstance(instance, Card)
    return instance


def _work(card: Card, stamp: int) -> list[SimpleNamespace]:
    found = [
        SimpleNamespace(pid=one.pid, timeStamp=one.stamp, smUtil=one.percent)
        for one in _value(card.work)
        if one.stamp > stamp or one.stamp == 0
    ]
    if not found:
        raise NVMLError(6)
    return found
