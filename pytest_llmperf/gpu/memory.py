"""Memory of GPUs: who holds it, how much is free, and whether it is free again."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.gpu.nvml import UntoldError, ask, call, constant, handle

SLACK_MIB = 64.0
"""What the use of a GPU may have grown by after a server: the driver keeps some for the next."""

UNSEEN = "a process that cannot be seen from here"

_FUNCTION_NOT_FOUND = 13
_POLL_S = 0.02
_LOOKS = 5
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that a process holds on a GPU, MiB; 0 where NVML does not tell how much."""

    gpu: int
    pid: int
    mib: float


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a GPU.

    Attributes:
        mib: What it holds there, MiB; None if untold.
        compute: Whether it computes; otherwise it draws.
    """

    mib: float | None
    compute: bool


def vram_mib(pids: Collection[int]) -> dict[int, float]:
    """Return MiB that the processes hold, by GPU index; only GPUs where they hold any.

    NVML names host processes. In a container with a PID namespace of its own they match no pid
    seen inside; then the result is empty, which is "not known", never "none".
    """
    held: dict[int, float] = {}
    for card in gpus():
        mine = processes(card.uuid)
        used = sum(one.mib or 0.0 for pid, one in mine.items() if pid in pids)
        if used:
            held[card.index] = held.get(card.index, 0.0) + used
    return held


def free_mib() -> dict[int, float]:
    """Return the free memory of each visible GPU in MiB, by index; only of those that tell it."""
    told = {card.index: _info(handle(card.uuid)) for card in gpus()}
    return {index: memory.free / _MIB for index, memory in told.items() if memory is not None}


def holders() -> list[Held]:
    """Return the processes that NVML knows to hold memory on a visible GPU."""
    return [
        Held(card.index, pid, one.mib or 0.0)
        for card in gpus()
        for pid, one in processes(card.uuid).items()
    ]


def processes(uuid: str) -> dict[int, Process]:
    """Return the processes that NVML names on a GPU, by pid; empty if it is gone."""
    device = handle(uuid)
    if device is None:
        return {}
    with suppress(UntoldError):
        return read_processes(device)
    return {}


def read_processes(device: Any) -> dict[int, Process]:  # noqa: ANN401 - a handle of NVML
    """Return the processes on a GPU; those of a kind that NVML does not tell are left out.

    Raises:
        UntoldError: If the GPU is gone.
    """
    found: dict[int, Process] = {}
    for name, compute in (
        ("nvmlDeviceGetComputeRunningProcesses", True),
        ("nvmlDeviceGetGraphicsRunningProcesses", False),
    ):
        try:
            running = _running(name, device)
        except UntoldError as error:
            if error.gone:
                raise
            continue
        for one in running:
            mib = None if one.usedGpuMemory is None else one.usedGpuMemory / _MIB
            before = found.get(one.pid)
            if before is not None:
                # One that computes and draws is in both lists, with all of its memory in each.
                known = [size for size in (mib, before.mib) if size is not None]
                mib = max(known) if known else None
            found[one.pid] = Process(mib, compute or (before is not None and before.compute))
    return found


def _running(name: str, device: Any) -> list[Any]:  # noqa: ANN401 - as above
    try:
        return list(call(name, device))
    except UntoldError as error:
        if error.code != _FUNCTION_NOT_FOUND:
            raise
    # Drivers before 510 have the second version of these functions only.
    return list(call(f"{name}_v2", device))


def read_used(device: Any) -> float | None:  # noqa: ANN401 - as above
    """Return MiB in use on a GPU, without the driver's own; None if untold."""
    if device is None:
        return None
    memory = ask("nvmlDeviceGetMemoryInfo", device, constant("nvmlMemory_v2", 0x02000028))
    memory = _info(device) if memory is None else memory
    return None if memory is None else float(memory.used / _MIB)


def _info(device: Any) -> Any | None:  # noqa: ANN401 - as above
    # Not supported where CPU and GPU share one memory.
    return None if device is None else ask("nvmlDeviceGetMemoryInfo", device)


def process_name(pid: int) -> str:
    """Return the name of a process, for people."""
    with suppress(psutil.Error):
        return psutil.Process(pid).name()
    return UNSEEN


class Release:
    """Memory of the GPUs before a server starts, to be waited for after it ended.

    Make it before the server starts.

    Args:
        cards: The GPUs that the server may use.
    """

    def __init__(self, cards: Sequence[Gpu]) -> None:
        self._cards = tuple(cards)
        self._before = {card.uuid: _unnamed_before(card) for card in self._cards}

    def wait(
        self,
        pids: Collection[int],
        timeout: float = 15.0,
        progress: Callable[[str], None] | None = None,
        *,
        alone: bool = True,
    ) -> str:
        """Wait until the server's memory is free.

        It is once NVML names none of the processes any more and what no named process holds is
        back to what it was, within :data:`SLACK_MIB`. Where NVML does not tell sizes and names
        other processes, only the names count: what is not known is no leak.

        Args:
            pids: The server's processes, all of which have ended.
            timeout: Seconds to wait at most.
            progress: Is told what is waited for.
            alone: Whether no other server of ours runs there, which NVML may not name: beside one
                only the names count.

        Returns:
            ``""``, or what is not free, in words: GPU, MiB, and who holds it.
        """
        deadline = time.monotonic() + timeout
        said = ""
        while True:
            leaks = [told for card in self._cards if (told := self._leak(card, pids, alone=alone))]
            if not leaks or time.monotonic() >= deadline:
                return "; ".join(leaks)
            if progress is not None and leaks[0] != said:
                said = leaks[0]
                progress(f"waiting for GPU memory to be free: {said}")
            time.sleep(_POLL_S)

    def _leak(self, card: Gpu, pids: Collection[int], *, alone: bool) -> str:
        """Return what is not free on a GPU, in words, or ``""``."""
        here, used = processes(card.uuid), read_used(handle(card.uuid))
        ours = {pid: one for pid, one in here.items() if pid in pids}
        if ours:
            told = ", ".join(
                f"{process_name(pid)} (pid {pid}) still holds "
                + ("memory" if one.mib is None else f"{one.mib:.0f} MiB")
                for pid, one in ours.items()
            )
            return f"GPU {card.index}: {told}"
        if not alone:
            return ""
        before, now = self._before[card.uuid], _unnamed(here, used)
        if before is None or now is None or now - before <= SLACK_MIB:
            return ""
        others = ", ".join(f"{process_name(pid)} (pid {pid})" for pid in here)
        beside = f", beside what {others} may hold" if others else ""
        return (
            f"GPU {card.index}: {now - before:.0f} MiB more in use than before, by no process that "
            f"NVML names{beside}"
        )


def _unnamed_before(card: Gpu) -> float | None:
    """Return :func:`_unnamed` of one moment, though a GPU is asked twice for it."""
    here = processes(card.uuid)
    for _ in range(_LOOKS):
        before, used = here, read_used(handle(card.uuid))
        here = processes(card.uuid)
        if here == before:
            return _unnamed(here, used)
    return None


def _unnamed(here: Mapping[int, Process], used: float | None) -> float | None:
    """Return MiB in use that no process is named for; None if that cannot be known."""
    named = [one.mib for one in here.values()]
    if used is None or None in named:
        return None
    return used - sum(size for size in named if size is not None)
