"""GPUs by NVML: which there are, and how much memory a process tree holds on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML tells it; ``total_mib`` in MiB, 0 for one that shares the CPU's memory."""

    index: int
    name: str
    total_mib: int
    driver: str


@cache
def _nvml() -> Any | None:  # noqa: ANN401 - a module without types
    """Return the loaded ``pynvml``, or None where there is no driver to talk to."""
    # Imported here: loading the driver's library is not free, and most machines have none.
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _memory(nvml: Any, index: int) -> Any | None:  # noqa: ANN401 - as above
    try:
        return nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index))
    except nvml.NVMLError:
        # Not supported where CPU and GPU share one memory.
        return None


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs NVML knows, in NVML's order; empty where there are none."""
    nvml = _nvml()
    if nvml is None:
        return ()
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = _memory(nvml, index)
        found.append(
            Gpu(
                index=index,
                name=_text(nvml.nvmlDeviceGetName(handle)),
                total_mib=0 if memory is None else memory.total // _MIB,
                driver=driver,
            )
        )
    return tuple(found)


def vram_mib(pids: Collection[int]) -> dict[int, float]:
    """Return MiB that the processes hold, by GPU index; only GPUs where they hold any.

    NVML names host processes. In a container with a PID namespace of its own they match no pid
    seen inside; then the result is empty, which is "not known", never "none".
    """
    nvml = _nvml()
    held: dict[int, float] = {}
    if nvml is None:
        return held
    for gpu in gpus():
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError:
            continue
        used = sum(p.usedGpuMemory or 0 for p in running if p.pid in pids)
        if used:
            held[gpu.index] = used / _MIB
    return held


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that a process holds on a GPU, MiB; 0 where NVML does not tell how much."""

    gpu: int
    pid: int
    mib: float


def holders() -> list[Held]:
    """Return the processes that NVML knows to hold memory on a GPU, by compute or graphics."""
    nvml = _nvml()
    found: dict[tuple[int, int], Held] = {}
    if nvml is None:
        return []
    for gpu in gpus():
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
        for ask in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            try:
                running = ask(handle)
            except nvml.NVMLError:
                continue
            for one in running:
                held = Held(gpu.index, one.pid, (one.usedGpuMemory or 0) / _MIB)
                found.setdefault((gpu.index, one.pid), held)
    return list(found.values())


def free_mib() -> dict[int, float]:
    """Return the free memory of each GPU in MiB, by index; only GPUs with memory of their own."""
    nvml = _nvml()
    if nvml is None:
        return {}
    told = {gpu.index: _memory(nvml, gpu.index) for gpu in gpus()}
    return {index: memory.free / _MIB for index, memory in told.items() if memory is not None}
