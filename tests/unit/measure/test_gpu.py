"""GPUs by NVML, with a stand-in for the driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf.measure import gpu
from pytest_llmperf.measure.gpu import Gpu, Held, free_mib, gpus, holders, vram_mib

MIB = 1024 * 1024


class NVMLError(Exception):
    """As in pynvml."""


@dataclass
class Card:
    """A GPU of the fake driver; memory in MiB."""

    name: str | bytes
    total: int
    free: int
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    shares_memory: bool = False
    tells_processes: bool = True


def fake_pynvml(cards: list[Card], *, driver: str | bytes = "580.1") -> ModuleType:
    """A module ``pynvml`` of a machine with these cards."""

    def memory(card: Card) -> SimpleNamespace:
        if card.shares_memory:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=card.total * MIB, free=card.free * MIB)

    def running(card: Card) -> list[SimpleNamespace]:
        if not card.tells_processes:
            raise NVMLError("Insufficient Permissions")
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if used is None else used * MIB)
            for pid, used in card.processes
        ]

    functions: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: driver,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetName": lambda card: card.name,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetComputeRunningProcesses": running,
        "nvmlDeviceGetGraphicsRunningProcesses": running,
    }
    module = ModuleType("pynvml")
    vars(module).update(functions)
    return module


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """What a test finds is not remembered by the next, nor by this machine's own tests."""
    gpu._nvml.cache_clear()
    gpu.gpus.cache_clear()
    yield
    gpu._nvml.cache_clear()
    gpu.gpus.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Put a fake ``pynvml`` in place of the real one."""
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver means no GPU and no memory, not an error."""
    module = fake_pynvml([])

    def fail() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(module, "nvmlInit", fail)
    install(monkeypatch, module)
    assert gpus() == ()
    assert vram_mib([1]) == {}
    assert free_mib() == {}


@pytest.mark.parametrize("as_bytes", [False, True])
def test_gpus_are_told_in_order(monkeypatch: pytest.MonkeyPatch, *, as_bytes: bool) -> None:
    """Name, whole MiB and driver, whether the driver's texts are bytes or not."""
    first: str | bytes = b"NVIDIA GeForce RTX 5080" if as_bytes else "NVIDIA GeForce RTX 5080"
    driver: str | bytes = b"580.1" if as_bytes else "580.1"
    cards = [Card(first, 16303, 15000), Card("NVIDIA H200", 143771, 143000)]
    install(monkeypatch, fake_pynvml(cards, driver=driver))
    assert gpus() == (
        Gpu(0, "NVIDIA GeForce RTX 5080", 16303, "580.1"),
        Gpu(1, "NVIDIA H200", 143771, "580.1"),
    )
    assert free_mib() == {0: 15000.0, 1: 143000.0}


def test_memory_is_summed_over_the_processes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes and GPUs without any of ours do not count."""
    cards = [
        Card("A", 1000, 10, [(7, 100), (8, 50), (9, 999)]),
        Card("B", 1000, 10, [(9, 999)]),
        Card("C", 1000, 10, [(8, 25)]),
    ]
    install(monkeypatch, fake_pynvml(cards))
    assert vram_mib({7, 8}) == {0: 150.0, 2: 25.0}
    assert vram_mib({1}) == {}


def test_what_the_driver_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that names no processes, or no memory of theirs, is left out."""
    cards = [
        Card("A", 1000, 10, [(7, None)]),
        Card("B", 1000, 10, [(7, 100)], tells_processes=False),
    ]
    install(monkeypatch, fake_pynvml(cards))
    assert vram_mib([7]) == {}


def test_a_gpu_that_shares_the_cpus_memory_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVML has no memory to tell, the size is 0 and nothing is said of free memory."""
    cards = [Card("NVIDIA GB10", 0, 0, shares_memory=True)]
    install(monkeypatch, fake_pynvml(cards))
    assert gpus() == (Gpu(0, "NVIDIA GB10", 0, "580.1"),)
    assert free_mib() == {}


def test_holders_are_all_processes_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once a GPU, though it computes and draws; how much it holds may not be told."""
    cards = [
        Card("A", 1000, 10, [(7, 100), (8, None)]),
        Card("B", 1000, 10, [(7, 100)], tells_processes=False),
    ]
    install(monkeypatch, fake_pynvml(cards))
    assert holders() == [Held(0, 7, 100.0), Held(0, 8, 0.0)]
